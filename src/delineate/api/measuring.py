"""Predictions against references, and methods against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delineate.api.prediction import Prediction
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset
from delineate.errors import DatasetError, MissingFile, RecipeError
from delineate.evaluation.agreement import QuantityMap
from delineate.evaluation.measure import Measuring, evaluate_folders, measure_prediction
from delineate.evaluation.pairs import open_references
from delineate.evaluation.table import Evaluation
from delineate.io.formats import read_label

if TYPE_CHECKING:
    from delineate.evaluation.methods import MethodDifference

__all__ = ["compare", "evaluate"]


def evaluate(
    predictions: str | Path | Prediction | LabelVolume,
    references: str | Path | Dataset | LabelVolume,
    *,
    targets: Targets | None = None,
    metrics: str | Sequence[str] = "standard",
    lesion_overlap: float = 0.0,
    quantity: str | None = None,
    margin_mm: float = 0.0,
    threshold: float | None = None,
    probabilities: str | Path | None = None,
) -> Evaluation:
    """Measure a folder of predicted labels, or one, against the references, by subject and target.

    >>> import delineate
    >>> label = delineate.read("reference.nii.gz", label=True)
    >>> evaluation = delineate.evaluate(label, "reference.nii.gz", targets=delineate.Targets({"ball": (1,)}))
    >>> float(evaluation.summary()["ball"]["dice"].mean)
    1.0

    ``references`` are a folder of labels or a data set, which are paired with predictions by name; or one
    label. Without ``targets``, those count that the prediction or the data set names, else one for each value.
    ``metrics`` are sets and single ones, as ``delineate metrics list`` explains them. ``lesion_overlap`` is the
    share of a lesion that must be covered. ``quantity`` is a channel of the data set, read ``margin_mm`` within
    each target; ``threshold`` splits subjects by it. ``probabilities`` are a folder of them; that which
    :func:`predict` wrote beside the predictions is found. A notebook shows the summary as a table;
    ``table`` is a row for each subject and target, for pandas.

    Raises :class:`~delineate.errors.GridMismatch` where a prediction is not on its reference's grid, and
    :class:`~delineate.errors.MissingFile` where nothing pairs.
    """
    if quantity is None and (threshold is not None or margin_mm):
        raise RecipeError("margin_mm and threshold are of a quantity, and none is named", fix="name its channel")
    read_within = None if quantity is None else QuantityMap(quantity, margin_mm, threshold)
    wanted = metrics if isinstance(metrics, str) else ",".join(metrics)
    if isinstance(predictions, str | Path):
        if isinstance(references, LabelVolume):
            predictions = read_label(Path(predictions))
        else:
            beside = Path(predictions) / "probabilities"
            kept = Path(probabilities) if probabilities is not None else beside if beside.is_dir() else None
            known = references if isinstance(references, Dataset) else open_references(Path(references))
            measuring = Measuring(wanted, lesion_overlap, read_within, kept)
            return evaluate_folders(Path(predictions), known, targets, measuring)
    if quantity is not None or probabilities is not None:
        raise RecipeError(
            "quantities and probabilities are read from folders", fix="give folders of predictions and data"
        )
    if isinstance(references, Dataset):
        raise DatasetError("one label is measured against a whole data set", fix="give the reference of its subject")
    return _evaluate_one(predictions, references, targets, Measuring(wanted, lesion_overlap))


def compare(
    methods: Mapping[str, str | Path | Evaluation] | None = None, /, **named: str | Path | Evaluation
) -> list[MethodDifference]:
    """Compare methods measured on the same subjects, two or more: paired, and corrected for many comparisons.

    >>> import delineate
    >>> for difference in delineate.compare(small="run", large="run"):
    ...     if difference.metric == "dice":
    ...         print(difference.verdict)
    too few to tell

    Each is an evaluation, or the folder of one or of a run. Names that are no identifiers go into a mapping:
    ``compare({"U-Net": "run1", "V-Net": "run2"})``. Each difference is a value, and a sentence when printed.

    Raises :class:`~delineate.errors.DatasetError` for fewer than two methods or subjects in common.
    """
    from delineate.evaluation.methods import compare_methods

    everything = {**(methods or {}), **named}
    if len(everything) < 2:
        raise DatasetError(
            f"{len(everything)} methods are given", fix="at least two are needed, such as a='run1', b='run2'"
        )
    return compare_methods({name: _opened(one) for name, one in everything.items()})


def _opened(one: str | Path | Evaluation) -> Evaluation:
    """An evaluation, read where the folder of one or of a run is given."""
    if isinstance(one, Evaluation):
        return one
    folder = Path(one)
    inside = folder / "evaluation" if (folder / "evaluation" / "metrics.csv").exists() else folder
    if not (inside / "metrics.csv").exists():
        raise MissingFile(f"'{folder}' holds no metrics.csv", fix="give a run, or the folder of a written evaluation")
    return Evaluation.read(inside)


def _evaluate_one(
    prediction: Prediction | LabelVolume,
    reference: str | Path | LabelVolume,
    targets: Targets | None,
    measuring: Measuring,
) -> Evaluation:
    label = prediction if isinstance(prediction, LabelVolume) else prediction.label
    known = reference if isinstance(reference, LabelVolume) else read_label(Path(reference))
    chosen = targets or (prediction.targets if isinstance(prediction, Prediction) else _by_value(label, known))
    return measure_prediction(label, known, chosen, measuring, subject="scan").evaluation(measuring)


def _by_value(*labels: LabelVolume) -> Targets:
    import numpy as np

    values = {int(value) for label in labels for value in np.unique(label.voxels)}
    return Targets({f"label {value}": (value,) for value in sorted(values - {0})})
