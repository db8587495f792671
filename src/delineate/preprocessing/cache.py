"""Prepared subjects on disk: made once, shared by runs, memory-mapped in training.

A subject is in a folder named by a key of everything it depends on: the bytes of its files, the
fitted pipeline, the targets, how files were read. So a folder never goes stale, and several recipes
can share a cache. It holds ``image.npy`` (C, X, Y, Z) float16, ``target.npy`` (T, X, Y, Z) uint8 and
``points.npy`` (n, 3), all Fortran-ordered, and ``meta.json``. Each file appears whole or not at
all, ``meta.json`` last: a folder that has it is complete, however many runs write at once. Where the disk may take
only so much (:class:`~delineate.preprocessing.room.Room`), arrays come and go, and ``meta.json`` stays.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from pathlib import Path
from typing import Any, Literal, Self, overload

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.limits import total_memory_bytes
from delineate.core.subject import Subject, files_of
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import channels_in, load_label, load_scan
from delineate.errors import MissingFile, OutputError, RecipeError, Truncated
from delineate.io.files import content_hash, writing_beside
from delineate.io.formats import parts_of
from delineate.plugins import requirement_of
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.room import ARRAYS, META, SUBJECT, Room, is_whole, used

FORMAT = 1
"""Part of every key; increased whenever prepared subjects would come out differently."""

POINTS_PER_TARGET = 20_000
_ABANDONED_S = 3600
_HALF_WRITTEN = re.compile(r"\.[0-9a-f]{8}-(image\.npy|target\.npy|points\.npy|meta\.json)")
_OPEN_SUBJECTS = 32
_PARTS_OF_ROOM = 3
"""Into how many parts the room for training subjects is divided: those in use, those to come, and those before them,
whose files take their space until the last reader closes them."""
_TRIES = 10
_LEAST_LARGEST = 1e-4
"""A channel that reaches less has few digits left in half precision (below 6e-5), or none (below 3e-8)."""


@dataclass(frozen=True, eq=False)
class PreparedSubject:
    """A subject ready for training.

    ``image`` (C, X, Y, Z) float16 and ``target`` (T, X, Y, Z) uint8 are Fortran-ordered, shared, and
    not to be changed. ``points`` maps each target, counted from 1, to voxel indices (n, 3) drawn from
    it, at most :data:`POINTS_PER_TARGET`. ``counts`` maps it to its number of voxels, and 0 to the
    voxels that belong to no target; ignored voxels are not counted.
    """

    id: str
    image: NDArray[np.float16]
    target: NDArray[np.uint8]
    points: Mapping[int, NDArray[np.integer]]
    grid: Grid
    counts: Mapping[int, int]

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        return self.grid.spacing_mm


class PreparedDataset(Sequence[PreparedSubject]):
    """Prepared subjects by their folders; a subject's arrays are mapped when it is accessed.

    Few stay open: each memory map holds a file descriptor, and cohorts outnumber those. Pickled for
    another process, it carries no voxels; processes share the pages that the system caches.

    With ``preparation``, subjects that made room for others are prepared again when they are accessed.
    """

    def __init__(self, folders: Sequence[Path], preparation: Preparation | None = None) -> None:
        self.folders = tuple(folders)
        self._preparation = preparation
        self._entries = tuple(_Entry.read(folder) for folder in self.folders)
        self._loaded: tuple[PreparedSubject, ...] | None = None
        self._keep_open(_OPEN_SUBJECTS)

    def _keep_open(self, most: int) -> None:
        self._mapped = lru_cache(maxsize=most)(lambda entry: self._opened(entry, "r"))

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(entry.id for entry in self._entries)

    @property
    def grids(self) -> tuple[Grid, ...]:
        return tuple(entry.grid for entry in self._entries)

    @property
    def counts(self) -> tuple[Mapping[int, int], ...]:
        """For each subject, the number of voxels in each target and in none (0)."""
        return tuple(entry.counts for entry in self._entries)

    @property
    def nbytes(self) -> int:
        """Size of all files in bytes."""
        return sum(entry.nbytes for entry in self._entries)

    def in_memory(self, budget_bytes: int | None = None) -> PreparedDataset:
        """This data set with all arrays in memory if they fit the budget (:func:`budget_in_memory`), else itself."""
        if self.nbytes > (budget_in_memory() if budget_bytes is None else budget_bytes):
            return self
        dataset = self._of(range(len(self)))
        dataset._loaded = tuple(self._opened(entry, None) for entry in self._entries)
        return dataset

    def repeated(self, counts: Sequence[int]) -> PreparedDataset:
        """This data set with each subject as many times as ``counts`` says, sharing its arrays."""
        return self._of([place for place, count in enumerate(counts) for _ in range(count)])

    def at_a_time(self, beside: PreparedDataset) -> int | None:
        """How many subjects training should go round before the next, so that those to come can be prepared meanwhile.

        None if all are at hand: in memory, or within what the disk may take together with those ``beside``, which stay.
        Raises :class:`OutputError` if the disk may not take enough.
        """
        room = None if self._preparation is None else self._preparation.room
        if room is None or room.most_bytes is None or self._loaded is not None:
            return None
        sizes = {entry.folder: entry.nbytes for entry in self._entries}
        others = {entry.folder: entry.nbytes for entry in beside._entries if beside._loaded is None}
        if sum((sizes | others).values()) <= room.most_bytes:
            return None
        least = sum(others.values()) + _PARTS_OF_ROOM * max(sizes.values())
        if least > room.most_bytes:
            raise OutputError(
                f"{room.most_bytes / 1e9:g} GB are too little for prepared subjects: the largest takes "
                f"{max(sizes.values()) / 1e9:.2g} GB, and those for validation {sum(others.values()) / 1e9:.2g} GB",
                fix=f"let them take at least {ceil(least / 1e7) / 100:g} GB (--cache-gb)",
            )
        room.kept = frozenset(others)
        many = (room.most_bytes - sum(others.values())) // (_PARTS_OF_ROOM * max(sizes.values()))
        self._keep_open(min(many, _OPEN_SUBJECTS))
        return int(many)

    def fetch(self, index: int) -> None:
        """Prepare a subject again if it made room for others, and count it as used."""
        if self._loaded is None and self._preparation is not None:
            self._preparation.have(self.folders[index])

    def _of(self, places: Sequence[int]) -> PreparedDataset:
        """The subjects at these places, sharing what is in memory."""
        part = PreparedDataset((), self._preparation)
        part.folders = tuple(self.folders[place] for place in places)
        part._entries = tuple(self._entries[place] for place in places)
        part._loaded = None if self._loaded is None else tuple(self._loaded[place] for place in places)
        return part

    def _opened(self, entry: _Entry, mmap_mode: Literal["r"] | None) -> PreparedSubject:
        for _ in range(_TRIES):
            if self._preparation is not None:
                self._preparation.have(entry.folder)
            with suppress(FileNotFoundError):  # another process has just removed it
                return entry.open(mmap_mode)
        raise _damaged(entry.folder)

    def __len__(self) -> int:
        return len(self.folders)

    @overload
    def __getitem__(self, index: int) -> PreparedSubject: ...
    @overload
    def __getitem__(self, index: slice) -> PreparedDataset: ...
    def __getitem__(self, index: int | slice) -> PreparedSubject | PreparedDataset:
        if isinstance(index, slice):
            return self._of(range(len(self))[index])
        return self._mapped(self._entries[index]) if self._loaded is None else self._loaded[index]

    def __reduce__(self) -> tuple[type[PreparedDataset], tuple[tuple[Path, ...], Preparation | None]]:
        return PreparedDataset, (self.folders, self._preparation)


@dataclass(frozen=True, eq=False)
class Preparation:
    """How subjects are prepared into ``room``, and which of them lies in which folder there."""

    pipeline: Pipeline
    targets: Targets
    room: Room
    channels: Sequence[str] | None
    nan: Literal["refuse", "fill"]
    orientation: Literal["refuse", "sform", "qform"]
    hashes: FileHashes
    subjects: dict[Path, Subject]

    def place_of(self, subject: Subject) -> Path:
        """The folder of a subject, by all that its content depends on."""
        files = _hashes_of(subject, self.channels, self.targets, self.hashes)
        # 2, since border voxels were cut in half when it was True; the keys of all other subjects stay.
        rules = [self.nan, self.orientation, subject.resample and 2]
        # Another version of a package's step may prepare differently.
        foreign = [found for step in self.pipeline.steps if (found := requirement_of(type(step)))]
        pipeline = self.pipeline.model_dump(mode="json")
        parts = [FORMAT, subject.id, files, pipeline, self.targets.as_dict(), *rules, *foreign]
        # Keys of JSON objects stay in order: that of the targets is the order of the classes.
        key = hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()
        return self.room.folder / key

    def have(self, place: Path) -> None:
        """Prepare the subject of a folder unless its arrays are there, and count it as used.

        Raises :class:`MissingFile` if its files are not what they were.
        """
        used(place)  # first, so that nobody removes it while it is written
        if not is_whole(place):
            with self.room.turn(place):
                if not is_whole(place):
                    subject = self.subjects[place]
                    if self.place_of(subject) != place:
                        raise MissingFile(
                            f"the files of '{subject.id}' are not what they were when it was prepared first",
                            fix="restore them, or start another run",
                        )
                    self.write(place)

    def write(self, place: Path) -> None:
        """Prepare the subject of a folder."""
        subject = self.subjects[place]
        scan = load_scan(subject, self.channels, nan=self.nan, orientation=self.orientation)
        label = load_label(subject, self.targets, scan.grid, orientation=self.orientation)
        prepared, encoded, _ = self.pipeline.apply_with_label(scan, self.targets.encode(label.voxels))
        _write(place, subject.id, prepared, encoded, self.targets, self.room)


def prepare(
    subjects: Sequence[Subject],
    pipeline: Pipeline,
    targets: Targets,
    folder: Path,
    *,
    channels: Sequence[str] | None = None,
    threads: int = 2,
    most_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    nan: Literal["refuse", "fill"] = "refuse",
    orientation: Literal["refuse", "sform", "qform"] = "refuse",
) -> PreparedDataset:
    """Prepare labelled subjects into ``folder``, reusing those already there.

    ``channels`` are read in that order (by default all). Each thread holds one subject in memory. All that is prepared
    in ``folder`` may take ``most_bytes``: beyond that, what was used least recently is removed, whoever prepared it.
    ``progress(done, total)`` is called after each subject. If it is interrupted, the same call resumes
    after the subjects that were finished.

    Raises :class:`~delineate.errors.RecipeError` if the pipeline is not fitted or leaves intensities
    that half precision cannot hold, and whatever reading a subject raises.
    """
    if pipeline.needs_fit:
        raise RecipeError("the preprocessing is not fitted", fix="fit it on the training subjects before preparing")
    _sweep(folder)
    hashes = FileHashes(folder / "hashes.json")
    how = Preparation(pipeline, targets, Room(folder, most_bytes), channels, nan, orientation, hashes, {})

    def prepare_one(subject: Subject) -> Path:
        place = how.place_of(subject)
        how.subjects[place] = subject
        if not (place / META).exists():
            how.write(place)
        used(place)
        return place

    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(prepare_one, subject) for subject in subjects]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(futures))
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            hashes.save()
    return PreparedDataset([future.result() for future in futures], how)


class FileHashes:
    """Content hashes of files, remembered in a file as long as size and modification time stay."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, list[Any]] = {}
        self._changed = False
        # Only a cache: if it cannot be read, start again.
        with suppress(OSError, ValueError):
            self._known = json.loads(path.read_text(encoding="utf-8"))

    def __reduce__(self) -> tuple[type[FileHashes], tuple[Path]]:
        return FileHashes, (self._path,)

    def of(self, file: Path) -> str:
        """BLAKE2b of the file's bytes, as 32 hexadecimal digits."""
        try:
            stat = file.stat()
        except FileNotFoundError as error:
            raise MissingFile(f"'{file}' does not exist", fix="restore it, or leave the subject out") from error
        stamp, name = [stat.st_size, stat.st_mtime_ns], str(file.resolve())
        known = self._known.get(name, [])
        if known[:2] == stamp:
            return str(known[2])
        digest = content_hash(file)
        self._known[name] = [*stamp, digest]
        self._changed = True
        return digest

    def save(self) -> None:
        """Write the hashes, where that can be done.

        If two runs save at once, one loses its own and computes them again next time.
        """
        if not self._changed:
            return
        with suppress(OutputError), writing_beside(self._path) as beside:
            beside.write_text(json.dumps(self._known), encoding="utf-8")


@dataclass(frozen=True, eq=False)
class _Entry:
    """What ``meta.json`` says."""

    folder: Path
    id: str
    grid: Grid
    counts: Mapping[int, int]
    nbytes: int

    @classmethod
    def read(cls, folder: Path) -> Self:
        try:
            meta = json.loads((folder / META).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(folder) from error
        counts = {int(target): n for target, n in meta["counts"].items()}
        return cls(folder, meta["id"], Grid(meta["shape"], np.array(meta["affine"])), counts, meta["nbytes"])

    def open(self, mmap_mode: Literal["r"] | None) -> PreparedSubject:
        try:
            image, target, points = (
                np.asarray(np.load(self.folder / name, mmap_mode=mmap_mode))
                for name in ("image.npy", "target.npy", "points.npy")
            )
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise _damaged(self.folder) from error
        numbers = sorted(self.counts)[1:]  # without 0, the background
        ends = np.cumsum([min(self.counts[number], POINTS_PER_TARGET) for number in numbers])
        parts = dict(zip(numbers, np.split(points, ends[:-1]), strict=True))
        return PreparedSubject(self.id, image, target, parts, self.grid, self.counts)


def _hashes_of(
    subject: Subject, channels: Sequence[str] | None, targets: Targets, hashes: FileHashes
) -> list[list[str | int]]:
    """The name and content hash of each channel, then of the label or of each target's mask.

    A channel of a file that holds several is followed by its place there, which only the data set's description tells.
    """
    found: list[list[str | int]] = []
    for name in subject.channels if channels is None else channels:
        if name in subject.scans:
            held = channels_in(subject, subject.scans[name])
            place = [held.index(name)] if len(held) > 1 else []
            found.append([name, *map(hashes.of, parts_of(subject.scans[name])), *place])
    label = {} if subject.label is None else files_of(subject.label, targets.names)
    for name, file in label.items():
        found.append([name, *map(hashes.of, parts_of(file))])
    return found


def _write(folder: Path, id: str, prepared: Volume, encoded: NDArray[np.uint8], targets: Targets, room: Room) -> None:
    for channel in prepared.voxels:
        largest = max(-float(channel.min()), float(channel.max()))
        if largest > float(np.finfo(np.float16).max):
            raise RecipeError(
                f"prepared intensities of '{id}' reach {largest:.4g}, beyond half precision (65504)",
                fix="add a normalise step to the preprocessing",
            )
        if 0 < largest < _LEAST_LARGEST:
            raise RecipeError(
                f"prepared intensities of a channel of '{id}' reach no more than {largest:.4g}, too little for half "
                f"precision ({_LEAST_LARGEST:g})",
                fix="add a normalise step to the preprocessing",
            )
    points, counts = _draw_points(encoded, targets, np.random.default_rng(int(folder.name, 16)))
    image, target = np.asfortranarray(prepared.voxels, dtype=np.float16), np.asfortranarray(encoded)
    arrays: dict[str, NDArray] = dict(zip(ARRAYS, (points, target, image), strict=True))
    nbytes = sum(array.nbytes for array in arrays.values())
    meta = {
        "id": id,
        "shape": prepared.grid.shape,
        "affine": prepared.grid.affine.tolist(),
        "counts": counts,
        "nbytes": nbytes,
    }
    with room.taking(nbytes):
        for name, array in arrays.items():
            with writing_beside(folder / name) as beside:
                np.save(beside, array)
        with writing_beside(folder / META) as beside:  # by which others who make room see the arrays
            beside.write_text(json.dumps(meta), encoding="utf-8")


def _draw_points(
    encoded: NDArray[np.uint8], targets: Targets, rng: np.random.Generator
) -> tuple[NDArray[np.integer], dict[int, int]]:
    """Voxel indices (n, 3) drawn from each target in turn, and how many voxels each has (0: no target)."""
    shape = encoded.shape[1:]
    dtype = np.int16 if max(shape) <= np.iinfo(np.int16).max else np.int32
    counts = {0: int(np.count_nonzero((encoded == 0).all(axis=0)))}
    points = []
    for number in range(1, len(targets.values) + 1):
        plane, value = (encoded[0], number) if targets.exclusive else (encoded[number - 1], 1)
        flat = np.flatnonzero((plane == value).ravel(order="F"))
        counts[number] = len(flat)
        if len(flat) > POINTS_PER_TARGET:
            flat = rng.choice(flat, POINTS_PER_TARGET, replace=False)
        points.append(np.stack(np.unravel_index(flat, shape, order="F"), axis=1).astype(dtype))
    return np.concatenate(points), counts


def _sweep(folder: Path) -> None:
    """Remove files that killed runs left half written: those untouched for an hour.

    Only files named like prepared subjects' are removed: any folder may be given as the cache, and
    everything else in it is the user's.
    """
    for leftover in folder.glob("*/.*"):
        if not (SUBJECT.fullmatch(leftover.parent.name) and _HALF_WRITTEN.fullmatch(leftover.name)):
            continue
        # Its run has just finished it, or it is another user's, who shares the cache.
        with suppress(OSError):
            if time.time() - leftover.stat().st_mtime > _ABANDONED_S:
                leftover.unlink()


def _damaged(folder: Path) -> Truncated:
    return Truncated(f"prepared subject '{folder}' is damaged", fix="delete this folder and run again")


def budget_in_memory() -> int:
    """How many bytes of prepared subjects stay in memory: a quarter of what this process may take."""
    return total_memory_bytes() // 4
