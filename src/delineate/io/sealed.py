"""A folder sealed by its manifest: any change to any of its files is noticed on reading.

The manifest gives the SHA-256 and size of every file, and a digest of itself. It is written before
the files that it names, so that a process killed at any moment leaves either a complete folder or
one that says it is incomplete:

- :func:`seal` writes a new folder: first a manifest that says ``"complete": false``, then the
  files, then the manifest again.
- :func:`replace_file` replaces one file of a sealed folder: meanwhile the manifest allows both the
  old and the new file, and what describes the old one may be gone.
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
_MOST_BYTES = 8 * 2**20  # for a manifest, and any other file that is read as a whole

Write = Callable[[Path], object]


@dataclass(frozen=True)
class Stamp:
    """What a file must contain: its SHA-256 and size."""

    sha256: str
    bytes: Annotated[int, Field(ge=0)]

    @classmethod
    def of(cls, path: Path) -> Stamp:
        """The stamp of a file as it is now. Raises :class:`BundleError` where it cannot be read."""
        with opened(path) as file:
            return cls(hashlib.file_digest(file, "sha256").hexdigest(), os.fstat(file.fileno()).st_size)


@dataclass(frozen=True)
class Sealed:
    """A manifest: ``about`` is its content; ``stamps`` lists what each file may be, with None for "missing"."""

    folder: Path
    about: Mapping[str, Any]
    stamps: Mapping[str, tuple[Stamp | None, ...]]
    complete: bool = True

    @classmethod
    def open(cls, folder: Path) -> Sealed:
        """A folder's manifest; files are checked when they are read.

        Raises :class:`BundleError` where it is damaged or the folder is incomplete.
        """
        contents = read_json(read_small(folder / MANIFEST), folder / MANIFEST)
        digest = contents.pop("sha256", None)
        if digest != _digest(contents):
            raise BundleError(
                f"'{folder / MANIFEST}' was changed or damaged after it was written: its digest differs", fix=AGAIN
            )
        files, complete = contents.pop("files", None), contents.pop("complete", None)
        try:
            stamps = _STAMPS.validate_json(json.dumps(files), strict=True)
        except ValidationError as error:
            raise BundleError(f"'{folder / MANIFEST}' has no valid list of files", fix=AGAIN) from error
        if complete is not True:
            raise BundleError(
                f"'{folder}' is incomplete: writing it was interrupted", fix=f"run the command again, or {AGAIN}"
            )
        return cls(folder, contents, stamps)

    @classmethod
    def unfinished(cls, folder: Path) -> bool:
        """Whether writing the folder was interrupted."""
        return read_json(read_small(folder / MANIFEST), folder / MANIFEST).get("complete") is False

    def __contains__(self, name: str) -> bool:
        return any(stamp is not None for stamp in self.stamps.get(name, ()))

    def read(self, name: str) -> bytes:
        """The content of a small file, once checked against its stamp."""
        if name not in self:
            raise BundleError(f"'{self.folder}' has no {name}", fix=AGAIN)
        content = read_small(self.folder / name, max(s.bytes for s in self.stamps[name] if s is not None))
        self._check(name, Stamp(hashlib.sha256(content).hexdigest(), len(content)))
        return content

    def stamp(self, name: str) -> Stamp | None:
        """A file's stamp, once checked against those allowed; None where it is missing and may be."""
        path = self.folder / name
        found = None
        if os.path.lexists(path):
            with opened(path) as file:
                size = os.fstat(file.fileno()).st_size
            # A file of another size need not be read.
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
            raise BundleError(f"'{path}' does not belong to this bundle: it was saved without it", fix="remove it")
        raise BundleError(
            f"'{path}' is not what was saved: it was edited, or damaged on the way",
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


def seal(
    folder: Path,
    about: Mapping[str, Any],
    files: Mapping[str, Write],
    keep: tuple[str, ...] = (),
    without: tuple[str, ...] = (),
) -> None:
    """Write a folder: each of ``files`` with a function that is passed the path to write to.

    Existing files among ``keep`` stay, and are sealed as they are; those in ``without`` are removed. Files appear in
    the given order.
    """
    kept = {name: (Stamp.of(folder / name),) for name in keep if (folder / name).exists()}
    if not files:  # only the manifest is written, in one rename
        Sealed(folder, about, kept).write()
        return
    with ExitStack() as renames:  # done on exit, the last one first
        stamps: dict[str, tuple[Stamp | None, ...]] = {}
        for name, write in reversed(list(files.items())):
            path = renames.enter_context(writing_beside(folder / name))
            write(path)
            stamps[name] = (Stamp.of(path),)
        sealed = Sealed(folder, about, {**dict(reversed(stamps.items())), **kept}, complete=False)
        sealed.write()
        for name in without:
            (folder / name).unlink(missing_ok=True)
    replace(sealed, complete=True).write()


def replace_file(folder: Path, name: str, write: Write, without: tuple[str, ...] = ()) -> None:
    """Replace or add one file of a sealed folder, with a function that is passed the path to write to.

    Files in ``without`` describe the one that is replaced: they go before another takes its place.
    """
    sealed = Sealed.open(folder)
    with writing_beside(folder / name) as path:
        write(path)
        before = Stamp.of(folder / name) if (folder / name).exists() else None
        after = Stamp.of(path)
        gone = [one for one in without if one in sealed and after != before]
        perhaps = {one: (*sealed.stamps[one], None) for one in gone}
        # A file that was damaged before must not be accepted as the old one.
        allowed = [stamp for stamp in sealed.stamps.get(name, (None,)) if stamp == before]
        replace(sealed, stamps={**sealed.stamps, **perhaps, name: (*allowed, after)}).write()
        for one in gone:
            (folder / one).unlink(missing_ok=True)
    kept = {one: stamps for one, stamps in sealed.stamps.items() if one not in gone}
    replace(sealed, stamps={**kept, name: (after,)}).write()


def opened(path: Path) -> BufferedReader:
    """A regular file, open for reading. Raises :class:`BundleError` for anything else, without waiting."""
    try:
        return open_file(path)
    except FileNotFoundError as error:
        raise BundleError(
            f"'{path.parent}' is not a bundle: {path.name} is missing", fix="give a run's bundle/ folder"
        ) from error
    except BadFormat as error:
        raise BundleError(f"'{path}' is not a file", fix=AGAIN) from error
    except OSError as error:
        raise BundleError(
            f"'{path}' cannot be read ({error.strerror or error})", fix=f"check its name and permissions, or {AGAIN}"
        ) from error


def read_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object with finite numbers. Raises :class:`BundleError`."""
    try:
        found = json.loads(content, parse_constant=_refuse)
        json.dumps(found)  # may fail at fewer nesting levels than reading
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise BundleError(f"'{path}' is not readable JSON ({reason})", fix=AGAIN) from error
    if not isinstance(found, dict):
        raise BundleError(f"'{path}' holds a {type(found).__name__}, not an object", fix=AGAIN)
    return found


def _refuse(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def read_small(path: Path, most: int = _MOST_BYTES) -> bytes:
    """A file's content, up to one byte more than ``most``, so that a longer file is noticed.

    Raises :class:`BundleError` for anything but a file, and for one larger than any that is read as a whole.
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
    """A digest of values, however their file lays them out; the order of fields counts, as it does for targets."""
    return hashlib.sha256(json.dumps(contents, separators=(",", ":")).encode("ascii")).hexdigest()
