"""The command line: a command parses, calls one function, prints. Heavy imports wait for the command."""

from __future__ import annotations

import errno
import os
import signal
import sys
from contextlib import suppress
from itertools import takewhile
from types import FrameType

from delineate.cli import started  # noqa: F401 - from here on time is counted

PIPE_CLOSED = 128 + 13
"""Exit status if whoever reads the output closes it, as ``| head`` does; the signal is SIGPIPE."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def main() -> None:
    """Entry point of ``delineate``.

    Exit status 0 done, 1 the work failed, 2 wrong usage or recipe, 130, 141 and 143 by signals. With ``--json`` an
    error is JSON on standard output, ``{"error": {"code": …, "message": …, "fix": …}}``, as well as a line on standard
    error.
    """
    from delineate.cli.terminal import guard

    _listen()
    guard()
    try:
        try:
            _run(as_json="--json" in takewhile(lambda argument: argument != "--", sys.argv[1:]))
        finally:
            sys.stdout.flush()
    except (BrokenPipeError, SystemExit) as end:
        # Typer and rich turn a closed pipe into their own exit status.
        if not isinstance(end, BrokenPipeError) and not isinstance(end.__context__, BrokenPipeError):
            raise
        _forget_what_is_left(sys.stdout)
        sys.exit(PIPE_CLOSED)


def _run(*, as_json: bool) -> None:
    from typer import TyperException

    from delineate.cli.app import app
    from delineate.cli.terminal import print_error
    from delineate.errors import DelineateError, OutputError, RecipeError

    try:
        # Typer prints wrong usage itself, but not as JSON.
        sys.exit(app(prog_name="delineate", standalone_mode=not as_json))
    except TyperException as error:
        print_error(error, "E_USAGE", error.format_message(), as_json=as_json)
        sys.exit(error.exit_code)
    except DelineateError as error:
        print_error(error, error.code, error.message, getattr(error, "fix", ""), as_json=as_json)
        sys.exit(2 if isinstance(error, RecipeError) else 1)
    except OSError as error:
        # Raised by other libraries' writers, such as the compiler's cache.
        if error.errno not in _FULL:
            raise
        where = f"'{os.fspath(error.filename)}'" if error.filename else "a file"
        full = OutputError(
            f"{where} cannot be written: {error.strerror}", fix="free some space, or choose another disk"
        )
        print_error(full, full.code, full.message, full.fix, as_json=as_json)
        sys.exit(1)
    except SystemExit as end:
        if end.code == 128 + signal.SIGINT:
            print("interrupted", file=sys.stderr)
        raise


def _forget_what_is_left(stream: object) -> None:
    """Let the interpreter flush its buffers into nothing at exit, rather than complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # type: ignore[attr-defined]


def _listen() -> None:
    """Let Ctrl-C and SIGTERM unwind, so that nothing is left half written; training finishes its step first."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where a shell has it ignored
        signal.signal(signal.SIGINT, _end)
    if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _end)


def _end(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)
