"""Repaired copies of data sets: only on request, overwriting nothing, with a manifest of what was done and why."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, permute_axes
from delineate.core.subject import Label, Masks, Subject, paths_of
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import SAME_GRID_MM, Dataset, Orientation, resample_onto, resampled
from delineate.datasets.mirroring import Suspicion, suspicion
from delineate.errors import AmbiguousOrientation, BadPath, DelineateError, OutputError, UnknownLayout
from delineate.io.files import read_json, walk, writing_beside
from delineate.io.formats import (
    is_series,
    name_of,
    parts_of,
    read_header,
    read_label,
    read_volume,
    write_label,
    write_volume,
)
from delineate.io.overwriting import check_folder
from delineate.io.segments import segments_in

MANIFEST = "repairs.json"
_DESCRIPTIONS = (".json", ".csv", ".tsv")
"""Suffixes of files that say what the scans are: their layout, names, sites, how they were made or simulated."""


@dataclass(frozen=True)
class Repair:
    """What happened to a file: ``copied``, ``repaired`` or ``left out``, and why. ``file`` is relative to the root."""

    subject: str
    file: str
    done: str
    why: str = ""


def repair(
    dataset: Dataset,
    out: Path,
    *,
    orientation: Orientation = "refuse",
    progress: Callable[[int, int], None] | None = None,
) -> list[Repair]:
    """Write a copy of the data set to ``out``, under the same names, with everything repaired that can be.

    A channel or label on the first channel's grid, but in another orientation, is reoriented; one on
    another grid is resampled to it (channels linearly, labels to the nearest voxel); a label whose
    border shows that it is mirrored is flipped back; voxels that are not finite become the smallest
    finite value; a label's values are rounded. A file with two orientations is repaired if
    ``orientation`` chooses one. A subject with anything that cannot be repaired is left out. What describes the data
    set (:data:`_DESCRIPTIONS`) is copied. Raises :class:`OutputError` where ``out`` is not empty.
    """
    check_new(out)
    descriptions = _descriptions_of(dataset.root, out)
    found: list[Repair] = []
    for done, subject in enumerate(dataset.subjects, start=1):
        found += _repair_subject(subject, dataset.root, out, dataset.targets, orientation)
        if progress is not None:
            progress(done, len(dataset.subjects))
    for file in descriptions:
        _copy(file, out / _below(dataset.root, file))
    left = {one.subject for one in found if one.done == "left out"}
    if left and (out / "dataset.json").is_file():
        _unlist(left, out / "dataset.json")
    with writing_beside(out / MANIFEST) as beside:
        beside.write_text(json.dumps([asdict(r) for r in found], indent=1) + "\n", encoding="utf-8")
    return found


def _descriptions_of(root: Path, out: Path) -> list[Path]:
    """Files that describe a data set, wherever they lie in it, before there is anything in ``out``."""
    places = ((place, names) for place, names in walk(root) if not place.resolve().is_relative_to(out.resolve()))
    files = (place / name for place, names in places for name in names)
    return [file for file in files if file.name.lower().endswith(_DESCRIPTIONS) and file.name != MANIFEST]


def _unlist(left: Set[str], description: Path) -> None:
    """Take subjects that were left out from the lists and numbers in a dataset.json."""
    about = read_json(description, UnknownLayout)
    for part, number in (("training", "numTraining"), ("test", "numTest")):
        if isinstance(about.get(part), list):
            about[part] = [entry for entry in about[part] if _subject_of(entry) not in left]
            about |= {number: len(about[part])} if number in about else {}
        elif part == "training" and isinstance(about.get(number), int):
            about[number] = max(0, about[number] - len(left))  # nnU-Net has no lists
    with writing_beside(description) as beside:
        beside.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _subject_of(entry: object) -> str:
    """Whose scan an entry in a list of dataset.json is."""
    image = entry.get("image") if isinstance(entry, Mapping) else entry
    return name_of(Path(image)) if isinstance(image, str) else ""


def check_new(folder: Path) -> None:
    """Raise :class:`OutputError` where ``folder`` is not empty or cannot be made."""
    check_folder(folder)
    if folder.exists() and any(folder.iterdir()):
        raise OutputError(f"'{folder}' is not empty", fix="give a new folder, so that nothing is overwritten")


def _repair_subject(
    subject: Subject, root: Path, out: Path, targets: Targets | None, orientation: Orientation
) -> Iterator[Repair]:
    """Repair a subject's files; none is written before all are known to be good."""
    made: list[tuple[Path, Callable[[], Volume | LabelVolume], str]] = []
    first: Grid | None = None
    shown: list[NDArray] = []
    try:
        if not subject.scans:
            raise OutputError("it has a label but no scan", fix="add the scan")
        for path in subject.files:
            _check_inside(root, path)
        for path in dict.fromkeys(subject.scans.values()):
            volume, why = _readable(path, orientation)
            if first is None:
                first = volume.grid
            volume, moved = _onto(volume, first)
            shown += list(volume.voxels)
            made.append((path, partial(_same, volume), _joined(why, moved)))
        if subject.label is not None and first is not None:
            made += _label_repaired(subject.label, first, shown, targets, orientation)
    except DelineateError as error:
        yield from (Repair(subject.id, _below(root, file), "left out", str(error)) for file in subject.files)
        return
    for path, make, why in made:
        name = _below(root, path)
        several = "a series" if is_series(path) else "a folder of pictures" if path.is_dir() else ""
        if not why and not several:
            for file in parts_of(path):
                _copy(file, out / _below(root, file))
            yield Repair(subject.id, name, "copied")
            continue
        place = out / (f"{name}.nii.gz" if several else name)
        on_its_grid = made[0][0]  # the first channel, whose grid the others now share
        content = make()
        if isinstance(content, Volume):
            write_volume(place, content, like=on_its_grid)
        else:
            write_label(place, content, like=on_its_grid)
        yield Repair(subject.id, str(place.relative_to(out)), "repaired", why or f"{several} became one file")


def _readable(path: Path, orientation: Orientation) -> tuple[Volume, str]:
    """A scan with only finite voxels, and what it took."""
    try:
        return read_volume(path, orientation="refuse"), ""
    except DelineateError as error:
        # Read again, allowing every fault with a single right answer; any other raises.
        return read_volume(path, orientation=orientation, nan="fill"), str(error)


def _onto(volume: Volume, grid: Grid) -> tuple[Volume, str]:
    """A scan on the first one's grid, and what it took."""
    turned = _turned(volume, grid)
    if turned is not None:
        return turned
    return resampled(volume, grid), f"resampled linearly from {volume.grid} to {grid}"


def _turned(volume: Volume, grid: Grid) -> tuple[Volume, str] | None:
    """A scan that lies on ``grid``, perhaps in another orientation, and what it took; None for any other."""
    if volume.grid.matches(grid, SAME_GRID_MM):
        return volume, ""
    order, flip = volume.grid.axes_to(grid.orientation)
    turned = Volume(permute_axes(volume.voxels, order, flip), volume.grid.permute(order, flip))
    if turned.grid.matches(grid, SAME_GRID_MM):
        return Volume(turned.voxels, grid), f"reoriented from {volume.grid.orientation} to {grid.orientation}"
    return None


def _same(volume: Volume) -> Volume:
    return volume


def _label_repaired(
    label: Label, grid: Grid, shown: list[NDArray], targets: Targets | None, orientation: Orientation
) -> Iterator[tuple[Path, Callable[[], LabelVolume], str]]:
    """A label's files, each with how to make it anew on the scan's grid, and what that takes.

    Masks are made again when they are written, since a hundred of them fill the memory. They were drawn together: if
    the largest is mirrored, all are.
    """

    def read(path: Path) -> LabelVolume:
        return read_label(path, orientation=orientation)

    def onto(path: Path) -> tuple[LabelVolume, str]:
        one = read(path)
        moved, why = _label_onto(one, grid, mirrored if one.grid.matches(first.grid, SAME_GRID_MM) else None)
        return moved, _joined(_ambiguity(path), why)

    segmentations = [path for path in paths_of(label) if not is_series(path) and segments_in(path) is not None]
    for path in segmentations:
        _check_segments_on(path, grid)
        yield path, partial(read, path), ""
    plain = [path for path in paths_of(label) if path not in segmentations]
    if not plain:
        return
    first = max(map(read, plain), key=lambda one: np.count_nonzero(one.voxels))
    by_value = targets is not None and not isinstance(label, Masks)
    mask = targets.foreground(first.voxels) if targets is not None and by_value else first.voxels > 0
    mirrored = suspicion(shown, grid, mask, first.grid)
    for path in plain:
        yield path, partial(lambda path: onto(path)[0], path), onto(path)[1]


def _ambiguity(path: Path) -> str:
    """What is said of a file with two orientations, which copying would keep; nothing of others."""
    if path.is_file():  # not a folder of pictures
        try:
            read_header(path)
        except AmbiguousOrientation as error:
            return str(error)
    return ""


def _check_segments_on(path: Path, grid: Grid) -> None:
    """Raise unless named segments lie on the scan's grid: they are only copied."""
    segments = segments_in(path)
    assert segments is not None
    for _, (_, own) in segments.masks(segments.names[:1], grid):
        if not own.matches(grid, SAME_GRID_MM):
            raise OutputError(
                f"its segments are {own}, the scan is {grid}", fix="save them on the scan's grid with 3D Slicer"
            )


def _label_onto(label: LabelVolume, grid: Grid, mirrored: Suspicion | None) -> tuple[LabelVolume, str]:
    """A label on the scan's grid, and what it took."""
    if mirrored is not None:
        turned = permute_axes(label.voxels, (0, 1, 2), mirrored.flip)
        return LabelVolume(turned, grid), f"moved onto the image's grid: {mirrored}"
    on_grid = _turned(Volume(label.voxels[None], label.grid), grid)
    if on_grid is not None:
        moved, why = on_grid
        return LabelVolume(moved.voxels[0], grid), why
    voxels = resample_onto(label.voxels, label.grid, grid, order=0)
    kept = np.count_nonzero(voxels) * grid.voxel_ml
    had = np.count_nonzero(label.voxels) * label.grid.voxel_ml
    if kept < 0.5 * had:
        raise OutputError(
            f"its label marks {had:.3g} ml, only {kept:.3g} ml of it on the scan: it is another patient's",
            fix="find this patient's label",
        )
    return LabelVolume(voxels, grid), f"resampled to the nearest voxel from {label.grid} to {grid}"


def _copy(file: Path, to: Path) -> None:
    with writing_beside(to) as beside:
        shutil.copyfile(file, beside)


def _joined(*reasons: str) -> str:
    return "; ".join(reason for reason in reasons if reason)


def _below(root: Path, path: Path) -> str:
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)


def _check_inside(root: Path, path: Path) -> None:
    """Raise for a file outside the data set: its copy would lie outside too, perhaps overwriting the original."""
    if not path.is_relative_to(root) or ".." in path.relative_to(root).parts:
        raise BadPath(f"'{path}' lies outside '{root}'", fix="move it into the data set")
