"""What every metric promises."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.metrics.catalogue import METRICS, Metric
from delineate.metrics.comparison import Comparison
from delineate.testing.laws import Law, close, hold, require, require_own_name

Mask = NDArray[np.bool_]
SPACING_MM = (0.9, 1.1, 5.0)


def check_metric(metric: Metric, *, skip: Iterable[str] = ()) -> None:
    """Hold a metric to :data:`METRIC_LAWS`, on small masks."""
    hold(f"metric '{metric.name}'", METRIC_LAWS, tuple(skip), metric)


def compared(reference: Mask, prediction: Mask, spacing_mm: tuple[float, ...] = SPACING_MM) -> Comparison:
    x, y, z = spacing_mm
    return Comparison.of(reference, prediction, Grid.of_spacing(reference.shape, (x, y, z)))


@lru_cache
def blobs() -> tuple[Mask, Mask]:
    """A reference with three blobs, and a prediction with two of them, shifted, and another; empty at every border."""
    index = np.stack(np.meshgrid(*(np.arange(n) for n in (24, 20, 11)), indexing="ij"), axis=-1)
    lumps = [((7, 7, 4), 3.2), ((16, 8, 6), 2.4), ((12, 14, 5), 1.5), ((18, 15, 7), 1.3)]
    balls = [(((index - centre) / (1, 1, 0.6)) ** 2).sum(-1) <= radius**2 for centre, radius in lumps]
    return balls[0] | balls[1] | balls[2], np.roll(balls[0], 1, 0) | np.roll(balls[1], (1, 1), (1, 2)) | balls[3]


@lru_cache
def changed() -> tuple[tuple[str, Comparison], ...]:
    """The same two masks mirrored, shifted, and with their axes permuted."""
    reference, prediction = blobs()
    flips = [tuple(slice(None, None, step) for step in steps) for steps in product((1, -1), repeat=3)]
    return (
        *((f"mirrored {flip}", compared(reference[flip], prediction[flip])) for flip in flips),
        ("moved", compared(np.roll(reference, (1, -1, 1), (0, 1, 2)), np.roll(prediction, (1, -1, 1), (0, 1, 2)))),
        *(
            (
                f"axes {order}",
                compared(reference.transpose(order), prediction.transpose(order), tuple(SPACING_MM[i] for i in order)),
            )
            for order in permutations(range(3))
        ),
    )


def it_has_a_name_a_definition_and_decimals(metric: Metric) -> None:
    require_own_name(METRICS, metric.name, metric)
    require(metric.label and metric.definition, "it has no label or no definition, which tables show")
    require(metric.decimals >= 0, f"it has {metric.decimals} decimals")


def it_is_a_number_whatever_is_empty(metric: Metric) -> None:
    """Undefined values are NaN; nothing is raised."""
    some, none = blobs()[0], np.zeros_like(blobs()[0])
    for what, pair in (
        ("both are", (none, none)),
        ("the reference is", (none, some)),
        ("the prediction is", (some, none)),
    ):
        value = metric.of(compared(*pair))
        require(isinstance(value, float | int | np.number), f"where {what} empty it is {value!r}, not a number")


def flips_shifts_and_permuted_axes_change_nothing(metric: Metric) -> None:
    plain = float(metric.of(compared(*blobs())))
    for what, comparison in changed():
        value = float(metric.of(comparison))
        require(close(value, plain), f"it is {plain}, and {value} when both masks are {what}")


def perfection_is_the_best(metric: Metric) -> None:
    reference, prediction = blobs()
    best, other = float(metric.of(compared(reference, reference))), float(metric.of(compared(reference, prediction)))
    worse = best < other if metric.better == "higher" else best > other
    require(
        metric.better is None or not worse, f"it is {best} for a perfect prediction and {other} for an imperfect one"
    )


METRIC_LAWS: tuple[Law, ...] = (
    it_has_a_name_a_definition_and_decimals,
    it_is_a_number_whatever_is_empty,
    flips_shifts_and_permuted_axes_change_nothing,
    perfection_is_the_best,
)
