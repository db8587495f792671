"""What fine-tuning costs on the data that a network was trained on before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset, load_label
from delineate.errors import BundleError
from delineate.evaluation.measure import Measuring, measure_prediction
from delineate.evaluation.table import FILES, Evaluation
from delineate.inference.batch import predict_subjects, unseen_by
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_label

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
    """Both bundles on the source's subjects that neither saw, in the targets that both have by name.

    Predictions are written to ``out/before`` and ``out/after``, the evaluations beside them. Raises
    :class:`BundleError` where the bundles have no target in common, :class:`DatasetError` where all
    subjects were seen, and what a subject that cannot be predicted raises.
    """
    common = [name for name in before.targets.names if name in after.targets.names]
    if not common:
        raise BundleError(
            f"{before.folder} segments {list(before.targets.names)}, {after.folder} {list(after.targets.names)}: "
            "nothing in common can be forgotten",
            fix="give bundles that share a target",
        )
    unseen = [s for s in unseen_by([before, after], dataset.subjects) if s.label is not None]
    evaluations = {}
    for k, (name, bundle) in enumerate(((BEFORE, before), (AFTER, after))):
        rows = []
        chosen = [subject.with_channels(bundle.channels) for subject in unseen]
        for done, outcome in enumerate(predict_subjects(Predictor([bundle], plan), chosen, out / name), start=1):
            if outcome.error is not None or outcome.path is None:
                raise outcome.error or BundleError(f"'{outcome.subject.id}' could not be predicted")
            prediction = read_label(outcome.path)
            reference = load_label(outcome.subject, before.targets, prediction.grid)
            predicted, true = bundle.targets.masks(prediction.voxels), before.targets.masks(reference.voxels)
            for target in common:
                # One by one: the same name may have other values in the two.
                said, wanted = (
                    LabelVolume(masks[target].astype(np.uint8), prediction.grid) for masks in (predicted, true)
                )
                subject, alone = outcome.subject, Targets({target: (1,)})
                rows += measure_prediction(
                    said, wanted, alone, measuring, subject=subject.id, site=subject.site, patient=subject.patient
                ).targets
            on_subject(k * len(chosen) + done, 2 * len(chosen))
        evaluations[name] = Evaluation(pd.DataFrame(rows), simulated=dataset.simulated)
        evaluations[name].write(out / f"{name}_evaluation")
    return evaluations
