"""Predictions against references: one tidy table, and what it says of each target."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from math import isfinite, isnan, nan
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import Dataset, check_grids
from delineate.datasets.layouts import open_dataset
from delineate.errors import DuplicateSubject, MissingFile
from delineate.io.files import writing_beside
from delineate.io.formats import name_of, read_label, suffix_of
from delineate.io.voxels import Orientation
from delineate.metrics.overlap import Overlap
from delineate.metrics.quantities import error_percent, volume_ml
from delineate.metrics.surface import surface_distances

QUALITY = ("dice", "precision", "recall", "hd95_mm")
METRICS = (*QUALITY, "volume_ml", "reference_volume_ml", "volume_error_ml", "volume_error_percent")
MEAN_OF_TARGETS = "mean of targets"

_RESAMPLES = 10_000
_LABEL_ENDING = re.compile(r"_(segmentation|seg|label|mask|gt)$", re.IGNORECASE)


@dataclass(frozen=True)
class Pair:
    """A prediction and the reference it is measured against."""

    subject: str
    prediction: Path
    reference: Path
    site: str = ""


class Pairing(NamedTuple):
    """What could be paired, and the names that stood alone, by what is missing of them."""

    pairs: list[Pair]
    unpaired: dict[str, list[str]]


@dataclass(frozen=True)
class Estimate:
    """A metric over subjects, without the ``undefined`` (NaN or infinite) values.

    ``sd`` has ``n - 1`` in its denominator. ``ci95`` is the percentile interval of the mean under
    10 000 bootstrap resamples of the subjects (Efron 1979), seeded. Both are NaN for fewer than two.
    """

    mean: float
    sd: float
    ci95: tuple[float, float]
    n: int
    undefined: int


Summary = dict[str, dict[str, Estimate]]
"""Target, then metric."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The ``table`` has a row for each subject and target.

    Its columns are subject, site, target, :data:`METRICS`, and case: ``both``, ``reference empty``,
    ``prediction empty`` or ``both empty``. Volumes leave ignored voxels out, as all metrics do.
    """

    table: pd.DataFrame
    unpaired: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.table["target"].unique())

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(self.table["subject"].unique())

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.table["site"].unique()))

    def mean_dice(self) -> pd.Series[float]:
        """Each subject's Dice, averaged over targets."""
        return self.table.groupby("subject", sort=False)["dice"].mean()

    def summary(self, site: str | None = None) -> Summary:
        """Estimates of every metric for every target, over all subjects or those of one site.

        :data:`MEAN_OF_TARGETS` averages a subject's targets first; it is undefined for a subject
        whose value is undefined for any target, so that all subjects average the same things.
        """
        table = self.table if site is None else self.table[self.table["site"] == site]
        # (subjects, targets, metrics)
        cube = np.stack([table.loc[table["target"] == t, list(METRICS)].to_numpy() for t in self.targets], axis=1)
        columns = [(target, metric) for target in self.targets for metric in METRICS]
        columns += [(MEAN_OF_TARGETS, metric) for metric in QUALITY]
        values = np.concatenate([cube.reshape(len(cube), -1), cube[..., : len(QUALITY)].mean(axis=1)], axis=1)
        summary: Summary = {}
        for (target, metric), estimate in zip(columns, estimate_means(values), strict=True):
            summary.setdefault(target, {})[metric] = estimate
        return summary

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON: undefined is None, infinite ``"inf"``. ``sites`` only if there are several."""
        content = {"subjects": self.table.to_dict("records"), **self._summaries()}
        return {key: _plain(value) for key, value in content.items()}

    def write(self, folder: Path) -> None:
        """Write ``metrics.csv``, the table, and ``summary.json``, what was made of it."""
        with writing_beside(folder / "metrics.csv") as path:
            self.table.to_csv(path, index=False)
        with writing_beside(folder / "summary.json") as path:
            path.write_text(json.dumps(_plain(self._summaries()), indent=2, allow_nan=False) + "\n")

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """What :meth:`write` wrote."""
        table = pd.read_csv(
            folder / "metrics.csv",
            dtype={"subject": str, "site": str, "target": str},
            # A subject may be called "NA"; only a metric may be missing.
            keep_default_na=False,
            na_values={metric: [""] for metric in METRICS},
        )
        return cls(table, json.loads((folder / "summary.json").read_text())["unpaired"])

    def _summaries(self) -> dict[str, object]:
        content: dict[str, object] = {"summary": self.summary()}
        if len(self.sites) > 1:
            content["sites"] = {site: self.summary(site) for site in self.sites}
        return content | {"unpaired": dict(self.unpaired)}


def evaluate(
    pairs: Sequence[Pair],
    targets: Targets,
    *,
    unpaired: Mapping[str, Sequence[str]] | None = None,
    orientation: Orientation = "refuse",
    threads: int = 2,
    on_subject: Callable[[str], None] = lambda subject: None,
) -> Evaluation:
    """Measure every pair; ``on_subject`` is told of each that is done, in order.

    ``orientation`` is how a file with two orientations is read. Raises :class:`GridMismatch` where a
    prediction is not on its reference's grid, :class:`BadLabelValue` where
    either has a value the targets do not know, and what reading raises.
    """

    def rows(pair: Pair) -> list[dict[str, object]]:
        prediction, reference = (read_label(p, orientation=orientation) for p in (pair.prediction, pair.reference))
        measured = compare(prediction, reference, targets, subject=pair.subject)
        return [{"subject": pair.subject, "site": pair.site, **row} for row in measured]

    found: list[dict[str, object]] = []
    with ThreadPoolExecutor(threads) as pool:
        for pair, measured in zip(pairs, pool.map(rows, pairs), strict=True):
            found += measured
            on_subject(pair.subject)
    return Evaluation(pd.DataFrame(found), unpaired or {})


def evaluate_folders(predictions: Path, references: Path, targets: Targets | None = None) -> Evaluation:
    """Measure a folder of predictions against a folder of labels or a data set, paired by name.

    Without ``targets``, those that the data set names count, else one for each value found. Raises
    what :func:`pair_files` and :func:`evaluate` raise.
    """
    known: Path | Dataset = references
    if references.is_dir() and ((references / "dataset.json").is_file() or not _scans_in(references)):
        known = open_dataset(references)
    pairing = pair_files(predictions, known)
    if targets is None:
        targets = known.targets if isinstance(known, Dataset) else None
    return evaluate(pairing.pairs, targets or targets_in(pairing.pairs), unpaired=pairing.unpaired)


def compare(
    prediction: LabelVolume, reference: LabelVolume, targets: Targets, *, subject: str
) -> list[dict[str, object]]:
    """A row for each target: its name, :data:`METRICS`, and case. ``subject`` is for messages."""
    check_grids(subject, "prediction", prediction.grid, "reference", reference.grid)
    for label in (prediction, reference):
        targets.check(label.voxels, subject)
    known = targets.known(reference.voxels) if targets.ignore else None
    references, predictions = targets.masks(reference.voxels), targets.masks(prediction.voxels)
    return [{"target": t, **_measure(predictions[t], references[t], known, reference)} for t in targets.names]


def _measure(
    prediction: NDArray[np.bool_], reference: NDArray[np.bool_], known: NDArray[np.bool_] | None, on: LabelVolume
) -> dict[str, object]:
    overlap = Overlap.of(reference, prediction, known)
    volume, reference_volume = (volume_ml(m, on.grid.voxel_ml, known) for m in (prediction, reference))
    return {
        "dice": overlap.dice,
        "precision": overlap.precision,
        "recall": overlap.recall,
        "hd95_mm": surface_distances(reference, prediction, on.grid.spacing_mm, known).hausdorff95_mm,
        "volume_ml": volume,
        "reference_volume_ml": reference_volume,
        "volume_error_ml": volume - reference_volume,
        "volume_error_percent": error_percent(volume, reference_volume),
        "case": _CASES[volume > 0, reference_volume > 0],
    }


_CASES = {
    (True, True): "both",
    (True, False): "reference empty",
    (False, True): "prediction empty",
    (False, False): "both empty",
}


def estimate_means(values: NDArray[np.float64], *, seed: int = 0) -> list[Estimate]:
    """An estimate of each column's mean; rows are subjects, resampled for all columns together."""
    defined = np.isfinite(values)
    filled = np.where(defined, values, 0.0)
    n, rng = len(values), np.random.default_rng(seed)
    with np.errstate(invalid="ignore"):  # a resample without a defined value has no mean
        # How often each subject is drawn makes a resample's means one matrix product; in parts, to bound memory.
        draws = (rng.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES // 10).astype(float) for _ in range(10))
        means = np.concatenate([draw @ filled / (draw @ defined) for draw in draws])
    return [
        _estimate(column[use], resampled[np.isfinite(resampled)], undefined=int(n - use.sum()))
        for column, use, resampled in zip(values.T, defined.T, means.T, strict=True)
    ]


def _estimate(defined: NDArray[np.float64], resampled: NDArray[np.float64], undefined: int) -> Estimate:
    n = len(defined)
    mean = float(defined.mean()) if n else nan
    if n < 2:
        return Estimate(mean, nan, (nan, nan), n, undefined)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return Estimate(mean, float(defined.std(ddof=1)), (float(low), float(high)), n, undefined)


def pair_files(predictions: Path, references: Path | Dataset) -> Pairing:
    """Pair ``<subject>.nii.gz`` (or another format) in a folder with the reference of that name.

    ``references`` is a folder of labels, whose names may end in _segmentation, _seg, _label, _mask
    or _gt; or a data set or its folder, which also knows sites. Two files pair whatever their names.

    Raises :class:`MissingFile` where nothing pairs, :class:`DuplicateSubject` where a name stands
    for two files.
    """
    if isinstance(references, Path) and predictions.is_file() and references.is_file():
        return Pairing([Pair(name_of(predictions), predictions, references)], {})
    found = _unique((name_of(file), file) for file in _scans_in(predictions))
    known = _references_in(references, found)
    paired = [Pair(name, found[name], *known[name]) for name in sorted(found.keys() & known.keys())]
    if not paired:
        of = references if isinstance(references, Path) else references.root
        raise MissingFile(
            f"no prediction in '{predictions}' ({_some(found)}) has the name of a reference in '{of}' "
            f"({_some(known)}); name predictions <subject>.nii.gz"
        )
    alone = {
        "prediction without reference": sorted(found.keys() - known.keys()),
        "reference without prediction": sorted(known.keys() - found.keys()),
    }
    return Pairing(paired, {what: names for what, names in alone.items() if names})


def targets_in(pairs: Iterable[Pair], *, orientation: Orientation = "refuse") -> Targets:
    """A target ``label N`` for each value N found in any reference or prediction; reads them all."""
    files = (file for pair in pairs for file in (pair.reference, pair.prediction))
    values = {int(v) for file in files for v in np.unique(read_label(file, orientation=orientation).voxels)}
    return Targets({f"label {v}": (v,) for v in sorted(values - {0})})


def _references_in(references: Path | Dataset, predicted: Container[str]) -> dict[str, tuple[Path, str]]:
    """File and site of each subject that has a reference."""
    if isinstance(references, Path):
        files = _scans_in(references)
        if files and not (references / "dataset.json").is_file():
            # A folder may hold scans beside their labels: case.mhd, case_segmentation.mhd.
            labels = [file for file in files if _LABEL_ENDING.search(name_of(file))] or files
            named = ((name_of(file), file) for file in labels)
            bare = _unique((n if n in predicted else _LABEL_ENDING.sub("", n), file) for n, file in named)
            return {name: (file, "") for name, file in bare.items()}
        references = open_dataset(references)
    return {s.id: (s.label, s.site) for s in references.subjects if s.label is not None}


def _scans_in(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise MissingFile(f"'{folder}' is no folder; give the folder that holds the files")
    return sorted(path for path in folder.iterdir() if suffix_of(path))


def _unique(named: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    files: dict[str, Path] = {}
    for name, file in named:
        if other := files.get(name):
            raise DuplicateSubject(f"'{other}' and '{file}' both stand for '{name}'; move one away")
        files[name] = file
    return files


def _some(names: Mapping[str, object]) -> str:
    return ", ".join([*sorted(names)[:3], *(["…"] if len(names) > 3 else [])]) or "none"


def _plain(value: object) -> object:
    """JSON has no NaN and no infinity."""
    match value:
        case Estimate():
            return _plain(asdict(value))
        case dict():
            return {str(key): _plain(item) for key, item in value.items()}
        case list() | tuple():
            return [_plain(item) for item in value]
        case float() if isnan(value):
            return None
        case float() if not isfinite(value):
            return "inf" if value > 0 else "-inf"
    return value
