"""All metrics by name, with unit and definition, and the sets that challenges rank by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from typing import Literal

from delineate.core.targets import Targets
from delineate.core.text import near
from delineate.errors import RecipeError
from delineate.metrics.comparison import Comparison, Part
from delineate.metrics.quantities import QuantityMap, error_percent
from delineate.metrics.regions import BRATS, LITS, PROMISE12, WMH2017, Regions
from delineate.plugins import Parts


@dataclass(frozen=True)
class Metric:
    """A number for one target in one subject.

    ``better`` says which direction is good; None: neither, as for volumes, which are not averaged over targets.
    """

    name: str
    label: str
    definition: str
    of: Callable[[Comparison], float] = field(repr=False, compare=False)
    unit: str = ""
    better: Literal["higher", "lower"] | None = "higher"
    decimals: int = 3

    @property
    def title(self) -> str:
        """The label with its unit, as a column heading."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


@dataclass(frozen=True)
class MetricSet:
    """Names of metrics, in the order of a challenge's table, and the ``regions`` that the challenge measures."""

    about: str
    names: str
    regions: Regions | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.names.split())


PROBABILITY_MAE = "probability_mae"
QUANTITIES = (
    "quantity_mean",
    "reference_quantity_mean",
    "quantity_error",
    "quantity_median",
    "reference_quantity_median",
)


def named_metric(name: str, quantity: QuantityMap | None) -> Metric:
    """A metric; one of a quantity by the name of that, with its unit."""
    metric = METRICS[name]
    if quantity is None or name not in QUANTITIES:
        return metric
    title = quantity.title
    label = metric.label.replace("Quantity", title[:1].upper() + title[1:]).replace("quantity", title)
    unit = "percentage points" if quantity.unit == "%" and name == "quantity_error" else quantity.unit
    return replace(metric, label=label, unit=unit)


_SURFACE = "between centres of surface voxels (6-neighbourhood), both directions"
_LESION = "lesions are 26-connected; matched by any overlap, or by more than the requested share of their voxels"


def _error_percent(c: Comparison) -> float:
    return error_percent(c.volume_ml, c.reference_volume_ml)


def _density_percent(c: Comparison) -> float:
    return 100 * (c.overlap.tp + c.overlap.fn) / c.voxels if c.voxels else nan


def _overlaps() -> Iterator[Metric]:
    yield Metric("dice", "Dice", "2 TP / (2 TP + FP + FN), which is F1", lambda c: c.overlap.dice)
    yield Metric("jaccard", "Jaccard", "TP / (TP + FP + FN)", lambda c: c.overlap.jaccard)
    yield Metric("precision", "Precision", "TP / (TP + FP)", lambda c: c.overlap.precision)
    yield Metric("recall", "Recall", "TP / (TP + FN)", lambda c: c.overlap.recall)
    yield Metric("specificity", "Specificity", "TN / (TN + FP)", lambda c: c.overlap.specificity, decimals=5)
    yield Metric(
        "voe_percent", "Overlap error", "1 − Jaccard", lambda c: 100 * (1 - c.overlap.jaccard), "%", "lower", 1
    )


def _distances() -> Iterator[Metric]:
    def mm(name: str, label: str, definition: str, of: Callable[[Comparison], float]) -> Metric:
        return Metric(name, label, definition, of, "mm", "lower", 2)

    larger = "larger 95th percentile of the distances"
    outlines = "between outlines in the slices (8-neighbourhood), both directions"
    yield mm("hd_mm", "HD", f"largest distance {_SURFACE}", lambda c: c.surfaces.hausdorff_mm())
    yield mm("hd95_mm", "HD95", f"{larger} {_SURFACE}", lambda c: c.surfaces.hausdorff95_mm)
    yield mm("hd95_outline_mm", "HD95 of outlines", f"{larger} {outlines}", lambda c: c.outlines.hausdorff95_mm)
    yield mm("assd_mm", "ASSD", f"mean distance {_SURFACE}", lambda c: c.surfaces.mean_mm)
    yield mm(
        "msd_mm",
        "Mean surface distance",
        "mean of the two directed mean distances between centres of surface voxels (6-neighbourhood)",
        lambda c: sum(c.surfaces.directed_means_mm) / 2,
    )
    yield mm("rms_mm", "RMS distance", f"root mean square distance {_SURFACE}", lambda c: c.surfaces.rms_mm)
    area = "between surface elements weighted by area, as in surface-distance (Nikolov et al. 2018)"
    yield mm("hd95_area_mm", "HD95 by area", f"{larger} {area}", lambda c: c.surfels.hausdorff95_mm)
    yield _surface_dice(1.0)
    yield _surface_dice(1.0, by_area=True)


def _surface_dice(tolerance_mm: float, *, by_area: bool = False) -> Metric:
    if by_area:
        return Metric(
            f"surface_dice_area_{tolerance_mm:g}mm",
            f"Surface Dice by area at {tolerance_mm:g} mm",
            f"share of both surfaces' area at most {tolerance_mm:g} mm from the other, as in surface-distance "
            "(Nikolov et al. 2018); any tolerance can be given in the name",
            lambda c: c.surfels.surface_dice(tolerance_mm),
        )
    return Metric(
        f"surface_dice_{tolerance_mm:g}mm",
        f"Surface Dice at {tolerance_mm:g} mm",
        f"share of both surfaces' voxels at most {tolerance_mm:g} mm from the other; "
        "any tolerance can be given in the name",
        lambda c: c.surfaces.surface_dice(tolerance_mm),
    )


def _volumes() -> Iterator[Metric]:
    def plain(name: str, label: str, definition: str, of: Callable[[Comparison], float], unit: str) -> Metric:
        return Metric(name, label, definition, of, unit, None, {"ml": 2, "%": 1}[unit])

    yield plain("volume_ml", "Volume", "volume of the prediction", lambda c: c.volume_ml, "ml")
    yield plain(
        "reference_volume_ml", "Reference volume", "volume of the reference", lambda c: c.reference_volume_ml, "ml"
    )
    error = "prediction − reference"
    yield plain("volume_error_ml", "Volume error", error, lambda c: c.volume_ml - c.reference_volume_ml, "ml")
    yield plain("volume_error_percent", "Volume error", f"{error}, in % of the reference", _error_percent, "%")
    yield Metric(
        "avd_percent",
        "Absolute volume error",
        f"{error}, in % of the reference, without its sign",
        lambda c: abs(_error_percent(c)),
        "%",
        "lower",
        1,
    )
    yield Metric(
        "density_percent", "Positive class density", "reference's share of all voxels", _density_percent, "%", None, 4
    )


def _lesions() -> Iterator[Metric]:
    yield Metric(
        "lesion_recall", "Lesion recall", f"share of reference lesions detected; {_LESION}", lambda c: c.lesions.recall
    )
    yield Metric(
        "lesion_precision",
        "Lesion precision",
        f"share of predicted lesions that are real; {_LESION}",
        lambda c: c.lesions.precision,
    )
    yield Metric(
        "lesion_f1", "Lesion F1", f"harmonic mean of lesion recall and precision; {_LESION}", lambda c: c.lesions.f1
    )
    for name, label, count in (
        ("lesion_count", "Lesions predicted", lambda c: float(c.lesions.predicted)),
        ("reference_lesion_count", "Lesions in the reference", lambda c: float(c.lesions.count)),
    ):
        yield Metric(name, label, "26-connected", count, "", None, 0)


def _of_more() -> Iterator[Metric]:
    """Metrics that need more than masks: probabilities, or a map of a quantity such as the fat fraction."""
    yield Metric(
        PROBABILITY_MAE,
        "Mean error of probabilities",
        "mean of |probability − reference| over all voxels",
        _more(PROBABILITY_MAE),
        better="lower",
        decimals=4,
    )
    where = "of the map's values in the {}, without the margin"
    for statistic in ("mean", "median"):
        for of, prefix in (("prediction", ""), ("reference", "reference_")):
            name = f"{prefix}quantity_{statistic}"
            label = f"{prefix.replace('_', ' ')}quantity, {statistic}".capitalize()
            yield Metric(name, label, f"{statistic} {where.format(of)}", _more(name), "", None, 2)
    yield Metric(
        "quantity_error",
        "Quantity error",
        "mean in the prediction − mean in the reference",
        lambda c: c.more.get("quantity_mean", nan) - c.more.get("reference_quantity_mean", nan),
        "",
        None,
        2,
    )


def _more(name: str) -> Callable[[Comparison], float]:
    return lambda c: c.more.get(name, nan)


def _of_part(metric: Metric, part: Part) -> Metric:
    end = {"apex": "feet", "base": "head"}[part]
    where = f"in the third of the reference's slices nearest to the {end}; undefined below three slices"
    return replace(
        metric,
        name=f"{part}_{metric.name}",
        label=f"{part.capitalize()} {metric.label}",
        definition=f"{metric.definition}; {where}",
        of=lambda c: nan if (third := c.part(part)) is None else metric.of(third),
    )


_PROMISE12 = ("dice", "assd_mm", "hd95_mm", "volume_error_percent")
_PARTS: tuple[Part, ...] = ("apex", "base")


class Catalogue(Parts[Metric]):
    """Metrics by name. Surface Dice is listed at one tolerance but works at any: ``surface_dice_area_2.5mm``."""

    def __getitem__(self, name: str) -> Metric:
        tolerance = None if name in self.packaged else _TOLERANCE.fullmatch(name)
        return (
            super().__getitem__(name)
            if tolerance is None
            else _surface_dice(float(tolerance[2]), by_area=bool(tolerance[1]))
        )

    def __contains__(self, name: object) -> bool:
        return (isinstance(name, str) and _TOLERANCE.fullmatch(name) is not None) or super().__contains__(name)


_TOLERANCE = re.compile(r"surface_dice_(area_)?(\d+(?:\.\d+)?)mm")
_WHOLE = {m.name: m for group in (_overlaps, _distances, _volumes, _lesions, _of_more) for m in group()}
_THIRDS = {m.name: m for part in _PARTS for m in (_of_part(_WHOLE[name], part) for name in _PROMISE12)}

METRICS = Catalogue(
    "metrics", "metric", {**_WHOLE, **_THIRDS}, lambda part: part.name if isinstance(part, Metric) else None
)

SETS: dict[str, MetricSet] = {
    "standard": MetricSet(
        "the essentials for a first look",
        "dice precision recall hd95_mm volume_ml reference_volume_ml volume_error_ml volume_error_percent",
    ),
    "wmh2017": MetricSet(
        "WMH segmentation challenge (Kuijf et al. 2019)",
        "dice hd95_outline_mm avd_percent lesion_recall lesion_f1",
        WMH2017,
    ),
    "promise12": MetricSet(
        "PROMISE12 (Litjens et al. 2014): whole prostate, apex and base",
        " ".join((*_PROMISE12, *(f"{part}_{name}" for part in _PARTS for name in _PROMISE12))),
        PROMISE12,
    ),
    "lits": MetricSet(
        "liver tumour challenge (Bilic et al. 2023)",
        "dice voe_percent volume_error_percent assd_mm rms_mm hd_mm lesion_recall lesion_precision",
        LITS,
    ),
    "brats": MetricSet(
        "brain tumour challenge (Menze et al. 2015)",
        "dice recall specificity hd95_mm",
        BRATS,
    ),
}


def metric_names(wanted: str) -> tuple[str, ...]:
    """Metric names from sets and metrics joined by commas, each once. Raises :class:`RecipeError`."""
    names: dict[str, None] = {}
    for name in (part.strip() for part in wanted.split(",")):
        if name in SETS:
            names |= dict.fromkeys(SETS[name].metrics)
        elif name in METRICS:
            names[METRICS[name].name] = None
        else:
            hint = near(name, (*SETS, *METRICS))
            known = f"sets are {', '.join(SETS)}, metrics {', '.join(METRICS)}"
            raise RecipeError(f"no metric '{name}'{hint}", fix=known)
    return tuple(names)


def targets_of(wanted: str, named: Targets | None) -> Targets | None:
    """What to measure in labels with ``named`` targets: these, or the regions of a challenge whose set is wanted.

    None where neither names any. Raises :class:`RecipeError` where the challenge's regions cannot be worked
    out from the targets, and where two challenges have different regions.
    """
    chosen = dict.fromkeys(name for name in (part.strip() for part in wanted.split(",")) if name in SETS)
    found = {name: _regions_of(name, regions, named) for name in chosen if (regions := SETS[name].regions)}
    if not found:
        return named
    first, *others = found.values()
    if any(other != first for other in others):
        raise RecipeError(f"{' and '.join(found)} measure different regions", fix="evaluate with one of them at a time")
    return first


def _regions_of(name: str, regions: Regions, named: Targets | None) -> Targets:
    made = regions.unnamed if named is None else regions.among(named)
    if made is not None:
        return made
    given = "no targets are named"
    if named is not None:
        targets = ", ".join(f"{target} {list(values)}" for target, values in named.values.items())
        given = f"got {targets}, but only names such as {', '.join(regions.parts)} say which region is which"
    raise RecipeError(
        f"'{name}' measures {', '.join(regions.made_of)}; {given}",
        fix=(
            f"give these regions with their label values, such as "
            f"--targets '{_EXAMPLES[name]}', or take the metrics without the set: {','.join(SETS[name].metrics)}"
        ),
    )


_EXAMPLES = {
    "wmh2017": "lesion=1",
    "promise12": "prostate=1+2",
    "lits": "liver=1+2,tumour=2",
    "brats": "whole=1+2+4,core=1+4,enhancing=4",
}


def formatted(name: str, value: float) -> str:
    """A metric's value as shown in tables: a dash if undefined, ∞ if infinite."""
    if isfinite(value):
        text = f"{value:.{METRICS[name].decimals}f}"
        return (text if float(text) else text.lstrip("-")).replace("-", "−")  # no minus sign before a zero
    return "–" if value != value else "∞"
