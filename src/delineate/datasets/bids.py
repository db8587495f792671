"""BIDS: raw data by subject, session and datatype, with labels among the derivatives.

Gorgolewski et al. 2016, The brain imaging data structure, a format for organizing and describing outputs of
neuroimaging experiments; BIDS specification 1.10.
"""

from __future__ import annotations

import csv
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import Folder, Layout, by_key, labelled, modality_of
from delineate.errors import DatasetError, UnknownLayout
from delineate.io.files import parsing, read_json, read_text
from delineate.io.formats import name_of

DESCRIPTION = "dataset_description.json"
_PARTICIPANTS = "participants.tsv"
_LABELS = ("dseg", "mask", "roi")
_NO_ANATOMY = ("func", "dwi", "perf", "fmap", "meg", "eeg", "ieeg", "beh", "motion", "nirs", "micr", "mrs", "figures")
"""Datatypes of other measurements: many volumes in a file, or none."""
_OF_EXAMINATION = ("sub", "ses", "run")
_NATIVE = ("orig", "individual", "native", "scanner")
_SITES = ("site", "site_id", "centre", "center", "scanner", "scanner_id", "institution")
_SIDECAR = {
    "MagneticFieldStrength": ("field_strength_t", 1.0),
    "EchoTime": ("echo_time_ms", 1000.0),
    "RepetitionTime": ("repetition_time_ms", 1000.0),
    "InversionTime": ("inversion_time_ms", 1000.0),
    "FlipAngle": ("flip_angle_deg", 1.0),
}
"""Fields of a sidecar that are worth a column, with the unit that they get; BIDS gives times in seconds."""
_MOST = 1e6
"""No scanner has a value beyond this; nor is what is not a number below it."""


@dataclass(frozen=True)
class _File:
    """A file by its name: ``sub-01_ses-pre_acq-mprage_run-1_T1w``."""

    path: Path
    entities: Mapping[str, str]
    suffix: str

    @property
    def examination(self) -> tuple[str, str]:
        return self.entities["sub"], self.entities.get("ses", "")

    @property
    def run(self) -> str:
        return self.entities.get("run", "")

    @property
    def variant(self) -> tuple[tuple[str, str], ...]:
        """What tells it from others of the same kind in an examination, except for its number."""
        return tuple((key, value) for key, value in self.entities.items() if key not in (*_OF_EXAMINATION, "space"))


@dataclass(frozen=True)
class _Examination:
    """Scans by channel; ``runs`` are the numbers that they, and so their label, may have."""

    id: str
    key: tuple[str, str]
    runs: frozenset[str]
    scans: Mapping[str, _File]


def read_bids(folder: Folder) -> Dataset | None:
    """A BIDS data set with its derivatives: ``participants.tsv`` gives sites, sidecars say how a scan was made."""
    described = (folder.root / DESCRIPTION).is_file()
    if not described and not (folder.root / _PARTICIPANTS).is_file():
        return None
    notes: list[str] = []
    scans, labels = _scans_and_labels(folder, notes)
    if not scans:
        return None
    chosen = _chosen(labels, scans, folder)
    examinations = _examinations(scans, notes)
    if lonely := len([label for label in chosen if label.examination not in {one.key for one in examinations}]):
        notes.append(f"{lonely} labels belong to no scan")
    channels = tuple(sorted({channel for one in examinations for channel in one.scans}))
    people = _participants(folder.root)
    sidecars = cache(lambda place: tuple(place.glob("*.json")))
    subjects = []
    for one in examinations:
        [participant, _] = one.key
        row = dict(people.get(f"sub-{participant}", {}))
        site = next((row.pop(name) for name in [*row] if name.lower() in _SITES), "")
        mine = {channel: folder.root / one.scans[channel].path for channel in channels if channel in one.scans}
        files = [file for file in chosen if file.examination == one.key and file.run in one.runs | {""}]
        label = by_key((one.id, file.path) for file in files).get(one.id)
        subjects.append(
            Subject(
                id=one.id,
                scans=mine,
                label=None if label is None else folder.root / label,
                site=site,
                patient=f"sub-{participant}",
                attributes=row,
                acquisition=_acquisition(folder.root, mine, notes, sidecars),
            )
        )
    about = read_json(folder.root / DESCRIPTION, UnknownLayout, fix="repair it") if described else {}
    pairs = len(labelled(subjects))
    source = f" from {_kind(chosen[0])}" if chosen else ""
    reason = (
        f"{DESCRIPTION if described else _PARTICIPANTS}; {pairs} of {len(subjects)} examinations have a label{source}"
    )
    return Dataset(
        str(about.get("Name") or folder.name),
        folder.root,
        "bids",
        tuple(subjects),
        _targets(folder.root, chosen),
        modality_of(channels),
        tuple(dict.fromkeys(notes)),
        reason=reason,
    )


def _scans_and_labels(folder: Folder, notes: list[str]) -> tuple[list[_File], list[_File]]:
    """Raw scans, and labels on a scan's own grid wherever they lie; what else there is goes into ``notes``."""
    scans, labels = [], []
    elsewhere: dict[str, int] = defaultdict(int)
    for path in folder.scans:
        file = _parsed(path)
        if file is None or path.parts[0] in ("sourcedata", "code"):
            continue
        if file.suffix in _LABELS:
            labels.append(file)
        elif path.parts[0] == f"sub-{file.entities['sub']}":
            if path.parent.name in _NO_ANATOMY:
                elsewhere[path.parent.name] += 1
            else:
                scans.append(file)
    if elsewhere:
        counts = ", ".join(f"{count} of {name}" for name, count in sorted(elsewhere.items()))
        notes.append(f"files of other measurements are left aside: {counts}")
    known = {file.suffix.lower() for file in scans} | set(_NATIVE)
    there = [file for file in labels if (space := file.entities.get("space")) is None or space.lower() in known]
    if strangers := sorted({file.entities["space"] for file in labels if file not in there}):
        notes.append(
            f"{len(labels) - len(there)} labels lie in another space ({', '.join(strangers)}) and are left aside"
        )
    return scans, there


def _parsed(path: Path) -> _File | None:
    """A file by its entities; None for one that is not named so, or lies in no folder of its subject."""
    *pairs, suffix = name_of(path).split("_")
    found = [re.fullmatch(r"([a-zA-Z0-9]+)-([a-zA-Z0-9+]+)", pair) for pair in pairs]
    if not found or not all(found):
        return None
    entities = {match[1]: match[2] for match in found if match}
    inside = "sub" in entities and f"sub-{entities['sub']}" in path.parts[:-1]
    return _File(path, entities, suffix) if inside and re.fullmatch(r"[A-Za-z0-9]+", suffix) else None


def _chosen(labels: Sequence[_File], scans: Sequence[_File], folder: Folder) -> list[_File]:
    """The labels of one kind. Raises :class:`UnknownLayout`, with patterns that fit, where there are several."""
    kinds: dict[str, list[_File]] = defaultdict(list)
    for label in labels:
        kinds[_kind(label)].append(label)
    if len(kinds) <= 1:
        return list(labels)
    shown = "; ".join(f"{kind} ({len(files)})" for kind, files in sorted(kinds.items()))
    files = max((kinds[kind] for kind in sorted(kinds)), key=len)
    scan = next((scan for scan in scans if scan.examination == files[0].examination), scans[0])
    raise UnknownLayout(
        f"'{folder.root}' has labels of several kinds: {shown}",
        fix=f"say which, such as --images '{_pattern(scan)}' --labels '{_pattern(files[0])}'",
    )


def _kind(label: _File) -> str:
    """Labels of the same kind: made by the same pipeline, in the same way."""
    place = "/".join(label.path.parts[:2]) if label.path.parts[0] == "derivatives" else ""
    words = "_".join([*(f"{key}-{value}" for key, value in label.variant), label.suffix])
    return f"{place}/…_{words}" if place else f"…_{words}"


def _pattern(file: _File) -> str:
    """A pattern for files of this kind: an asterisk for each part that names the examination."""
    return re.sub(r"\b(sub|ses|run)-[a-zA-Z0-9]+", r"\1-*", file.path.as_posix())


def _channels(scans: Iterable[_File]) -> dict[tuple[tuple[tuple[str, str], ...], str], str]:
    """A channel's name, by variant and suffix: the suffix, and what else it takes to tell it from the others."""
    variants: dict[str, set[tuple[tuple[str, str], ...]]] = defaultdict(set)
    for scan in scans:
        variants[scan.suffix].add(scan.variant)
    return {
        (variant, suffix): suffix if len(found) == 1 else "_".join([*(f"{k}-{v}" for k, v in variant), suffix])
        for suffix, found in variants.items()
        for variant in found
    }


def _examinations(scans: Sequence[_File], notes: list[str]) -> list[_Examination]:
    """If all channels were repeated, each run is an examination; otherwise the first run of each channel counts."""
    named = _channels(scans)
    by_key(((_id(scan.examination, scan.run), named[scan.variant, scan.suffix]), scan.path) for scan in scans)
    found: dict[tuple[str, str], dict[str, dict[str, _File]]] = defaultdict(lambda: defaultdict(dict))
    for scan in scans:
        found[scan.examination][named[scan.variant, scan.suffix]][scan.run] = scan
    examinations = []
    left = 0
    for key, channels in sorted(found.items()):
        runs = {tuple(sorted(files, key=_number)) for files in channels.values()}
        if len(runs) == 1 and len(several := next(iter(runs))) > 1:
            for run in several:
                one = {name: files[run] for name, files in channels.items()}
                examinations.append(_Examination(_id(key, run), key, frozenset({run}), one))
            continue
        left += sum(len(files) - 1 for files in channels.values())
        first = {name: files[min(files, key=_number)] for name, files in channels.items()}
        examinations.append(_Examination(_id(key, ""), key, frozenset(file.run for file in first.values()), first))
    if left:
        notes.append(f"{left} repeated scans are left aside: the first run of each channel counts")
    return examinations


def _number(run: str) -> tuple[int, str]:
    return (int(run) if run.isdigit() else 0, run)


def _id(examination: tuple[str, str], run: str) -> str:
    subject, session = examination
    return "_".join([f"sub-{subject}", *([f"ses-{session}"] if session else []), *([f"run-{run}"] if run else [])])


def _participants(root: Path) -> dict[str, dict[str, str]]:
    """Rows of participants.tsv by participant, without what is not known."""
    rows = _table(root / _PARTICIPANTS)
    return {
        row["participant_id"]: {name: value for name, value in row.items() if name != "participant_id" and value}
        for row in rows
        if row.get("participant_id")
    }


def _table(path: Path) -> list[dict[str, str]]:
    """Rows of a table by column, ``n/a`` as nothing; none if there is no file. Raises :class:`UnknownLayout`."""
    if not path.is_file():
        return []
    with parsing(path, UnknownLayout, fix="save it as tab-separated text in UTF-8"):
        rows = list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))
    cleaned = [{key.strip(): (value or "").strip() for key, value in row.items() if key} for row in rows]
    return [{key: "" if value == "n/a" else value for key, value in row.items()} for row in cleaned]


def _acquisition(
    root: Path, scans: Mapping[str, Path], notes: list[str], sidecars: Callable[[Path], Sequence[Path]]
) -> dict[str, str]:
    """How scans were made, by their sidecars. What differs between channels is given for each."""
    values: dict[str, dict[str, str]] = defaultdict(dict)
    for channel, path in scans.items():
        about: dict[str, Any] = {}
        for sidecar in _sidecars(root, path, sidecars):
            try:
                about |= read_json(sidecar, UnknownLayout)
            except DatasetError as error:
                notes.append(f"a sidecar cannot be read: {error.message}")
        for field, (name, factor) in _SIDECAR.items():
            value = about.get(field)
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _MOST:
                values[name][channel] = f"{value * factor:.6g}"
        scanner = " ".join(str(about[key]) for key in ("Manufacturer", "ManufacturersModelName") if about.get(key))
        if scanner:
            values["scanner"][channel] = scanner
    return {
        name: found
        for kind, by_channel in values.items()
        for name, found in (
            [(kind, next(iter(by_channel.values())))]
            if len(set(by_channel.values())) == 1
            else [(f"{kind} {channel}", value) for channel, value in by_channel.items()]
        )
    }


def _sidecars(root: Path, scan: Path, within: Callable[[Path], Sequence[Path]]) -> Iterator[Path]:
    """A scan's sidecars, from those of the whole data set to its own: what is said nearer to it counts."""
    words = name_of(scan).split("_")
    below = [place for place in scan.parents if place.is_relative_to(root)]
    for place in reversed(below):
        fitting = [path for path in within(place) if {words[-1]} <= {*path.stem.split("_")} <= {*words}]
        yield from sorted(fitting, key=lambda path: len(path.stem.split("_")))


def _targets(root: Path, labels: Sequence[_File]) -> Targets | None:
    """Targets by name: from the table of a ``dseg``, or of a ``mask`` from its entity ``label``."""
    if not labels:
        return None
    first = labels[0]
    if first.suffix != "dseg":
        name = first.entities.get("label")
        return Targets({name: (1,)}) if name else None
    beside = first.path.with_name(f"{name_of(first.path)}.tsv")
    pipeline = Path(*first.path.parts[:2])
    words = [f"{key}-{value}" for key, value in first.variant]
    tables = [beside, pipeline / f"{'_'.join([*words, 'dseg'])}.tsv", pipeline / "dseg.tsv", Path("dseg.tsv")]
    for table in tables:
        values: dict[str, tuple[int, ...]] = {}
        for row in _table(root / table):
            if row.get("index", "").isdecimal() and row.get("name") and int(row["index"]):
                values[row["name"]] = (*values.get(row["name"], ()), int(row["index"]))
        if values:
            return Targets(values)
    return None


BIDS = Layout(
    "bids",
    """\
dataset_description.json              or participants.tsv, whose column site names sites
sub-01[/ses-1]/anat/sub-01[_ses-1]_T1w.nii.gz      a file for each channel, with or without its .json
                    sub-01[_ses-1]_FLAIR.nii.gz
derivatives/NAME/sub-01[/ses-1]/anat/sub-01[_ses-1]_dseg.nii.gz      labels of one kind: _dseg, _mask or _roi""",
    read_bids,
)
