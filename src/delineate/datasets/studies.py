"""DICOM studies as subjects: channels are series, chosen by patterns of their descriptions."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.errors import SeveralSeries, UnknownLayout
from delineate.io.formats import is_dicom

LABELS = ("*mask*", "*segmentation*")
"""Descriptions of series that are labels where no pattern names them; DICOM-SEG is one by its modality."""


def read_studies(
    root: Path, images: str | Mapping[str, str] | None = None, labels: str | None = None
) -> Dataset | None:
    """Every study below ``root`` as a subject; None where there is no DICOM.

    ``images`` has a pattern for each channel, such as ``{"T1": "*t1*pre*", "FLAIR": "*flair*"}``;
    without it every series is a channel called by its description. A subject is called after the
    folders that tell its files from other studies', never after a person. Raises
    :class:`SeveralSeries` where a pattern fits several of one study, :class:`UnknownLayout` where
    it fits none of any.
    """
    if not any(is_dicom(Path(place, name)) for place, _, files in os.walk(root) for name in files):
        return None
    from delineate.io.dicom_series import Series, find_series, fits  # pydicom takes a while to import

    found = find_series(root)
    studies: dict[str, list[Series]] = defaultdict(list)
    for series in found:
        studies[series.study].append(series)
    names = _names(root, studies)
    shared = Counter(series.folder for series in found)

    def place(series: Series) -> Path:
        """One path that stands for the series: its folder, or a file where others lie there too."""
        alone = shared[series.folder] == 1 and not any(series.folder in other.parents for other in shared)
        return series.folder if alone else series.instances[0].path

    def is_label(series: Series) -> bool:
        if labels is not None:
            return fits(series, labels)
        return series.modality == "SEG" or any(fits(series, pattern) for pattern in LABELS)

    patterns = {"image": images} if isinstance(images, str) else images
    subjects = []
    for uid, members in studies.items():
        label = [series for series in members if is_label(series)]
        scans = [series for series in members if series not in label]
        if patterns is None:
            channels = {name: [series] for name, series in zip(_channel_names(scans), scans, strict=True)}
        else:
            channels = {name: [s for s in scans if fits(s, pattern)] for name, pattern in patterns.items()}
        for what, fitting in (*channels.items(), ("label", label)):
            if len(fitting) > 1:
                raise SeveralSeries(
                    f"{what} of '{names[uid]}' could be {', '.join(map(str, fitting))}; narrow the pattern"
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
        raise UnknownLayout(f"no series of '{root}' fits {patterns}; descriptions there are {', '.join(there[:12])}")
    modality = found[0].modality if found[0].modality in ("CT", "MR") else ""
    ordered = tuple(sorted(subjects, key=lambda subject: subject.id))
    return Dataset(root.resolve().name, root, "dicom", ordered, modality=modality, described=patterns is None)


def _names(root: Path, studies: Mapping[str, Sequence]) -> dict[str, str]:
    """A study's first folder below the root that no other study has, or all of its folders."""
    folders = {uid: Path(os.path.commonpath([series.folder for series in members])) for uid, members in studies.items()}
    parts = {
        uid: folder.relative_to(root).parts if folder.is_relative_to(root) else () for uid, folder in folders.items()
    }
    depth = max((len(p) for p in parts.values()), default=0)
    for length in range(1, depth + 1):
        names = {uid: "_".join(p[:length]) for uid, p in parts.items()}
        if len(set(names.values())) == len(names) and all(names.values()):
            return names
    numbered = {uid: f"{root.resolve().name}_{i}" for i, uid in enumerate(sorted(studies), start=1)}
    return numbered if len(numbered) > 1 else dict.fromkeys(studies, root.resolve().name)


def _channel_names(series: Sequence) -> list[str]:
    """Descriptions, or modality and number where there is none or another has the same."""
    count = Counter(s.description for s in series)
    return [
        s.description if s.description and count[s.description] == 1 else f"{s.modality}_{s.number}" for s in series
    ]
