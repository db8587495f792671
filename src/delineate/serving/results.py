"""What a client gets: the files of a result. All of them appear at their places, whole and together, or none does."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from errno import EISDIR
from pathlib import Path
from typing import IO, Any

from ..errors import OutputError, Truncated
from .formats import OUTPUTS, SUFFIXES, suffix_of
from .protocol import Output

ABOUT = "label.json"
"""The output that says what is known of a result. Others are called the same, with other suffixes."""

NAMES = frozenset(f"label.{format}" for format in OUTPUTS)
"""What outputs can be called: nothing else that a server says becomes part of a path."""


@dataclass(frozen=True)
class Result:
    """What came of a job: its files, the first being the one asked for, what it says of itself, and where time went.

    ``about`` holds volumes in ml, expected Dice with intervals, and anything unusual about the scan; ``seconds`` the
    stages of the server, and those of this client: ``upload`` and ``download``.
    """

    job: str
    files: list[Path]
    about: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def format_of(path: Path) -> str:
    """The format that a name ends in. Raises :class:`OutputError` for a name that says none."""
    if not (suffix := suffix_of(path)):
        raise OutputError(f"'{path}' has no suffix of a result", fix=f"give one of {', '.join(SUFFIXES)}")
    return suffix[1:]


def places(out: Path, formats: Iterable[str], *, overwrite: bool) -> dict[str, Path]:
    """Where each output of a job goes, by its name: to ``out`` itself, the others beside it under the same name.

    ``out`` is the first. Raises :class:`OutputError` if one of them exists and is not to be replaced, or if the folder
    cannot be written to.
    """
    asked = format_of(out)
    stem = out.name[: -len(asked) - 1]
    found = {f"label.{asked}": out}
    for format in formats:
        found.setdefault(f"label.{format}", out.with_name(f"{stem}.{format}"))
    for place in found.values():
        if place.is_dir():
            raise OutputError(f"'{place}' is a folder", fix="choose another name")
        if os.path.lexists(place) and not overwrite:
            raise OutputError(f"'{place}' exists already", fix="choose another name, or overwrite it")
    if not os.access(folder := _folder(out), os.W_OK | os.X_OK):
        raise OutputError(f"'{folder}' cannot be written to", fix="change its permissions, or choose another folder")
    return found


@contextmanager
def together(places: Mapping[str, Path]) -> Iterator[dict[str, Path]]:
    """Files to be written, by name, that are moved to their places at the end. After an error, none has been.

    A file that is replaced is back in its place then.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".delineate-", dir=_folder(next(iter(places.values())))) as folder:
            files = {name: Path(folder) / name for name in places}
            yield files
            _move(files, places, Path(folder))
    except OSError as error:
        place = next(iter(places.values()))
        raise OutputError(
            f"'{place}' cannot be written: {error.strerror or error}", fix="free some space, or choose another place"
        ) from error


def _move(files: Mapping[str, Path], places: Mapping[str, Path], folder: Path) -> None:
    # The one that was asked for comes last: once it is there, so are the others.
    moves = [(files[name], place, folder / f"old-{name}") for name, place in reversed(list(places.items()))]
    before = {place for _, place, _ in moves if os.path.lexists(place)}
    begun: list[tuple[Path, Path]] = []
    try:
        for file, place, old in moves:
            place.parent.mkdir(parents=True, exist_ok=True)
            begun.append((place, old))
            if place in before:
                if place.is_dir():  # it has become one since
                    raise IsADirectoryError(EISDIR, os.strerror(EISDIR))
                place.replace(old)
            file.replace(place)
        _sync(moves[-1][1].parent)
    except BaseException:
        for place, old in begun:
            if os.path.lexists(old):
                old.replace(place)
            elif place not in before:
                place.unlink(missing_ok=True)
        raise


def _sync(folder: Path) -> None:
    if os.name == "posix":  # elsewhere folders cannot be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _folder(out: Path) -> Path:
    """A folder on the disk that the outputs go to, so that they only have to be renamed."""
    return next(folder for folder in out.absolute().parents if folder.is_dir())


class Arriving:
    """An output that arrives, in its order, in a file."""

    def __init__(self, output: Output, file: IO[bytes]) -> None:
        self.output, self._file, self._digest, self.size = output, file, hashlib.sha256(), 0

    def take(self, content: bytes) -> None:
        """Write what comes next."""
        self._file.write(content)
        self._digest.update(content)
        self.size += len(content)

    def finish(self) -> None:
        """Raise :class:`Truncated` unless this is what the server made."""
        if self.size != self.output.size or self._digest.hexdigest() != self.output.sha256:
            raise Truncated(f"'{self.output.name}' is not what the server made", fix="fetch it again")
        self._file.flush()
