"""What fine-tuning costs on the data that a network was originally trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.targets import SharedTargets
from delineate.datasets.dataset import Dataset
from delineate.errors import BundleError
from delineate.evaluation.held_out import measure_outcomes
from delineate.evaluation.measure import Measuring
from delineate.evaluation.table import FILES, Evaluation
from delineate.inference.batch import Outcome, predict_subjects, unseen_by
from delineate.inference.predictor import Predictor

BEFORE, AFTER = "before", "after"


def outputs_of_forgetting(out: Path, dataset: Dataset) -> list[Path]:
    """The files that :func:`measure_forgetting` may write."""
    labels = [out / name / f"{subject.id}.nii.gz" for name in (BEFORE, AFTER) for subject in dataset.subjects]
    return labels + [out / f"{name}_evaluation" / file for name in (BEFORE, AFTER) for file in FILES]


def measure_forgetting(
    before: Bundle,
    after: Bundle,
    dataset: Dataset,
    out: Path,
    plan: ComputePlan,
    measuring: Measuring,
    on_subject: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Evaluation]:
    """Measure both bundles on the subjects that neither has seen, for the targets whose names they share.

    Predictions are written to ``out/before`` and ``out/after``, the evaluations beside them. Raises
    :class:`BundleError` if the bundles have no target in common, :class:`DatasetError` if all
    subjects were seen, and the error of any subject that cannot be predicted.
    """
    common = [name for name in before.targets.names if name in after.targets.names]
    if not common:
        raise BundleError(
            f"{before.folder} segments {list(before.targets.names)} and {after.folder} {list(after.targets.names)}: "
            "they have no target in common",
            fix="give bundles that share a target",
        )
    unseen = [s for s in unseen_by([before, after], dataset.subjects) if s.label is not None]
    evaluations = {}
    for k, (name, bundle) in enumerate(((BEFORE, before), (AFTER, after))):
        chosen = [subject.with_channels(bundle.channels) for subject in unseen]
        evaluations[name] = measure_outcomes(
            predict_subjects(Predictor([bundle], plan), chosen, out / name),
            chosen,
            SharedTargets.of(bundle.targets, before.targets, common),
            measuring,
            simulated=dataset.simulated,
            on_outcome=_counting(on_subject, k * len(chosen), 2 * len(chosen)),
        ).evaluation
        evaluations[name].write(out / f"{name}_evaluation")
    return evaluations


def _counting(on_subject: Callable[[int, int], None], before: int, total: int) -> Callable[[Outcome, int], None]:
    """A callback for the outcomes of one bundle, counted after those ``before``."""
    return lambda outcome, done: on_subject(before + done, total)
