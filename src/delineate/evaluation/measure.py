"""Predictions measured against references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from delineate.core.grid import Grid, box_around
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset, check_grids, load_map, with_maps
from delineate.errors import BadShape, DatasetError, MissingFile, RecipeError
from delineate.evaluation.pairs import Pair, open_references, pair_files, targets_in
from delineate.evaluation.table import BACKGROUND, LESION_COLUMNS, Evaluation, reliability_table
from delineate.io.formats import read_volume
from delineate.io.voxels import Orientation
from delineate.metrics.catalogue import METRICS, PROBABILITY_MAE, QUANTITIES, metric_names, targets_of
from delineate.metrics.comparison import Comparison
from delineate.metrics.quantities import QuantityMap, measure_target
from delineate.metrics.reliability import Reliability

_ROUNDING = 1e-3
"""How far beyond 0 and 1 stored probabilities may lie."""


@dataclass(frozen=True)
class Measuring:
    """What is measured: sets and single metrics by name, separated by commas (``metrics.catalogue``).

    A lesion is matched if more than the fraction ``lesion_overlap`` of its voxels is covered; 0 means any
    overlap. The mean and median of ``quantity`` in each target are measured. ``probabilities`` is a
    folder as ``predict --probabilities`` writes it. Raises :class:`RecipeError` for an unknown name.
    """

    wanted: str = "standard"
    lesion_overlap: float = 0.0
    quantity: QuantityMap | None = None
    probabilities: Path | None = None

    def __post_init__(self) -> None:
        metric_names(self.wanted)

    @property
    def metrics(self) -> tuple[str, ...]:
        more = (QUANTITIES if self.quantity else ()) + ((PROBABILITY_MAE,) if self.probabilities else ())
        return tuple(dict.fromkeys((*metric_names(self.wanted), *more)))

    @property
    def lesions(self) -> bool:
        return any("lesion" in name for name in self.metrics)


STANDARD = Measuring()


@dataclass(frozen=True)
class Measured:
    """One subject's rows: one per target, per lesion (if counted), per pair of classes and per probability bin."""

    targets: list[dict[str, object]] = field(default_factory=list)
    lesions: list[dict[str, object]] = field(default_factory=list)
    confusion: list[dict[str, object]] = field(default_factory=list)
    reliability: list[dict[str, object]] = field(default_factory=list)

    def evaluation(
        self,
        measuring: Measuring = STANDARD,
        *,
        unpaired: Mapping[str, Sequence[str]] | None = None,
        simulated: bool = False,
    ) -> Evaluation:
        """The rows as tables."""
        return Evaluation(
            pd.DataFrame(self.targets),
            unpaired or {},
            pd.DataFrame(self.lesions, columns=list(LESION_COLUMNS)),
            pd.DataFrame(self.confusion, columns=["subject", "reference", "prediction", "voxels"]),
            reliability_table(self.reliability),
            measuring.quantity,
            simulated,
        )


def evaluate(
    pairs: Sequence[Pair],
    targets: Targets,
    measuring: Measuring = STANDARD,
    *,
    unpaired: Mapping[str, Sequence[str]] | None = None,
    simulated: bool = False,
    orientation: Orientation = "refuse",
    threads: int = 2,
    on_subject: Callable[[str], None] = lambda subject: None,
) -> Evaluation:
    """Measure every pair; ``on_subject`` is called with each subject that is done, in order.

    ``targets`` says what the labels hold; if a challenge's set is measured, its regions are measured instead.
    ``simulated`` marks the scans as simulated wherever the result is shown.
    ``orientation`` is how a file with two orientations is read. Raises :class:`GridMismatch` if a
    prediction is not on its reference's grid, :class:`BadLabelValue` if either has a value that belongs to no
    target, :class:`RecipeError` if a challenge's regions cannot be derived from the targets, and any error
    of reading.
    """
    targets_of(measuring.wanted, targets)
    if measuring.quantity is not None and measuring.quantity.maps is not None:
        sources = [pair.source or Subject(pair.subject, {}) for pair in pairs]
        mapped = with_maps(sources, measuring.quantity.channel, measuring.quantity.maps)
        pairs = [replace(pair, source=source) for pair, source in zip(pairs, mapped, strict=True)]

    def measure(pair: Pair) -> Measured:
        prediction, reference = pair.labels(targets, orientation=orientation)
        return measure_prediction(
            prediction,
            reference,
            targets,
            measuring,
            subject=pair.subject,
            site=pair.site,
            patient=pair.patient,
            quantity=None if measuring.quantity is None else _map_of(pair, measuring.quantity, reference.grid),
            probabilities=None
            if measuring.probabilities is None
            else _probabilities_of(pair, measuring.probabilities, targets, reference.grid),
        )

    found = Measured()
    # Volumes are read and measured in turn: a thousand take no more memory than one per thread.
    with ThreadPoolExecutor(threads) as pool:
        for pair, measured in zip(pairs, pool.map(measure, pairs), strict=True):
            for rows, more in zip(vars(found).values(), vars(measured).values(), strict=True):
                rows += more
            on_subject(pair.subject)
    return found.evaluation(measuring, unpaired=unpaired, simulated=simulated)


def evaluate_folders(
    predictions: Path, references: Path | Dataset, targets: Targets | None = None, measuring: Measuring = STANDARD
) -> Evaluation:
    """Measure a folder of predictions against a folder of labels or a data set (or its folder), paired by name.

    ``targets`` default to those of the data set, else to those of the challenge that is measured, else to
    one per value found. For a challenge's set, the regions that these targets make up are measured.
    Raises whatever :func:`pair_files` and :func:`evaluate` raise.
    """
    known = open_references(references) if isinstance(references, Path) else references
    pairing = pair_files(predictions, known)
    labelled = targets or (known.targets if isinstance(known, Dataset) else None)
    chosen = labelled or targets_of(measuring.wanted, None) or targets_in(pairing.pairs)
    simulated = isinstance(known, Dataset) and known.simulated
    return evaluate(pairing.pairs, chosen, measuring, unpaired=pairing.unpaired, simulated=simulated)


def named_targets(
    references: Path | Dataset, measuring: Measuring = STANDARD, targets: Targets | None = None
) -> Targets | None:
    """What is measured: the challenge's regions, ``targets`` or the data set's targets; None if none is named."""
    return targets_of(measuring.wanted, targets or (references.targets if isinstance(references, Dataset) else None))


def measure_prediction(
    prediction: LabelVolume,
    reference: LabelVolume,
    targets: Targets,
    measuring: Measuring = STANDARD,
    *,
    subject: str = "",
    site: str = "",
    patient: str = "",
    quantity: NDArray | None = None,
    probabilities: NDArray | None = None,
) -> Measured:
    """Measure one prediction; raises :class:`GridMismatch`, :class:`BadLabelValue` and :class:`RecipeError`.

    ``targets`` says what the labels hold; if a challenge's set is measured, its regions are measured instead.
    Without ``patient``, the subject counts as a patient of its own.
    ``quantity`` (X, Y, Z) is the quantity's map, ``probabilities`` (T, X, Y, Z) those of the targets.
    """
    labelled, targets = targets, targets_of(measuring.wanted, targets) or targets
    if probabilities is not None:
        probabilities = probabilities_of_regions(probabilities, labelled, targets)
    check_grids(subject, "prediction", prediction.grid, "reference", reference.grid)
    whole = reference.voxels.size
    for label in (prediction, reference):
        targets.check(label.voxels, subject)
    beyond = 0
    if probabilities is None:  # which are measured in the background, too
        prediction, reference, box = _within(prediction, reference)
        quantity = None if quantity is None else quantity[box]
        beyond = 0 if 0 in targets.ignore else whole - reference.voxels.size
    known = targets.known(reference.voxels) if targets.ignore else None
    references, predictions = targets.masks(reference.voxels), targets.masks(prediction.voxels)
    named = {"subject": subject, "site": site}
    measured = Measured()
    for t, target in enumerate(targets.names):
        more: dict[str, float] = {}
        if quantity is not None and measuring.quantity is not None:
            for prefix, mask in (("", predictions[target]), ("reference_", references[target])):
                inside = mask if known is None else mask & known
                found = measure_target(inside, quantity, reference.grid, measuring.quantity)
                more |= {f"{prefix}quantity_mean": found.mean, f"{prefix}quantity_median": found.median}
        if probabilities is not None:
            reliability = Reliability.of(probabilities[t], references[target], known)
            more[PROBABILITY_MAE] = reliability.mean_absolute_error
            measured.reliability.extend({"target": target, **row} for row in reliability.rows())
        comparison = Comparison.of(
            references[target],
            predictions[target],
            reference.grid,
            known,
            minimum_overlap=measuring.lesion_overlap,
            more=more,
            beyond=beyond,
        )
        values = {name: METRICS[name].of(comparison) for name in measuring.metrics}
        case = _CASES[comparison.volume_ml > 0, comparison.reference_volume_ml > 0]
        measured.targets.append({**named, "patient": patient or subject, "target": target, **values, "case": case})
        if measuring.lesions:
            measured.lesions.extend({**named, "target": target, **row} for row in _lesions(comparison))
    if targets.exclusive:
        counts = _confusion(references, predictions, known, beyond)
        measured.confusion.extend({"subject": subject, **row} for row in counts)
    return measured


def _within(prediction: LabelVolume, reference: LabelVolume) -> tuple[LabelVolume, LabelVolume, tuple[slice, ...]]:
    """Two labels of a scan, cropped to what either marks and a voxel around it, and that box.

    Most of a scan is background, which this looks at once instead of for each target.
    """
    box = box_around((prediction.voxels != 0) | (reference.voxels != 0), margin=1)
    box = box or tuple(slice(0, 1 + (n > 1)) for n in reference.grid.shape)
    grid = reference.grid.crop([b.start for b in box], reference.voxels[box].shape)
    return LabelVolume(prediction.voxels[box], grid), LabelVolume(reference.voxels[box], grid), box


_CASES = {
    (True, True): "both",
    (True, False): "reference empty",
    (False, True): "prediction empty",
    (False, False): "both empty",
}


def _map_of(pair: Pair, quantity: QuantityMap, grid: Grid) -> NDArray:
    """The quantity (X, Y, Z) of the pair's subject."""
    if pair.source is None:
        raise MissingFile(
            f"'{quantity.channel}' of '{pair.subject}' can only be read from a data set",
            fix="give one as the references, or say where its maps are",
        )
    values = load_map(pair.source, quantity.channel, "reference", grid)
    quantity.check(values, pair.subject)
    return values


def _probabilities_of(pair: Pair, folder: Path, targets: Targets, grid: Grid) -> NDArray:
    """Probabilities (T, X, Y, Z), from 0 to 1, of the pair's prediction for the ``targets``."""
    file = folder / f"{pair.subject}.nii.gz"
    found = read_volume(file)
    check_grids(pair.subject, "probabilities", found.grid, "reference", grid)
    predicted = targets.names if pair.shared is None else pair.shared.of_predictions.names
    if found.channels != len(predicted):
        raise BadShape(
            f"'{file}' holds {found.channels} probabilities, but the targets are {', '.join(predicted)}",
            fix="give the targets that were predicted (--targets)",
        )
    low, high = float(found.voxels.min()), float(found.voxels.max())
    if low < -_ROUNDING or high > 1 + _ROUNDING:
        raise DatasetError(
            f"'{file}' has values from {low:.4g} to {high:.4g}, which are not probabilities",
            fix="give the folder that `delineate predict --probabilities` wrote",
        )
    order = [predicted.index(name) for name in targets.names]
    chosen = found.voxels if predicted == targets.names else found.voxels[order]
    return chosen if low >= 0 and high <= 1 else np.clip(chosen, 0, 1)


def probabilities_of_regions(probabilities: NDArray, labelled: Targets, regions: Targets) -> NDArray:
    """Probabilities (R, X, Y, Z) of regions from those (T, X, Y, Z) of the targets they are made of.

    Raises :class:`RecipeError` if they do not follow from them.
    """
    if regions.values == labelled.values:
        return probabilities
    planes = []
    for region, values in regions.values.items():
        within = [t for t, name in enumerate(labelled.names) if set(labelled.values[name]) <= set(values)]
        same = [t for t in within if set(labelled.values[labelled.names[t]]) == set(values)]
        if not same and not labelled.exclusive:
            raise RecipeError(
                f"the probability of {region} does not follow from those of {', '.join(labelled.names)}, which overlap",
                fix="leave out the probabilities, or request the set's metrics by name",
            )
        planes.append(probabilities[same[0]] if same else np.minimum(probabilities[within].sum(axis=0), 1))
    return np.stack(planes)


def _lesions(comparison: Comparison) -> list[dict[str, object]]:
    """A row for each lesion of the reference, then for each lesion of the prediction."""
    c, voxel_ml = comparison.lesions, comparison.voxel_ml
    sides = [
        ("reference", c.reference_sizes, c.reference_covered, c.found),
        ("prediction", c.prediction_sizes, c.prediction_covered, c.right),
    ]
    return [
        {"of": of, "volume_ml": float(size) * voxel_ml, "covered": float(share), "matched": bool(match)}
        for of, sizes, covered, matched in sides
        for size, share, match in zip(sizes, covered, matched, strict=True)
    ]


def _confusion(
    references: Mapping[str, NDArray[np.bool_]],
    predictions: Mapping[str, NDArray[np.bool_]],
    known: NDArray[np.bool_] | None,
    beyond: int,
) -> list[dict[str, object]]:
    """Voxel counts of each pair of classes, background first; ignored voxels are left out.

    ``beyond`` is how many more voxels are background in both.
    """
    names = [BACKGROUND, *references]
    classes: list[NDArray[np.intp]] = []
    for masks in (references, predictions):
        numbered = np.zeros(next(iter(masks.values())).shape, np.intp)
        for k, mask in enumerate(masks.values(), 1):
            numbered[mask] = k
        classes.append(numbered if known is None else numbered[known])
    counts = np.bincount((classes[0] * len(names) + classes[1]).ravel(), minlength=len(names) ** 2)
    counts[0] += beyond
    return [
        {"reference": names[i // len(names)], "prediction": names[i % len(names)], "voxels": int(n)}
        for i, n in enumerate(counts)
    ]
