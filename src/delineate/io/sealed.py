"""A folder whose manifest seals it: any change to any of its files is noticed when it is opened.

The manifest names the SHA-256 and size of every file, and holds a digest of itself. It is written
before the files that it names, so that a process killed at any moment leaves either a whole folder
or one that says it was not written to its end:

- :func:`seal` writes a folder anew: first a manifest that says ``"complete": false``, then the
  files, then the manifest again.
- :func:`replace_file` replaces one file of a sealed folder: meanwhile the manifest allows the file as it
  was and as it will be.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from delineate.errors import BadFormat, BundleError
from delineate.io.files import open_file, writing_beside

MANIFEST = "bundle.json"
AGAIN = "copy the bundle again from where it was made"
_MOST_BYTES = 8 * 2**20  # of a manifest, and of any file that is read as a whole

Write = Callable[[Path], object]


@dataclass(frozen=True)
class Stamp:
    """What a file must be."""

    sha256: str
    bytes: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """Of a file as it is. Raises :class:`BundleError` where it cannot be read."""
        with opened(path) as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


@dataclass(frozen=True)
class Sealed:
    """A manifest: ``about`` is its content; of each file ``stamps`` names what it may be, None for not there."""

    folder: Path
    about: Mapping[str, Any]
    stamps: Mapping[str, tuple[Stamp | None, ...]]
    complete: bool = True

    @classmethod
    def open(cls, folder: Path) -> Sealed:
        """The manifest of a folder; files are checked when they are read.

        Raises :class:`BundleError` where it is damaged or the folder was not written to its end.
        """
        contents = read_json(read_small(folder / MANIFEST), folder / MANIFEST)
        digest = contents.pop("sha256", None)
        if digest != _digest(contents):
            raise BundleError(
                f"'{folder / MANIFEST}' was changed after it was written, or damaged: its digest differs", fix=AGAIN
            )
        files, complete = contents.pop("files", None), contents.pop("complete", None)
        try:
            stamps = _STAMPS.validate_json(json.dumps(files), strict=True)
        except ValidationError as error:
            raise BundleError(f"'{folder / MANIFEST}' does not say what its files are", fix=AGAIN) from error
        if complete is not True:
            raise BundleError(
                f"'{folder}' was not written to its end", fix=f"run the command again that was writing it, or {AGAIN}"
            )
        return cls(folder, contents, stamps)

    @classmethod
    def unfinished(cls, folder: Path) -> bool:
        """Whether writing the folder was interrupted."""
        return read_json(read_small(folder / MANIFEST), folder / MANIFEST).get("complete") is False

    def __contains__(self, name: str) -> bool:
        return any(stamp is not None for stamp in self.stamps.get(name, ()))

    def read(self, name: str) -> bytes:
        """A small file, once it is found to be what it must be."""
        if name not in self:
            raise BundleError(f"'{self.folder}' has no {name}", fix=AGAIN)
        content = read_small(self.folder / name, max(s.bytes for s in self.stamps[name] if s is not None))
        self._check(name, Stamp(hashlib.sha256(content).hexdigest(), len(content)))
        return content

    def stamp(self, name: str) -> Stamp | None:
        """What a file is, once it is found to be what it may be; None where it may be missing and is."""
        path = self.folder / name
        found = None
        if os.path.lexists(path):
            with opened(path) as file:
                size = os.fstat(file.fileno()).st_size
            # What has another size need not be read.
            right = any(stamp is not None and stamp.bytes == size for stamp in self.stamps.get(name, ()))
            found = Stamp.of(path) if right else Stamp("", size)
        return self._check(name, found)

    def _check(self, name: str, found: Stamp | None) -> Stamp | None:
        if found in self.stamps.get(name, (None,)):
            return found
        path = self.folder / name
        if found is None:
            raise BundleError(f"'{path}' is missing", fix=AGAIN)
        if name not in self:
            raise BundleError(f"'{path}' does not belong to this bundle, which was saved without it", fix="remove it")
        raise BundleError(
            f"'{path}' is not what was saved: it was changed, or damaged on the way",
            fix=(
                f"{AGAIN}. A trained bundle "
                "cannot be edited: change the recipe and train, or use the options of the command that reads it"
            ),
        )

    def write(self) -> None:
        """Replace the manifest in one rename."""
        files = _STAMPS.dump_python(dict(self.stamps), mode="json")
        contents = {**self.about, "files": files, "complete": self.complete}
        text = json.dumps({**contents, "sha256": _digest(contents)}, indent=1, allow_nan=False)
        with writing_beside(self.folder / MANIFEST) as path:
            path.write_text(text, encoding="utf-8")


_STAMPS = TypeAdapter(dict[str, tuple[Stamp | None, ...]])


def seal(folder: Path, about: Mapping[str, Any], files: Mapping[str, Write], keep: tuple[str, ...] = ()) -> None:
    """Write a folder: each of ``files`` by a function that is given the path to write to.

    Those of ``keep`` that are there stay, and are sealed as they are. Files appear in the given order.
    """
    kept = {name: (Stamp.of(folder / name),) for name in keep if (folder / name).exists()}
    if not files:  # the manifest alone is written, in one rename
        Sealed(folder, about, kept).write()
        return
    with ExitStack() as renames:  # which happen when it is left, the last first
        stamps: dict[str, tuple[Stamp | None, ...]] = {}
        for name, write in reversed(list(files.items())):
            path = renames.enter_context(writing_beside(folder / name))
            write(path)
            stamps[name] = (Stamp.of(path),)
        sealed = Sealed(folder, about, {**dict(reversed(stamps.items())), **kept}, complete=False)
        sealed.write()
    replace(sealed, complete=True).write()


def replace_file(folder: Path, name: str, write: Write) -> None:
    """Replace, or add, one file of a sealed folder, by a function that is given the path to write to."""
    sealed = Sealed.open(folder)
    with writing_beside(folder / name) as path:
        write(path)
        before = Stamp.of(folder / name) if (folder / name).exists() else None
        after = Stamp.of(path)
        # Only what was right before stays right.
        allowed = [stamp for stamp in sealed.stamps.get(name, (None,)) if stamp == before]
        replace(sealed, stamps={**sealed.stamps, name: (*allowed, after)}).write()
    replace(sealed, stamps={**sealed.stamps, name: (after,)}).write()


def opened(path: Path) -> BufferedReader:
    """A regular file, open to be read. Raises :class:`BundleError` for anything else, at once."""
    try:
        return open_file(path)
    except FileNotFoundError as error:
        raise BundleError(
            f"'{path.parent}' is not a bundle: {path.name} is missing", fix="give a run's folder bundle/"
        ) from error
    except BadFormat as error:
        raise BundleError(f"'{path}' is not a file", fix=AGAIN) from error
    except OSError as error:
        raise BundleError(f"'{path}' cannot be read ({error.strerror or error})", fix=AGAIN) from error


def read_json(content: bytes, path: Path) -> dict[str, Any]:
    """An object of JSON, whose numbers are finite. Raises :class:`BundleError`."""
    try:
        found = json.loads(content, parse_constant=_refuse)
        json.dumps(found)  # which may fail at fewer levels than reading
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise BundleError(f"'{path}' is no JSON that can be read ({reason})", fix=AGAIN) from error
    if not isinstance(found, dict):
        raise BundleError(f"'{path}' holds {type(found).__name__}, not fields", fix=AGAIN)
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is no number")


def read_small(path: Path, most: int = _MOST_BYTES) -> bytes:
    """A file of at most ``most`` bytes; where it has more, the first of them and one more.

    Raises :class:`BundleError` for what is not a file, or larger than any that a bundle has read as a whole.
    """
    with opened(path) as file:
        try:
            content = file.read(min(most, _MOST_BYTES) + 1)
        except OSError as error:
            raise BundleError(f"'{path}' cannot be read ({error.strerror or error})", fix=AGAIN) from error
    if len(content) > _MOST_BYTES:
        raise BundleError(f"'{path}' is larger than {_MOST_BYTES >> 20} MiB", fix=AGAIN)
    return content


def _digest(contents: Mapping[str, Any]) -> str:
    """Of values, however they are laid out in their file; the order of fields counts, as it does to targets."""
    return hashlib.sha256(json.dumps(contents, separators=(",", ":")).encode("ascii")).hexdigest()
