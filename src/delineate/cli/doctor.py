"""``delineate doctor``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import Json
from delineate.cli.servers import Key, serving


def doctor(
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Check the server of this folder (default: ~/.local/share/delineate/server)."),
    ] = None,
    key: Key = None,
    json: Json = False,
) -> None:
    """Check the server on this machine and the way to the server of your key, and say how to fix what is wrong."""
    with serving():
        from delineate.serving.doctor import examine

    from dataclasses import asdict

    from delineate.cli.terminal import print_json

    found = []
    for finding in examine(state, key):
        found.append(finding)
        if not json:
            fix = f"; {finding.fix}" if finding.fix else ""
            typer.echo(f"{finding.verdict:<5}  {finding.what}: {finding.found}{fix}")
    if json:
        print_json({"findings": [asdict(finding) for finding in found]})
    if any(finding.verdict == "wrong" for finding in found):
        raise typer.Exit(1)
