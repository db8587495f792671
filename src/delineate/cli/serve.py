"""``delineate serve``."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated

import typer

from delineate.cli.options import Device, Engine, Json, Precision, Threads
from delineate.cli.servers import State, check_there, log_as_servers_do, serving

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delineate.serving.protocol import Model
    from delineate.serving.settings import Address, Settings


def serve(
    bundles: Annotated[
        list[str],
        typer.Argument(
            metavar="BUNDLE",
            help="Runs, bundles or installed models to offer, each by the name of its folder; NAME=FOLDER gives "
            "another name.",
        ),
    ],
    bind: Annotated[
        str,
        typer.Option("--bind", help="Listen at this address; tcp://0.0.0.0:7420 is open to other machines, with keys."),
    ] = "tcp://127.0.0.1:7420",
    http: Annotated[
        str, typer.Option("--http", help="Listen for HTTP as well, such as at 127.0.0.1:8420 (default: not at all).")
    ] = "",
    state: State = None,
    device: Device = "auto",
    precision: Precision = "auto",
    engine: Engine = "torch",
    threads: Threads = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            max=64,
            help="Run this many workers on this machine, on the same device (default: 1, or 0 with --ray).",
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray",
            help="Run workers as replicas on the ray cluster at ray://HOST:PORT, as many as there are jobs; "
            "local starts a ray on this machine.",
        ),
    ] = None,
    replicas_at_least: Annotated[
        int | None,
        typer.Option("--replicas-at-least", min=0, max=1024, help="Keep this many replicas, even idle (default: 1)."),
    ] = None,
    replicas_at_most: Annotated[
        int | None,
        typer.Option(
            "--replicas-at-most",
            min=1,
            max=1024,
            help="Run at most this many replicas (default: as many as the cluster has room for).",
        ),
    ] = None,
    cpus_a_replica: Annotated[
        int | None,
        typer.Option("--cpus-a-replica", min=1, max=1024, help="Use this many CPUs for each replica (default: 1)."),
    ] = None,
    gpus_a_replica: Annotated[
        float | None,
        typer.Option(
            "--gpus-a-replica",
            min=0,
            max=64,
            help="Use this many GPUs for each replica, such as 0.5 (default: 1, or 0 if the cluster has none).",
        ),
    ] = None,
    memory_gb_a_replica: Annotated[
        float | None,
        typer.Option(
            "--memory-gb-a-replica",
            min=0,
            max=10_000,
            help="Hold this much memory for each replica, in GB (default: 0).",
        ),
    ] = None,
    reach: Annotated[
        str | None,
        typer.Option(
            "--reach",
            help="Name the address at which the cluster's nodes find this server: tcp://HOST:7420 (default: --bind).",
        ),
    ] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Use no keys: every user of this machine may send scans and see all jobs.")
    ] = False,
    queue: Annotated[
        int, typer.Option("--queue", min=1, max=100_000, help="Let this many jobs wait; refuse more until later.")
    ] = 32,
    spool_gb: Annotated[
        float, typer.Option("--spool-gb", min=0.01, max=1e6, help="Keep at most this many GB of scans and results.")
    ] = 20.0,
    disk_percent: Annotated[
        float,
        typer.Option("--disk-percent", min=0, max=100, help="Refuse scans that would fill the disk beyond this."),
    ] = 75.0,
    drain_s: Annotated[
        float,
        typer.Option("--drain-s", min=0, max=86_400, help="Finish running jobs for at most this long when stopped."),
    ] = 60.0,
    keep_hours: Annotated[
        float,
        typer.Option("--keep-hours", min=0.01, max=8760, help="Keep results that nobody fetches for this long."),
    ] = 24.0,
    json: Json = False,
) -> None:
    """Offer trained networks to this machine or the network, until Ctrl-C or SIGTERM. Not for diagnosis.

    A scan sent with `delineate send` comes back segmented on its own grid. A bundle that is replaced by a better one is
    taken up while the server runs. What was accepted is not lost when the server stops: start it again to finish.
    """
    with serving():
        from delineate.serving.engine import Limits
        from delineate.serving.front_door import check_bind
        from delineate.serving.models import offered
        from delineate.serving.places import state_folder
        from delineate.serving.server import Server
        from delineate.serving.settings import Settings

        if http:
            import fastapi  # noqa: F401
            import prometheus_client  # noqa: F401
            import uvicorn  # noqa: F401

    from delineate.cli.terminal import Terminal, print_json

    check_there(device)
    asked = {
        "--replicas-at-least": replicas_at_least,
        "--replicas-at-most": replicas_at_most,
        "--cpus-a-replica": cpus_a_replica,
        "--gpus-a-replica": gpus_a_replica,
        "--memory-gb-a-replica": memory_gb_a_replica,
        "--reach": reach,
    }
    replicas = None
    if ray is not None:
        from delineate.cluster import Request
        from delineate.serving.settings import Replicas

        request = Request(cpus_a_replica or 1, gpus_a_replica, memory_gb_a_replica or 0.0)
        least = 1 if replicas_at_least is None else replicas_at_least
        replicas = Replicas(ray, request, least, replicas_at_most, reach=reach or "")
    for option, value in asked.items():
        if ray is None and value is not None:
            raise typer.BadParameter(f"{option} needs --ray")
    settings = Settings(
        state=(state or state_folder()).absolute(),
        bundles=_named(bundles),
        bind=bind,
        http=http,
        plain=plain,
        limits=Limits(queue, spool_bytes=int(spool_gb * 1e9), disk_share=disk_percent / 100, keep_s=keep_hours * 3600),
        workers=(0 if ray else 1) if workers is None else workers,
        device=device,
        precision=precision,
        engine=engine,
        threads=threads,
        drain_s=drain_s,
        replicas=replicas,
    )
    for address in filter(None, (bind, f"tcp://{http}" if http else "")):
        check_bind(address, plain=plain)
    log_as_servers_do()
    server = Server(settings)

    def ready(address: Address) -> None:
        models = list(offered(settings.models).values())
        if json:
            found = [{"name": model.name, "sha256": model.sha256, "channels": list(model.channels)} for model in models]
            print_json({"address": address.zmq, "http": address.http, "state": str(settings.state), "models": found})
        else:
            for line in _announced(settings, address, models):
                typer.echo(line)
        sys.stdout.flush()

    with Terminal() as terminal:
        server.run(ready)
        terminal.say("stopped; what was accepted and is not done waits for the next start")


def _named(texts: Sequence[str]) -> dict[str, Path]:
    """Bundles by name, from folders, installed models and ``NAME=FOLDER``."""
    from delineate.installed import resolved

    named: dict[str, Path] = {}
    for text in texts:
        name, equals, rest = ("", "", "") if Path(text).exists() else text.partition("=")
        given = Path(rest if equals else text)
        folder = resolved(given).absolute()
        if not equals:
            named_by = given.absolute()
            name = named_by.parent.name if named_by.name == "bundle" else named_by.name
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
            raise typer.BadParameter(
                f"'{name}' cannot be a model's name; write NAME=FOLDER, with letters, digits, . _ -"
            )
        if name in named:
            raise typer.BadParameter(f"two bundles are called '{name}'; write NAME=FOLDER for one of them")
        named[name] = folder
    return named


def _announced(settings: Settings, address: Address, models: Sequence[Model]) -> list[str]:
    """What to type on this machine, and what to do for others."""
    from delineate.serving.front_door import is_loopback
    from delineate.serving.places import EVERYWHERE, FIRST, find_key, host_of, state_folder
    from delineate.serving.spool import disk_used

    names = ", ".join(model.name for model in models)
    lines = [f"serving {names} at {address.zmq}" + (f" and http://{address.http}" if address.http else "")]
    own = settings.state / f"{FIRST}.key"
    here = "" if settings.state == state_folder().absolute() else f" --state {quote(str(settings.state))}"
    if own.exists():
        channels = models[0].channels
        scans = ["scan.nii.gz"] if len(channels) == 1 else [f"--channel {quote(c)}=FILE" for c in channels]
        words = ["delineate send", *scans, "-o segmentation.nii.gz"]
        if len(models) > 1:
            words.append(f"--model {models[0].name}")
        if find_key() != own:
            words.append(f"--key {quote(str(own))}")
        lines += ["send a scan from this machine:", f"    {' '.join(words)}"]
    host = host_of(address.zmq)
    if settings.plain:
        lines.append("without keys: every user of this machine may send scans and see all jobs")
    elif is_loopback(host):
        lines.append("only this machine can connect; for others, start it with --bind tcp://0.0.0.0:7420")
    else:
        port = address.zmq.rpartition(":")[2]
        named = f" --address tcp://{socket.gethostname()}:{port}" if host in EVERYWHERE else ""
        lines += ["give others a key each:", f"    delineate keys add NAME -o NAME.key{named}{here}"]
    if (used := disk_used(settings.state)) >= settings.limits.disk_share:
        lines.append(f"the disk is {used:.0%} full, so scans are refused until it is emptied: see --disk-percent")
    lines.append("not for diagnosis; Ctrl-C stops")
    return lines
