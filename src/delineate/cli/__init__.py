"""The command line: a command parses, calls one function, prints. Heavy imports wait for the command."""

from __future__ import annotations

import sys


def main() -> None:
    """Entry point of ``delineate``: exit status 0 done, 1 the work failed, 2 wrong usage."""
    from delineate.cli.app import app
    from delineate.cli.terminal import guard
    from delineate.errors import DelineateError, RecipeError

    guard()
    try:
        app(prog_name="delineate")
    except DelineateError as error:
        print(f"error {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, RecipeError) else 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
