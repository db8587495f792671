"""Names that must be recognisable but not readable: hashed with a key that never leaves the user's machine.

Without a key, anybody could hash every patient ID that a hospital might assign, and compare. The key
is a file with 64 hexadecimal digits, ``$DELINEATE_KEY``, else ``delineate/key`` in the user's data
folder (``$XDG_DATA_HOME`` or ``~/.local/share``). It is made once, readable only by the user.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from secrets import token_bytes, token_hex
from typing import Literal

from delineate.errors import OutputError, UnknownKey

Kind = Literal["subject", "patient", "files", "key"]

PATTERN = r"^[0-9a-f]{32}$"
"""What a pseudonym looks like: 128 bits."""


def pseudonym(kind: Kind, name: str) -> str:
    """HMAC-SHA256 of a name with the user's key, as 32 hexadecimal digits.

    It is the same in every run with the same key; a subject and a patient with the same name have different
    pseudonyms. Raises :class:`UnknownKey` where the key file is damaged, :class:`OutputError` where
    there is none and none can be made.
    """
    text = f"{kind}\0{name}".encode("utf-8", "surrogatepass")
    return hmac.new(_key(key_file()), text, hashlib.sha256).hexdigest()[:32]


def key_id() -> str:
    """An identifier that tells keys apart and reveals nothing about them."""
    return pseudonym("key", "")


def key_file() -> Path:
    """The path of the key file."""
    if named := os.environ.get("DELINEATE_KEY"):
        return Path(named)
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "delineate" / "key"


@lru_cache(maxsize=8)
def _key(path: Path) -> bytes:
    """The key in a file, which is made if it does not exist."""
    try:
        if not path.exists():
            _make(path)
        text = path.read_bytes()
    except OSError as error:
        raise OutputError(
            f"the key that hides names, '{path}', cannot be read or made ({error.strerror or error})",
            fix="set DELINEATE_KEY to a file in a writable folder that you will keep",
        ) from error
    if not re.fullmatch(rb"[0-9a-f]{64}\n?", text):
        raise UnknownKey(
            f"'{path}' is not a key: its {len(text)} bytes are not 64 hexadecimal digits",
            fix=(
                "restore it from a backup, or delete it to have a new one made (bundles trained before will then not "
                "recognise their subjects)"
            ),
        )
    return bytes.fromhex(text.decode("ascii"))


def _make(path: Path) -> None:
    """Make a key atomically: if several processes try at once, all use the first one's key."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{token_hex(8)}-{path.name}")
    descriptor = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(token_bytes(32).hex().encode("ascii") + b"\n")
            file.flush()
            os.fsync(file.fileno())
        # Unlike a rename, a link never replaces a key that another process has made meanwhile.
        with suppress(FileExistsError):
            os.link(beside, path)
    finally:
        beside.unlink()
