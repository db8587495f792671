"""Predictions against references, and methods against each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from delineate.api.prediction import Prediction
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset, read_numbered
from delineate.errors import DatasetError, MissingFile, RecipeError
from delineate.evaluation.measure import Measuring, evaluate_folders, measure_prediction
from delineate.evaluation.pairs import open_references
from delineate.evaluation.table import Evaluation
from delineate.metrics.quantities import quantity_map

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
    maps: str | Path | None = None,
    probabilities: str | Path | None = None,
) -> Evaluation:
    """Measure a folder of predicted labels, or a single one, against references, by subject and target.

    >>> import delineate
    >>> label = delineate.read("reference.nii.gz", label=True)
    >>> evaluation = delineate.evaluate(label, "reference.nii.gz", targets=delineate.Targets({"ball": (1,)}))
    >>> float(evaluation.summary()["ball"]["dice"].mean)
    1.0

    ``references`` is a folder of labels or a data set, paired with the predictions by name, or a single
    label. ``targets`` default to those of the prediction or the data set, else to one per label value.
    ``metrics`` are sets and single metrics; ``delineate metrics list`` explains them. ``lesion_overlap`` is the
    fraction of a lesion that must be covered. ``quantity`` is a channel of the data set, or is read from ``maps``, a
    folder with a file for each subject; it is read ``margin_mm`` inside each target's surface, and ``threshold``
    divides subjects by its mean (default: 5.56 % for a fat fraction). ``probabilities`` is a folder of probability
    maps; by default the one that :func:`predict` wrote beside the predictions. A notebook shows the summary as a
    table; ``table`` has a row for each subject and target, for pandas.

    Raises :class:`~delineate.errors.GridMismatch` if a prediction is not on its reference's grid, and
    :class:`~delineate.errors.MissingFile` if nothing pairs.
    """
    read_within = quantity_map(quantity, margin_mm, threshold, maps)
    wanted = metrics if isinstance(metrics, str) else ",".join(metrics)
    if isinstance(predictions, str | Path):
        if isinstance(references, LabelVolume):
            predictions = read_numbered(Path(predictions), targets, "scan", references.grid)
        else:
            beside = Path(predictions) / "probabilities"
            kept = Path(probabilities) if probabilities is not None else beside if beside.is_dir() else None
            known = references if isinstance(references, Dataset) else open_references(Path(references))
            measuring = Measuring(wanted, lesion_overlap, read_within, kept)
            return evaluate_folders(Path(predictions), known, targets, measuring)
    if quantity is not None or probabilities is not None:
        raise RecipeError(
            "quantities and probabilities can only be read from folders", fix="give folders of predictions and data"
        )
    if isinstance(references, Dataset):
        raise DatasetError("a single label cannot be measured against a data set", fix="give its subject's reference")
    return _evaluate_one(predictions, references, targets, Measuring(wanted, lesion_overlap))


def compare(
    methods: Mapping[str, str | Path | Evaluation] | None = None, /, **named: str | Path | Evaluation
) -> list[MethodDifference]:
    """Compare two or more methods measured on the same subjects: paired, and corrected for multiple comparisons.

    >>> import delineate
    >>> for difference in delineate.compare(small="run", large="run"):
    ...     if difference.metric == "dice":
    ...         print(difference.verdict)
    too few to tell

    Each method is an evaluation, or the folder of an evaluation or a run. Names that are not Python identifiers go
    into a mapping: ``compare({"U-Net": "run1", "V-Net": "run2"})``. Each difference holds values, and prints as a
    sentence.

    Raises :class:`~delineate.errors.DatasetError` for fewer than two methods or subjects in common.
    """
    from delineate.evaluation.methods import compare_methods

    everything = {**(methods or {}), **named}
    if len(everything) < 2:
        raise DatasetError(
            f"{len(everything)} methods were given", fix="at least two are needed, such as a='run1', b='run2'"
        )
    return compare_methods({name: _opened(one) for name, one in everything.items()})


def _opened(one: str | Path | Evaluation) -> Evaluation:
    """An evaluation, read first if the folder of an evaluation or a run is given."""
    if isinstance(one, Evaluation):
        return one
    folder = Path(one)
    inside = folder / "evaluation" if (folder / "evaluation" / "metrics.csv").exists() else folder
    if not (inside / "metrics.csv").exists():
        raise MissingFile(f"'{folder}' has no metrics.csv", fix="give the folder of a run or of a saved evaluation")
    return Evaluation.read(inside)


def _evaluate_one(
    prediction: Prediction | LabelVolume,
    reference: str | Path | LabelVolume,
    targets: Targets | None,
    measuring: Measuring,
) -> Evaluation:
    label = prediction if isinstance(prediction, LabelVolume) else prediction.label
    named = targets or (prediction.targets if isinstance(prediction, Prediction) else None)
    known = (
        reference if isinstance(reference, LabelVolume) else read_numbered(Path(reference), named, "scan", label.grid)
    )
    chosen = named or _by_value(label, known)
    return measure_prediction(label, known, chosen, measuring, subject="scan").evaluation(measuring)


def _by_value(*labels: LabelVolume) -> Targets:
    import numpy as np

    values = {int(value) for label in labels for value in np.unique(label.voxels)}
    return Targets({f"label {value}": (value,) for value in sorted(values - {0})})
