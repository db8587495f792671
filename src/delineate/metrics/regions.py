"""The regions that challenges measure, worked out from the targets that a data set or a user names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from delineate.core.targets import Targets


@dataclass(frozen=True)
class Regions:
    """A challenge's regions, and how to recognise them among targets with other names and label values.

    ``names`` has a name pattern for each region, from the largest to the smallest, and ``parts`` one for each of
    the classes drawn in labels. ``made_of`` gives each region's parts, ``left_out`` the part that is
    ignored. ``values`` are the challenge's own targets; its label values may differ from year to year.
    """

    names: Mapping[str, str]
    parts: Mapping[str, str]
    made_of: Mapping[str, tuple[str, ...]]
    values: tuple[Targets, ...]
    left_out: str = ""

    @property
    def unnamed(self) -> Targets | None:
        """The targets to assume if nobody names any; None where the challenge's label values differ by year."""
        return self.values[0] if len(self.values) == 1 else None

    def among(self, named: Targets) -> Targets | None:
        """The regions in labels with ``named`` targets; None where the targets do not say.

        Targets that already are the regions, by name or by the challenge's own label values, keep their names.
        Otherwise they are taken for parts, and each must have the name of one.
        """
        regions = self._as_named(named) or self._joined(named)
        if regions is None:
            return None
        own = {v for targets in self.values for v in targets.ignore}
        measured = {v for values in regions.values.values() for v in values}
        if own & measured and not regions.ignore:
            return None  # a part that the challenge ignores was merged into one that it measures
        ignore = regions.ignore or tuple(sorted(own - named.known_values))
        return named if regions == named and ignore == named.ignore else Targets(regions.values, regions.mode, ignore)

    def _as_named(self, named: Targets) -> Targets | None:
        ordered = sorted(named.values, key=lambda name: -len(set(named.values[name])))
        values = [set(named.values[name]) for name in ordered]
        if len(ordered) != len(self.names) or not _nested(values):
            return None
        if all(_is(name, pattern) for name, pattern in zip(ordered, self.names.values(), strict=True)):
            return named
        own = any(values == [set(numbers) for numbers in targets.values.values()] for targets in self.values)
        known = any(_is(name, pattern) for name in ordered for pattern in (*self.names.values(), *self.parts.values()))
        return named if own and not known else None

    def _joined(self, named: Targets) -> Targets | None:
        values: dict[str | None, set[int]] = {}
        for name, numbers in named.values.items():
            values.setdefault(self.part_of(name), set()).update(numbers)
        needed = {part for parts in self.made_of.values() for part in parts}
        if None in values or not needed <= set(values):
            return None
        regions = {
            region: tuple(sorted(set().union(*(values[part] for part in parts))))
            for region, parts in self.made_of.items()
        }
        ignore = tuple(sorted({*named.ignore, *values.get(self.left_out, ())}))
        if not _nested([set(v) for v in regions.values()]) or set(ignore) & set(next(iter(regions.values()))):
            return None
        return Targets(regions, "overlapping" if len(regions) > 1 else "exclusive", ignore)

    def part_of(self, name: str) -> str | None:
        """The part that a target's name stands for, if any."""
        return next((part for part, pattern in self.parts.items() if _is(name, pattern)), None)


def _is(name: str, pattern: str) -> bool:
    return re.fullmatch(pattern, " ".join(re.findall(r"[a-z0-9]+", name.lower()))) is not None


def _nested(values: list[set[int]]) -> bool:
    return all(inner < outer for outer, inner in pairwise(values))


_TUMOUR = "tumou?rs?|lesions?|cancers?"
_WMH = r"wmhs?|wml|lesions?|(white matter )?(hyperintensit(y|ies)|lesions?)"
_PROSTATE = (
    r"(whole )?(prostate|gland|prostate gland)|[pct]z|cg|anterior fibromuscular stroma|afm?s"
    r"|(prostate )?(peripheral|transition(al)?|central)( zone| gland)?"
)
_LIVER_TUMOUR = rf"((liver|hepatic) )?({_TUMOUR}|metastas[ei]s)"
_ENHANCING = rf"enhancing( ({_TUMOUR}|core|part))?|et"

WMH2017 = Regions(
    {"lesion": _WMH},
    {"lesion": _WMH, "other": r"other( patholog(y|ies))?"},
    {"lesion": ("lesion",)},
    (Targets({"lesion": (1,)}, ignore=(2,)),),
    left_out="other",
)

PROMISE12 = Regions(
    {"prostate": _PROSTATE},
    {"prostate": _PROSTATE},
    {"prostate": ("prostate",)},
    (Targets({"prostate": (1,)}),),
)

LITS = Regions(
    {"liver": "(whole )?liver", "tumour": _LIVER_TUMOUR},
    {"liver": "((healthy|normal) )?liver( (parenchyma|tissue))?", "tumour": _LIVER_TUMOUR},
    {"liver": ("liver", "tumour"), "tumour": ("tumour",)},
    (Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping"),),
)

BRATS = Regions(
    {"whole": rf"(whole|complete)( ({_TUMOUR}))?|wt", "core": rf"(({_TUMOUR}) )?core|tc", "enhancing": _ENHANCING},
    {
        "edema": r"(peritumou?ral )?o?edema|ed|snfh",
        "core": rf"necrosis|necrotic|(necrotic )?(({_TUMOUR}) )?core|(ncr )?netc?|ncr"
        rf"|(necrotic (and )?)?non ?enhancing( ({_TUMOUR}))?( core)?",
        "enhancing": _ENHANCING,
    },
    {"whole": ("edema", "core", "enhancing"), "core": ("core", "enhancing"), "enhancing": ("enhancing",)},
    # Until 2016, from 2017 to 2021, and since 2023.
    tuple(
        Targets({"whole": (*core, 2), "core": core, "enhancing": core[-1:]}, "overlapping")
        for core in ((1, 3, 4), (1, 4), (1, 3))
    ),
)
