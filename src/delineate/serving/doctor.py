"""What may be wrong with a server, or with the way to one: each thing that is looked at, what was found, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import stat
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import zmq

from delineate.errors import DelineateError, ServingError
from delineate.serving.client import Client
from delineate.serving.engine import Limits
from delineate.serving.keys import read_key, read_server_keys
from delineate.serving.places import find_key, host_of, reachable, state_folder, way_to_server
from delineate.serving.protocol import VERSION, Figures, Hello, Stats, Welcome, decode, encode
from delineate.serving.settings import Address, Settings, read_address
from delineate.serving.spool import disk_used

Verdict = Literal["ok", "note", "wrong"]

_ANSWER_S = 5.0
_NETWORK_DISKS = ("nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "lustre", "beegfs")
"""File systems on which SQLite's write-ahead log and locks cannot be relied on."""


@dataclass(frozen=True)
class Finding:
    """What was looked at, how it is, what was found and, if it is wrong, what to do."""

    what: str
    verdict: Verdict
    found: str
    fix: str = ""


def examine(state: Path | None, key: Path | None) -> Iterator[Finding]:
    """Look at this machine, at the server whose state is in a folder, and at the server that a key leads to."""
    yield from _versions()
    folder = state or state_folder()
    used = find_key(key)
    if (folder / "server.json").exists() or state is not None:
        yield from _server(folder)
    elif used is None:
        yield Finding("server", "note", f"none has been started in '{folder}'", "delineate serve BUNDLE")
    if used is not None:
        yield from _key(used)
    elif key is None and not (folder / "server.json").exists():
        yield Finding(
            "key", "wrong", "there is none", "ask who runs the server for a key file, or start a server of your own"
        )


def _versions() -> Iterator[Finding]:
    yield Finding("delineate", "ok", f"{metadata.version('delineate')}, Python {platform.python_version()}")
    if zmq.has("curve"):
        yield Finding("libzmq", "ok", f"{zmq.zmq_version()} with CURVE, pyzmq {zmq.pyzmq_version()}")
    else:
        yield Finding("libzmq", "wrong", f"{zmq.zmq_version()} without CURVE", "pip install --force-reinstall pyzmq")


# The server


def _server(state: Path) -> Iterator[Finding]:
    yield from _checked("state folder", lambda: _folder(state))
    yield from _checked("keys", lambda: _keys(state))
    yield _device()
    try:
        address = read_address(state)
    except ServingError as error:
        yield from _checked("disk", lambda: _disk(state, Limits().disk_share))
        yield Finding("server", "note", error.message, error.fix)
        yield from _checked("port", lambda: _port(Settings(state).bind))
        return
    try:
        figures = _figures(Settings(state).socket)
    except ServingError as error:
        yield Finding("server", "wrong", error.message, error.fix)
    else:
        yield from _checked("disk", lambda: _disk(state, figures.figures["disk limit"]))
        yield _running(address, figures)
    if address.http:
        yield from _checked("http", lambda: _http(address.http))


def _checked(what: str, look: Callable[[], Finding]) -> Iterator[Finding]:
    """What a look finds, or the error that it ends in."""
    try:
        yield look()
    except DelineateError as error:
        yield Finding(what, "wrong", error.message, error.fix)
    except OSError as error:
        yield Finding(what, "wrong", f"{error.filename or what}: {error.strerror or error}", "check its permissions")


def _folder(state: Path) -> Finding:
    found = state.stat()
    if os.name == "posix" and stat.S_IMODE(found.st_mode) & 0o077:
        return Finding("state folder", "wrong", f"'{state}' is open to other users", f"chmod 700 '{state}'")
    kind = _file_system(state)
    if kind in _NETWORK_DISKS:
        return Finding(
            "state folder", "wrong", f"'{state}' is on a network disk ({kind}), where the job store may be damaged",
            "use a --state on a disk of this machine",
        )  # fmt: skip
    if not os.access(state, os.W_OK | os.X_OK):
        return Finding("state folder", "wrong", f"'{state}' cannot be written to", "do this as the server's user")
    return Finding("state folder", "ok", f"{state}")


def _file_system(path: Path) -> str:
    """The kind of file system that a folder is on; empty where the system does not say."""
    best, kind = "", ""
    with suppress(OSError):
        for line in Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace").splitlines():
            _, place, this, *_ = line.split()
            inside = place == "/" or path.resolve().is_relative_to(place.replace("\\040", " "))
            if inside and len(place) >= len(best):
                best, kind = place, this
    return kind


def _keys(state: Path) -> Finding:
    keys = read_server_keys(state / "server.json").allowed
    by_role = [f"{sum(key.role == role for key in keys)} of {role}s" for role in ("client", "worker")]
    if not keys:
        return Finding("keys", "note", "nobody may connect", "delineate keys add NAME -o FILE")
    return Finding("keys", "ok", ", ".join(by_role))


def _disk(state: Path, share: float) -> Finding:
    used = disk_used(state)
    found = f"{used:.0%} used, {shutil.disk_usage(state).free / 1e9:.1f} GB free"
    if used >= share:
        return Finding(
            "disk", "wrong", f"{found}: above {share:.0%} scans are refused", "free some space, or serve --disk-percent"
        )
    return Finding("disk", "ok", found)


def _device() -> Finding:
    from delineate.compute import plan_compute

    choice = plan_compute(compile="off").choices[0]
    return Finding("device", "ok", f"{choice.choice} ({choice.why})")


def _port(bind: str) -> Finding:
    """Whether a server could listen where it would by default."""
    host, port = host_of(bind), int(bind.rpartition(":")[2])
    try:
        with socket.create_server((host, port)):
            return Finding("port", "ok", f"{bind} is free")
    except OSError as error:
        return Finding(
            "port",
            "wrong",
            f"{bind} cannot be used: {error.strerror}",
            "stop the other program, or give another --bind",
        )


def _running(address: Address, figures: Figures) -> Finding:
    """How the front door says that the server is."""
    jobs = ", ".join(f"{figures.figures.get(f'jobs {state}', 0):.0f} {state}" for state in ("queued", "running"))
    models = ", ".join(model.name for model in figures.models) or "none"
    found = f"listens at {address.zmq}; models: {models}; jobs: {jobs}"
    if figures.ready:
        return Finding("server", "ok", found)
    workers = figures.figures.get("workers", 0)
    why = "no worker is there" if not workers else "it has no model, or is stopping"
    return Finding("server", "wrong", f"{found}; not ready: {why}", "wait a minute; else see the server's log")


def _figures(door: Path) -> Figures:
    """Ask the front door through its own socket. Raises :class:`ServingError` if it does not answer."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer:
        dealer.linger = 0
        dealer.connect(f"ipc://{door}")
        for question, kind in (
            (Hello(versions=(VERSION,), client="doctor", role="gateway"), Welcome),
            (Stats(), Figures),
        ):
            dealer.send_multipart(encode(question))
            if not dealer.poll(int(1000 * _ANSWER_S)):
                raise ServingError("the front door does not answer", fix="start the server again; see its log")
            answer, _ = decode(dealer.recv_multipart())
            if not isinstance(answer, kind):
                raise ServingError(f"the front door answers with {type(answer).__name__.upper()}", fix="see its log")
    assert isinstance(answer, Figures)
    return answer


def _http(address: str) -> Finding:
    url = f"http://{reachable(address)}/readyz"
    try:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is on this machine
        with direct.open(url, timeout=_ANSWER_S) as answer:
            return Finding("http", "ok", f"{url} answers {answer.status}")
    except urllib.error.HTTPError as error:
        return Finding("http", "wrong", f"{url} answers {error.code}", "wait until the server is ready; see its log")
    except OSError as error:
        return Finding("http", "wrong", f"{url}: {error}", "see the server's log")


# The way to it


def _key(path: Path) -> Iterator[Finding]:
    try:
        own = read_key(path)
    except DelineateError as error:
        yield Finding("key", "wrong", error.message, error.fix)
        return
    yield Finding("key", "ok", f"{path}: {own.role} '{own.name}'")
    try:
        found, address = way_to_server(path)
        with Client(found, address) as client:
            models = client.models(_ANSWER_S)
            yield Finding(
                "connection", "ok", f"{address} answers in {1000 * client.ping(_ANSWER_S):.1f} ms; models: "
                f"{', '.join(model.name for model in models) or 'none'}",
            )  # fmt: skip
    except DelineateError as error:
        yield Finding("connection", "wrong", error.message, error.fix)
