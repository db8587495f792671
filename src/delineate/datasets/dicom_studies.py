"""DICOM studies as subjects: channels are series, chosen by patterns of their descriptions."""

from __future__ import annotations

import os
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import labelled
from delineate.errors import SeveralSeries, UnknownLayout
from delineate.io.files import walk
from delineate.io.formats import is_dicom, name_of

if TYPE_CHECKING:
    from delineate.io.dicom_series import Series

LABELS = ("*mask*", "*segmentation*")
"""Descriptions of series that are labels where no pattern names them; DICOM-SEG is one by its modality."""


def read_studies(
    root: Path, images: str | Mapping[str, str] | None = None, labels: str | None = None
) -> Dataset | None:
    """Every study below ``root`` as a subject; None where there is no DICOM.

    ``images`` has a pattern for each channel, such as ``{"T1": "*t1*pre*", "FLAIR": "*flair*"}``;
    without it every series is a channel called by its description. A subject is called after the
    folders its files lie in, whichever of them is the root, never after a person in a header. Raises
    :class:`SeveralSeries` where a pattern fits several of one study, :class:`UnknownLayout` where
    it fits none of any.
    """
    if not first_dicom(root):
        return None
    from delineate.io.dicom_series import find_series, fits  # pydicom takes a while to import

    found = find_series(root)
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in found:
        studies[series.study].append(series)
    names = _names(studies)
    shared = Counter(series.folder for series in found)

    def place(series: Series) -> Path:
        """One path that stands for the series: its folder, or a file where others lie there too."""
        alone = shared[series.folder] == 1 and not any(series.folder in other.parents for other in shared)
        return series.folder if alone else series.instances[0].path

    def looks_like_label(series: Series) -> bool:
        return series.modality == "SEG" or any(fits(series, pattern) for pattern in LABELS)

    def is_label(series: Series) -> bool:
        return looks_like_label(series) if labels is None else fits(series, labels)

    patterns = {"image": images} if isinstance(images, str) else images
    subjects = []
    for uid, members in studies.items():
        label = [series for series in members if is_label(series)]
        scans = [series for series in members if series not in label and not looks_like_label(series)]
        if patterns is None:
            channels = {name: [series] for name, series in zip(_channel_names(scans), scans, strict=True)}
        else:
            channels = {name: [s for s in scans if fits(s, pattern)] for name, pattern in patterns.items()}
        for what, fitting in (*channels.items(), ("label", label)):
            if len(fitting) > 1:
                raise SeveralSeries(
                    f"{what} of '{names[uid]}' could be {', '.join(map(str, fitting))}", fix="narrow the pattern"
                )
        subjects.append(
            Subject(
                id=names[uid],
                scans={name: place(fitting[0]) for name, fitting in channels.items() if fitting},
                label=place(label[0]) if label else None,
                patient=members[0].patient,
            )
        )
    if not any(subject.scans for subject in subjects):
        there = sorted({series.description for series in found})
        raise UnknownLayout(
            f"no series of '{root}' fits {patterns}", fix=f"descriptions there are {', '.join(there[:12])}"
        )
    modality = found[0].modality if found[0].modality in ("CT", "MR") else ""
    ordered = tuple(sorted(subjects, key=lambda subject: subject.id))
    reason = f"{len(ordered)} studies in DICOM files, {len(labelled(ordered))} with a series that is its label"
    described = patterns is None
    return Dataset(root.resolve().name, root, "dicom", ordered, modality=modality, reason=reason, described=described)


def first_dicom(root: Path) -> list[Path]:
    """The first DICOM file below ``root`` that is found, if there is one."""
    files = (place / name for place, names in walk(root, links=False) for name in names)
    return list(islice(filter(is_dicom, files), 1))


_UNTELLING = re.compile(
    r"""\d+(\.\d+){3,}                              # a UID
    | (19|20)\d{6} | (19|20)\d\d[-._]\d\d[-._]\d\d\b.* | \d\d[-._]\d\d[-._](19|20)\d\d\b.*    # a date
    | \d+(\.\d+)?-.*-\d{5}                        # number, description and the end of a UID: a series
    | dicom(dir)? | dcm | (pat?|stu?|ser?|img?)\d+  # what they are called on disks: DICOM/PA000/ST000/SE000
    """,
    re.IGNORECASE | re.VERBOSE,
)
"""Names of folders that say what lies there, and not whose. A date is one, and no result is called after it."""

_LEVELS = 4
"""How far up a telling name is looked for: disk, patient, study, series."""


def name_of_study(path: Path) -> str:
    """What a result of one series (a zip, or one of its files) is called: as if its folder had been given.

    Raises what reading DICOM's headers raises.
    """
    from delineate.io.dicom_series import the_series

    series = the_series(path)
    if series.instances[0].archive is None:
        together = [file for file in path.parent.iterdir() if file.is_file() and is_dicom(file)]
        if len(together) > len(series.instances):
            return name_of(path)  # several series in one folder: only their files' names tell them apart
    return _folders([series])[0]


def _names(studies: Mapping[str, Sequence[Series]]) -> dict[str, str]:
    """What each study is called: the innermost folder around it whose name tells, whichever folder was given.

    Where several have the same, the folders below it are added until they differ, and numbers where they never do.
    """
    chains = {uid: _folders(members) for uid, members in studies.items()}
    depth = max(map(len, chains.values()), default=0)
    names = {uid: chain[0] for uid, chain in chains.items()}
    for length in range(2, depth + 1):
        count = Counter(names.values())
        names |= {uid: "_".join(chains[uid][:length]) for uid, name in names.items() if count[name] > 1}
    count, seen = Counter(names.values()), Counter[str]()
    for uid in sorted(names):
        name = names[uid]
        seen[name] += 1
        names[uid] = f"{name}_{seen[name]}" if count[name] > 1 else name
    return names


def _folders(members: Sequence[Series]) -> tuple[str, ...]:
    """The names of the folders from the first that tells down to the one that holds all of a study."""
    parts = Path(os.path.commonpath([_place(series) for series in members])).parts
    descriptions = {series.description for series in members}
    for k in range(1, min(_LEVELS, len(parts) - 1) + 1):
        if not _UNTELLING.fullmatch(parts[-k]) and parts[-k] not in descriptions:
            return parts[-k:]
    return parts[-1:]


def _place(series: Series) -> str:
    """A series' folder; that within a zip as if it had been unpacked."""
    if series.instances[0].archive is None:
        return os.path.abspath(series.folder)
    inside = [str(PurePosixPath(instance.member.replace("\\", "/")).parent) for instance in series.instances]
    return os.path.join(os.path.abspath(series.folder.with_suffix("")), os.path.commonpath(inside))


def _channel_names(series: Sequence) -> list[str]:
    """Descriptions, or modality and number where there is none or another has the same."""
    count = Counter(s.description for s in series)
    return [
        s.description if s.description and count[s.description] == 1 else f"{s.modality}_{s.number}" for s in series
    ]
