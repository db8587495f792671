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

LEAST_PATIENTS = 5
"""Fewest patients with the target for which limits of agreement mean anything."""


@dataclass(frozen=True)
class QuantityMap:
    """A channel of the data set, such as a fat fraction, that is read within each target.

    Only voxels ``margin_mm`` or more inside the target's surface count. Subjects that the prediction's mean puts
    on the wrong side of ``threshold`` are reported.
    """

    channel: str
    margin_mm: float = 0.0
    threshold: float | None = None

    def __str__(self) -> str:
        inside = f" {self.margin_mm:g} mm or more inside the surface" if self.margin_mm else " within the target"
        return f"quantity: {self.channel}{inside}"


@dataclass(frozen=True)
class Compared:
    """Two columns of an evaluation's table that should agree; ``relative`` means that errors grow with the value."""

    name: str
    predicted: str
    reference: str
    unit: str
    relative: bool


def _comparable(quantity: str) -> list[Compared]:
    return [
        Compared("volume", "volume_ml", "reference_volume_ml", "ml", relative=True),
        Compared(f"mean {quantity}", "quantity_mean", "reference_quantity_mean", "", relative=False),
        Compared(f"median {quantity}", "quantity_median", "reference_quantity_median", "", relative=False),
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
                "bias": f"{_signed(found.bias)} ({_signed(found.bias_ci95[0])} to {_signed(found.bias_ci95[1])})",
                "limits": f"{_signed(found.limits[0])} to {_signed(found.limits[1])}",
                "concordance": "{:.3f} ({:.3f} to {:.3f})".format(
                    self.concordance.value, *self.concordance.ci95
                ).replace("-", "−"),
                "n": f"{found.count}{self.without(found)}",
                "beyond": ", ".join(self.subjects[i] for i in found.outliers),
            }
            for found, unit in self._kinds
        ]

    def without(self, found: Agreement) -> str:
        """How many subjects are left out and why, to be appended to n."""
        why = ((found.left_out, "not in the reference"), (self.left_out, "undefined"))
        return "".join(f"; {n} left out, {reason}" for n, reason in why if n)

    @property
    def _kinds(self) -> list[tuple[Agreement, str]]:
        return [(self.absolute, self.compared.unit), (self.relative, "%")][: 1 + self.in_percent]


def agreements(table: pd.DataFrame, quantity: QuantityMap | None = None) -> Iterator[Agreeing]:
    """Everything in an evaluation's table that can be compared, for targets that enough patients have."""
    for compared in _comparable("quantity" if quantity is None else quantity.channel):
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
    """For each target, subjects that the prediction puts on the wrong side of a quantity's threshold."""
    sides: dict[str, dict[str, Any]] = {}
    for target, rows in table.groupby("target", sort=False):
        found = crossing(rows["quantity_mean"].to_numpy(), rows["reference_quantity_mean"].to_numpy(), threshold)
        names = rows["subject"].to_numpy()
        over, under = ([str(names[i]) for i in which] for which in (found.over, found.under))
        sides[str(target)] = {"n": found.n, "right": found.right, "over": over, "under": under}
    return sides


def crossing_sentences(table: pd.DataFrame, threshold: float) -> list[str]:
    """:func:`crossings` in words, one sentence per target."""
    sentences = []
    for target, found in crossings(table, threshold).items():
        wrong = [
            f"{what} {', '.join(found[side])}"
            for side, what in (("over", "wrongly above it:"), ("under", "wrongly below it:"))
            if found[side]
        ]
        sentences.append(
            f"{target}: {found['right']} of {found['n']} on the right side of the threshold {threshold:g}"
            + (f"; {'; '.join(wrong)}" if wrong else "")
        )
    return sentences


def _signed(value: float) -> str:
    return f"{value:+.2f}".replace("-", "−")
