"""Files found by patterns that the user gives, in folders that no layout knows."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import (
    Folder,
    by_key,
    counted_pairs,
    looks_like_label,
    modality_of,
    some,
    subjects_of,
    targets_of_masks,
)
from delineate.errors import UnknownLayout
from delineate.io.formats import name_of

_LONGEST_PATTERN = 1000
_WILDCARDS = ("**/", "**", "*", "?")
_TARGET = "{target}"
"""Stands for the names of masks."""
_MATCHING = (*_WILDCARDS, _TARGET)


def read_patterns(folder: Folder, images: str | Mapping[str, str], labels: str | None) -> Dataset:
    """Files by patterns; a label that the images' pattern also matches is not an image.

    With ``{target}`` in the pattern of labels, they are masks: what it matches is their target.
    """
    patterns = {"image": images} if isinstance(images, str) else dict(images)
    asked = (*patterns.values(), *([labels] if labels else []))
    if long := [pattern for pattern in asked if len(pattern) > _LONGEST_PATTERN]:
        raise UnknownLayout(
            f"pattern '{long[0][:60]}…' has {len(long[0])} characters", fix=f"use {_LONGEST_PATTERN} at most"
        )
    wildcards = {pattern: Pattern(pattern) for pattern in asked}
    if len({matcher.wildcards for matcher in wildcards.values()}) > 1 or not all(
        matcher.wildcards for matcher in wildcards.values()
    ):
        raise UnknownLayout(
            f"patterns {', '.join(wildcards)} do not have the same number of wildcards",
            fix="use *, ? or ** for what a subject's files share, such as '*/artery.nii' and '*/label.nii'",
        )
    if named := [pattern for pattern in patterns.values() if wildcards[pattern].target is not None]:
        raise UnknownLayout(f"'{named[0]}' is a pattern of images", fix=f"use {_TARGET} in that of labels only")
    label_files = _labels(folder, wildcards[labels], [wildcards[p] for p in patterns.values()]) if labels else {}
    taken = {
        path for found in label_files.values() for path in (found.values() if isinstance(found, dict) else [found])
    }
    # A file that looks like a label is a scan only if the pattern itself says so: '*_mask.nii', 'labelsTr/*'.
    asks = {pattern: looks_like_label(Path(re.sub(r"[*?]+", "x", pattern))) for pattern in patterns.values()}
    matched = [
        ((key, channel), path)
        for channel, pattern in patterns.items()
        for key, _, path in _matching(folder, wildcards[pattern])
        if path not in taken
    ]
    suspects = [path for (_, channel), path in matched if looks_like_label(path) and not asks[patterns[channel]]]
    kept_out = set(suspects)
    scans = by_key((key, path) for key, path in matched if path not in kept_out)
    if not scans:
        raise UnknownLayout(
            f"no scan in '{folder.root}' matches {', '.join(patterns.values())}: found {folder.summary}",
            fix="give patterns relative to that folder, in quotes",
        )
    subjects = subjects_of(folder.root, scans, label_files, tuple(patterns))
    shown = ", ".join(patterns.values()) + (f" with {labels}" if labels else "")
    reason = f"{counted_pairs(subjects)} by the patterns {shown}"
    notes = (f"{len(suspects)} files look like labels and were left out: {some([p.name for p in suspects])}",)
    modality = modality_of(patterns)
    return Dataset(
        folder.name,
        folder.root,
        "patterns",
        subjects,
        targets_of_masks(subjects),
        modality,
        notes if suspects else (),
        reason=reason,
    )


def _labels(folder: Folder, pattern: Pattern, images: Sequence[Pattern]) -> dict[str, Path | dict[str, Path]]:
    """Labels by subject: a file, or masks by target."""
    found = _matching(folder, pattern)
    if pattern.target is None:
        return dict(by_key((key, path) for key, _, path in found))
    # '*/{target}.nii' matches '*/ct.nii', too.
    masks = by_key(
        ((key, target), path)
        for key, target, path in found
        if looks_like_label(path) or all(image.match(path.as_posix()) is None for image in images)
    )
    labels: dict[str, dict[str, Path]] = defaultdict(dict)
    for (key, target), path in masks.items():
        labels[key][target] = path
    return dict(labels)


class Pattern:
    """A pattern for paths and what its wildcards match; ``.nii*`` is .nii or .nii.gz.

    A regular expression would try every way to divide a path among the wildcards, which for some takes
    forever; this class remembers from which positions the rest cannot match.
    """

    def __init__(self, pattern: str) -> None:
        self.either = pattern.endswith(".nii*")
        pattern = pattern[:-1] if self.either else pattern
        pieces = re.split(r"(\*\*/|\*\*|\*|\?|\{target\})", pattern.removeprefix("./"))
        self.pieces = tuple(piece for piece in pieces if piece)

    @property
    def wildcards(self) -> int:
        return sum(piece in _WILDCARDS for piece in self.pieces)

    @property
    def target(self) -> int | None:
        """Where ``{target}`` is among the texts that :meth:`match` returns; None if the pattern has none."""
        matching = [piece for piece in self.pieces if piece in _MATCHING]
        return matching.index(_TARGET) if _TARGET in matching else None

    def match(self, path: str) -> tuple[str, ...] | None:
        """What each wildcard and ``{target}`` matches, earlier ones greedily; None where the path does not match."""
        found = self._match(path)
        return self._match(path.removesuffix(".gz")) if found is None and self.either else found

    def _match(self, path: str) -> tuple[str, ...] | None:
        # For each piece, the ends still to be tried, the longest last; an exhausted position is a dead end.
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
                    return tuple(path[start:end] for kind, start, end in spans if kind in _MATCHING)
                continue
            places.append(at)
            ends.append(self._ends(path, self.pieces[piece], at))
        return None

    @staticmethod
    def _ends(path: str, piece: str, at: int) -> list[int]:
        """Where a piece that begins ``at`` a position may end, the longest last."""
        if piece not in _MATCHING:
            return [at + len(piece)] if path.startswith(piece, at) else []
        slash = path.find("/", at)
        end = len(path) if slash < 0 else slash
        match piece:
            case "?":
                return [at + 1] if at < end else []
            case "*" | "{target}":
                return list(range(at, end + 1))
            case "**":
                return list(range(at, len(path) + 1))
        return [at, *(i + 1 for i in range(at, len(path)) if path[i] == "/")]


def _matching(folder: Folder, pattern: Pattern) -> Iterator[tuple[str, str, Path]]:
    """Subject, target (or "") and path of each scan that matches: the subject's name is what the wildcards matched."""
    for path in folder.scans:
        if (found := pattern.match(path.as_posix())) is not None:
            parts = [part.strip("/").replace("/", "_") for part in found]
            parts[-1] = name_of(Path(parts[-1])) if parts[-1] else ""
            target = "" if pattern.target is None else parts.pop(pattern.target)
            yield "_".join(part for part in parts if part), target, path
