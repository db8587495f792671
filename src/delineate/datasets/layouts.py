"""Ways to arrange scans on disk, and opening a folder in whichever of them it is."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.challenges import CHALLENGES
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import (
    SIMULATED,
    Folder,
    Layout,
    by_key,
    channel_names,
    description,
    modality_of,
    subjects_of,
    targets_of,
    with_sites,
)
from delineate.datasets.studies import read_studies
from delineate.errors import BadPath, UnknownLayout
from delineate.io.files import parsing
from delineate.io.formats import name_of, suffix_of


def open_dataset(
    path: Path | str,
    *,
    layout: str = "auto",
    images: str | Mapping[str, str] | None = None,
    labels: str | None = None,
    targets: Targets | None = None,
) -> Dataset:
    """The data set in a folder (or the one scan in a file), in whichever of :data:`LAYOUTS` it is.

    ``images`` and ``labels`` are patterns such as ``*/artery.nii`` and ``*/label.nii``, relative to
    ``path``: files belong together where their wildcards match the same text. Several channels
    have a pattern each, ``{"T1": "*/t1.nii", "T2": "*/t2.nii"}``. Of DICOM, patterns are matched with
    the series' descriptions. ``targets`` replace those that the data set names. Nothing but names
    (and DICOM's headers) is read: what is wrong with a subject, a missing label included, is found by
    :func:`delineate.datasets.inspection.inspect`.

    Raises :class:`MissingFile` where there is no folder, :class:`UnknownLayout` where it is in no
    known layout, :class:`DuplicateSubject` where subjects share a name.
    """
    root = Path(path)
    if layout not in ("auto", *LAYOUTS):
        near = difflib.get_close_matches(layout, LAYOUTS, 1)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UnknownLayout(f"no layout is called '{layout}'; {hint}known are auto, {', '.join(LAYOUTS)}")
    if labels is not None and images is None:
        raise UnknownLayout(f"labels are given by a pattern ({labels}), images are not; give both")
    with parsing(root, UnknownLayout, fix="repair its dataset.json, or give patterns"):
        dataset = _opened(root, layout, images, labels)
    return dataset if targets is None else replace(dataset, targets=targets)


def _opened(root: Path, layout: str, images: str | Mapping[str, str] | None, labels: str | None) -> Dataset:
    if root.is_file() and suffix_of(root):
        dataset = _read_file(root)
    else:
        folder = Folder.walk(root)
        # DICOM has no suffix to be known by: it is looked for where nothing else is.
        wanted = layout == "dicom" or (layout == "auto" and not folder.scans)
        studies = read_studies(root, images, labels) if wanted else None
        if studies is not None:
            dataset = studies
        elif images is not None:
            dataset = _read_patterns(folder, images, labels)
        else:
            dataset = _read(folder, list(LAYOUTS.values()) if layout == "auto" else [LAYOUTS[layout]])
        dataset = replace(with_sites(dataset), simulated=(root / SIMULATED).is_file())
    return dataset


def _read(folder: Folder, layouts: Sequence[Layout]) -> Dataset:
    for layout in layouts:
        if (dataset := layout.read(folder)) is not None:
            return dataset
    trees = "\n\n".join(f"{layout.name}:\n{_indented(layout.tree)}" for layout in layouts)
    raise UnknownLayout(
        f"'{folder.root}' is in no known layout: found {_summary(folder)}. "
        "Arrange it as one of these, or give patterns such as "
        f"--images '*/artery.nii' --labels '*/label.nii':\n\n{trees}"
    )


def read_msd(folder: Folder) -> Dataset | None:
    """Antonelli et al. 2022, The Medical Segmentation Decathlon. dataset.json decides which files count."""
    about = folder.about
    if not isinstance(about.get("training"), list) or "modality" not in about:
        return None
    if any("_0000" in path.name for path in folder.within("imagesTr")):
        return None  # nnU-Net's files under an MSD's description, as its first version had them
    channels = channel_names(about["modality"])
    # Test images have no labels: they are the data set only where there is nothing else.
    entries = [_entry(entry) for entry in about["training"] or about.get("test") or []]
    for file in (file for entry in entries for file in entry if file):
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise BadPath(f"dataset.json lists '{file[:300]}', outside of its folder; put the files into the folder")
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
    notes = _unlisted([path for path in folder.within("imagesTr") if path not in listed])
    name, targets = str(about.get("name") or folder.name), targets_of(about.get("labels"))
    return Dataset(name, folder.root, "msd", subjects, targets, modality_of(channels), notes)


def _entry(entry: Any) -> tuple[str, str | None]:
    """Image and label of one line of an MSD's list, relative to its folder."""
    if isinstance(entry, str):
        return entry, None
    image, label = (entry.get("image"), entry.get("label")) if isinstance(entry, Mapping) else (None, None)
    if isinstance(image, str) and (label is None or isinstance(label, str)):
        return image, label
    raise UnknownLayout(f'dataset.json lists {str(entry)[:300]} for training; give {{"image": …, "label": …}}')


def _unlisted(paths: list[Path]) -> tuple[str, ...]:
    if not paths:
        return ()
    return (f"{len(paths)} scans are not listed in dataset.json: {_some([p.name for p in paths])}",)


_NUMBERED = re.compile(r"(.+)_(\d{4})")


def read_nnunet(folder: Folder) -> Dataset | None:
    """Isensee et al. 2021, nnU-Net: its raw format, of either version."""
    names = folder.about.get("channel_names", folder.about.get("modality"))
    images = folder.within("imagesTr") or folder.within("imagesTs")
    if names is None or not any(_NUMBERED.fullmatch(name_of(path)) for path in images):
        return None
    channels = channel_names(names)
    labels = by_key((name_of(path), path) for path in folder.within("labelsTr")) if folder.within("imagesTr") else {}
    scans = by_key(_numbered(images, channels))
    strays = [path for path in images if path not in set(scans.values())]
    subjects = subjects_of(folder.root, scans, labels, channels)
    name, targets = str(folder.about.get("name") or folder.name), targets_of(folder.about.get("labels"))
    return Dataset(name, folder.root, "nnunet", subjects, targets, modality_of(channels), _unlisted(strays))


def _numbered(images: list[Path], channels: tuple[str, ...]) -> Iterator[tuple[tuple[str, str], Path]]:
    """((subject, channel), file) of files named SUBJECT_0000; those with other names or numbers are left aside."""
    for path in images:
        match = _NUMBERED.fullmatch(name_of(path))
        if match and int(match[2]) < len(channels):
            yield (match[1], channels[int(match[2])]), path


def read_scans(folder: Folder) -> Dataset | None:
    """Loose scans without labels, for prediction; channels' names from a dataset.json here or one folder up."""
    images = folder.within()
    if not images:
        return None
    about = folder.about or description(folder.root.resolve().parent)
    names = about.get("channel_names", about.get("modality"))
    channels = channel_names(names) if names else ()
    if split := _channels_by_number(images, channels):
        subjects = subjects_of(folder.root, by_key(_numbered(images, split)), {}, split)
    else:
        found = by_key((name_of(path), path) for path in images)
        channels = channels or ("image",)
        subjects = tuple(
            Subject(name, dict.fromkeys(channels, folder.root / path), file_channels=channels)
            for name, path in found.items()
        )
    return Dataset(folder.name, folder.root, "scans", subjects, targets_of(about.get("labels")), modality_of(channels))


def _channels_by_number(images: list[Path], channels: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the channels if every file is SUBJECT_0000 … and every subject has the same numbers, else none."""
    matches = [_NUMBERED.fullmatch(name_of(path)) for path in images]
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
    return ("image",) if len(first) == 1 else tuple(f"channel_{i}" for i in first)


def _read_file(path: Path) -> Dataset:
    name = name_of(path)
    return Dataset(name, path.parent, "scans", (Subject(name, {"image": path}),))


def _read_patterns(folder: Folder, images: str | Mapping[str, str], labels: str | None) -> Dataset:
    """Files by patterns; a label that the pattern of images matches too is no image."""
    patterns = {"image": images} if isinstance(images, str) else dict(images)
    asked = (*patterns.values(), *([labels] if labels else []))
    if long := [pattern for pattern in asked if len(pattern) > _LONGEST_PATTERN]:
        raise UnknownLayout(f"pattern '{long[0][:60]}…' has {len(long[0])} characters; {_LONGEST_PATTERN} are the most")
    wildcards = {pattern: Pattern(pattern) for pattern in asked}
    if len({matcher.wildcards for matcher in wildcards.values()}) > 1 or not all(
        matcher.wildcards for matcher in wildcards.values()
    ):
        raise UnknownLayout(
            f"patterns {', '.join(wildcards)} do not have the same number of wildcards; "
            "use *, ? or ** for what a subject's files share, such as '*/artery.nii' and '*/label.nii'"
        )
    label_files = by_key(_matching(folder, wildcards[labels])) if labels else {}
    taken = set(label_files.values())
    scans = by_key(
        ((key, channel), path)
        for channel, pattern in patterns.items()
        for key, path in _matching(folder, wildcards[pattern])
        if path not in taken
    )
    if not scans:
        raise UnknownLayout(
            f"no scan in '{folder.root}' matches {', '.join(patterns.values())}: found {_summary(folder)}; "
            "give patterns relative to that folder, in quotes"
        )
    subjects = subjects_of(folder.root, scans, label_files, tuple(patterns))
    return Dataset(folder.name, folder.root, "patterns", subjects, modality=modality_of(patterns))


_LONGEST_PATTERN = 1000
_WILDCARDS = ("**/", "**", "*", "?")


class Pattern:
    """A pattern of paths and what its wildcards match; ``.nii*`` is .nii or .nii.gz.

    A regular expression would try every way to share a path out among the wildcards, which takes
    for ever for some; this one remembers from where on the rest does not fit.
    """

    def __init__(self, pattern: str) -> None:
        self.either = pattern.endswith(".nii*")
        pattern = pattern[:-1] if self.either else pattern
        pieces = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
        self.pieces = tuple(piece for piece in pieces if piece)

    @property
    def wildcards(self) -> int:
        return sum(piece in _WILDCARDS for piece in self.pieces)

    def match(self, path: str) -> tuple[str, ...] | None:
        """What each wildcard matches, the first ones as much as they can; None where the path does not fit."""
        found = self._match(path)
        return self._match(path.removesuffix(".gz")) if found is None and self.either else found

    def _match(self, path: str) -> tuple[str, ...] | None:
        # For each piece the ends still to be tried, the longest last; what is left of a place leads nowhere.
        tried: set[tuple[int, int]] = set()
        ends: list[list[int]] = [[0]]
        places: list[int] = []
        while ends:
            if not ends[-1]:
                ends.pop()
                if places:
                    places.pop()
                continue
            at, piece = ends[-1].pop(), len(ends) - 1
            if (piece, at) in tried:
                continue
            tried.add((piece, at))
            if piece == len(self.pieces):
                if at == len(path):
                    starts = [*places, at]
                    spans = zip(self.pieces, starts, starts[1:], strict=False)
                    return tuple(path[start:end] for kind, start, end in spans if kind in _WILDCARDS)
                continue
            places.append(at)
            ends.append(self._ends(path, self.pieces[piece], at))
        return None

    @staticmethod
    def _ends(path: str, piece: str, at: int) -> list[int]:
        """Where a piece that begins ``at`` a place may end, the longest last."""
        if piece not in _WILDCARDS:
            return [at + len(piece)] if path.startswith(piece, at) else []
        slash = path.find("/", at)
        end = len(path) if slash < 0 else slash
        match piece:
            case "?":
                return [at + 1] if at < end else []
            case "*":
                return list(range(at, end + 1))
            case "**":
                return list(range(at, len(path) + 1))
        return [at, *(i + 1 for i in range(at, len(path)) if path[i] == "/")]


def _matching(folder: Folder, pattern: Pattern) -> Iterator[tuple[str, Path]]:
    """Subject and path of each scan that matches: the subject's name is what the wildcards matched."""
    for path in folder.scans:
        if (found := pattern.match(path.as_posix())) is not None:
            parts = [part.strip("/").replace("/", "_") for part in found]
            parts[-1] = name_of(Path(parts[-1])) if parts[-1] else ""
            yield "_".join(part for part in parts if part), path


def _summary(folder: Folder) -> str:
    if not folder.scans:
        return "no scan in it"
    about = f"; dataset.json with {', '.join(folder.about)}" if folder.about else ""
    return f"{len(folder.scans)} scans such as {_some([p.as_posix() for p in folder.scans], 4)}{about}"


def _some(names: list[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _indented(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())


LAYOUTS: Mapping[str, Layout] = {
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
        *CHALLENGES,
        Layout(
            "scans",
            """\
SUBJECT.nii.gz                        loose scans without labels, for prediction
SUBJECT_0000.nii.gz SUBJECT_0001…     or a file for each channel""",
            read_scans,
        ),
        Layout(
            "dicom",
            """\
SUBJECT/…                             DICOM files in any folders; a study is a subject, its series are
                                      channels: --images '*flair*' or {T1: '*t1*', FLAIR: '*flair*'}""",
            lambda folder: read_studies(folder.root),
        ),
    )
}
"""Layouts by name, in the order in which they are tried."""
