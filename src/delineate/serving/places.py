"""Where a server keeps its state and its users' keys, and where a client looks for its own key and for its server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

import msgspec

from delineate.errors import MissingFile, OutputError, ServingError, UnknownKey
from delineate.serving.front_door import is_loopback
from delineate.serving.keys import (
    Allowed,
    KeyFile,
    added,
    new_server_keys,
    read_key,
    read_server_keys,
    removed,
    write_key,
)
from delineate.serving.settings import Address, read_address

FIRST = "me"
"""Name of the key that a server makes for its own machine when it first starts."""

EVERYWHERE = ("0.0.0.0", "*", "[::]")
"""Hosts that stand for all addresses of a machine: a server can listen there, but nobody can connect to them."""


def data_folder() -> Path:
    """The user's folder of what has to be kept: ``delineate`` in ``$XDG_DATA_HOME`` or ``~/.local/share``."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "delineate"


def state_folder() -> Path:
    """Where a server keeps its state, unless told otherwise."""
    return data_folder() / "server"


def own_key() -> Path:
    """Where a user keeps the key of a server elsewhere: ``delineate/client.key`` in the user's configuration folder."""
    config = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(config) / "delineate" / "client.key"


def find_key(given: Path | None = None) -> Path | None:
    """The key file to use: the one given, else ``$DELINEATE_KEY_FILE``, one's own, that of this machine's server."""
    if given is not None:
        return given
    if named := os.environ.get("DELINEATE_KEY_FILE"):
        return Path(named)
    return next((path for path in (own_key(), state_folder() / f"{FIRST}.key") if path.exists()), None)


def way_to_server(key: Path | None = None, address: str = "") -> tuple[KeyFile | None, str]:
    """A key and the address to use it at. A key in the folder of a server leads to where that server listens now.

    The key is None for a server that wants none. Raises :class:`MissingFile` if no key is found, and
    :class:`ServingError` if the server in whose folder it lies is not running.
    """
    path = find_key(key)
    if path is None:
        raise MissingFile(
            "no key for a server was found",
            fix=f"give --key FILE, or put the file at {own_key()}; whoever runs the server makes one with "
            "`delineate keys add NAME -o FILE`",
        )
    found = read_key(path)
    if address or not (path.parent / "server.json").exists():
        return found, address or found.address
    there = read_address(path.parent)
    return None if there.plain else found, reachable(there.zmq)


def reachable(address: str, host: str = "127.0.0.1") -> str:
    """An address to connect to, from one at which a server listens: ``host`` for all addresses of a machine."""
    scheme, slashes, rest = address.rpartition("://")
    listening, colon, port = rest.rpartition(":")
    return f"{scheme}{slashes}{host if listening in EVERYWHERE else listening}{colon}{port}"


def host_of(address: str) -> str:
    """``HOST`` of ``tcp://HOST:PORT``."""
    return address.rpartition("://")[2].rpartition(":")[0]


def make_keys(state: Path, bind: str) -> None:
    """Make a server's keys when it first starts, and one for its own machine: ``me.key``, in the state folder."""
    with _changing(state):
        if (state / "server.json").exists():
            return
        keys, own = added(new_server_keys(), FIRST, "client", reachable(bind))
        write_key(state / f"{FIRST}.key", own)
        write_key(state / "server.json", keys)


def allowed(state: Path) -> tuple[Allowed, ...]:
    """The keys that a server knows. Raises :class:`MissingFile` where none has been started."""
    return read_server_keys(state / "server.json").allowed


def add_key(
    state: Path, name: str, role: Literal["client", "worker"], out: Path, *, address: str = "", http: str = ""
) -> KeyFile:
    """Let a key in, and write its owner's file. Without an address, it is where the server listens now.

    Raises :class:`ServingError` for a name in use, or if the address is not known, and :class:`OutputError`.
    """
    with _changing(state):
        known = read_server_keys(state / "server.json")
        keys, own = added(known, name, role, *_addresses(state, role, address, http))
        if os.path.lexists(out):
            raise OutputError(f"'{out}' exists already", fix="choose another name for the key's file")
        write_key(out, own)
        try:
            write_key(state / "server.json", keys)
        except OutputError:
            out.unlink()
            raise
    return own


def worker_key(state: Path, name: str, address: str) -> KeyFile:
    """The key of a server's own workers elsewhere, in its state folder, for use at ``address``; made if need be."""
    path = state / f"{name}.key"
    with _changing(state):
        keys = read_server_keys(state / "server.json")
        with suppress(MissingFile, UnknownKey):
            own = read_key(path)
            if own.server_public == keys.public and keys.by_public(own.public) is not None:
                return msgspec.structs.replace(own, address=address)
        with suppress(UnknownKey):
            keys = removed(keys, name)
        keys, own = added(keys, name, "worker", address)
        write_key(path, own)
        write_key(state / "server.json", keys)
    return own


def remove_key(state: Path, name: str) -> None:
    """Let a key in no more. Raises :class:`UnknownKey` if there is none of this name."""
    with _changing(state):
        write_key(state / "server.json", removed(read_server_keys(state / "server.json"), name))
        if name == FIRST:
            (state / f"{FIRST}.key").unlink(missing_ok=True)


def _addresses(state: Path, role: str, address: str, http: str) -> tuple[str, str]:
    """The addresses that a key's file names."""
    running = _running(state)
    if not address:
        if running is None:
            raise ServingError(
                f"no server is running in '{state}', so its address is not known",
                fix="start it, or give --address tcp://HOST:PORT",
            )
        if host_of(running.zmq) in EVERYWHERE:
            port = running.zmq.rpartition(":")[2]
            raise ServingError(
                f"the server listens on all addresses of this machine ({running.zmq})",
                fix=f"say by which one others reach it: --address tcp://HOST:{port}",
            )
        address = running.zmq
    host, port = host_of(address), address.rpartition(":")[2]
    if not address.startswith("tcp://") or not host or host in EVERYWHERE or not port.isdigit():
        raise ServingError(f"clients cannot connect to '{address}'", fix="give --address tcp://HOST:PORT")
    if not http and role == "client" and running is not None and running.http:
        there = reachable(running.http, host)
        http = f"http://{there}" if is_loopback(host) or not is_loopback(host_of(there)) else ""
    return address, http


def _running(state: Path) -> Address | None:
    try:
        return read_address(state)
    except ServingError:
        return None


@contextmanager
def _changing(state: Path) -> Iterator[None]:
    """Let no other process change a server's keys meanwhile. Nothing is written: root may do this for another user."""
    import fcntl

    try:
        folder = os.open(state, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError as error:
        raise MissingFile(
            f"no server has been started in '{state}'", fix="start it once, or give its --state"
        ) from error
    except OSError as error:
        raise UnknownKey(
            f"'{state}' cannot be opened: {error.strerror}", fix="do this as the user that runs the server, or as root"
        ) from error
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)
