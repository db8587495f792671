"""How well the volumes and quantities of predictions agree with those of the references."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from delineate.metrics.agreement import Agreement, Concordance, agreement, concordance, crossing
from delineate.metrics.quantities import QuantityMap

LEAST_PATIENTS = 5
"""Fewest patients with the target for which limits of agreement mean anything."""


NEAR_PERCENT = 5
"""Volumes off by no more than this are counted as near, as Lindgren, Lundin & Wallin (2020) do."""


@dataclass(frozen=True)
class Compared:
    """Two columns of an evaluation's table that should agree; ``relative`` means that errors grow with the value.

    Both should be on the same side of ``threshold``.
    """

    name: str
    predicted: str
    reference: str
    unit: str
    relative: bool
    threshold: float | None = None

    @property
    def difference_unit(self) -> str:
        """The unit of errors: those of percent are not in percent of anything."""
        return "percentage points" if self.unit == "%" else self.unit


def _comparable(quantity: QuantityMap) -> list[Compared]:
    title, unit, threshold = quantity.title, quantity.unit, quantity.threshold
    return [
        Compared("volume", "volume_ml", "reference_volume_ml", "ml", True),
        Compared(f"mean {title}", "quantity_mean", "reference_quantity_mean", unit, False, threshold),
        Compared(f"median {title}", "quantity_median", "reference_quantity_median", unit, False),
    ]


@dataclass(frozen=True, eq=False)
class Agreeing:
    """Predicted and reference values of one target, with the subjects, sites and patients they belong to.

    Subjects without the target have a volume of 0; ``left_out`` counts those with an undefined value.
    """

    target: str
    compared: Compared
    subjects: tuple[str, ...]
    sites: tuple[str, ...]
    patients: tuple[str, ...]
    left_out: int
    predicted: NDArray[np.float64]
    reference: NDArray[np.float64]

    @cached_property
    def absolute(self) -> Agreement:
        """Differences in the unit of what is compared."""
        return agreement(self.predicted, self.reference, self.patients)

    @cached_property
    def relative(self) -> Agreement:
        """Differences in percent of the reference; subjects whose reference is 0 are left out."""
        return agreement(self.predicted, self.reference, self.patients, relative=True)

    @cached_property
    def concordance(self) -> Concordance:
        """Lin's concordance correlation."""
        return concordance(self.predicted, self.reference, self.patients)

    @property
    def in_percent(self) -> bool:
        """Whether differences are also given in percent: errors grow with the value, and enough patients have one."""
        return self.compared.relative and self.relative.patients >= LEAST_PATIENTS

    @property
    def shown(self) -> Agreement:
        """The agreement to show: in percent where errors grow with the value, else in the unit."""
        return self.relative if self.in_percent else self.absolute

    def rows(self) -> list[dict[str, object]]:
        """Plain values, in the unit and, where errors are relative, in percent."""
        return [
            {
                "target": self.target,
                "of": self.compared.name,
                "unit": unit,
                "n": found.n,
                "patients": found.patients,
                "left_out": found.left_out + self.left_out,
                "bias": found.bias,
                "bias_ci95": found.bias_ci95,
                "limits": found.limits,
                "low_limit_ci95": found.low_ci95,
                "high_limit_ci95": found.high_ci95,
                "limits_ci95_method": found.method,
                "beyond": [self.subjects[i] for i in found.outliers],
                "concordance": self.concordance.value,
                "concordance_ci95": self.concordance.ci95,
            }
            for found, unit in self._kinds
        ]

    def described(self) -> list[dict[str, str]]:
        """:meth:`rows` as text for a reader."""
        return [
            {
                "target": self.target,
                "of": f"{self.compared.name}{', ' * bool(unit)}{unit}",
                "bias": f"{signed(found.bias)} ({signed(found.bias_ci95[0])} to {signed(found.bias_ci95[1])})",
                "limits": f"{signed(found.limits[0])} to {signed(found.limits[1])}",
                "concordance": "{:.3f} ({:.3f} to {:.3f})".format(
                    self.concordance.value, *self.concordance.ci95
                ).replace("-", "−"),
                "n": f"{found.count}{self.without(found)}",
                "beyond": ", ".join(self.subjects[i] for i in found.outliers),
            }
            for found, unit in self._kinds
        ]

    def error_sizes(self) -> dict[str, str]:
        """Sizes of errors as text, whatever their sign: of volumes in percent of the reference, else in the unit.

        Scans whose reference volume is 0 are left out of the percentages.
        """
        sizes, names = np.abs(self.predicted - self.reference), np.array(self.subjects)
        unit = self.compared.difference_unit
        if self.compared.relative:
            there = self.reference > 0
            sizes, names, unit = 100 * sizes[there] / self.reference[there], names[there], "%"
        worst = int(np.argmax(sizes)) if len(sizes) else None
        within = np.count_nonzero(sizes <= NEAR_PERCENT)
        return {
            "target": self.target,
            "of": f"{self.compared.name}{', ' * bool(unit)}{unit}",
            "mean": f"{sizes.mean():.2f}" if len(sizes) else "–",
            "median": f"{np.median(sizes):.2f}" if len(sizes) else "–",
            "largest": "–" if worst is None else f"{sizes[worst]:.2f} ({names[worst]})",
            f"within {NEAR_PERCENT} %": f"{within} of {len(sizes)}" if self.compared.relative else "",
        }

    def without(self, found: Agreement) -> str:
        """How many subjects are left out and why, to be appended to n."""
        why = ((found.left_out, "not in the reference"), (self.left_out, "undefined"))
        return "".join(f"; {n} left out, {reason}" for n, reason in why if n)

    @property
    def _kinds(self) -> list[tuple[Agreement, str]]:
        return [(self.absolute, self.compared.difference_unit), (self.relative, "%")][: 1 + self.in_percent]


def agreements(table: pd.DataFrame, quantity: QuantityMap | None = None) -> Iterator[Agreeing]:
    """Everything in an evaluation's table that can be compared, for targets that enough patients have."""
    for compared in _comparable(quantity or QuantityMap("quantity")):
        if not {compared.predicted, compared.reference} <= set(table.columns):
            continue
        for target, rows in table.groupby("target", sort=False):
            predicted, reference = (rows[c].to_numpy(float) for c in (compared.predicted, compared.reference))
            use = np.isfinite(predicted) & np.isfinite(reference)
            whose = rows["patient" if "patient" in rows else "subject"].to_numpy()
            # Two empty volumes agree, but tell nothing about how large errors are.
            has_it = use & ((predicted > 0) | (reference > 0)) if compared.relative else use
            if len(set(whose[has_it])) >= LEAST_PATIENTS:
                subjects, sites = (tuple(rows[column].to_numpy()[use]) for column in ("subject", "site"))
                yield Agreeing(
                    str(target), compared, subjects, sites, tuple(whose[use]), int((~use).sum()), predicted[use],
                    reference[use],
                )  # fmt: skip


def crossings(table: pd.DataFrame, threshold: float) -> dict[str, dict[str, Any]]:
    """For each target, subjects that the prediction puts on the wrong side of a quantity's threshold.

    ``above`` and ``below`` count those for whom prediction and reference are on the same side.
    """
    sides: dict[str, dict[str, Any]] = {}
    for target, rows in table.groupby("target", sort=False):
        found = crossing(rows["quantity_mean"].to_numpy(), rows["reference_quantity_mean"].to_numpy(), threshold)
        names = rows["subject"].to_numpy()
        over, under = ([str(names[i]) for i in which] for which in (found.over, found.under))
        sides[str(target)] = {
            "n": found.n,
            "right": found.right,
            "above": found.above,
            "below": found.below,
            "over": over,
            "under": under,
        }
    return sides


def crossing_sentences(table: pd.DataFrame, quantity: QuantityMap) -> list[str]:
    """:func:`crossings` in words, one sentence per target; none without a threshold."""
    if quantity.threshold is None:
        return []
    sentences, limit = [], quantity.with_unit(quantity.threshold)
    for target, found in crossings(table, quantity.threshold).items():
        wrong = [
            f"{what} it only in the prediction: {', '.join(found[side])}"
            for side, what in (("over", "at or above"), ("under", "below"))
            if found[side]
        ]
        right = f"{target}: mean {quantity.title} on the right side of {limit} in {found['right']} of {found['n']}"
        sentences.append("; ".join([right, *wrong]))
    return sentences


def signed(value: float) -> str:
    """A difference as a table shows it."""
    return f"{value:+.2f}".replace("-", "−")
