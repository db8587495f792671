"""``delineate keys``: who may use a server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Json
from delineate.cli.servers import State, serving

app = Commands(help="List, add and remove the keys of those who may use a server.")


@app.command("list")
def list_keys(state: State = None, json: Json = False) -> None:
    """List the keys that a server knows."""
    with serving():
        from delineate.serving.places import allowed, state_folder

    from delineate.cli.terminal import print_json, print_table

    keys = allowed(state or state_folder())
    if json:
        print_json({"keys": [{"name": key.name, "role": key.role, "public": key.public} for key in keys]})
    else:
        print_table("", ["name", "role", "public key"], [[key.name, key.role, key.public] for key in keys])


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="Name the person or machine whose key this is.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the key to this new file, which only you can read.")],
    role: Annotated[
        Literal["client", "worker"],
        typer.Option("--role", help="Let it send scans (client) or compute on another machine (worker)."),
    ] = "client",
    address: Annotated[
        str,
        typer.Option(
            "--address",
            help="Name the address by which the server is reached, tcp://HOST:PORT (default: where it listens now).",
        ),
    ] = "",
    http: Annotated[
        str, typer.Option("--http", help="Name the URL by which the server's HTTP interface is reached.")
    ] = "",
    state: State = None,
    json: Json = False,
) -> None:
    """Make a key for a person or a machine. The running server knows it within a second.

    The file holds a secret: hand it over by a safe way, one file to each, and remove the key if the file is lost.
    """
    with serving():
        from delineate.serving.places import add_key, state_folder

    from delineate.cli.terminal import print_json
    from delineate.core.text import printable

    own = add_key(state or state_folder(), name, role, out, address=address, http=http)
    if json:
        print_json({"name": own.name, "role": own.role, "file": str(out), "address": own.address, "http": own.http})
        return
    where = " and ".join(place for place in (own.address, own.http) if place)
    typer.echo(f"{printable(str(out))}: the key of {own.role} '{own.name}' for {where}")


@app.command("remove")
def remove(
    name: Annotated[str, typer.Argument(help="Remove the key of this name.")],
    state: State = None,
    json: Json = False,
) -> None:
    """Remove a key. Whoever holds it cannot connect any more; jobs that it sent stay until they are too old."""
    with serving():
        from delineate.serving.places import remove_key, state_folder

    from delineate.cli.terminal import print_json

    remove_key(state or state_folder(), name)
    if json:
        print_json({"removed": name})
    else:
        typer.echo(f"'{name}' may no longer use the server")
