"""Challenge data sets as they unpack: PROMISE12, WMH 2017, LiTS, BraTS."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import Folder, Layout, by_key, for_training, labelled, subjects_of
from delineate.io.formats import name_of, suffix_of


def read_promise12(folder: Folder) -> Dataset | None:
    """Litjens et al. 2014, Evaluation of prostate segmentation algorithms for MRI."""
    scans: list[tuple[str, Path]] = []
    labels: list[tuple[str, Path]] = []
    for path in for_training(folder.scans):
        match = re.fullmatch(r"(Case\d+)(_segmentation)?", name_of(path), re.IGNORECASE)
        if match and (match[2] or not folder.like_label(path)):
            (labels if match[2] else scans).append((match[1], path))
    # A name like case01 proves nothing: a pair does, or that every scan is a case's .mhd, as in the test set.
    whole = len(scans) == len(for_training(folder.scans)) and all(suffix_of(path) == ".mhd" for _, path in scans)
    if not ({case for case, _ in scans} & {case for case, _ in labels} or (scans and whole)):
        return None
    images = by_key(((case, "T2"), path) for case, path in scans)
    subjects = subjects_of(folder.root, images, by_key(labels), ("T2",))
    reason = f"{len(labelled(subjects))} of {len(subjects)} cases are pairs of CaseNN with CaseNN_segmentation"
    targets = Targets({"prostate": (1,)})
    return Dataset(folder.name, folder.root, "promise12", subjects, targets, "MR", reason=reason)


def read_wmh(folder: Folder) -> Dataset | None:
    """Kuijf et al. 2019, Standardized assessment of automatic segmentation of white matter hyperintensities."""
    channels = {"flair": "FLAIR", "t1": "T1"}
    found: list[tuple[list[str], str, Path]] = []
    scans, labels, places = [], [], {}
    for path in for_training(folder.scans):
        *above, name = *path.parts[:-1], name_of(path).lower()
        if above[-1:] == ["pre"] and name in channels:
            above, kind = above[:-1], channels[name]
        elif name == "wmh":
            kind = "label"
        else:
            continue
        above = [part for part in above[:-1] if part.lower() not in ("training", "test")] + above[-1:]
        found.append((above, kind, path))
    if not any(kind == "FLAIR" for _, kind, _ in found):
        return None
    # Folders above the sites are not part of a name, so it does not matter which of them was given.
    around = 0
    while (
        len({tuple(above[: around + 1]) for above, _, _ in found}) == 1
        and min(len(a) for a, _, _ in found) > around + 2
    ):
        around += 1
    for above, kind, path in found:
        # A site's own folder may be opened too: the site is then the folder's name.
        place = above[around:] if len(above) > 1 else [folder.name, *above]
        place = place[:-1][:2] + place[-1:]
        subject = "_".join(place)
        places[subject] = place
        if kind == "label":
            labels.append((subject, path))
        else:
            scans.append(((subject, kind), path))
    sites = {subject: place[0] for subject, place in places.items() if len(place) > 1}
    subjects = subjects_of(folder.root, by_key(scans), by_key(labels), ("FLAIR", "T1"), sites)
    # 2 is other pathology: the challenge ignores whatever is predicted there.
    targets = Targets({"lesion": (1,)}, ignore=(2,))
    reason = f"{len(labelled(subjects))} of {len(subjects)} folders are pairs of pre/FLAIR with wmh"
    return Dataset(folder.name, folder.root, "wmh2017", subjects, targets, "MR", reason=reason)


def read_lits(folder: Folder) -> Dataset | None:
    """Bilic et al. 2023, The Liver Tumor Segmentation Benchmark. Tumour lies within liver: the targets overlap."""
    scans: list[tuple[str, Path]] = []
    labels: list[tuple[str, Path]] = []
    for path in folder.scans:
        match = re.fullmatch(r"(volume|segmentation)-(\d+)", name_of(path))
        if match and (match[1] == "segmentation" or not folder.like_label(path)):
            (scans if match[1] == "volume" else labels).append((f"volume-{match[2]}", path))
    if not ({case for case, _ in scans} & {case for case, _ in labels} or (scans and len(scans) == len(folder.scans))):
        return None
    images = by_key(((case, "CT"), path) for case, path in scans)
    subjects = subjects_of(folder.root, images, by_key(labels), ("CT",))
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    reason = f"{len(labelled(subjects))} of {len(subjects)} cases are pairs of volume-N with segmentation-N"
    return Dataset(folder.name, folder.root, "lits", subjects, targets, "CT", reason=reason)


_BRATS_CHANNELS: Mapping[str, tuple[str, ...]] = {
    "FLAIR": ("flair", "t2f"),
    "T1": ("t1", "t1n"),
    "T1c": ("t1c", "t1ce", "t1gd"),
    "T2": ("t2", "t2w"),
}
_BRATS_TARGETS: Mapping[str, Targets] = {
    # The word in the label's name, by year: 2012–2016, 2017–2021, since 2023 (recognised by "t2f" beside it).
    "ot": Targets({"necrosis": (1,), "edema": (2,), "non_enhancing": (3,), "enhancing": (4,)}),
    "seg": Targets({"necrotic_core": (1,), "edema": (2,), "enhancing": (4,)}),
    "seg 2023": Targets({"necrotic_core": (1,), "edema": (2,), "enhancing": (3,)}),
}
_BRATS_KIND = {word: channel for channel, words in _BRATS_CHANNELS.items() for word in words} | dict.fromkeys(
    ("ot", "otmulticlass", "seg"), "label"
)


def read_brats(folder: Folder) -> Dataset | None:
    """Menze et al. 2015, The Multimodal Brain Tumor Image Segmentation Benchmark, and later years."""
    scans, labels, words = [], [], set()
    for path in folder.scans:
        found = {_BRATS_KIND[word]: word for word in _words(path) if word in _BRATS_KIND}
        # BraTS 2015 as published has a folder for each file inside the case's folder.
        place = path.parent.parent if path.parent.name == name_of(path) else path.parent
        if len(found) != 1:
            continue
        ((kind, word),) = found.items()
        if kind != "label" and folder.like_label(path):
            continue  # such as T1_brainmask
        words.add(word)
        case = place.name or folder.name
        if kind == "label":
            labels.append((case, path))
        else:
            scans.append(((case, kind), path))
    places = {path.parent for _, path in scans}
    if not labels and any(folder.like_label(path) and path.parent in places for path in folder.scans):
        return None  # labelled in words of its own
    cases = Counter(case for case, _ in {key for key, _ in scans})
    # A folder that holds many subjects' T1 and T2 side by side is not a case.
    if max(cases.values(), default=0) < 2 or len(scans) > 1.5 * cases.total():
        return None
    subjects = subjects_of(folder.root, by_key(scans), by_key(labels), tuple(_BRATS_CHANNELS))
    year = "ot" if words & {"ot", "otmulticlass"} else "seg 2023" if words & {"t2f", "t1n"} else "seg"
    reason = f"{len(labelled(subjects))} of {len(subjects)} folders are pairs of channels with a label, by words"
    return Dataset(folder.name, folder.root, "brats", subjects, _BRATS_TARGETS[year], "MR", reason=reason)


def _words(path: Path) -> list[str]:
    return re.findall(r"[a-z0-9]+", name_of(path).lower())


FOLDERS_OF_CASES = ("wmh2017", "brats")
"""Layouts in which each subject has its own folder, which may hold other files too."""

CHALLENGES = (
    Layout(
        "lits",
        """\
volume-0.nii  segmentation-0.nii      in any folders; 1 liver, 2 tumour within it
volume-1.nii  segmentation-1.nii""",
        read_lits,
    ),
    Layout(
        "promise12",
        """\
Case00.mhd  Case00_segmentation.mhd   with their .raw files, in any folders
Case01.mhd  Case01_segmentation.mhd""",
        read_promise12,
    ),
    Layout(
        "wmh2017",
        """\
SITE/[SCANNER/]SUBJECT/pre/FLAIR.nii.gz
                       pre/T1.nii.gz  optional
                       wmh.nii.gz     1 lesion, 2 other pathology, ignored""",
        read_wmh,
    ),
    Layout(
        "brats",
        """\
CASE/CASE_flair.nii.gz                channels by the words flair t1 t1ce t2 (2023: t2f t1n t1c t2w)
     CASE_t1.nii.gz
     CASE_t1ce.nii.gz
     CASE_t2.nii.gz
     CASE_seg.nii.gz                  or OTMultiClass.nii.gz (2015); other files are left aside""",
        read_brats,
    ),
)
