"""Every metric by name, with its unit and definition, and the sets that challenges rank by."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from math import isfinite, nan
from typing import Literal

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.metrics.comparison import Comparison, Part
from delineate.metrics.quantities import error_percent


@dataclass(frozen=True)
class Metric:
    """One number of one target of one subject.

    ``better`` says which way is good; None: neither, as with volumes, so that it is not averaged over targets.
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
        """Label with unit, as a table's head."""
        return f"{self.label}, {self.unit}" if self.unit else self.label


@dataclass(frozen=True)
class MetricSet:
    """Names of metrics, in the order of a challenge's table.

    ``targets`` are what the challenge measures, where it says so; ``regions`` makes them from a data
    set's own, by name, since label values differ from year to year.
    """

    about: str
    names: str
    targets: Targets | None = None
    regions: Callable[[Targets], Targets | None] = lambda named: None

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

_SURFACE = "between centres of surface voxels (6-neighbourhood), both directions"
_LESION = "lesions are 26-connected; matched by any overlap, or by more than the asked share of their voxels"


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
        "mean of both directions' mean distances between centres of surface voxels (6-neighbourhood)",
        lambda c: sum(c.surfaces.directed_means_mm) / 2,
    )
    yield mm("rms_mm", "RMS distance", f"root mean square distance {_SURFACE}", lambda c: c.surfaces.rms_mm)
    yield _surface_dice(1.0)


def _surface_dice(tolerance_mm: float) -> Metric:
    return Metric(
        f"surface_dice_{tolerance_mm:g}mm",
        f"Surface Dice at {tolerance_mm:g} mm",
        f"share of both surfaces' voxels at most {tolerance_mm:g} mm from the other; any tolerance may be named",
        lambda c: c.surfaces.surface_dice(tolerance_mm),
    )


def _volumes() -> Iterator[Metric]:
    def plain(name: str, label: str, definition: str, of: Callable[[Comparison], float], unit: str) -> Metric:
        return Metric(name, label, definition, of, unit, None, {"ml": 2, "%": 1}[unit])

    yield plain("volume_ml", "Volume", "of the prediction", lambda c: c.volume_ml, "ml")
    yield plain("reference_volume_ml", "Reference volume", "of the reference", lambda c: c.reference_volume_ml, "ml")
    error = "prediction − reference"
    yield plain("volume_error_ml", "Volume error", error, lambda c: c.volume_ml - c.reference_volume_ml, "ml")
    yield plain("volume_error_percent", "Volume error", f"{error}, of the reference", _error_percent, "%")
    yield Metric(
        "avd_percent",
        "Absolute volume error",
        f"{error}, of the reference, without sign",
        lambda c: abs(_error_percent(c)),
        "%",
        "lower",
        1,
    )
    yield Metric("density_percent", "Positive class density", "reference of all voxels", _density_percent, "%", None, 4)


def _lesions() -> Iterator[Metric]:
    yield Metric("lesion_recall", "Lesion recall", f"reference lesions found; {_LESION}", lambda c: c.lesions.recall)
    yield Metric(
        "lesion_precision",
        "Lesion precision",
        f"predicted lesions that are real; {_LESION}",
        lambda c: c.lesions.precision,
    )
    yield Metric("lesion_f1", "Lesion F1", f"of lesion recall and precision; {_LESION}", lambda c: c.lesions.f1)
    for name, label, count in (
        ("lesion_count", "Lesions predicted", lambda c: float(c.lesions.predicted)),
        ("reference_lesion_count", "Lesions in the reference", lambda c: float(c.lesions.count)),
    ):
        yield Metric(name, label, "26-connected", count, "", None, 0)


def _of_more() -> Iterator[Metric]:
    """Of what lies beside the masks: probabilities, and a map of a quantity such as the fat fraction."""
    yield Metric(
        PROBABILITY_MAE,
        "Mean error of probabilities",
        "mean of |probability − reference| over all voxels",
        _more(PROBABILITY_MAE),
        better="lower",
        decimals=4,
    )
    where = "of the map's values in the {}, the margin left out"
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
    third = {"apex": "third of the slices nearest to the feet", "base": "third of the slices nearest to the head"}
    return replace(
        metric,
        name=f"{part}_{metric.name}",
        label=f"{part.capitalize()} {metric.label}",
        definition=f"{metric.definition}; in the {third[part]}",
        of=lambda c: metric.of(c.part(part)),
    )


def _tumour_regions(named: Targets) -> Targets | None:
    """Whole tumour, core (all but edema) and enhancing part."""
    values = named.values
    if not named.exclusive or not {"edema", "enhancing"} <= set(values):
        return None
    core = tuple(v for name, numbers in values.items() if name != "edema" for v in numbers)
    regions = {"whole": (*core, *values["edema"]), "core": core, "enhancing": values["enhancing"]}
    return Targets(regions, "overlapping", named.ignore)


_PROMISE12 = ("dice", "assd_mm", "hd95_mm", "volume_error_percent")
_PARTS: tuple[Part, ...] = ("apex", "base")


class Catalogue(dict[str, Metric]):
    """Metrics by name. Surface Dice is listed at one tolerance and known at all: ``surface_dice_2.5mm``."""

    def __missing__(self, name: str) -> Metric:
        tolerance = _TOLERANCE.fullmatch(name)
        if tolerance is None:
            raise KeyError(name)
        return _surface_dice(float(tolerance[1]))

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or (isinstance(name, str) and _TOLERANCE.fullmatch(name) is not None)


_TOLERANCE = re.compile(r"surface_dice_(\d+(?:\.\d+)?)mm")

METRICS = Catalogue({m.name: m for group in (_overlaps, _distances, _volumes, _lesions, _of_more) for m in group()})
METRICS.update((m.name, m) for part in _PARTS for m in (_of_part(METRICS[name], part) for name in _PROMISE12))

SETS: dict[str, MetricSet] = {
    "standard": MetricSet(
        "what a first look needs",
        "dice precision recall hd95_mm volume_ml reference_volume_ml volume_error_ml volume_error_percent",
    ),
    "wmh2017": MetricSet(
        "WMH segmentation challenge (Kuijf et al. 2019)",
        "dice hd95_outline_mm avd_percent lesion_recall lesion_f1",
        Targets({"lesion": (1,)}, ignore=(2,)),
    ),
    "promise12": MetricSet(
        "PROMISE12 (Litjens et al. 2014): whole prostate, apex and base",
        " ".join((*_PROMISE12, *(f"{part}_{name}" for part in _PARTS for name in _PROMISE12))),
        Targets({"prostate": (1,)}),
    ),
    "lits": MetricSet(
        "liver tumour challenge (Bilic et al. 2023)",
        "dice voe_percent volume_error_percent assd_mm rms_mm hd_mm lesion_recall lesion_precision",
        Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping"),
    ),
    "brats": MetricSet(
        "brain tumour challenge (Menze et al. 2015)",
        "dice recall specificity hd95_mm",
        Targets({"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}, "overlapping"),
        _tumour_regions,
    ),
}


def metric_names(wanted: str) -> tuple[str, ...]:
    """Names of metrics from sets and metrics joined by commas, each once; raises :class:`RecipeError`."""
    names: dict[str, None] = {}
    for name in (part.strip() for part in wanted.split(",")):
        if name in SETS:
            names |= dict.fromkeys(SETS[name].metrics)
        elif name in METRICS:
            names[METRICS[name].name] = None
        else:
            raise RecipeError(f"no metric '{name}'; sets are {', '.join(SETS)}, metrics {', '.join(METRICS)}")
    return tuple(names)


def targets_of(wanted: str, named: Targets | None) -> Targets | None:
    """What is measured of a data set that has ``named`` targets: the challenge's regions, else those, else its targets.

    None where nothing names any, or several challenges name different ones.
    """
    sets = [SETS[name] for name in (part.strip() for part in wanted.split(",")) if name in SETS]
    regions = [made for s in sets if named is not None and (made := s.regions(named)) is not None]
    found = regions or ([named] if named is not None else [s.targets for s in sets if s.targets is not None])
    return found[0] if found and all(other == found[0] for other in found) else None


def formatted(name: str, value: float) -> str:
    """A metric's value as a table shows it: undefined is a dash, infinite its sign."""
    if isfinite(value):
        text = f"{value:.{METRICS[name].decimals}f}"
        return (text if float(text) else text.lstrip("-")).replace("-", "−")  # no minus before zeros alone
    return "–" if value != value else "∞"
