"""Labels in DICOM studies: series of masks, segmentations, contours, and folders of pictures beside a series."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from delineate.core.subject import Label, Masks
from delineate.core.text import printable
from delineate.datasets.folder import is_label_folder
from delineate.datasets.series_rules import SeriesRule
from delineate.errors import DelineateError
from delineate.io.files import walk
from delineate.io.formats import suffix_of
from delineate.io.suffixes import PICTURE_SUFFIXES

if TYPE_CHECKING:
    from delineate.io.dicom_series import Series

_DESCRIBED = tuple(SeriesRule(description=pattern) for pattern in ("*mask*", "*segmentation*"))
"""Series with these descriptions are labels unless a rule says otherwise."""

_ALL = ""
"""The name of a structure, where one series or folder marks all of them."""


@dataclass(frozen=True)
class Candidate:
    """What may be the label of a study: by the structures that they mark, DICOM ``series`` or folders of ``pictures``.

    ``on`` are the series that it was drawn on, none if nothing tells. ``likely``: it looks like a label.
    """

    folder: Path
    series: Mapping[str, Series]
    pictures: Mapping[str, Path]
    on: tuple[Series, ...]
    likely: bool

    @property
    def kind(self) -> str:
        """Only labels of one kind can be joined."""
        return next((series.modality for series in self.series.values()), "pictures")

    def fitting(self, rule: SeriesRule | None) -> Candidate | None:
        """The part of it that a rule picks; without a rule, all of it if it looks like a label."""
        if rule is None:
            return self if self.likely else None
        series = {name: one for name, one in self.series.items() if rule.fits(one)}
        whole = rule.fits_folder(self.folder)
        pictures = {name: one for name, one in self.pictures.items() if whole or rule.fits_folder(one)}
        if not series and not (pictures and rule.only_folder):
            return None
        return replace(self, series=series, pictures=pictures)

    def __str__(self) -> str:
        if self.pictures:
            return f"pictures in '{printable(str(self.folder))}'"
        return ", ".join(map(str, self.series.values()))


def candidates(root: Path, studies: Mapping[str, Sequence[Series]]) -> tuple[dict[str, list[Candidate]], list[str]]:
    """What may be the label of each study, and the folders of pictures below ``root`` that belong to no study."""
    found = {study: [*_series_of(members)] for study, members in studies.items()}
    within: dict[Path, list[Series]] = defaultdict(list)  # every folder that holds scans, at any depth
    for study, members in studies.items():
        for series in members:
            if not likely_label(series, found[study]):
                for folder in (series.folder, *series.folder.parents):
                    within[folder].append(series)
    whole: dict[Path, dict[str, Path]] = defaultdict(dict)
    drawn_on: dict[Path, tuple[Series, ...]] = {}
    strays = []
    for folder, names in walk(root, links=False):
        if folder in within or not any(suffix_of(Path(name)) in PICTURE_SUFFIXES for name in names):
            continue  # pictures among scans are previews
        above = next((above for above in folder.parents if above in within), root)
        if len({series.study for series in within[above]}) != 1:
            strays.append(printable(folder.relative_to(root).as_posix()))
            continue
        labels, structure = _structure(folder, above)
        whole[labels][structure] = folder
        drawn_on[labels] = tuple(within[above])
    for labels, folders in whole.items():
        on, likely = drawn_on[labels], is_label_folder(labels.name)
        if _ALL in folders and len(folders) > 1:  # one of values, beside one for each structure
            found[on[0].study].append(Candidate(labels, {}, {_ALL: folders.pop(_ALL)}, on, likely))
        found[on[0].study].append(Candidate(labels, {}, folders, on, likely))
    return found, strays


def likely_label(series: Series, found: Iterable[Candidate]) -> bool:
    """Whether a series looks like a label."""
    return any(one.likely and series in one.series.values() for one in found)


def _series_of(members: Sequence[Series]) -> Iterator[Candidate]:
    """Each series of a study as what may be its label; series in folders of one label folder together."""
    from delineate.io.dicom_series import MARKING

    common = Path(os.path.commonpath([series.folder for series in members]))
    together: dict[Path, dict[str, Series]] = defaultdict(dict)
    for series in members:
        labels, structure = _structure(series.folder, common)
        if series.modality in MARKING:
            yield Candidate(series.folder, {_ALL: series}, {}, _drawn_on(series, members), likely=True)
        elif structure and structure not in together[labels]:
            together[labels][structure] = series
        else:
            likely = labels != common and is_label_folder(labels.name)
            likely = likely or any(rule.fits(series) for rule in _DESCRIBED)
            yield Candidate(series.folder, {_ALL: series}, {}, (), likely)
    for labels, by_structure in together.items():
        if by_structure:
            yield Candidate(labels, by_structure, {}, (), likely=True)


def _structure(folder: Path, above: Path) -> tuple[Path, str]:
    """The first folder below ``above`` that is called after labels, and the name of the structure in it.

    The folder itself, and no structure, where there is none.
    """
    parts = folder.relative_to(above).parts
    for i, part in enumerate(parts):
        if is_label_folder(part):
            return above.joinpath(*parts[: i + 1]), "_".join(parts[i + 1 :])
    return folder, _ALL


def _drawn_on(label: Series, members: Sequence[Series]) -> tuple[Series, ...]:
    """The series whose images segments or contours refer to; some refer to the series alone."""
    others = [series for series in members if series is not label and series.slices]
    by_image = [series for series in others if series.images & label.refers_to]
    return tuple(by_image or [series for series in others if series.uid in label.refers_to])


def chosen(
    found: Iterable[Candidate], rule: SeriesRule | None, scans: Sequence[Series]
) -> tuple[list[Candidate], list[Candidate]]:
    """What is the label of these scans, more than one if that is ambiguous; and labels of other series of the study.

    Without a rule, contours count only where there are no voxels.
    """
    from delineate.io.dicom_series import CONTOURS

    fitting = [part for one in found if (part := one.fitting(rule)) is not None]
    fitting = [one for one in fitting if not any(series in scans for series in one.series.values())]
    ours = [one for one in fitting if not one.on or any(series in scans for series in one.on)]
    others = [one for one in fitting if one not in ours]
    voxels = [one for one in ours if one.kind != CONTOURS]
    return (voxels if rule is None and voxels else ours), others


def label_of(parts: Sequence[Candidate], place: Callable[[Series], Path]) -> tuple[Label, tuple[str, ...]] | None:
    """The label that candidates are together, and the names of its structures, if it has names.

    None for several that cannot be joined: only segmentations, or contours, of different structures can.
    """
    from delineate.io.dicom_series import MARKING

    if len(parts) > 1 and (len({one.kind for one in parts}) > 1 or parts[0].kind not in MARKING):
        return None
    if parts[0].kind in MARKING:
        return _named([one.series[_ALL] for one in parts], place)
    [only] = parts
    files = {name: place(series) for name, series in only.series.items()} | dict(only.pictures)
    return (files[_ALL], ()) if [*files] == [_ALL] else (Masks(files), tuple(files))


def _named(objects: Sequence[Series], place: Callable[[Series], Path]) -> tuple[Label, tuple[str, ...]] | None:
    """The segmentations, or contours, of a study as one label, with the names in them."""
    from delineate.io.segments import segments_in

    files: dict[str, Path] = {}
    for series in objects:
        path = place(series)
        try:
            there = segments_in(path)
        except DelineateError:
            there = None  # reading it as the label will say what is wrong
        if there is None or not there.names:
            return (path, ()) if len(objects) == 1 else None
        if set(there.names) & set(files):
            return None
        files |= dict.fromkeys(there.names, path)
    return Masks(files), tuple(files)
