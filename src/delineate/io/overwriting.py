"""What a command may overwrite: never its inputs, and other existing files only when asked to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from delineate.errors import DelineateError, OutputError
from delineate.io.formats import parts_of
from delineate.io.suffixes import is_dicom

_LISTED = 5


def check_outputs(outputs: Iterable[Path], inputs: Iterable[Path], *, overwrite: bool = False) -> None:
    """Raise :class:`OutputError` where an output would replace a file that must stay, or cannot be written.

    Call this before any work is done. ``inputs`` are files, headers with voxels beside them, or folders of
    DICOM. They are recognised by their identity in the file system, whatever path leads there: links, ``..``
    and letter case make no difference. With ``overwrite`` other files may be replaced, but only plain ones.
    """
    outputs = list(outputs)
    for folder in dict.fromkeys(path.parent for path in outputs):
        check_folder(folder)
    there = [path for path in outputs if os.path.lexists(path)]
    if not there:
        return
    kept = {identity for path in inputs for file in _files(path) if (identity := _identity(file))}
    if taken := [path for path in there if _identity(path) in kept]:
        raise OutputError(
            f"{_listed(taken)} would be overwritten, but {_are(taken)} an input or label, which no result may replace",
            fix="choose another place",
        )
    if strange := [path for path in there if path.exists() and not path.is_file()]:
        raise OutputError(f"{_listed(strange)} {_are(strange)} not a plain file", fix="choose another name")
    if not overwrite:
        exist = "exists" if len(there) == 1 else "exist"
        raise OutputError(
            f"{_listed(there)} {exist} already", fix="give --overwrite to replace, or choose another place"
        )


def check_folder(folder: Path) -> None:
    """Raise :class:`OutputError` where no file can be written to ``folder``, which need not exist yet."""
    place = folder
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise OutputError(f"'{place}' is a file where a folder is needed", fix="choose another folder")
    if not os.access(place, os.W_OK | os.X_OK):
        raise OutputError(f"'{place}' cannot be written to", fix="change its permissions, or choose another folder")


def _files(path: Path) -> Iterator[Path]:
    """All files that an input consists of, itself among them."""
    if path.is_dir():
        yield from (Path(place, name) for place, _, names in os.walk(path) for name in names)
        return
    yield path
    try:
        yield from parts_of(path)
    except (DelineateError, OSError):
        # The series is damaged: any file beside this one may belong to it.
        if is_dicom(path):
            yield from path.parent.iterdir()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino


def _listed(paths: list[Path]) -> str:
    more = f" and {len(paths) - _LISTED} more ({len(paths)} files)" if len(paths) > _LISTED else ""
    return ", ".join(f"'{path}'" for path in paths[:_LISTED]) + more


def _are(paths: list[Path]) -> str:
    return "is" if len(paths) == 1 else "are"
