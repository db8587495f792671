"""The command line: a command parses, calls one function, prints. Heavy imports wait for the command."""

from __future__ import annotations

import errno
import os
import signal
import sys
from types import FrameType

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Entry point of ``delineate``: exit status 0 done, 1 the work failed, 2 wrong usage, 130 and 143 by signals."""
    from delineate.cli.app import app
    from delineate.cli.terminal import guard
    from delineate.errors import DelineateError, OutputError, RecipeError

    _listen()
    guard()
    try:
        app(prog_name="delineate")
    except DelineateError as error:
        print(f"error {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)
    except OSError as error:
        # Of writers that are not ours, such as the compiler's cache.
        if error.errno not in _FULL:
            raise
        where = f"'{os.fspath(error.filename)}'" if error.filename else "a file"
        full = OutputError(
            f"{where} cannot be written: {error.strerror}", fix="free some space, or choose another disk"
        )
        print(f"error {full}", file=sys.stderr)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            print("interrupted", file=sys.stderr)
        raise


def _listen() -> None:
    """Let Ctrl-C and SIGTERM unwind, so that nothing half-written stays; a training waits for its step first."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _end)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
