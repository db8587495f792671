"""Which prediction belongs to which reference."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.core.subject import Label, Subject, paths_of
from delineate.core.targets import SharedTargets, Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset, masks_of, named_in, numbered_targets, read_numbered
from delineate.datasets.layouts import open_dataset
from delineate.errors import DuplicateSubject, MissingFile, UnknownLayout
from delineate.io.formats import name_of, read_label, suffix_of
from delineate.io.voxels import Orientation

_LABEL_ENDING = re.compile(r"_(segmentation|seg|label|mask|gt)$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A prediction and the reference it is measured against; ``source`` is the subject, if a data set has it.

    ``shared`` relabels both if their label values differ.
    """

    subject: str
    prediction: Label
    reference: Label
    source: Subject | None = None
    shared: SharedTargets | None = None

    @property
    def site(self) -> str:
        """The subject's site, if it is known."""
        return "" if self.source is None else self.source.site

    @property
    def patient(self) -> str:
        """Whose scan it is; the subject itself, if that is not known."""
        return self.subject if self.source is None else self.source.patient

    def labels(self, targets: Targets, *, orientation: Orientation = "refuse") -> tuple[LabelVolume, LabelVolume]:
        """The prediction and the reference, with the same label values: those of ``targets``, or of ``shared``.

        Where one was saved for a part of the scan, it is widened to the other's grid; outlines are drawn on it.
        Raises any error of reading.
        """
        shared = self.shared or SharedTargets(targets, targets, targets)

        def read(label: Label, relabelled: Callable[[NDArray, str], NDArray], grid: Grid | None = None) -> LabelVolume:
            if masks_of(label, shared.targets, self.subject) is not None:
                return read_numbered(label, shared.targets, self.subject, grid, orientation=orientation)
            [path] = paths_of(label)
            found = read_label(path, orientation=orientation)
            if self.shared is None:
                return found
            return LabelVolume(relabelled(found.voxels, self.subject), found.grid)

        prediction = read(self.prediction, shared.prediction)
        reference = read(self.reference, shared.reference, prediction.grid)
        if prediction.grid.shape != reference.grid.shape:  # it may be the prediction that is a part
            prediction = read(self.prediction, shared.prediction, reference.grid)
        return prediction, reference


class Pairing(NamedTuple):
    """The pairs, and the names that have no partner, grouped by what is missing."""

    pairs: list[Pair]
    unpaired: dict[str, list[str]]


def open_references(folder: Path) -> Path | Dataset:
    """The data set in a folder of references, or the folder itself if it is none: labels, or scans beside them."""
    if not folder.is_dir():
        return folder
    try:
        dataset = open_dataset(folder)
    except UnknownLayout:
        if _scans_in(folder):
            return folder
        raise
    return dataset if any(subject.label is not None for subject in dataset.subjects) else folder


def pair_files(predictions: Path, references: Path | Dataset) -> Pairing:
    """Pair ``<subject>.nii.gz`` (or another format) in a folder with the reference of that name.

    ``references`` is a folder of labels, whose names may end in _segmentation, _seg, _label, _mask
    or _gt; or a data set or its folder, which also knows sites. Two single files pair whatever their names.

    Raises :class:`MissingFile` if nothing pairs, :class:`DuplicateSubject` if two files have the same
    subject's name.
    """
    if isinstance(references, Path) and predictions.is_file() and references.is_file():
        return Pairing([Pair(name_of(predictions), predictions, references)], {})
    found = _unique((name_of(file), file) for file in _scans_in(predictions))
    known = _references_in(references, found)
    paired = [Pair(name, found[name], *known[name]) for name in sorted(found.keys() & known.keys())]
    if not paired:
        of = references if isinstance(references, Path) else references.root
        raise MissingFile(
            f"no prediction in '{predictions}' ({_some(found)}) has the name of a reference in '{of}' ({_some(known)})",
            fix="name predictions <subject>.nii.gz",
        )
    alone = {
        "prediction without reference": sorted(found.keys() - known.keys()),
        "reference without prediction": sorted(known.keys() - found.keys()),
    }
    return Pairing(paired, {what: names for what, names in alone.items() if names})


def labels_in(folder: Path) -> dict[str, Label]:
    """Labels in a folder by subject; names may end in _seg and the like. Raises :class:`DuplicateSubject`."""
    return {name: label for name, (label, *_) in _references_in(folder, ()).items()}


def targets_in(pairs: Iterable[Pair], *, orientation: Orientation = "refuse") -> Targets:
    """A target for each name, if all references and predictions name what they mark.

    Otherwise a target ``label N`` for each value N in any of them, for which every file is read.
    """
    labels = [label for pair in pairs for label in (pair.reference, pair.prediction)]
    names = [named_in(label) for label in labels]
    if names and all(names):
        return numbered_targets(name for found in names for name in found)
    files = (path for label in labels for path in paths_of(label))
    values = {int(v) for file in files for v in np.unique(read_label(file, orientation=orientation).voxels)}
    return Targets({f"label {v}": (v,) for v in sorted(values - {0})})


def _references_in(references: Path | Dataset, predicted: Container[str]) -> dict[str, tuple[Label, Subject | None]]:
    """The reference of each subject that has one, and the subject, if a data set has it."""
    if isinstance(references, Path):
        files = _scans_in(references)
        if files and not (references / "dataset.json").is_file():
            # A folder may hold scans beside their labels: case.mhd, case_segmentation.mhd.
            labels = [file for file in files if _LABEL_ENDING.search(name_of(file))] or files
            named = ((name_of(file), file) for file in labels)
            bare = _unique((n if n in predicted else _LABEL_ENDING.sub("", n), file) for n, file in named)
            return {name: (file, None) for name, file in bare.items()}
        references = open_dataset(references)
    return {s.id: (s.label, s) for s in references.subjects if s.label is not None}


def _scans_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingFile(f"'{folder}' is not a folder", fix="give the folder that holds the files")
    return sorted(path for path in folder.iterdir() if suffix_of(path))


def _unique(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, file in named:
        if other := files.get(name):
            raise DuplicateSubject(f"'{other}' and '{file}' both have the name '{name}'", fix="move one of them away")
        files[name] = file
    return files


def _some(names: Mapping[str, object]) -> str:
    return ", ".join([*sorted(names)[:3], *(["…"] if len(names) > 3 else [])]) or "none"
