"""Who may talk to a server: a CURVE key pair each, in one file that also says where the server is and who it is."""

from __future__ import annotations

import hashlib
import os
import secrets
from pathlib import Path
from typing import Annotated, Literal

import msgspec
import zmq
from msgspec import Meta, Struct

from ..errors import MissingFile, OutputError, ServingError, UnknownKey
from .protocol import Name

LOCAL = "local"
"""Who comes without a key, from the server's own machine; not a name for a key."""

Z85 = Annotated[str, Meta(min_length=40, max_length=40)]


class KeyFile(Struct, frozen=True, kw_only=True):
    """A client's or worker's own file: its key pair, the server's address and public key, and a token for HTTP."""

    format: Literal[1] = 1
    name: Name
    role: Literal["client", "worker"]
    address: Annotated[str, Meta(max_length=300)]
    server_public: Z85
    public: Z85
    secret: Z85
    http: Annotated[str, Meta(max_length=300)] = ""
    token: Annotated[str, Meta(max_length=100)] = ""


class Allowed(Struct, frozen=True, kw_only=True):
    """What a server knows of a key: nothing by which somebody could pass for its owner."""

    name: Name
    role: Literal["client", "worker"]
    public: Z85
    token_sha256: str = ""


class ServerKeys(Struct, frozen=True, kw_only=True):
    """A server's own key pair, and who may talk to it."""

    format: Literal[1] = 1
    public: Z85
    secret: Z85
    allowed: tuple[Allowed, ...] = ()

    def by_public(self, public: str) -> Allowed | None:
        """Whose key it is."""
        return next((one for one in self.allowed if secrets.compare_digest(one.public, public)), None)

    def by_token(self, token: str) -> Allowed | None:
        """Whose token it is."""
        digest = _digest(token)
        return next((one for one in self.allowed if secrets.compare_digest(one.token_sha256, digest)), None)


def read_key(path: Path) -> KeyFile:
    """A client's file. Raises :class:`MissingFile`, and :class:`UnknownKey` if it is none or others may read it."""
    return _read(path, KeyFile, "ask who runs the server for a new one (`delineate keys add NAME`)")


def read_server_keys(path: Path) -> ServerKeys:
    """The server's file. Raises as :func:`read_key`."""
    return _read(path, ServerKeys, "start the server once to make it")


def write_key(path: Path, value: KeyFile | ServerKeys) -> None:
    """Write a file that nobody else may read. Raises :class:`OutputError`."""
    beside = path.with_name(f".{secrets.token_hex(4)}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "wb") as file:
            if os.name == "posix" and os.geteuid() == 0:  # root does it for the user whose folder it is
                owner = path.parent.stat()
                os.fchown(descriptor, owner.st_uid, owner.st_gid)
            file.write(msgspec.json.format(msgspec.json.encode(value), indent=1))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        beside.unlink(missing_ok=True)
        raise OutputError(
            f"'{path}' cannot be written: {error.strerror or error}", fix="choose another place"
        ) from error


def new_server_keys() -> ServerKeys:
    """A new pair, which nobody may talk to yet."""
    public, secret = zmq.curve_keypair()
    return ServerKeys(public=public.decode(), secret=secret.decode())


def added(
    keys: ServerKeys, name: str, role: Literal["client", "worker"], address: str, http: str = ""
) -> tuple[ServerKeys, KeyFile]:
    """The server's keys with one more, and the file for its owner. Raises :class:`ServingError` for a name in use.

    Jobs belong to names: whoever gets the name of a key that was removed sees what is left of its jobs.
    """
    if name == LOCAL or any(one.name == name for one in keys.allowed):
        raise ServingError(f"there is a key '{name}'", fix="choose another name, or remove that key first")
    public, secret = (part.decode() for part in zmq.curve_keypair())
    token = secrets.token_urlsafe(32) if role == "client" else ""
    allowed = Allowed(name=name, role=role, public=public, token_sha256=_digest(token) if token else "")
    try:
        own = KeyFile(
            name=name, role=role, address=address, server_public=keys.public, public=public, secret=secret, http=http,
            token=token,
        )  # fmt: skip
        own = msgspec.json.decode(msgspec.json.encode(own), type=KeyFile)  # a name as the file allows it
    except msgspec.ValidationError as error:
        raise ServingError(
            f"'{name[:80]}' cannot be a key's name: {error}", fix="use letters, digits, . _ -"
        ) from error
    return msgspec.structs.replace(keys, allowed=(*keys.allowed, allowed)), own


def removed(keys: ServerKeys, name: str) -> ServerKeys:
    """The server's keys without one. Raises :class:`UnknownKey`."""
    if all(one.name != name for one in keys.allowed):
        raise UnknownKey(f"there is no key '{name}'", fix="see `delineate keys list`")
    return msgspec.structs.replace(keys, allowed=tuple(one for one in keys.allowed if one.name != name))


def _read(path: Path, kind: type, fix: str):  # type: ignore[no-untyped-def]
    try:
        if os.name == "posix" and path.stat().st_mode & 0o077:
            raise UnknownKey(f"'{path}' can be read by others", fix=f"run `chmod 600 {path}`, or make a new key")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise MissingFile(f"there is no key file '{path}'", fix=fix) from error
    except OSError as error:
        raise UnknownKey(f"'{path}' cannot be read: {error.strerror or error}", fix=fix) from error
    try:
        return msgspec.json.decode(content, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise UnknownKey(f"'{path}' is no key file: {error}", fix=fix) from error


def _digest(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
