"""How targets are named, coded and coloured wherever a label is looked at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle

RGB = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""

PALETTE: tuple[str, ...] = ("#56b4e9", "#e69f00", "#009e73", "#f0e442", "#cc79a7", "#d55e00", "#0072b2")
"""Colours of targets that have none of their own, in order and then from the first again: those of Okabe & Ito 2008,
which colour-blind readers tell apart."""


@dataclass(frozen=True)
class Code:
    """A concept of a coding scheme, as in DICOM: ``Code("10200004", "SCT", "Liver")`` from SNOMED CT."""

    value: str
    scheme: str
    meaning: str


@dataclass(frozen=True)
class Coding:
    """What a target is, in codes: a category from the DICOM standard (CID 7150) and a type within it."""

    category: Code
    type: Code


@dataclass(frozen=True)
class Legend:
    """Codes and colours (``#rrggbb``) of targets, by name. A target may lack either.

    >>> legend = Legend(colours={"liver": "#dd8265"})
    >>> legend.colours_of(["liver", "tumour"])
    {'liver': (221, 130, 101), 'tumour': (86, 180, 233)}
    """

    codes: Mapping[str, Coding] = field(default_factory=dict)
    colours: Mapping[str, str] = field(default_factory=dict)

    def colours_of(self, names: Sequence[str]) -> dict[str, RGB]:
        """Each target's colour: its own, or the next of :data:`PALETTE` that no target has as its own."""
        own = {colour.lower() for colour in self.colours.values()}
        others = cycle([colour for colour in PALETTE if colour not in own] or PALETTE)
        return {name: _rgb(self.colours[name] if name in self.colours else next(others)) for name in names}


PLAIN = Legend()
"""No codes, and the colours of the palette."""


def _rgb(colour: str) -> RGB:
    red, green, blue = bytes.fromhex(colour.removeprefix("#"))
    return red, green, blue
