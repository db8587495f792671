"""Methods measured on the same subjects: do they differ, by how much, and in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import pandas as pd

from delineate.errors import DatasetError
from delineate.evaluation.table import Evaluation
from delineate.metrics.catalogue import METRICS, formatted
from delineate.metrics.statistics import Difference, holm, paired_difference


@dataclass(frozen=True)
class MethodDifference:
    """``first`` minus ``second`` in a metric, each subject's targets averaged; p is Holm-corrected in the metric."""

    metric: str
    first: str
    second: str
    difference: Difference

    def __str__(self) -> str:
        d, metric = self.difference, METRICS[self.metric]
        low, high = (formatted(self.metric, v) for v in d.ci95)
        unit = f" {metric.unit}" if metric.unit else ""
        measured = (
            f"difference {formatted(self.metric, d.mean)}{unit} ({low} to {high}), p {_p(d.p)}, "
            f"effect {d.effect:.2f}, n = {d.n}".replace("-", "−")
        )
        if not d.distinguishable and 2 ** (1 - d.n) >= 0.05:
            return (
                f"{metric.label}: {d.n} subjects are too few to tell {self.first} and {self.second} apart ({measured})"
            )
        if not d.distinguishable:
            return f"{metric.label}: {self.first} and {self.second} are not distinguishable ({measured})"
        first_better = (d.mean > 0) == (metric.better == "higher")
        better, worse = (self.first, self.second) if first_better else (self.second, self.first)
        return f"{metric.label}: {better} is better than {worse} ({measured})"


def on_common_subjects(evaluations: Mapping[str, Evaluation]) -> dict[str, Evaluation]:
    """What was measured of the subjects that all methods have. Raises :class:`DatasetError` for fewer than two."""
    subjects = set.intersection(*(set(evaluation.subjects) for evaluation in evaluations.values()))
    if len(subjects) < 2:
        raise DatasetError(f"the evaluations have {len(subjects)} subjects in common; two are the least")
    return {name: evaluation.of_subjects(subjects) for name, evaluation in evaluations.items()}


def compare_methods(
    evaluations: Mapping[str, Evaluation], metrics: Sequence[str] | None = None
) -> list[MethodDifference]:
    """Every pair of methods, in every metric that all have and that is better higher or lower (or those named).

    Only subjects that all methods have count. Raises :class:`DatasetError` where methods have other
    targets, or fewer than two subjects in common.
    """
    evaluations = on_common_subjects(evaluations)
    first = next(iter(evaluations.values()))
    for name, other in evaluations.items():
        if set(other.targets) != set(first.targets):
            raise DatasetError(f"'{name}' measures {list(other.targets)}, others {list(first.targets)}; compare like")
    common = [m for m in first.metrics if METRICS[m].better and all(m in e.metrics for e in evaluations.values())]
    chosen = [m for m in common if metrics is None or m in metrics]
    if not chosen:
        raise DatasetError(f"no metric that was asked for is in all evaluations; in common are {', '.join(common)}")
    found: list[MethodDifference] = []
    for metric in chosen:
        table = pd.DataFrame({name: e.mean_of_targets(metric) for name, e in evaluations.items()})
        pairs = list(combinations(evaluations, 2))
        whose = [first.patients[subject] for subject in table.index]
        raw = [paired_difference(table[a].to_numpy(), table[b].to_numpy(), whose) for a, b in pairs]
        corrected = holm([d.p for d in raw])
        found += [
            MethodDifference(metric, a, b, replace(d, p=p)) for (a, b), d, p in zip(pairs, raw, corrected, strict=True)
        ]
    return found


def _p(p: float) -> str:
    return "undefined" if p != p else "< 0.001" if p < 0.001 else f"= {p:.3f}"
