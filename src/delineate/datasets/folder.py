"""A folder of scans as layouts see it: walked once, with the content of its dataset.json and sites.csv."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from delineate.core.subject import Label, Masks, Subject
from delineate.core.targets import MOST_TARGETS, Targets
from delineate.core.text import printable
from delineate.datasets.dataset import Dataset, named_in, numbered_targets
from delineate.errors import DelineateError, DuplicateSubject, MissingFile, UnknownLayout
from delineate.io.files import parsing, read_json, read_text, walk
from delineate.io.formats import name_of, names_segments, suffix_of
from delineate.io.suffixes import PICTURE_SUFFIXES

SIMULATED = "simulated.json"
"""A file at the root of simulated scans that says how they were made."""

_DEPTH = 6  # folders below the root; challenges nest up to four

_LABEL_FOLDER = re.compile(
    r"label|labels(?:tr|ts|va|val|train|test)?(?:[^a-z].*)?|masks?(?:.dicom)?|labell?ed.dicom|"
    r"segs?|segmentations?|rois?|gt|ground(?:.?truths?)?|annotations",
    re.IGNORECASE,
)
_ENDING = (
    r"(?:seg|dseg|segs|segmentations?|labels?|labelmap|[a-z]*mask|masks|gt|ground_?truth|annotations?|otmulticlass)"
)
_BEGINNING = r"(?:seg|segmentation|label|mask|gt)"
_LABEL_NAME = re.compile(
    rf"(?:(?P<before>.+?)[^a-z0-9]+)?{_ENDING}|{_BEGINNING}[^a-z0-9]+(?P<after>.+)|wmh", re.IGNORECASE
)
NUMBERED = re.compile(r"(.+)_(\d{4})")
"""nnU-Net's file names, SUBJECT_0000: subject and channel number."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Folder:
    """``scans``: every scan below ``root``, sorted, relative to it. ``about``: its dataset.json, or {}.

    Pictures count as scans only where there are no volumes; beside volumes they are previews.
    """

    root: Path
    scans: tuple[Path, ...]
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def walk(cls, root: Path) -> Folder:
        """Walk a folder. Raises :class:`MissingFile` if it does not exist."""
        if not root.is_dir():
            raise MissingFile(f"no folder at '{root}'", fix="check the path")
        scans: list[Path] = []
        for place, names in walk(root, _DEPTH):
            relative = place.relative_to(root)
            scans += (relative / name for name in names if suffix_of(Path(name)))
        volumes = [path for path in scans if suffix_of(path) not in PICTURE_SUFFIXES]
        return cls(root, tuple(sorted(volumes or scans)), description(root))

    def like_label(self, path: Path) -> bool:
        """Whether one of ``scans`` looks like a label; for those directly in the root, by the root's name too."""
        return looks_like_label(Path(self.name, path) if len(path.parts) == 1 else path)

    def within(self, *parts: str) -> list[Path]:
        """Scans directly in the folder with this name (without one, in the root itself)."""
        return [path for path in self.scans if path.parent.parts == parts]

    @cached_property
    def name(self) -> str:
        return self.root.resolve().name

    @property
    def summary(self) -> str:
        """What there is, for an error."""
        if not self.scans:
            return "no scans"
        about = f"; dataset.json with {', '.join(self.about)}" if self.about else ""
        return f"{len(self.scans)} scans such as {some([p.as_posix() for p in self.scans], 4)}{about}"


@dataclass(frozen=True)
class Layout:
    """A way to arrange scans on disk.

    ``tree`` shows it, in the documentation and in errors. ``read`` returns ``None`` for a folder
    that is not arranged this way.
    """

    name: str
    tree: str
    read: Callable[[Folder], Dataset | None]


def own_folder(root: Path) -> Path:
    """The data set's own folder: ``root``, or the only folder in it that holds every scan and says what they are.

    A data set unpacked one level deeper thus keeps its subjects, its sites and the mark that it is simulated.
    """
    while True:
        scans = Folder.walk(root).scans
        first = {path.parts[0] for path in scans if len(path.parts) > 1}
        if len(first) != 1 or any(len(path.parts) == 1 for path in scans):
            return root
        below = root / first.pop()
        told = ("dataset.json", "dataset_description.json", "sites.csv", "meta.csv", SIMULATED, "imagesTr", "imagesTs")
        if any((root / name).exists() for name in told) or not any((below / name).exists() for name in told):
            return root
        root = below


def bare_name(path: Path) -> str:
    """A file's name without the word that marks it as a label: ``case`` for ``case_seg.nii.gz``, ``""`` for that
    word alone, and the whole name for a file not called a label."""
    name = name_of(path)
    match = _LABEL_NAME.fullmatch(name)
    return name if match is None else match["before"] or match["after"] or ""


def looks_like_label(path: Path) -> bool:
    """Whether a file below a data set's root looks like a label, by its name or a folder's: ``case_seg.nii.gz``,
    ``labelsTr/case.nii.gz``, ``case.seg.nrrd``. No layout takes such a file for a scan."""
    if names_segments(path):
        return True
    name = numbered[1] if (numbered := NUMBERED.fullmatch(name_of(path))) else name_of(path)
    return _LABEL_NAME.fullmatch(name) is not None or any(map(is_label_folder, path.parts[:-1]))


def is_label_folder(name: str) -> bool:
    """Whether a folder's name says that it holds labels."""
    return _LABEL_FOLDER.fullmatch(name) is not None


def description(root: Path) -> dict[str, Any]:
    """Contents of dataset.json, {} if there is none. Raises :class:`UnknownLayout` if it is damaged."""
    path = root / "dataset.json"
    return read_json(path, UnknownLayout, fix="repair it") if path.exists() else {}


def by_key(found: Iterable[tuple[Key, Path]]) -> dict[Key, Path]:
    """Files by subject (and channel). Raises :class:`DuplicateSubject`, listing the files, where two share a key."""
    files: dict[Key, list[Path]] = defaultdict(list)
    for key, path in found:
        files[key].append(path)
    twice = {key: paths for key, paths in files.items() if len(paths) > 1}
    if twice:
        text = "; ".join(
            f"{' '.join(map(str, key)) if isinstance(key, tuple) else key}: {', '.join(map(str, paths))}"
            for key, paths in twice.items()
        )
        raise DuplicateSubject(f"several files for one subject ({text})", fix="keep one of each, or rename them")
    return {key: paths[0] for key, paths in files.items()}


def subjects_of(
    root: Path,
    scans: Mapping[tuple[str, str], Path],
    labels: Mapping[str, Path | Mapping[str, Path]],
    channels: Sequence[str],
    sites: Mapping[str, str] | None = None,
) -> tuple[Subject, ...]:
    """Subjects from files by (subject, channel) and labels by subject: a file, or files by target.

    A label without a scan is a subject too, so that inspection finds it.
    """

    def label_of(found: Path | Mapping[str, Path] | None) -> Label | None:
        if found is None or isinstance(found, Path):
            return None if found is None else root / found
        return Masks({target: root / found[target] for target in sorted(found)})

    ids = sorted({subject for subject, _ in scans} | set(labels))
    return tuple(
        Subject(
            id=subject,
            scans={c: root / scans[subject, c] for c in channels if (subject, c) in scans},
            label=label_of(labels.get(subject)),
            site=(sites or {}).get(subject, ""),
        )
        for subject in ids
    )


def labelled(subjects: Iterable[Subject]) -> list[Subject]:
    """Subjects that have both a scan and a label."""
    return [subject for subject in subjects if subject.scans and subject.label is not None]


def counted_pairs(subjects: Iterable[Subject]) -> str:
    """How many subjects have both a scan and a label, in words."""
    count = len(labelled(subjects))
    return f"{count} pair{'s' if count != 1 else ''}"


def some(names: Sequence[str], most: int = 6) -> str:
    """The first few names."""
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def channel_names(names: Mapping[str, str] | Sequence[str]) -> tuple[str, ...]:
    """A dataset.json's channels, in the order of their numbers; a number is added to a name used twice."""
    ordered = [str(names[k]) for k in sorted(names, key=int)] if isinstance(names, Mapping) else list(map(str, names))
    return tuple(f"{name}_{i}" if ordered.count(name) > 1 else name for i, name in enumerate(ordered))


def modality_of(channels: Iterable[str]) -> str:
    """CT, MR or nothing, by the names of the channels."""
    names = [channel.upper() for channel in channels]
    if any(name.startswith("CT") for name in names):
        return "CT"
    known = ("MR", "T1", "T2", "FLAIR", "PD", "ADC", "DWI", "SWI")
    return "MR" if any(name.startswith(known) for name in names) else ""


def targets_of(labels: Any) -> Targets | None:
    """Targets of a dataset.json's ``labels``: value → name (MSD) or name → value or values (nnU-Net).

    The value 0 is background; the name ``ignore`` marks voxels that nobody labelled. Targets that share
    values overlap. ``None`` where no target is named; raises :class:`UnknownLayout` for other contents.
    """
    values: dict[str, tuple[int, ...]] = defaultdict(tuple)
    try:
        for key, entry in (labels or {}).items():
            name, numbers = (entry, key) if str(key).isdigit() and isinstance(entry, str) else (key, entry)
            values[str(name)] += tuple(map(int, numbers)) if isinstance(numbers, list) else (int(numbers),)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise UnknownLayout(
            f"dataset.json has labels {str(labels)[:300]}", fix="give value: name, or name: value or [values]"
        ) from error
    ignore = values.pop("ignore", ())
    named = {name: numbers for name, numbers in values.items() if 0 not in numbers}
    if not named:
        return None
    used = [v for numbers in named.values() for v in numbers]
    return Targets(named, "overlapping" if len(set(used)) < len(used) else "exclusive", ignore)


def targets_of_masks(subjects: Iterable[Subject]) -> Targets | None:
    """A target for each name of a mask; None where there are no masks, or more names than there may be targets."""
    names = {name for subject in subjects if isinstance(subject.label, Masks) for name in subject.label.names}
    return numbered_targets(names) if 0 < len(names) <= MOST_TARGETS else None


def with_named_segments(dataset: Dataset) -> Dataset:
    """The data set with labels that name their segments as masks by name; these are its targets if it names none."""
    subjects = tuple(
        replace(subject, label=Masks(dict.fromkeys(sorted(names), subject.label)))
        if isinstance(subject.label, Path) and names_segments(subject.label) and (names := _named(subject.label))
        else subject
        for subject in dataset.subjects
    )
    return replace(dataset, subjects=subjects, targets=dataset.targets or targets_of_masks(subjects))


def _named(label: Path) -> tuple[str, ...]:
    """The segments of a file; none where it cannot be read, which inspection reports."""
    try:
        return named_in(label)
    except DelineateError:
        return ()


def for_training(scans: Sequence[Path]) -> list[Path]:
    """Scans outside folders named ``test…``, if there are any: challenges' test sets have no labels."""
    return [p for p in scans if not any(part.lower().startswith("test") for part in p.parts[:-1])] or list(scans)


def with_sites(dataset: Dataset) -> Dataset:
    """The data set with sites, patients and attributes from the root's sites.csv, if there is one.

    Its columns are ``subject,site[,patient]``; any others become attributes. Raises
    :class:`UnknownLayout` for other columns, :class:`DuplicateSubject` for a subject with two rows.
    """
    path = dataset.root / "sites.csv"
    if not path.exists():
        return dataset
    with parsing(path, UnknownLayout, fix="save it as CSV in UTF-8"):
        table = csv.DictReader(io.StringIO(read_text(path), newline=""), skipinitialspace=True)
        columns = table.fieldnames or ()
        if not {"subject", "site"} <= set(columns):
            raise UnknownLayout(f"'{path}' has columns {_listed(columns)}", fix="give subject,site[,patient]")
        rows = [{key: printable((value or "").strip()) for key, value in row.items() if key} for row in table]
    names = Counter(row["subject"] for row in rows)
    if twice := sorted(name for name, count in names.items() if count > 1):
        raise DuplicateSubject(f"'{path}' has several rows for {_listed(twice)}", fix="keep one of each")

    known = {row.pop("subject"): row for row in rows}
    ids = {subject.id for subject in dataset.subjects}
    notes = list(dataset.notes)
    if strangers := [name for name in known if name not in ids]:
        notes.append(f"sites.csv names {_listed(strangers)}, which the data set does not have")
    subjects = []
    for subject in dataset.subjects:
        row = dict(known.get(subject.id, {}))
        site, patient = row.pop("site", "") or subject.site, row.pop("patient", "") or subject.patient
        subjects.append(replace(subject, site=site, patient=patient, attributes={**subject.attributes, **row}))
    return replace(dataset, subjects=tuple(subjects), notes=tuple(notes))


def _listed(names: Iterable[str], most: int = 12) -> str:
    shown = [name if len(name) <= 80 else f"{name[:80]}…" for name in names]
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")
