"""``delineate worker``: compute for a server on another machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import Device, Engine, Json, Precision, Threads
from delineate.cli.servers import check_there, log_as_servers_do, serving


def worker(
    bundles: Annotated[
        list[Path],
        typer.Argument(metavar="BUNDLE", help="Runs, bundles or installed models, the same as the server offers."),
    ],
    key: Annotated[
        Path, typer.Option("--key", help="Use this key file, from `delineate keys add NAME --role worker`.")
    ],
    state: Annotated[
        Path | None,
        typer.Option("--state", help="Keep jobs under way in this folder (default: ~/.local/share/delineate/worker)."),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: Engine = "torch",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Compute for a server on another machine, until Ctrl-C or SIGTERM. It connects to the server, never the reverse.

    If the server is away, the worker waits for it. What a worker has not finished when it stops, another one does.
    """
    with serving():
        from delineate.serving.server import serve_elsewhere
        from delineate.serving.settings import WorkerSettings

    from delineate.cli.terminal import Terminal, print_json
    from delineate.installed import resolved
    from delineate.serving.places import data_folder

    check_there(device)
    settings = WorkerSettings(
        state=(state or data_folder() / "worker").absolute(),
        key=key,
        bundles=tuple(resolved(bundle).absolute() for bundle in bundles),
        device=device,
        precision=precision,
        engine=engine,
        threads=threads,
    )
    log_as_servers_do()

    def ready() -> None:
        if json:
            print_json({"ready": True, "pid": os.getpid()})
        else:
            typer.echo("ready; Ctrl-C stops")
        sys.stdout.flush()

    with Terminal() as terminal:
        serve_elsewhere(settings, ready)
        terminal.say("stopped; what was not done goes to another worker")
