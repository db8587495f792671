"""A mask for each target: a folder of them beside a scan, as TotalSegmentator has it, or a folder of scans for each."""

from __future__ import annotations

import csv
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from delineate.core.targets import MOST_TARGETS
from delineate.core.text import printable
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import (
    Folder,
    Layout,
    bare_name,
    by_key,
    is_label_folder,
    labelled,
    modality_of,
    some,
    subjects_of,
    targets_of,
    targets_of_masks,
)
from delineate.datasets.pairs import Key, apart, ids_of, match_of, paired_up, place_of
from delineate.errors import UnknownLayout
from delineate.io.files import parsing, read_text
from delineate.io.formats import name_of, names_segments

_TABLE = "meta.csv"
"""TotalSegmentator's table of its subjects."""
_SUBJECT, _SITE = "image_id", "institute"


def read_masks(folder: Folder) -> Dataset | None:
    """Masks by their folders. None where a label lies elsewhere, or may be the only one of its scan.

    So that nothing is taken for what it is not, every label must be a mask of a scan, and all subjects must have
    the same channels.
    """
    scans, masks = apart(folder)
    pairs = {(place_of(path), bare_name(path)) for path in masks}
    if not masks or any(map(names_segments, masks)) or any(match_of(path, pairs) for path in scans):
        return None
    ways = (_in_a_folder_of_masks, _in_a_folder_of_the_scan, _in_a_folder_of_the_target)
    readings = [one for one in (_read_as(way, scans, masks) for way in ways) if one is not None]
    if len(readings) != 1:
        return None
    found, named = readings[0]
    channels, names = sorted({channel for _, channel in found.values()}), {name for _, name in named}
    fullest = max(Counter(key for key, _ in found.values()).values())
    one = len({key for key, _ in found.values()}) == 1
    if len(channels) > (1 if one else fullest) or len(names) > MOST_TARGETS:
        return None
    ids = {key: name or folder.name for key, name in ids_of({key for key, _ in found.values()}).items()}
    images = by_key(((ids[key], channel), path) for path, (key, channel) in found.items())
    labels: dict[str, dict[str, Path]] = defaultdict(dict)
    for (key, name), path in named.items():
        labels[ids[key]][name] = path
    subjects = subjects_of(folder.root, images, labels, channels)
    (first, _), mask = next(iter(named.items()))
    scan = next(path for path, (key, _) in found.items() if key == first)
    there = len(labelled(subjects))
    reason = (
        f"{there} of {len(subjects)} scans have masks, such as {scan.as_posix()} with {mask.as_posix()}; "
        f"{len(names)} target{'s' if len(names) != 1 else ''}: {some(sorted(names))}"
    )
    targets = targets_of(folder.about.get("labels")) or targets_of_masks(subjects)
    dataset = Dataset(folder.name, folder.root, "masks", subjects, targets, modality_of(channels), reason=reason)
    return _with_table(dataset)


def _read_as(
    read: Callable[[Path], tuple[Key, str] | None], scans: Sequence[Path], masks: Sequence[Path]
) -> tuple[dict[Path, tuple[Key, str]], dict[tuple[Key, str], Path]] | None:
    """Scans with their keys and channels, and masks by key and target, if all masks can be read so."""
    read_so = [read(path) for path in masks]
    places = [one for one in read_so if one is not None]
    if len(places) < len(masks):
        return None
    found = paired_up(scans, {key for key, _ in places})
    return None if found is None else (found, by_key(zip(places, masks, strict=True)))


def _in_a_folder_of_masks(path: Path) -> tuple[Key, str] | None:
    """``SUBJECT/segmentations/TARGET``: the masks of the scans in the folder around it."""
    if len(path.parts) < 2 or not is_label_folder(path.parts[-2]):
        return None
    place = place_of(path)
    return (place, ""), _target(path, place[-1] if place else "")


def _in_a_folder_of_the_scan(path: Path) -> tuple[Key, str] | None:
    """``masks/SUBJECT/TARGET``: the masks of the scan called SUBJECT."""
    if len(path.parts) < 3 or is_label_folder(path.parts[-2]) or not is_label_folder(path.parts[-3]):
        return None
    *place, subject = place_of(path)
    return ((*place,), subject), _target(path, subject)


def _in_a_folder_of_the_target(path: Path) -> tuple[Key, str] | None:
    """``masks/TARGET/SUBJECT``: the masks of one target, called as their scans are."""
    if len(path.parts) < 3 or is_label_folder(path.parts[-2]) or not is_label_folder(path.parts[-3]):
        return None
    *place, target = place_of(path)
    return ((*place,), bare_name(path)), printable(target)


def _target(path: Path, subject: str) -> str:
    """What a mask is of: its name without the subject's and without the word that says that it is one."""
    name = bare_name(path) or name_of(path)
    rest = name[len(subject) :].lstrip("_-. ") if subject and name.startswith(subject) else name
    return rest or name


def _with_table(dataset: Dataset) -> Dataset:
    """The data set with what TotalSegmentator's ``meta.csv`` says: institutes as sites, the rest as attributes."""
    path = dataset.root / _TABLE
    if not path.is_file():
        return dataset
    with parsing(path, UnknownLayout, fix="save it as CSV in UTF-8"):
        text = read_text(path)
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=";" if ";" in text.partition("\n")[0] else ",")
        known: Mapping[str, Mapping[str, str]] = {
            row[_SUBJECT]: {key: (value or "").strip() for key, value in row.items() if key and isinstance(value, str)}
            for row in rows
            if row.get(_SUBJECT)
        }
    subjects = []
    for subject in dataset.subjects:
        row = {key: value for key, value in known.get(subject.id, {}).items() if key != _SUBJECT and value}
        site = row.pop(_SITE, "")
        subjects.append(replace(subject, site=site, attributes=row))
    return replace(dataset, subjects=tuple(subjects))


MASKS = Layout(
    "masks",
    """\
SUBJECT/ct.nii.gz                     scans, each kind a channel
SUBJECT/segmentations/TARGET.nii.gz   a mask for each target; or masks/SUBJECT/TARGET.nii.gz or
                                      masks/TARGET/SUBJECT.nii.gz, with images/SUBJECT.nii.gz""",
    read_masks,
)
