"""Disk space of prepared subjects: those used least recently make room for others.

Only a subject's arrays go. Its ``meta.json`` stays, so its size and its counts of voxels remain known; when that file
was modified last is when the subject was used last.
"""

from __future__ import annotations

import os
import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

ARRAYS = ("points.npy", "target.npy", "image.npy")
META = "meta.json"
SUBJECT = re.compile(r"[0-9a-f]{32}")
"""The name of a prepared subject's folder; whatever else lies beside it is the user's."""

_SPARE = 0.1
"""Share of the limit that is free after making room, so that not every subject looks through the whole folder."""


def is_whole(place: Path) -> bool:
    """Whether all arrays of a prepared subject are there."""
    return all((place / name).exists() for name in ARRAYS)


def used(place: Path) -> None:
    """Remember that a prepared subject has just been used."""
    with suppress(OSError):  # another user's, or on a disk that cannot be written: then it only goes sooner
        os.utime(place / META)


class Room:
    """What the prepared subjects in ``folder`` may take: ``most_bytes``, or as much as there is.

    ``kept`` are folders of subjects that this process never removes. Other processes can share the folder, each with
    a limit of its own; what they remove is prepared again.
    """

    def __init__(self, folder: Path, most_bytes: int | None = None) -> None:
        self.folder, self.most_bytes = folder, most_bytes
        self.kept: frozenset[Path] = frozenset()
        self._held: int | None = None
        self._coming = 0
        self._lock = threading.Lock()
        self._turns: defaultdict[Path, threading.Lock] = defaultdict(threading.Lock)

    def __reduce__(self) -> tuple[type[Room], tuple[Path, int | None]]:
        return Room, (self.folder, self.most_bytes)

    def turn(self, place: Path) -> threading.Lock:
        """Held by the thread that prepares a subject, so that no other does the same meanwhile."""
        with self._lock:
            return self._turns[place]

    @contextmanager
    def taking(self, nbytes: int) -> Iterator[None]:
        """While so many bytes are written; before, the subjects used least recently are removed if need be."""
        if self.most_bytes is None:
            yield
            return
        with self._lock:
            self._coming += nbytes
            if self._held is None or self._held + self._coming > self.most_bytes:
                self._held = self._trimmed(self.most_bytes - self._coming)
        try:
            yield
        finally:
            with self._lock:
                self._coming -= nbytes
                self._held += nbytes

    def _trimmed(self, most_bytes: int) -> int:
        """Remove what is beyond so many bytes, and some more; the bytes of what is left."""
        found = [_Found.of(meta) for meta in self.folder.glob(f"*/{META}") if SUBJECT.fullmatch(meta.parent.name)]
        held = sum(one.nbytes for one in found)
        if held <= most_bytes:
            return held
        for one in sorted(found, key=lambda one: one.used_ns):
            if held <= most_bytes * (1 - _SPARE):
                break
            if one.place not in self.kept:
                held -= one.removed()
        return held


@dataclass(frozen=True)
class _Found:
    """A prepared subject on the disk: how much it takes, and when it was used last."""

    place: Path
    nbytes: int
    used_ns: int

    @classmethod
    def of(cls, meta: Path) -> _Found:
        sizes, used_ns = [], 0
        with suppress(FileNotFoundError):
            used_ns = meta.stat().st_mtime_ns
        for name in ARRAYS:
            with suppress(FileNotFoundError):
                sizes.append((meta.parent / name).stat().st_size)
        return cls(meta.parent, sum(sizes), used_ns)

    def removed(self) -> int:
        """Remove its arrays; how many bytes that freed."""
        try:
            for name in reversed(ARRAYS):
                (self.place / name).unlink(missing_ok=True)
        except OSError:  # another user's; or open, on Windows
            return 0
        return self.nbytes
