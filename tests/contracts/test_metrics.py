"""Every metric keeps the laws of ``delineate.testing``."""

from __future__ import annotations

from dataclasses import replace

import pytest

from delineate.metrics.catalogue import METRICS, Metric
from delineate.testing import check_metric


@pytest.mark.parametrize("metric", METRICS.packaged.values(), ids=lambda metric: metric.name)
def test_it_keeps_the_laws(metric: Metric) -> None:
    ends = metric.name.startswith(("apex", "base"))  # which know the feet from the head
    check_metric(metric, skip={"flips_shifts_and_permuted_axes_change_nothing"} if ends else ())


@pytest.mark.parametrize(
    ("changes", "law"),
    [
        ({"better": "lower"}, "perfection_is_the_best"),
        ({"of": lambda c: float(c.reference.shape[0])}, "flips_shifts_and_permuted_axes_change_nothing"),
        ({"of": lambda c: 1 / c.overlap.tp}, "it_is_a_number_whatever_is_empty.*ZeroDivision"),
        ({"definition": ""}, "it_has_a_name"),
    ],
)
def test_a_metric_that_breaks_a_promise_is_told_which(changes, law) -> None:
    with pytest.raises(AssertionError, match=law):
        check_metric(replace(METRICS["dice"], name="crooked", **changes))


def test_a_metric_may_not_take_another_s_name() -> None:
    with pytest.raises(AssertionError, match="'dice' is one of Delineate's own metric names"):
        check_metric(replace(METRICS["recall"], name="dice"))
