"""Scans and labels that belong together by their names, wherever they lie: ``images/a`` with ``labels/a``, ``a/ct``
with ``a/seg``, ``a_t1`` and ``a_t2`` with ``a_mask``."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence, Set
from heapq import nlargest
from itertools import compress, takewhile
from operator import not_
from pathlib import Path

from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import (
    Folder,
    Layout,
    bare_name,
    by_key,
    is_label_folder,
    modality_of,
    subjects_of,
    targets_of,
)
from delineate.io.formats import name_of

_SCAN_FOLDER = re.compile(
    r"(?:images?|imgs?|scans?|volumes?|data|raw|input|niftis?)(?:tr|train|training)?", re.IGNORECASE
)
_GAPS = re.compile(r"[^A-Za-z0-9]+")
_MOST_CHANNELS = 16
_MOST_PATTERNS = 50
ALONE = "image"
"""The channel of scans whose names say nothing else."""

Key = tuple[tuple[str, ...], str]
"""The folders that are not called after images or labels, and a name."""


def read_pairs(folder: Folder) -> Dataset | None:
    """Pairs by names. None where a label has no scan, or several labels are for one scan."""
    scans, named = apart(folder)
    keys = [(place_of(path), bare_name(path)) for path in named]
    if not named or len(set(keys)) < len(keys):
        return None
    labels = dict(zip(keys, named, strict=True))
    found = paired_up(scans, labels.keys())
    if found is None:
        return None
    channels = sorted({channel for _, channel in found.values()})
    ids = ids_of({key for key, _ in found.values()})
    images = by_key(((ids[key], channel), path) for path, (key, channel) in found.items())
    subjects = subjects_of(folder.root, images, by_key((ids[key], path) for key, path in labels.items()), channels)
    first = next(iter(labels))
    shown = " and ".join(path.as_posix() for path, (key, _) in found.items() if key == first)
    such = f"{shown} with {labels[first].as_posix()}"
    reason = f"{len(labels)} of {len(subjects)} scans have a label by its name, such as {such}"
    targets = targets_of(folder.about.get("labels"))
    return Dataset(folder.name, folder.root, "pairs", subjects, targets, modality_of(channels), reason=reason)


def paired_up(scans: Sequence[Path], labels: Set[Key]) -> dict[Path, tuple[Key, str]] | None:
    """The label that each scan belongs to, and its channel; also scans without a label, if they are named as others.

    None where a label has no scan, or the scans make too many channels.
    """
    found = {path: match for path in scans if (match := match_of(path, labels)) is not None}
    if {key for key, _ in found.values()} != labels:
        return None
    channels = sorted({channel for _, channel in found.values()})
    places = {place for place, _ in labels}
    others = {path: _alone(path, channels, places) for path in scans if path not in found}
    return found | {path: match for path, match in others.items() if match} if len(channels) <= _MOST_CHANNELS else None


def apart(folder: Folder) -> tuple[list[Path], list[Path]]:
    """Scans and labels."""
    like = [folder.like_label(path) for path in folder.scans]
    return [*compress(folder.scans, map(not_, like))], [*compress(folder.scans, like)]


def place_of(path: Path) -> tuple[str, ...]:
    """The folders of a file that tell subjects apart."""
    return tuple(part for part in path.parts[:-1] if not is_label_folder(part) and not _SCAN_FOLDER.fullmatch(part))


def match_of(path: Path, labels: Container[Key]) -> tuple[Key, str] | None:
    """The label that a scan belongs to, and its channel: the rest of its name, or the folder that it alone is in."""
    place, name = place_of(path), name_of(path)
    for end in [len(name), *(gap.start() for gap in reversed([*_GAPS.finditer(name)]))]:  # of a and a_1, a_1 for a_1_ct
        if (place, name[:end]) in labels:
            return (place, name[:end]), _GAPS.sub("", name[end:], count=1) or ALONE
    if (place, "") in labels:
        own = f"{place[-1]}_" if place else ""
        return (place, ""), name[len(own) :] if own and name.startswith(own) and name != own else name
    for i, part in enumerate(place):
        if (place[:i] + place[i + 1 :], name) in labels:
            return (place[:i] + place[i + 1 :], name), part
    return None


def _alone(path: Path, channels: Iterable[str], places: Set[tuple[str, ...]]) -> tuple[Key, str] | None:
    """A scan without a label, named as those that have one; ``places`` are theirs."""
    place, name = place_of(path), name_of(path)
    for channel in channels:
        match = re.fullmatch(rf"(.+?)[^A-Za-z0-9]+{re.escape(channel)}", name)
        if place in places and (channel == ALONE or match):
            return (place, match[1] if match else name), channel
        own = place[-1:] in {(name,), (match[1],) if match else ()}
        if any(len(place) == len(other) for other in places) and (name == channel or (match and own)):
            return (place, ""), channel
    return None


def ids_of(keys: Set[Key]) -> dict[Key, str]:
    """Subjects' names: folders that all have in common are not part of them."""
    named = {(place, name): (*place, *([name] if name and name not in place[-1:] else [])) for place, name in keys}
    levels = zip(*(place if name else place[:-1] for place, name in keys), strict=False)
    common = sum(1 for _ in takewhile(lambda parts: len({*parts}) == 1, levels))
    return {key: "_".join(words[min(common, len(words) - 1) :]) for key, words in named.items()}


def proposed(folder: Folder, most: int = 3) -> list[tuple[str, str, int]]:
    """Patterns for scans and labels that lie together in several folders, with how many pairs each makes; for folders
    that no layout reads, such as those with a file for each target beside the scan."""
    scans, labels = map(_keys_by_pattern, apart(folder))
    found = [
        (image, label, len(scans[image] & keys))
        for label, keys in labels.items()
        if (image := max(scans, key=lambda pattern: (len(scans[pattern] & keys), -len(scans[pattern])), default=""))
    ]
    ranked = sorted((one for one in found if one[2] > 1), key=lambda one: (-one[2], one[1]))
    return [*_with_targets(ranked), *ranked][:most]


def _with_targets(ranked: Sequence[tuple[str, str, int]]) -> Iterator[tuple[str, str, int]]:
    """Patterns for all labels of the same scans at once: ``{target}`` for what those in the same folder differ in."""
    together: dict[tuple[str, Path], list[tuple[str, int]]] = defaultdict(list)
    for image, label, pairs in ranked:
        if "*" not in Path(label).name:
            together[image, Path(label).parent].append((Path(label).name, pairs))
    for (image, place), found in together.items():
        names = [name for name, _ in found]
        start, end = _begin(names), _begin([name[::-1] for name in names])[::-1]
        if len(names) > 1 and min(map(len, names)) > len(start) + len(end):
            yield image, (place / f"{start}{{target}}{end}").as_posix(), max(pairs for _, pairs in found)


def _begin(texts: Sequence[str]) -> str:
    """What all texts begin with."""
    return "".join(letters[0] for letters in takewhile(lambda letters: len({*letters}) == 1, zip(*texts, strict=False)))


def _keys_by_pattern(paths: Iterable[Path]) -> dict[str, set[str]]:
    """The patterns that most files fit, each with what its asterisk stands for."""
    keys: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        for pattern, key in _patterns(path):
            keys[pattern].add(key)
    return {pattern: keys[pattern] for pattern in nlargest(_MOST_PATTERNS, keys, key=lambda one: len(keys[one]))}


def _patterns(path: Path) -> Iterator[tuple[str, str]]:
    """Patterns that fit a file, with an asterisk for one folder, or for its name up to its last word; and its text."""
    for i, part in enumerate(path.parts[:-1]):
        yield Path(*path.parts[:i], "*", *path.parts[i + 1 :]).as_posix(), part
    name = name_of(path)
    suffix = path.name[len(name) :]
    yield path.with_name(f"*{suffix}").as_posix(), name
    if (gap := name.rfind("_")) > 0:
        yield path.with_name(f"*{name[gap:]}{suffix}").as_posix(), name[:gap]


PAIRS = Layout(
    "pairs",
    """\
images/SUBJECT.nii.gz                 with labels/SUBJECT.nii.gz, or SUBJECT_seg.nii.gz there
SUBJECT/ct.nii.gz                     with SUBJECT/seg.nii.gz, SUBJECT/SUBJECT_label.nii.gz, …
SUBJECT/SUBJECT_t1.nii.gz             several channels: whatever the names of a subject's files differ in""",
    read_pairs,
)
