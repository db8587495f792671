"""DICOM studies as subjects: channels are series, chosen by patterns that their descriptions match, or by rules."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from delineate.core.subject import Label, Subject
from delineate.core.targets import MOST_TARGETS
from delineate.datasets.dataset import Dataset, numbered_targets
from delineate.datasets.dicom_labels import Candidate, candidates, chosen, label_of, likely_label
from delineate.datasets.folder import labelled
from delineate.datasets.series_rules import LABEL, Images, Rule, SeriesRule, rule_of, rules_of
from delineate.errors import SeveralSeries, UnknownLayout
from delineate.io.files import walk
from delineate.io.formats import name_of, suffix_of
from delineate.io.suffixes import is_dicom

if TYPE_CHECKING:
    from delineate.io.dicom_series import Series

_SHOWN = 8


@dataclass(frozen=True)
class Study:
    """A study, and what rules pick of it; none of its names is a person's.

    ``series`` are all of its series. ``channels``: those that each rule fits, one if all is well. ``label``: what is
    its label, more than one if that is ambiguous; ``other_labels`` were drawn on series that are no channel.
    ``number`` is that among the patient's ``of`` studies by date, and ``day`` counts from the first of them, if all
    have a date.
    """

    name: str
    patient: str
    series: tuple[Series, ...]
    channels: Mapping[str, tuple[Series, ...]]
    label: tuple[Candidate, ...]
    other_labels: tuple[Candidate, ...]
    number: int = 1
    of: int = 1
    day: int | None = None

    @property
    def ambiguous(self) -> dict[str, tuple[object, ...]]:
        """What is picked several times, by the name of the rule."""
        several: dict[str, tuple[object, ...]] = {
            name: series for name, series in self.channels.items() if len(series) > 1
        }
        joined = len(self.label) < 2 or label_of(self.label, lambda series: series.instances[0].path) is not None
        return several if joined else {**several, LABEL: self.label}

    @property
    def scans(self) -> list[Series]:
        """What the channels are."""
        return [series for picked in self.channels.values() for series in picked]

    @property
    def left(self) -> list[Series]:
        """Series that nothing picks."""
        taken = [*self.scans, *(series for one in self.label for series in one.series.values())]
        return [series for series in self.series if series not in taken]

    @property
    def when(self) -> dict[str, str]:
        """Which of the patient's studies it is, without a date."""
        if self.of == 1:
            return {}
        days = {} if self.day is None else {"days_after_the_first": str(self.day)}
        return {"study": f"{self.number} of {self.of}", **days}


def find_studies(root: Path, images: Images | None = None, labels: Rule | None = None) -> tuple[list[Study], list[str]]:
    """What rules pick of every study below ``root``, a patient's studies one after the other in order of date.

    ``images`` and ``labels`` are as for :func:`read_studies`. Also returned are notes about what belongs to no study.
    """
    from delineate.io.dicom_series import find_objects  # pydicom takes a while to import

    members: dict[str, list[Series]] = defaultdict(list)
    for series in find_objects(root):
        members[series.study].append(series)
    rules = None if images is None else rules_of({"image": images} if isinstance(images, str) else images)
    label_rule = None if labels is None else rule_of(labels, LABEL)
    members = {uid: found for uid, found in members.items() if any(series.slices for series in found)}
    may_be_labels, strays = candidates(root, members)
    order = _order(members)
    names = _names({uid: members[uid] for uid in order})
    studies = []
    for uid in sorted(order, key=lambda uid: (order[uid].first(names), order[uid].number)):
        found = may_be_labels[uid]
        labels_by_rule = _picked_by(label_rule, found) if label_rule is not None else []
        scans = [
            series
            for series in members[uid]
            if series.slices and series not in labels_by_rule and not likely_label(series, found)
        ]
        channels: dict[str, tuple[Series, ...]]
        if rules is None:
            channels = {name: (series,) for name, series in zip(_channel_names(scans), scans, strict=True)}
        else:
            channels = {name: tuple(filter(rule.fits, scans)) for name, rule in rules.items()}
        label, others = chosen(found, label_rule, [series for picked in channels.values() for series in picked])
        when = order[uid]
        studies.append(
            Study(
                names[uid], members[uid][0].patient, tuple(members[uid]), channels, tuple(label), tuple(others),
                when.number, len(when.studies), when.day,
            )
        )  # fmt: skip
    notes = [f"{len(strays)} folders of pictures belong to no single study: {_some(strays)}"] if strays else []
    return studies, notes


def read_studies(root: Path, images: Images | None = None, labels: Rule | None = None) -> Dataset | None:
    """Every study below ``root``, or in a zip, as a subject; None for a folder without DICOM.

    ``images`` has a pattern or a :class:`SeriesRule` for each channel, such as ``{"T1": "*t1*pre*", "FLAIR":
    {"description": "*flair*", "number": 3}}``; without it every series is a channel named by its description. A study
    of which nothing is picked is left out. A subject is named after the folders that hold its files, whichever of them
    is the root, never after a person in a header, nor after a date. Raises :class:`SeveralSeries` where a rule picks
    several series of a study, :class:`UnknownLayout` where it picks none in any study, :class:`BadPath` where one that
    is picked lies in several folders, with others around it.
    """
    if root.is_dir() and not first_dicom(root):
        return None
    from delineate.io.dicom_series import find_series

    studies, notes = find_studies(root, images, labels)
    if not studies:
        find_series(root)  # says that it holds no images
    ambiguous = [
        f"{name} of '{study.name}' could be {', '.join(map(str, fitting))}"
        for study in studies
        for name, fitting in study.ambiguous.items()
    ]
    if ambiguous:
        raise SeveralSeries(
            _some(ambiguous),
            fix="narrow the pattern, or give rules by protocol, number and folder (--rules); `delineate data series "
            "--rules` shows what they pick",
        )
    if not any(study.scans for study in studies):
        there = sorted({series.description for study in studies for series in study.left})
        raise UnknownLayout(
            f"no series in '{root}' matches {_shown(images)}", fix=f"descriptions there are {', '.join(there[:12])}"
        )
    place, targets = _places(studies), dict[str, None]()
    subjects, without, elsewhere = [], [], []
    for study in studies:
        label: Label | None = None
        if study.label:
            joined = label_of(study.label, place)
            assert joined is not None  # it is not ambiguous
            label, structures = joined
            targets |= dict.fromkeys(structures)
        if not study.scans and label is None:
            without.append(study.name)
            continue
        if label is None and study.other_labels:
            elsewhere.append(f"{study.name} ({', '.join(map(str, study.other_labels))})")
        subjects.append(
            Subject(
                id=study.name,
                scans={name: place(series[0]) for name, series in study.channels.items() if series},
                label=label,
                patient=study.patient,
                acquisition=study.when,
            )
        )
    if without:
        notes.append(
            f"{len(without)} studies, of which {_shown(images)} picks no series, are left out: {_some(without)}"
        )
    if elsewhere:
        notes.append(f"{len(elsewhere)} studies have labels of series that are no channel: {_some(elsewhere)}")
    modalities = {series.modality for study in studies for series in study.scans}
    modality = modalities.pop() if len(modalities) == 1 and modalities <= {"CT", "MR"} else ""
    named = numbered_targets(targets) if 0 < len(targets) <= MOST_TARGETS else None
    reason = f"{len(subjects)} studies in DICOM files, {len(labelled(subjects))} with a label in DICOM or in pictures"
    return Dataset(
        root.resolve().name, root, "dicom", tuple(subjects), named, modality, tuple(notes), reason=reason,
        described=images is None,
    )  # fmt: skip


def _picked_by(rule: SeriesRule, found: Sequence[Candidate]) -> list[Series]:
    """The series that the rule for labels picks."""
    parts = [part for one in found if (part := one.fitting(rule)) is not None]
    return [series for part in parts for series in part.series.values()]


def _places(studies: Sequence[Study]) -> Callable[[Series], Path]:
    """A path that stands for a series: its folder, or one of its files if the folder holds other series too.

    Contours are a file. It raises :class:`BadPath` for a series in several folders that hold other series too.
    """
    from delineate.io.dicom_series import file_of

    folders = Counter(series.folder for study in studies for series in study.series)
    above = {parent for folder in folders for parent in folder.parents}

    def place(series: Series) -> Path:
        alone = folders[series.folder] == 1 and series.folder not in above
        return series.folder if alone and series.slices else file_of(series)

    return place


@dataclass(frozen=True)
class _When:
    """Which of a patient's ``studies``, in order of date, a study is."""

    studies: tuple[str, ...]
    number: int
    day: int | None

    def first(self, names: Mapping[str, str]) -> str:
        """What comes first of the names of the patient's studies."""
        return min(names[uid] for uid in self.studies)


def _order(members: Mapping[str, Sequence[Series]]) -> dict[str, _When]:
    """When each study was made among those of its patient."""
    patients: dict[str, list[str]] = defaultdict(list)
    studied = {uid: min(series.studied for series in found) for uid, found in members.items()}
    for uid, found in members.items():
        patients[found[0].patient].append(uid)
    order = {}
    for uids in patients.values():
        uids.sort(key=lambda uid: (studied[uid], uid))
        days = [_date(studied[uid]) for uid in uids]
        for i, (uid, day) in enumerate(zip(uids, days, strict=True)):
            since = None if None in days else (day - days[0]).days  # type: ignore[operator]
            order[uid] = _When(tuple(uids), i + 1, since)
    return order


def _date(studied: str) -> date | None:
    with suppress(ValueError):
        return date.fromisoformat(studied[:8])
    return None


def first_dicom(root: Path) -> list[Path]:
    """The first DICOM file found below ``root``, if there is one."""
    files = (place / name for place, names in walk(root, links=False) for name in names if not suffix_of(Path(name)))
    return list(islice(filter(is_dicom, files), 1))


_DATED = r"""\d+(\.\d+){3,}                              # a UID
    | (19|20)\d{6} | (19|20)\d\d[-._]\d\d[-._]\d\d\b.* | \d\d[-._]\d\d[-._](19|20)\d\d\b.*    # a date"""
_UNTELLING = re.compile(
    _DATED
    + r"""
    | \d+(\.\d+)?-.*-\d{5}                        # number, description and the end of a UID: a series
    | (dicom|dcm)(dir)? | (pat?|stu?|ser?|img?)\d+  # names on disks: DICOM/PA000/ST000/SE000
    | (dicom|dcm)[-_]?anon\w* | patient_dicom | t1dual | t2spir | (in|out|opp)[-_]?phase  # in challenges
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Folder names that say what is in them but not whose it is."""
_IDENTIFYING = re.compile(_DATED, re.VERBOSE)
"""Names that may tell a stranger whose study it is. No result is named after one if any other name is known."""

_LEVELS = 4
"""How many folders up to look for a telling name: disk, patient, study, series."""


def name_of_study(path: Path) -> str:
    """The name for a result from one series (a zip, or one of its files): the same as if its folder had been given.

    Raises what reading DICOM headers raises.
    """
    from delineate.io.dicom_series import the_series

    series = the_series(path)
    if series.instances[0].archive is None:
        together = [file for file in path.parent.iterdir() if file.is_file() and is_dicom(file)]
        if len(together) > len(series.instances):
            return name_of(path)  # several series in one folder: only file names tell them apart
    return _folders([series])[0]


def _names(studies: Mapping[str, Sequence[Series]]) -> dict[str, str]:
    """A name for each study: the innermost folder around it with a telling name, whichever folder was given.

    Where several have the same name, folders below are added until they differ, but for dates; and numbers, in the
    order of ``studies``, if they never do.
    """
    chains = {}
    for uid, members in studies.items():
        first, *below = _folders(members)
        chains[uid] = (first, *(name for name in below if not _IDENTIFYING.fullmatch(name)))
    names = {uid: chain[0] for uid, chain in chains.items()}
    for length in range(2, max(map(len, chains.values()), default=0) + 1):
        alike: dict[str, dict[str, str]] = defaultdict(dict)
        for uid, name in names.items():
            alike[name][uid] = "_".join(chains[uid][:length])
        for longer in alike.values():
            if len(set(longer.values())) > 1:
                names |= longer
    count, seen = Counter(names.values()), Counter[str]()
    for uid, name in names.items():
        seen[name] += 1
        names[uid] = f"{name}_{seen[name]:0{len(str(count[name]))}}" if count[name] > 1 else name
    return names


def _folders(members: Sequence[Series]) -> tuple[str, ...]:
    """Folder names from the first telling one down to the one that holds all of a study."""
    around = {instance.folder for series in members for instance in series.instances}
    parts = Path(os.path.commonpath(list(around))).parts
    descriptions = {series.description for series in members}
    for k in range(1, min(_LEVELS, len(parts) - 1) + 1):
        if not _UNTELLING.fullmatch(parts[-k]) and parts[-k] not in descriptions:
            return parts[-k:]
    return parts[-1:]


def _channel_names(series: Sequence[Series]) -> list[str]:
    """Descriptions, or modality and number where a description is missing or not unique, or else folders."""
    known = [(s.description, f"{s.modality}_{s.number}", Path(s.instances[0].folder).name) for s in series]
    counts = [Counter(names) for names in zip(*known, strict=True)]
    return [
        next((name for name, count in zip(names, counts, strict=True) if name and count[name] == 1), f"{names[1]}_{i}")
        for i, names in enumerate(known, start=1)
    ]


def _shown(images: Images | None) -> str:
    if images is None or isinstance(images, str):
        return f"'{images or '*'}'"
    return ", ".join(f"{name} ({rule})" for name, rule in rules_of(images).items())


def _some(texts: Sequence[str]) -> str:
    return "; ".join(texts[:_SHOWN]) + (f"; and {len(texts) - _SHOWN} more" if len(texts) > _SHOWN else "")
