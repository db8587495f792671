"""What is segmented: named sets of label values, exclusive or overlapping."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delineate.core.text import printable
from delineate.errors import BadLabelValue, RecipeError

IGNORED = 255
"""Encoded value of a voxel that losses and metrics must ignore."""

MOST_TARGETS = 254
"""Target numbers are encoded in one byte, with the background's and :data:`IGNORED`."""

MOST_VALUE = 2**16 - 1
"""The largest label value: predictions are written with 16 bits at most."""

_FEW = 8
_MOST_KINDS = 2**15
"""How many combinations of overlapping masks are told apart."""


@dataclass(frozen=True)
class Targets:
    """Named sets of label values.

    ``values`` maps a target's name to the label values that belong to it, in the order of the
    network's outputs. ``exclusive``: each voxel belongs to at most one target (softmax over
    background and targets). ``overlapping``: a voxel may belong to several (a sigmoid each), as
    tumour within liver. ``ignore``: values that count as unknown.

    >>> import numpy as np
    >>> targets = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping")
    >>> {name: int(mask.sum()) for name, mask in targets.masks(np.array([0, 1, 1, 2])).items()}
    {'liver': 3, 'tumour': 1}
    """

    values: Mapping[str, tuple[int, ...]]
    mode: Literal["exclusive", "overlapping"] = "exclusive"
    ignore: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        values = {printable(str(name)): _as_tuple(v) for name, v in self.values.items()}
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "ignore", _as_tuple(self.ignore))
        if not values:
            raise RecipeError("no target is named", fix="give at least one, such as {liver: [1]}")
        if len(values) > MOST_TARGETS:
            raise RecipeError(f"{len(values)} targets are named", fix=f"name {MOST_TARGETS} at most")
        if beyond := [v for v in (*self.ignore, *(v for n in values.values() for v in n)) if abs(v) > MOST_VALUE]:
            raise RecipeError(
                f"label value {str(beyond[0])[:20]} is beyond {MOST_VALUE}", fix="number the structures from 1"
            )
        for name, numbers in values.items():
            if any(v < 0 for v in numbers):
                raise RecipeError(
                    f"target '{name}' has values {list(numbers)}, some of them negative", fix="renumber them"
                )
            if not numbers or 0 in numbers:
                raise RecipeError(
                    f"target '{name}' has values {list(numbers)}", fix="give one or more, without 0 (background)"
                )
        used = [v for numbers in values.values() for v in numbers]
        if self.mode == "exclusive" and len(set(used)) < len(used):
            raise RecipeError(
                f"targets share label values {sorted(used)}", fix="set mode: overlapping, or separate them"
            )
        if set(used) & set(self.ignore):
            raise RecipeError(
                f"values {sorted(set(used) & set(self.ignore))} are both segmented and ignored", fix="drop one"
            )

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.values)

    @property
    def exclusive(self) -> bool:
        return self.mode == "exclusive"

    @property
    def outputs(self) -> int:
        """Number of the network's output channels: background and targets, or one sigmoid per target."""
        return len(self.values) + (1 if self.exclusive else 0)

    @cached_property
    def outer_first(self) -> tuple[str, ...]:
        """The names in the order in which targets are written into a label, later ones over earlier ones.

        A target follows those that it lies within, as a tumour its liver; otherwise the order is that of :attr:`names`.
        """
        own = {name: frozenset(numbers) for name, numbers in self.values.items()}
        ordered: dict[str, None] = {}
        for name in self.names:
            around = [other for other in self.names if own[other] > own[name]]
            ordered |= dict.fromkeys([*sorted(around, key=lambda other: -len(own[other])), name])
        return tuple(ordered)

    @property
    def known_values(self) -> frozenset[int]:
        return frozenset({0, *self.ignore, *(v for numbers in self.values.values() for v in numbers)})

    def check(self, label: NDArray, subject: str) -> None:
        """Raise :class:`BadLabelValue` where ``label`` holds a value that no target includes."""
        # To count a few known values is many times as fast as to sort all voxels.
        few = self.known_values if len(self.known_values) <= _FEW else ()
        if few and sum(np.count_nonzero(label == value) for value in few) == label.size:
            return
        values, counts = np.unique(label, return_counts=True)
        unknown = {int(v): int(n) for v, n in zip(values, counts, strict=True) if int(v) not in self.known_values}
        if unknown:
            found = ", ".join(f"{v} ({n} voxels)" for v, n in unknown.items())
            raise BadLabelValue(
                f"the label of '{subject}' has values that no target includes: {found}; "
                f"known values are {sorted(self.known_values)}",
                fix="add them to a target or to 'ignore'",
            )

    def encode(self, label: NDArray) -> NDArray[np.uint8]:
        """A label (X, Y, Z) as training uses it, (T, X, Y, Z).

        Exclusive: T = 1, with 0 for background and 1… for the targets in order. Overlapping: T targets,
        each 0 or 1. Ignored voxels are :data:`IGNORED` in every channel.
        """
        planes = 1 if self.exclusive else len(self.values)
        least, most = (int(label.min()), int(label.max())) if label.size else (0, 0)
        # One table look-up per voxel, however many values there are.
        table = np.zeros((planes, most - least + 1), dtype=np.uint8)
        for index, numbers in enumerate(self.values.values()):
            inside = [v - least for v in numbers if least <= v <= most]
            table[0 if self.exclusive else index, inside] = index + 1 if self.exclusive else 1
        table[:, [v - least for v in self.ignore if least <= v <= most]] = IGNORED
        position = label if least == 0 else label.astype(np.int64) - least
        return np.stack([row[position] for row in table])

    def masks(self, label: NDArray) -> dict[str, NDArray[np.bool_]]:
        """Each target's boolean mask (X, Y, Z) in a label with the data set's own values."""
        return {name: self.mask_of(name, label) for name in self.values}

    def mask_of(self, name: str, label: NDArray) -> NDArray[np.bool_]:
        """One target's boolean mask (X, Y, Z) in a label with the data set's own values."""
        return _among(label, self.values[name])

    def label(
        self, masks: Iterable[tuple[str, NDArray[np.bool_]]], shape: tuple[int, ...], subject: str
    ) -> NDArray[np.unsignedinteger]:
        """A label (X, Y, Z) from the targets' masks, in any order, one held at a time: the inverse of :meth:`masks`.

        A voxel has the smallest value that belongs to exactly the targets whose masks it lies in, 0 where it lies in
        none. Raises :class:`BadLabelValue` where there is no such value, with targets that would have one.
        """
        kinds = {frozenset[str](): 0}  # every combination of masks that occurs, and its number
        kind_of = np.zeros(math.prod(shape), np.uint16)  # in Fortran order, as masks are read
        for name, mask in masks:
            place = np.flatnonzero(mask.ravel(order="F"))
            inside = kind_of[place]
            table = np.zeros(len(kinds), np.uint16)
            known = list(kinds)
            for before in np.flatnonzero(np.bincount(inside, minlength=len(kinds))):
                table[before] = kinds.setdefault(known[before] | {name}, len(kinds))
                if len(kinds) > _MOST_KINDS:
                    raise BadLabelValue(
                        f"the masks of '{subject}' overlap in more than {_MOST_KINDS} ways",
                        fix="choose fewer targets, or correct the masks",
                    )
            kind_of[place] = table[inside]
        counts = np.bincount(kind_of[kind_of > 0], minlength=len(kinds))
        found = {kind: int(n) for kind, n in zip(kinds, counts, strict=True) if n and kind}
        values = self._value_by_kind()
        if strangers := {kind: n for kind, n in found.items() if kind not in values}:
            raise BadLabelValue(
                f"the masks of '{subject}' mark voxels that no label value stands for: {self._described(strangers)}",
                fix=f"if that is right, say so with targets that have such a value ({_option(self.meant(found))}); "
                "otherwise correct the masks",
            )
        numbers = np.array([values.get(kind, 0) for kind in kinds])
        return numbers.astype(np.min_scalar_type(int(numbers.max())))[kind_of].reshape(shape, order="F")

    def _value_by_kind(self) -> dict[frozenset[str], int]:
        """The smallest value of each combination of targets that has one."""
        values = sorted({v for numbers in self.values.values() for v in numbers}, reverse=True)
        return {frozenset(_within(self.names, self, value)): value for value in values}

    def meant(self, kinds: Iterable[frozenset[str]]) -> Targets:
        """These targets with a value for each of some combinations that occur together in a label.

        A target that occurs only within others has its value counted among theirs: a tumour within its liver.
        """
        found, values, known = set(kinds), {n: {*numbers} for n, numbers in self.values.items()}, self._value_by_kind()
        free = {
            name: known[frozenset({name})]
            for name in self.names
            if frozenset({name}) in known and frozenset({name}) not in found
        }
        for kind in sorted(found - known.keys(), key=lambda kind: (len(kind), sorted(kind))):
            within = [name for name in free if name in kind]
            value = free.pop(within[-1]) if within else max(v for numbers in values.values() for v in numbers) + 1
            for name in kind:
                values[name].add(value)
        used = [v for numbers in values.values() for v in numbers]
        mode = "overlapping" if len(set(used)) < len(used) else self.mode
        return Targets({name: tuple(sorted(numbers)) for name, numbers in values.items()}, mode, self.ignore)

    def _described(self, kinds: Mapping[frozenset[str], int]) -> str:
        """Combinations of targets with their numbers of voxels, the largest first."""
        texts = []
        for kind, voxels in sorted(kinds.items(), key=lambda one: -one[1])[:_FEW]:
            inside = " and ".join(name for name in self.names if name in kind)
            only = " alone" if len(kind) == 1 else ""
            texts.append(f"{inside}{only} ({voxels} voxel{'s' if voxels != 1 else ''})")
        return ", ".join(texts) + (", …" if len(kinds) > _FEW else "")

    def class_voxels(self, by_value: Mapping[int, int]) -> dict[str, int]:
        """Voxels of the background, then of each target, from voxels by label value; ignored ones are left out."""
        foreground = {*self.ignore, *(v for numbers in self.values.values() for v in numbers)}
        background = sum(n for value, n in by_value.items() if value not in foreground)
        return {
            "background": background,
            **{name: sum(by_value.get(v, 0) for v in numbers) for name, numbers in self.values.items()},
        }

    def foreground(self, label: NDArray) -> NDArray[np.bool_]:
        """Voxels of a label that belong to any target."""
        return _among(label, [value for numbers in self.values.values() for value in numbers])

    def known(self, label: NDArray) -> NDArray[np.bool_]:
        """Voxels of a label that are not ignored."""
        return ~_among(label, self.ignore)

    def mask(self, encoded: NDArray[np.uint8], index: int) -> NDArray[np.bool_]:
        """The mask (X, Y, Z) of the target of this index in a label as :meth:`encode` gives it."""
        return encoded[0] == index + 1 if self.exclusive else encoded[index] == 1

    def decode(self, encoded: NDArray[np.uint8]) -> NDArray[np.unsignedinteger]:
        """Label values (X, Y, Z) from a label as :meth:`encode` gives it, in which nothing is ignored.

        Each target writes the value that :meth:`written_value` gives, in the order of :attr:`outer_first`. Reading the
        label back gives the same masks as long as an inner target lies within the outer one, which lists the inner
        one's values too.
        """
        values = [0, *(self.written_value(name) for name in self.names)]
        table = np.array(values, np.uint8 if max(values) < 256 else np.uint16)
        label: NDArray[np.unsignedinteger]
        if self.exclusive:
            return table[encoded[0]]
        label = np.zeros_like(encoded[0], table.dtype)
        for index in map(self.names.index, self.outer_first):
            np.copyto(label, table[index + 1], where=encoded[index] == 1)
        return label

    def written_value(self, name: str) -> int:
        """The label value that :meth:`decode` writes for a target: one that no target written later claims."""
        later = {v for other in self.outer_first[self.outer_first.index(name) + 1 :] for v in self.values[other]}
        own = [v for v in self.values[name] if v not in later]
        return (own or list(self.values[name]))[0]

    def as_dict(self) -> dict[str, object]:
        """Plain values for YAML and JSON."""
        return {"values": {n: list(v) for n, v in self.values.items()}, "mode": self.mode, "ignore": list(self.ignore)}


@dataclass(frozen=True)
class SharedTargets:
    """The targets that predictions and references both name, and one numbering for labels whose values differ.

    ``targets`` are those of relabelled labels: a value for each combination of shared targets that a value of either
    stands for. Targets that only one of them names become background; what references ignore stays ignored. Where
    both are the same, labels stay as they are.

    >>> import numpy as np
    >>> shared = SharedTargets.of(Targets({"liver": (1,), "tumour": (2,)}), Targets({"tumour": (5,)}))
    >>> shared.targets.names, shared.prediction(np.array([0, 1, 2]), "a"), shared.reference(np.array([0, 5, 0]), "a")
    (('tumour',), array([0, 0, 1], dtype=uint16), array([0, 1, 0], dtype=uint16))
    """

    targets: Targets
    of_predictions: Targets
    of_references: Targets

    @classmethod
    def of(cls, predictions: Targets, references: Targets, names: Sequence[str] | None = None) -> SharedTargets:
        """What both name, in the references' order; of these, ``names`` if given.

        Raises :class:`RecipeError` if they share no target.
        """
        shared = [n for n in references.names if n in predictions.values and (names is None or n in names)]
        if not shared:
            raise RecipeError(
                f"predictions hold {', '.join(predictions.names)}, references {', '.join(references.names)}: "
                "they have no target in common",
                fix="name the references' targets as the predictions', such as --targets liver=1,tumour=2",
            )
        if predictions == references and len(shared) == len(references.names):
            return cls(references, predictions, references)
        numbers = _numbers(shared, predictions, references)
        values = {name: tuple(n for within, n in numbers.items() if name in within) for name in shared}
        ignored = (len(numbers) + 1,) if references.ignore or predictions.ignore else ()
        exclusive = predictions.exclusive and references.exclusive
        targets = Targets(values, "exclusive" if exclusive else "overlapping", ignored)
        return cls(targets, predictions, references)

    @property
    def relabels(self) -> bool:
        """Whether labels have to be relabelled."""
        return not self.targets == self.of_predictions == self.of_references

    def prediction(self, label: NDArray, subject: str) -> NDArray:
        """A prediction (X, Y, Z) in the shared numbering; raises :class:`BadLabelValue`."""
        return self._relabelled(label, self.of_predictions, subject)

    def reference(self, label: NDArray, subject: str) -> NDArray:
        """A reference (X, Y, Z) in the shared numbering; raises :class:`BadLabelValue`."""
        return self._relabelled(label, self.of_references, subject)

    def _relabelled(self, label: NDArray, own: Targets, subject: str) -> NDArray:
        own.check(label, subject)
        if not self.relabels:
            return label
        numbers = _numbers(self.targets.names, self.of_predictions, self.of_references)
        found, place = np.unique(label, return_inverse=True)
        new = [
            self.targets.ignore[0] if v in own.ignore else numbers.get(_within(self.targets.names, own, v), 0)
            for v in found.tolist()
        ]
        return np.array(new, np.uint16)[place].reshape(label.shape)


def _within(names: Sequence[str], targets: Targets, value: int) -> tuple[str, ...]:
    """Which of ``names`` a label value belongs to."""
    return tuple(name for name in names if value in targets.values[name])


def _numbers(names: Sequence[str], *several: Targets) -> dict[tuple[str, ...], int]:
    """A number from 1 for each combination of ``names`` that any label value stands for."""
    values = [(targets, v) for targets in several for numbers in targets.values.values() for v in numbers]
    combinations = dict.fromkeys(_within(names, targets, value) for targets, value in values)
    return {within: number for number, within in enumerate(filter(None, combinations), start=1)}


def _option(targets: Targets) -> str:
    """Targets as on the command line; of many, only those that share values."""
    shown, more = targets.values, ""
    if len(shown) > _FEW:
        sharing = {v for v in targets.known_values if len(_within(targets.names, targets, v)) > 1}
        shown, more = {name: numbers for name, numbers in shown.items() if sharing & {*numbers}}, ",…"
    texts = (f"{name}={'+'.join(map(str, numbers))}" for name, numbers in shown.items())
    return f"--targets '{','.join(texts)}{more}'"


def _as_tuple(values: int | tuple[int, ...] | list[int]) -> tuple[int, ...]:
    return (values,) if isinstance(values, int) else tuple(int(v) for v in values)


def _among(label: NDArray, values: Collection[int]) -> NDArray[np.bool_]:
    """Where a label has one of some values. A few are compared one by one: three to forty times as fast as ``isin``."""
    if not 0 < len(values) <= _FEW:
        return np.isin(label, list(values))
    first, *others = values
    inside: NDArray[np.bool_] = label == first
    for value in others:
        inside |= label == value
    return inside
