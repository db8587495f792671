"""What the commands of serving share: options, the extra that they need, and the way to a server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from delineate.cli.terminal import Terminal
    from delineate.errors import DelineateError
    from delineate.serving.calling import OnWait
    from delineate.serving.client import Client

State = Annotated[
    Path | None,
    typer.Option(
        "--state",
        help="Keep the server's keys, jobs and scans in this folder (default: ~/.local/share/delineate/server).",
    ),
]
Key = Annotated[
    Path | None,
    typer.Option(
        "--key",
        help="Use this key file (default: $DELINEATE_KEY_FILE, ~/.config/delineate/client.key, or that of the server "
        "on this machine).",
    ),
]
ServerAddress = Annotated[
    str,
    typer.Option("--address", help="Connect to this address instead of the one in the key file, as through a tunnel."),
]

_EXTRA = ("zmq", "msgspec", "fastapi", "uvicorn", "prometheus_client", "blosc2")
_BLINK_S = 2.0
"""A connection that is back sooner is not worth a word."""


@contextmanager
def serving() -> Iterator[None]:
    """Say which extra is missing if an import of serving fails."""
    from delineate.errors import ServingError

    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in _EXTRA:
            raise
        raise ServingError(
            f"serving needs '{error.name}', which is missing", fix="pip install 'delineate[serve]'"
        ) from error


def connected(terminal: Terminal, key: Path | None, address: str, timeout_s: float = 3600.0) -> Client:
    """A client of the server that a key leads to; it says what it waits for."""
    from delineate.serving.client import Client
    from delineate.serving.places import way_to_server

    found, there = way_to_server(key, address)
    return Client(found, there, timeout_s=timeout_s, on_wait=_says(terminal))


def _says(terminal: Terminal) -> OnWait:
    """Says why a client waits: once for each reason in a row."""
    said = ""

    def say(why: DelineateError, seconds: float) -> None:
        nonlocal said
        if why.message != said and (why.code == "E_BUSY" or seconds >= _BLINK_S):
            said = why.message
            terminal.say(f"{said}; trying again in {seconds:.0f} s")

    return say


def check_there(device: str) -> None:
    """Raise :class:`RecipeError` for a device that this machine does not have."""
    if device not in ("auto", "cpu"):  # else torch, which takes seconds, is left to the workers
        from delineate.compute import check_device

        check_device(device)


def log_as_servers_do() -> None:
    """Let this process log as those that it starts."""
    import logging

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(processName)s: %(message)s")
