"""Methods measured on the same subjects: whether they differ, by how much, and a sentence that says so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from math import inf, isfinite, isnan, nan
from typing import Literal

import numpy as np
import pandas as pd

from delineate.errors import DatasetError
from delineate.evaluation.table import RIGHTLY_NOTHING, Evaluation
from delineate.metrics.catalogue import METRICS, formatted, metric_names
from delineate.metrics.statistics import Difference, holm, paired_difference

Verdict = Literal["better", "not distinguishable", "too few to tell"]


@dataclass(frozen=True)
class MethodDifference:
    """``first`` minus ``second`` in a metric, averaged over targets; p is Holm-corrected within the metric.

    ``failed`` counts, for each method, on how many of the compared ``subjects`` it failed: missed a target, or
    marked one where there is none.
    """

    metric: str
    first: str
    second: str
    difference: Difference
    failed: tuple[int, int]
    subjects: int

    @property
    def verdict(self) -> Verdict:
        """What can be concluded; patients are too few if no outcome could have been significant."""
        if self.difference.too_few:
            return "too few to tell"
        return "better" if self.difference.distinguishable else "not distinguishable"

    @property
    def better(self) -> str | None:
        """Which of the two is better, by the ranks of the test; None if that cannot be told."""
        if self.verdict != "better":
            return None
        return self.first if (self.difference.effect > 0) == (METRICS[self.metric].better == "higher") else self.second

    def as_dict(self) -> dict[str, object]:
        """The fields, what follows from them, and the sentence."""
        d = self.difference
        derived = {"needed": d.needed, "detectable": d.detectable}
        said = {"verdict": self.verdict, "better": self.better, "sentence": str(self)}
        return asdict(self) | {"difference": asdict(d) | derived} | said

    def __str__(self) -> str:
        d, name = self.difference, METRICS[self.metric].label
        if self.better is not None:
            worse = self.second if self.better == self.first else self.first
            return f"{name}: {self.better} is better than {worse} ({self._measured})"
        if d.too_few:
            return (
                f"{name}: {d.n} patients are too few to tell {self.first} and {self.second} apart, whatever the "
                f"difference; at least {d.needed} are needed ({self._measured})"
            )
        sentence = f"{name}: {self.first} and {self.second} are not distinguishable ({self._measured})"
        if isfinite(d.detectable):
            sentence += (
                f"; with {d.measured} patients, 80 % of studies detect a true difference only if it is "
                f"{self._in_unit(d.detectable)} or more"
            )
        return sentence

    @property
    def _measured(self) -> str:
        d = self.difference
        low, high = (formatted(self.metric, v) for v in d.ci95)
        where = "" if d.measured == d.n else f" over the {d.measured} of {d.n} patients on whom neither failed"
        effect = "undefined" if isnan(d.effect) else f"{d.effect:.2f}".replace("-", "−")
        failures = ""
        if any(self.failed):
            (a, b), n = self.failed, self.subjects
            failures = f"; failures, which rank last: {self.first} {a} of {n}, {self.second} {b} of {n}"
        return (
            f"{self.first} minus {self.second}: {self._in_unit(d.mean)} ({low} to {high}){where}, p {_p(d.p)}, "
            f"effect {effect}, n = {d.n} patients{failures}"
        )

    def _in_unit(self, value: float) -> str:
        unit = METRICS[self.metric].unit
        return f"{formatted(self.metric, value)}{f' {unit}' if unit else ''}"


def on_common_subjects(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """Evaluations of the subjects that all methods have. Raises :class:`DatasetError` for fewer than two."""
    subjects = set.intersection(*(set(evaluation.subjects) for evaluation in evaluations.values()))
    if len(subjects) < 2:
        raise DatasetError(f"the evaluations have {len(subjects)} subjects in common", fix="at least two are needed")
    return {name: evaluation.of_subjects(subjects) for name, evaluation in evaluations.items()}


def compare_methods(
    evaluations: Mapping[str, Evaluation], metrics: Sequence[str] | None = None
) -> list[MethodDifference]:
    """Compare every pair of methods in the metrics that they share and that have a better end.

    ``metrics`` are names of some of them, or of sets, of which those that are shared count (``metrics.catalogue``).
    Only subjects that all methods have count. Raises :class:`DatasetError` if methods have different targets, fewer
    than two subjects in common or nothing to compare by one of these names, and :class:`RecipeError` for an unknown
    name.
    """
    evaluations = on_common_subjects(evaluations)
    first = next(iter(evaluations.values()))
    for name, other in evaluations.items():
        if set(other.targets) != set(first.targets):
            raise DatasetError(
                f"'{name}' measures {list(other.targets)}, others {list(first.targets)}",
                fix="compare methods on the same targets",
            )
    common = [m for m in first.metrics if METRICS[m].better and all(m in e.metrics for e in evaluations.values())]
    asked = {name: metric_names(name) for name in (common if metrics is None else metrics)}
    lacking = [name for name, found in asked.items() if not set(found) & set(common)]
    if lacking or not asked:
        raise DatasetError(
            f"not in all evaluations, or without a better end: {', '.join(lacking) or 'all metrics'}",
            fix=f"choose from {', '.join(common) or 'other evaluations'}",
        )
    chosen = [m for m in common if any(m in found for found in asked.values())]
    return [found for metric in chosen for found in _differences(evaluations, metric, first.patients)]


def _differences(
    evaluations: Mapping[str, Evaluation], metric: str, patients: Mapping[str, str]
) -> list[MethodDifference]:
    """Every pair of methods in one metric, corrected together."""
    names = list(combinations(evaluations, 2))
    pairs = [_pair(evaluations[a], evaluations[b], metric) for a, b in names]
    raw = [
        paired_difference(pair["first"], pair["second"], [patients[subject] for subject in pair.index])
        for pair in pairs
    ]
    comparisons = sum(not isnan(d.p) for d in raw) or len(raw)
    corrected = [replace(d, p=p, comparisons=comparisons) for d, p in zip(raw, holm([d.p for d in raw]), strict=True)]
    return [
        MethodDifference(
            metric, a, b, d, (int(np.isinf(pair["first"]).sum()), int(np.isinf(pair["second"]).sum())), len(pair)
        )
        for (a, b), d, pair in zip(names, corrected, pairs, strict=True)
    ]


def _pair(first: Evaluation, second: Evaluation, metric: str) -> pd.DataFrame:
    """Both methods' outcomes in a metric, averaged over targets, one row per subject that has both.

    A subject that a method was tested on several times, as by the networks of several folds, counts once: each test is
    paired with each of the other method's, and outcomes are averaged over the pairs that have both. Whoever failed in
    one of them has failed, as with targets.
    """
    keys, both = ["subject", "target"], ["first", "second"]
    pairs = _tests(first, metric, "first").merge(_tests(second, metric, "second"), on=keys)
    for one, other in (both, both[::-1]):
        # If one rightly marks nothing and so has no value, the other has failed. The zero is never averaged.
        right = pairs[f"{one} rightly nothing"] & pairs[one].isna() & pairs[other].notna()
        pairs.loc[right, one] = 0.0
        pairs.loc[right, other] = inf if METRICS[metric].better == "lower" else -inf
    pairs.loc[pairs[both].isna().any(axis=1), both] = nan
    of_target = pairs.groupby(keys)[both].mean()
    return of_target.groupby(level="subject", sort=False).agg(lambda v: v.mean(skipna=False)).dropna()


def _tests(evaluation: Evaluation, metric: str, name: str) -> pd.DataFrame:
    """A row for each test of a subject and target: its outcome, called ``name``, and whether nothing was right."""
    table = evaluation.outcomes
    nothing = table["case"] == RIGHTLY_NOTHING if "case" in table else False
    return table[["subject", "target"]].assign(
        **{name: table[metric].astype(float), f"{name} rightly nothing": nothing}
    )


def _p(p: float) -> str:
    return "undefined" if p != p else "< 0.001" if p < 0.001 else f"= {p:.3f}"
