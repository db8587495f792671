"""Ways to arrange scans on disk, and opening a folder in whichever of them it uses."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

from delineate.core.subject import Subject, unnamed
from delineate.core.targets import Targets
from delineate.core.text import near
from delineate.datasets.bids import BIDS
from delineate.datasets.challenges import CHALLENGES, FOLDERS_OF_CASES
from delineate.datasets.dataset import Dataset
from delineate.datasets.dicom_studies import first_dicom, read_studies
from delineate.datasets.folder import (
    NUMBERED,
    SIMULATED,
    Folder,
    Layout,
    bare_name,
    by_key,
    channel_names,
    counted_pairs,
    description,
    for_training,
    is_label_folder,
    labelled,
    modality_of,
    own_folder,
    some,
    subjects_of,
    targets_of,
    with_named_segments,
    with_sites,
)
from delineate.datasets.masks import MASKS
from delineate.datasets.pairs import PAIRS, proposed
from delineate.datasets.patterns import read_patterns
from delineate.datasets.series_rules import Images, Rule
from delineate.errors import BadPath, DatasetError, DuplicateSubject, UnknownLayout
from delineate.io.files import parsing
from delineate.io.formats import holds_label, name_of, suffix_of
from delineate.io.suffixes import NIFTI_SUFFIXES, PICTURE_SUFFIXES
from delineate.plugins import Parts, requirement_of


def open_dataset(
    path: Path | str,
    *,
    layout: str = "auto",
    images: Images | None = None,
    labels: Rule | None = None,
    targets: Targets | None = None,
) -> Dataset:
    """Open the data set in a folder (or the one scan in a file), in whichever of :data:`LAYOUTS` it uses.

    >>> import delineate
    >>> dataset = delineate.open_dataset("scans")
    >>> dataset.layout, dataset.channels, dataset.targets.names
    ('msd', ('image',), ('ball',))
    >>> dataset.subjects[0].id
    'case0'

    A label may be a mask for each target, or a file whose segments have names: its targets are then those names,
    unless others are given. ``images`` and ``labels`` are patterns such as ``*/artery.nii`` and ``*/label.nii``,
    relative to ``path``: files belong together if their wildcards match the same text. Give each of several channels
    its own pattern, ``{"T1": "*/t1.nii", "T2": "*/t2.nii"}``; ``{target}`` in the pattern for labels stands for the
    names of masks, ``*/masks/{target}.nii``. For DICOM, patterns are matched against series descriptions, and a rule
    may stand in place of a pattern, ``{"T1": {"description": "*t1*", "number": 3}}``, with the fields description,
    protocol, modality, number and folder. ``targets`` replace those that the data set names; where it names none,
    those in the header of its first label count, if that is NIfTI. Only names (and headers) are read, except where
    only voxels tell a scan from its label: problems with a subject, including a missing label, are found by
    :func:`delineate.datasets.inspection.inspect`.

    A layout is recognised by its pairs of scans and labels; ``reason`` says by which. A file that looks
    like a label is never a scan, unless ``images`` asks for it or it is the single file given.

    Raises :class:`MissingFile` where there is no folder, :class:`UnknownLayout` where it has no known
    layout, or several, and :class:`DuplicateSubject` where subjects share a name.
    """
    root = Path(path)
    if layout not in ("auto", *LAYOUTS):
        known = f"auto, {', '.join(LAYOUTS)}"
        raise UnknownLayout(f"there is no layout '{layout}'", fix=f"known are {known}{near(layout, LAYOUTS)}")
    if labels is not None and images is None:
        raise UnknownLayout(f"there is a pattern for labels ({labels}) but none for images", fix="give both")
    with parsing(root, UnknownLayout, fix="repair its dataset.json, or give patterns"):
        dataset = _opened(root, layout, images, labels)
        dataset = with_named_segments(dataset)
        targets = targets or dataset.targets or _targets_in_header(dataset)
    return replace(dataset, targets=targets)


def _targets_in_header(dataset: Dataset) -> Targets | None:
    """The targets that the first label names itself, if it is NIfTI."""
    first = next((subject.label for subject in dataset.subjects if subject.label is not None), None)
    if not isinstance(first, Path) or suffix_of(first) not in NIFTI_SUFFIXES or not first.is_file():
        return None
    from delineate.io.nifti_names import targets_named_in  # imports nibabel

    return targets_named_in(first)


def _opened(root: Path, layout: str, images: Images | None, labels: Rule | None) -> Dataset:
    if root.is_file() and suffix_of(root):
        dataset = _read_file(root)
    else:
        # Patterns are relative to the folder that was given.
        root = root if images is not None else own_folder(root)
        folder = Folder.walk(root)
        # DICOM has no suffix to recognise it by: it is looked for only if nothing else is found but pictures, which may
        # be its labels or previews.
        wanted = layout == "dicom" or (layout == "auto" and _only_pictures(folder.scans) and not _for_pictures(images))
        studies = read_studies(root, images, labels) if wanted else None
        if studies is not None:
            dataset = studies
        elif images is not None:
            dataset = read_patterns(folder, *_plain(folder, images, labels))
        else:
            dataset = _read(folder, _automatic(folder) if layout == "auto" else [LAYOUTS[layout]])
        dataset = replace(with_sites(dataset), simulated=(root / SIMULATED).is_file())
    return dataset


def _only_pictures(scans: Sequence[Path]) -> bool:
    return all(suffix_of(path) in PICTURE_SUFFIXES for path in scans)


def _for_pictures(images: Images | None) -> bool:
    """Whether a pattern asks for pictures."""
    patterns = [images] if isinstance(images, str) else list((images or {}).values())
    return any(isinstance(pattern, str) and pattern.lower().endswith(PICTURE_SUFFIXES) for pattern in patterns)


def _plain(folder: Folder, images: Images, labels: Rule | None) -> tuple[str | dict[str, str], str | None]:
    """The patterns for files. Raises :class:`UnknownLayout` for rules, which are for DICOM alone."""
    named = {"image": images} if isinstance(images, str) else images
    patterns = {name: pattern for name, pattern in named.items() if isinstance(pattern, str)}
    if len(patterns) < len(named) or not (labels is None or isinstance(labels, str)):
        raise UnknownLayout(
            f"there are rules for DICOM series, but no DICOM in '{folder.root}': found {folder.summary}",
            fix="give patterns for file names",
        )
    return images if isinstance(images, str) else patterns, labels


def _automatic(folder: Folder) -> list[Layout]:
    """The layouts in the order in which they are tried: those of other packages before those that fit any names."""
    *special, masks, scans, pairs, dicom = LAYOUTS.packaged.values()
    return [*special, *LAYOUTS.usable(), masks, scans, pairs, *([] if folder.scans else [dicom])]


def _read(folder: Folder, layouts: Sequence[Layout]) -> Dataset:
    """The folder in the layout that covers all of its pairs; if it has no pairs, in the first layout that fits."""
    found: list[Dataset] = []
    refusal: DatasetError | None = None
    for layout in layouts:
        if layout is PAIRS and (found or refusal):
            continue  # a layout that knows the names knows more
        try:
            dataset = layout.read(folder)
        except (DuplicateSubject, UnknownLayout) as error:
            if isinstance(error, UnknownLayout) and layout.name != "scans":
                raise  # the layout fits, but the folder's own description is wrong
            refusal = refusal or error
            continue
        except Exception as error:
            if layout.name in LAYOUTS.packaged:
                raise
            raise UnknownLayout(
                f"layout '{layout.name}' of {requirement_of(layout)} fails on '{folder.root}': {type(error).__name__}: "
                f"{error}",
                fix="name the right layout with --layout, or uninstall that package",
            ) from error
        if dataset is not None:
            found.append(dataset)
    paired = [dataset for dataset in found if labelled(dataset.subjects)]
    if paired:
        pairs = {subject.files for dataset in paired for subject in labelled(dataset.subjects)}
        whole = [dataset for dataset in paired if pairs <= {subject.files for subject in labelled(dataset.subjects)}]
        if not whole:
            what = " and ".join(f"{dataset.layout} ({dataset.reason})" for dataset in paired)
            raise UnknownLayout(
                f"'{folder.root}' mixes layouts: {what}",
                fix="put them into separate folders, or name one with --layout",
            )
        found = whole
    elif refusal is not None:
        raise refusal
    if found:
        return _with_strays(folder, _without_labels_as_scans(folder, found[0]))
    if folder.scans and all(map(folder.like_label, folder.scans)):
        raise UnknownLayout(
            f"every scan in '{folder.root}' looks like a label ({folder.summary})",
            fix="give the folder with the scans, or name a single file to have it taken for a scan",
        )
    raise UnknownLayout(*_what_would_fit(folder, layouts))


def _what_would_fit(folder: Folder, layouts: Sequence[Layout]) -> tuple[str, str]:
    """What a folder without a known layout holds; and patterns that fit, or else all layouts."""
    unknown = f"'{folder.root}' has no known layout: found {folder.summary}"
    fitting = [
        (f"--images '{images}' --labels '{labels}'", pairs)
        for images, labels, pairs in proposed(folder)
        if _pairs_by_patterns(folder, images, labels) == pairs
    ]
    if fitting and len(layouts) > 1:
        listed = "; ".join(f"{patterns} ({pairs} pairs)" for patterns, pairs in fitting)
        return unknown, f"one of these fits: {listed}"
    shown = layouts if len(layouts) == 1 else [*LAYOUTS.packaged.values(), *LAYOUTS.usable()]
    trees = "\n\n".join(f"{layout.name}:\n{_indented(layout.tree)}" for layout in shown)
    example = "--images '*/artery.nii' --labels '*/label.nii'"
    return f"{unknown}. Arrange it as one of these, or give patterns such as {example}:\n\n{trees}", ""


def _pairs_by_patterns(folder: Folder, images: str, labels: str) -> int:
    """How many pairs patterns make; none if they do not fit."""
    try:
        return len(labelled(read_patterns(folder, images, labels).subjects))
    except DatasetError:
        return 0


def _without_labels_as_scans(folder: Folder, dataset: Dataset) -> Dataset:
    """The data set, whatever its layout; raises :class:`UnknownLayout` where one of its scans looks like a label."""
    files = {path for subject in dataset.subjects for path in subject.scans.values()}
    scans = {path.relative_to(folder.root) if path.is_relative_to(folder.root) else path for path in files}
    if suspects := sorted(path.as_posix() for path in scans if folder.like_label(path)):
        raise UnknownLayout(
            f"read as {dataset.layout}, '{folder.root}' has scans that look like labels: {some(suspects)}",
            fix=(
                "rename the files or their folder, or give patterns such as "
                f"--images '{Path(suspects[0]).parent.joinpath('*').as_posix()}'"
            ),
        )
    return dataset


def _with_strays(folder: Folder, dataset: Dataset) -> Dataset:
    """The data set with a note about scans that belong to no subject.

    Test sets are not mentioned, nor are other files in a subject's own folder.
    """
    if dataset.layout in ("scans", "bids"):  # report them themselves
        return dataset
    taken = {path for subject in dataset.subjects for path in subject.files}
    own = set()
    if dataset.layout in FOLDERS_OF_CASES:
        own = {path.parent.parent if path.parent.name == "pre" else path.parent for path in taken}
    test = [path for path in folder.scans if path.parts[0] in ("imagesTs", "labelsTs")]
    strays = [
        path.as_posix()
        for path in for_training(folder.scans)
        if folder.root / path not in taken and path not in test and not own & {*(folder.root / path).parents}
    ]
    if not strays:
        return dataset
    return replace(dataset, notes=(*dataset.notes, f"{len(strays)} scans belong to no subject: {some(strays)}"))


def read_msd(folder: Folder) -> Dataset | None:
    """Antonelli et al. 2022, The Medical Segmentation Decathlon. dataset.json decides which files count.

    Without one, scans and labels with the same name are subjects, whose channel and targets have no names.
    """
    about = folder.about
    if not about:
        return _pairs_by_name(folder)
    if not isinstance(about.get("training"), list) or "modality" not in about:
        return None
    if any("_0000" in path.name for path in folder.within("imagesTr")):
        return None  # nnU-Net's files with an MSD description, as in its first version
    channels = channel_names(about["modality"])
    # Test images have no labels: they are the data set only if there is nothing else.
    entries = [_entry(entry) for entry in about["training"] or about.get("test") or []]
    for file in (file for entry in entries for file in entry if file):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise BadPath(f"dataset.json lists '{file[:300]}', outside its folder", fix="put the files into the folder")
    images = by_key((name_of(Path(image)), Path(image)) for image, _ in entries)
    labels = {name_of(Path(image)): label for image, label in entries if label}
    subjects = tuple(
        Subject(
            id=subject,
            scans=dict.fromkeys(channels, folder.root / image),
            label=folder.root / labels[subject] if subject in labels else None,
            file_channels=channels,
        )
        for subject, image in images.items()
    )
    listed = set(images.values())
    if listed and not any((folder.root / image).is_file() for image in listed):
        raise UnknownLayout(
            f"'{folder.root / 'dataset.json'}' lists {len(listed)} scans such as {some(sorted(map(str, listed)), 2)}, "
            f"none of which exists",
            fix=f"found {folder.summary}: rename the folder, or correct the list",
        )
    expected = {Path(label).name for label in labels.values()}
    moved = [path.as_posix() for path in folder.scans if path.name in expected and path not in listed]
    if moved and not any((folder.root / label).is_file() for label in labels.values()):
        raise UnknownLayout(
            f"'{folder.root / 'dataset.json'}' lists {len(labels)} labels, none of which exists",
            fix=f"found {some(moved, 2)}: rename the folder, or correct the list",
        )
    reason = f"dataset.json lists {len(labels)} pairs of scan and label, {len(subjects)} scans"
    name, targets = str(about.get("name") or folder.name), targets_of(about.get("labels"))
    return Dataset(name, folder.root, "msd", subjects, targets, modality_of(channels), reason=reason)


def _pairs_by_name(folder: Folder) -> Dataset | None:
    """imagesTr/SUBJECT with labelsTr/SUBJECT, in the absence of a dataset.json."""
    scans = by_key((name_of(path), path) for path in folder.within("imagesTr"))
    labels = by_key((name_of(path), path) for path in folder.within("labelsTr"))
    if not set(scans) & set(labels):
        return None
    subjects = subjects_of(folder.root, {(name, "image"): path for name, path in scans.items()}, labels, ("image",))
    reason = f"{counted_pairs(subjects)} of imagesTr/SUBJECT with labelsTr/SUBJECT; no dataset.json names targets"
    return Dataset(folder.name, folder.root, "msd", subjects, reason=reason)


def _entry(entry: Any) -> tuple[str, str | None]:
    """Image and label of one entry in an MSD list, relative to its folder."""
    if isinstance(entry, str):
        return entry, None
    image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, Mapping) else (None, None)
    if isinstance(image, str) and (label is None or isinstance(label, str)):
        return image, label
    raise UnknownLayout(f"dataset.json lists {str(entry)[:300]} for training", fix='give {"image": …, "label": …}')


def read_nnunet(folder: Folder) -> Dataset | None:
    """Isensee et al. 2021, nnU-Net: its raw format, either version.

    Without a dataset.json that names them, channels are known by their numbers.
    """
    names = folder.about.get("channel_names", folder.about.get("modality"))
    training = folder.within("imagesTr")
    images = training or folder.within("imagesTs")
    numbers = [int(match[2]) for path in images if (match := NUMBERED.fullmatch(name_of(path)))]
    if not numbers or (names is None and folder.about):
        return None
    labels = by_key((name_of(path), path) for path in folder.within("labelsTr"))
    if labels and not training:
        raise UnknownLayout(f"'{folder.root}' has labelsTr but no imagesTr", fix="name the scans' folder imagesTr")
    if training and not labels and (other := _labels_elsewhere(folder, images)):
        raise UnknownLayout(
            f"'{folder.root}' has no labelsTr, but {some(other, 3)}, named like scans in imagesTr",
            fix="name that folder labelsTr if these are the labels, or move it away",
        )
    channels = channel_names(names) if names is not None else unnamed(max(numbers) + 1)
    scans = by_key(_numbered(images, channels))
    subjects = subjects_of(folder.root, scans, labels, channels)
    name, targets = str(folder.about.get("name") or folder.name), targets_of(folder.about.get("labels"))
    told = "" if names is not None else "; no dataset.json names channels and targets"
    place = "imagesTr" if training else "imagesTs"
    reason = f"{counted_pairs(subjects)} of {place}/SUBJECT_0000 with labelsTr/SUBJECT, {len(subjects)} subjects{told}"
    return Dataset(name, folder.root, "nnunet", subjects, targets, modality_of(channels), reason=reason)


def _labels_elsewhere(folder: Folder, images: Sequence[Path]) -> list[str]:
    """Files outside imagesTr and imagesTs that are named after its subjects."""
    subjects = {match[1] for path in images if (match := NUMBERED.fullmatch(name_of(path)))}
    others = [path for path in folder.scans if path.parts[0] not in ("imagesTr", "imagesTs") and len(path.parts) > 1]
    return [path.as_posix() for path in others if bare_name(path) in subjects]


def _numbered(images: list[Path], channels: tuple[str, ...]) -> Iterator[tuple[tuple[str, str], Path]]:
    """((subject, channel), file) for files named SUBJECT_0000; those with other names or numbers are skipped."""
    for path in images:
        match = NUMBERED.fullmatch(name_of(path))
        if match and int(match[2]) < len(channels):
            yield (match[1], channels[int(match[2])]), path


def read_scans(folder: Folder) -> Dataset | None:
    """Loose scans, with their labels where those lie beside them; mostly for prediction, without labels.

    Channel names come from a dataset.json here or one folder up. A file that looks like a label is one, belonging
    to the scan that it is named after, or to none; a file that is named after a scan and holds only a few whole
    numbers is a label too. Raises :class:`UnknownLayout` where folders below hold scans with other names.
    """
    here = folder.within()
    named = [path for path in here if folder.like_label(path)]
    scans = [path for path in here if path not in named]
    if scans and (other := _label_of_a_sibling(folder.root, scans[0])):
        raise UnknownLayout(
            f"'{folder.root / scans[0]}' is the label of '{other}'",
            fix="give the folder with the scans, or name the file itself to have it taken for a scan",
        )
    around = folder.root.resolve().parent.name
    if scans and is_label_folder(around) and any(holds_label(folder.root / path) for path in scans):
        raise UnknownLayout(
            f"'{folder.root}' lies in '{around}' and holds files of a few whole numbers, as labels do",
            fix="give the folder with the scans, or name the file itself to have it taken for a scan",
        )
    masks = _masks_among(folder.root, scans)
    scans, named = [path for path in scans if path not in masks], [*named, *masks]
    if not scans:
        return None
    _refuse_more_below(folder, {name_of(path) for path in here})
    about = folder.about or description(folder.root.resolve().parent)
    names = about.get("channel_names", about.get("modality"))
    channels = channel_names(names) if names else ()
    if split := _channels_by_number(scans, channels):
        channels, files = split, by_key(_numbered(scans, split))
        one_file = False
    else:
        channels = channels or ("image",)
        found = by_key((name_of(path), path) for path in scans)
        files = {(name, channel): path for name, path in found.items() for channel in channels}
        one_file = True
    labels, notes = _labels_beside({subject for subject, _ in files}, named, masks)
    subjects = subjects_of(folder.root, files, labels, channels)
    if one_file:
        subjects = tuple(replace(subject, file_channels=channels) for subject in subjects)
    reason = f"{len(subjects)} loose scans, {len(labels)} with a label beside them, and no other layout's pairs"
    targets, modality = targets_of(about.get("labels")), modality_of(channels)
    return Dataset(folder.name, folder.root, "scans", subjects, targets, modality, notes, reason=reason)


def _label_of_a_sibling(root: Path, path: Path) -> Path | None:
    """The scan with the same name in a folder beside ``root``, if the file's voxels look like a label's."""
    name, suffix = name_of(path), path.name[len(name_of(path)) :]
    for folder in sorted(folder for folder in root.resolve().parent.iterdir() if folder.is_dir()):
        for other in (folder / path.name, folder / f"{name}_0000{suffix}"):
            if folder.name != root.resolve().name and other.is_file():
                return other if holds_label(root / path) and not holds_label(other) else None
    return None


def _masks_among(root: Path, scans: Sequence[Path]) -> dict[Path, str]:
    """Files named after another one, or the other way round, whose voxels look like a label's.

    Maps each file to its scan's name: ``case_tumour.nii.gz`` beside ``case.nii.gz``, or ``case.nii.gz``
    beside ``case_0000.nii.gz``.
    """
    names = {name_of(path): path for path in scans}
    masks: dict[Path, str] = {}
    for name, path in names.items():
        others = [other for other in names if re.match(re.escape(other) + "[^A-Za-z0-9]", name)]
        for other in others:
            if holds_label(root / path):
                masks[path] = other
            elif holds_label(root / names[other]):
                numbered = NUMBERED.fullmatch(name)
                masks[names[other]] = numbered[1] if numbered else name
    return masks


def _labels_beside(
    subjects: Set[str], named: Sequence[Path], masks: Mapping[Path, str]
) -> tuple[dict[str, Path], tuple[str, ...]]:
    """Each subject's label, if it has one, and notes about labels that belong to no subject or compete for one."""
    candidates: dict[str, list[Path]] = defaultdict(list)
    for path in named:
        candidates[masks.get(path) or bare_name(path)].append(path)
    labels = {subject: paths[0] for subject, paths in candidates.items() if subject in subjects and len(paths) == 1}
    notes = []
    if strangers := [path.name for subject, paths in candidates.items() if subject not in subjects for path in paths]:
        notes.append(f"{len(strangers)} files look like labels but belong to no scan: {some(strangers)}")
    for subject, paths in candidates.items():
        if subject in subjects and len(paths) > 1:
            notes.append(f"'{subject}' has several labels beside it, so none is used: {some([p.name for p in paths])}")
    return labels, tuple(notes)


def _refuse_more_below(folder: Folder, names: Set[str]) -> None:
    """Raise unless loose scans are all there is, apart from files with their names in folders below (predictions)."""
    below = [path.as_posix() for path in folder.scans if len(path.parts) > 1 and name_of(path) not in names]
    if not below:
        below = [str(found.relative_to(folder.root)) for found in first_dicom(folder.root)]
    if below:
        raise UnknownLayout(
            f"'{folder.root}' holds loose scans and, in folders below, others such as {some(below, 3)}",
            fix="give the right folder, or a pattern such as --images '*.nii.gz' for the loose ones",
        )


def _channels_by_number(images: list[Path], channels: tuple[str, ...]) -> tuple[str, ...]:
    """Channel names if every file is SUBJECT_0000 … and all subjects have the same numbers, otherwise none."""
    matches = [NUMBERED.fullmatch(name_of(path)) for path in images]
    numbers: dict[str, list[int]] = {}
    for match in matches:
        if match is None:
            return ()
        numbers.setdefault(match[1], []).append(int(match[2]))
    first = sorted(next(iter(numbers.values())))
    if first != list(range(len(first))) or any(sorted(found) != first for found in numbers.values()):
        return ()
    if len(channels) == len(first):
        return channels
    return unnamed(len(first))


def _read_file(path: Path) -> Dataset:
    name = name_of(path)
    return Dataset(
        name, path.parent, "scans", (Subject(name, {"image": path}),), reason="the single file that was given"
    )


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


_PACKAGED = {
    layout.name: layout
    for layout in (
        Layout(
            "msd",
            """\
dataset.json                          with modality, labels and training: [{image, label}, …]
imagesTr/SUBJECT.nii.gz               4D where there are several channels
labelsTr/SUBJECT.nii.gz""",
            read_msd,
        ),
        Layout(
            "nnunet",
            """\
dataset.json                          with channel_names and labels
imagesTr/SUBJECT_0000.nii.gz          a file for each channel
         SUBJECT_0001.nii.gz
labelsTr/SUBJECT.nii.gz""",
            read_nnunet,
        ),
        BIDS,
        *CHALLENGES,
        MASKS,
        Layout(
            "scans",
            """\
SUBJECT.nii.gz                        loose scans, with SUBJECT_seg.nii.gz or without, for prediction
SUBJECT_0000.nii.gz SUBJECT_0001…     or a file for each channel""",
            read_scans,
        ),
        PAIRS,
        Layout(
            "dicom",
            """\
SUBJECT/…                             DICOM files in any folders; a study is a subject, its series are
                                      channels: --images '*flair*', or --rules rules.yaml
        masks/…                       its label: DICOM-SEG, RTSTRUCT, a series called mask, or pictures,
                                      one for each slice, in a folder beside the series (masks, Ground, …)""",
            lambda folder: read_studies(folder.root),
        ),
    )
}
LAYOUTS: Parts[Layout] = Parts(
    "layouts", "layout", _PACKAGED, lambda part: part.name if isinstance(part, Layout) else None
)
"""Layouts by name; Delineate's own in the order in which they are tried."""
