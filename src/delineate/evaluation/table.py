"""The tidy table of an evaluation, and its summaries by target."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from delineate.core.tables import html_table
from delineate.errors import BadFormat, MissingFile
from delineate.evaluation.agreement import Agreeing, agreements, crossing_sentences, crossings
from delineate.io.files import parsing, read_json, writing_beside
from delineate.io.tables import read_table, write_table
from delineate.metrics.catalogue import METRICS, PROBABILITY_MAE, Metric, formatted, named_metric
from delineate.metrics.quantities import QuantityMap
from delineate.metrics.reliability import Reliability
from delineate.metrics.statistics import Estimate, estimate_means

MEAN_OF_TARGETS = "mean of targets"

BACKGROUND = "background"
"""The class of every voxel that is in no target."""

MISSED, RIGHTLY_NOTHING = "prediction empty", "both empty"
"""Cases in which the prediction has no voxel of a target."""

Summary = dict[str, dict[str, Estimate]]
"""Target, then metric."""

_FIX = "copy it again, or measure again with `delineate evaluate -o`"
_COLUMNS = ("subject", "site", "target")
_NUMBERS = ("voxels", "bin", "sum_predicted", "sum_true", "sum_error", "covered", "volume_ml")

LESION_SIZES_ML = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, inf)
"""Bounds of the size classes of lesions (ml)."""

LESION_COLUMNS = ("subject", "site", "target", "of", "volume_ml", "covered", "matched")

_MORE = {
    "lesions": LESION_COLUMNS,
    "confusion": ("subject", "reference", "prediction", "voxels"),
    "reliability": ("target", "bin", "voxels", "sum_predicted", "sum_true", "sum_error"),
}

FILES = ("metrics.csv", "summary.json", *(f"{name}.csv" for name in _MORE))
"""What :meth:`Evaluation.write` writes into a folder."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What was measured: ``table`` has a row for each subject and target.

    Its columns are subject, site, patient, target, metrics by name, and case: ``both``,
    ``reference empty``, ``prediction empty`` or ``both empty``. Without a patient column, each subject counts as
    a separate patient. Ignored voxels are left out of everything.

    ``lesions`` has a row for each lesion, if lesions were counted: whether it is ``of`` the
    reference or the prediction, its volume (ml), the share of it that the other covers, and whether that
    is a match. ``confusion`` counts voxels by subject, reference class and predicted class,
    if targets are exclusive. ``reliability`` sums probabilities in bins by target, if they were
    given. ``quantity`` is the map that was measured within targets; ``simulated`` says that
    the scans are simulated.
    """

    table: pd.DataFrame
    unpaired: Mapping[str, Sequence[str]] = field(default_factory=dict)
    lesions: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(LESION_COLUMNS)))
    confusion: pd.DataFrame = field(
        default_factory=lambda: pd.DataFrame(columns=["subject", "reference", "prediction", "voxels"])
    )
    reliability: pd.DataFrame = field(default_factory=lambda: reliability_table([]))
    quantity: QuantityMap | None = None
    simulated: bool = False

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(str(column) for column in self.table.columns if column in METRICS)

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.table["target"].unique())

    @property
    def subjects(self) -> tuple[str, ...]:
        return tuple(self.table["subject"].unique())

    @property
    def patients(self) -> dict[str, str]:
        """Whose scan each subject is."""
        whose = self.table["patient" if "patient" in self.table.columns else "subject"]
        return dict(zip(self.table["subject"], whose, strict=True))

    @property
    def sites(self) -> tuple[str, ...]:
        return tuple(sorted(self.table["site"].unique()))

    def of_subjects(self, subjects: Collection[str]) -> Evaluation:
        """The evaluation of some subjects, without reliability bins, which are sums over all subjects."""
        tables = {name: getattr(self, name) for name in ("table", "lesions", "confusion")}
        some = {name: table[table["subject"].isin(subjects)] for name, table in tables.items()}
        return replace(self, **some, reliability=reliability_table([]))

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """The ``table`` with failures counted as infinitely bad in every metric that has a better end.

        A missed target may have no value, such as a precision, but that is no reason to leave the subject
        out. Values that the reference leaves undefined stay undefined.
        """
        missed = (self.table["case"] if "case" in self.table else pd.Series("", self.table.index)) == MISSED
        # Whether probabilities exist does not depend on what was found.
        judged = [m for m in self.metrics if METRICS[m].better and m != PROBABILITY_MAE]
        worst = {m: inf if METRICS[m].better == "lower" else -inf for m in judged}
        columns = {m: self.table[m].astype(float) for m in worst}
        return self.table.assign(**{m: v.mask(missed & v.isna(), worst[m]) for m, v in columns.items()})

    def mean_of_targets(self, metric: str) -> pd.Series[float]:
        """Each subject's outcome in a metric, averaged over targets; undefined if it is for any target."""
        values = self.outcomes.groupby("subject", sort=False)[metric]
        return values.agg(lambda v: v.astype(float).mean(skipna=False))

    def summary(self, site: str | None = None) -> Summary:
        """Estimates of every metric for every target, over all patients or those of one site.

        :data:`MEAN_OF_TARGETS` averages a subject's targets first; it is undefined for a subject
        with an undefined value for any target, so that every subject averages the same targets.
        """
        if site not in self._summed:
            self._summed[site] = self._summary(site)
        return self._summed[site]

    @cached_property
    def _summed(self) -> dict[str | None, Summary]:
        return {}

    def _summary(self, site: str | None) -> Summary:
        table = self.outcomes if site is None else self.outcomes[self.outcomes["site"] == site]
        names = list(self.metrics)
        quality = [i for i, name in enumerate(names) if METRICS[name].better]
        # (subjects, targets, metrics)
        cube = np.stack([table.loc[table["target"] == t, names].to_numpy(float) for t in self.targets], axis=1)
        columns = [(target, metric) for target in self.targets for metric in names]
        columns += [(MEAN_OF_TARGETS, names[i]) for i in quality]
        values = np.concatenate([cube.reshape(len(cube), -1), cube[..., quality].mean(axis=1)], axis=1)
        summary: Summary = {}
        subjects = table.loc[table["target"] == self.targets[0], "subject"]
        estimates = estimate_means(values, subjects.map(self.patients).tolist())
        for (target, metric), estimate in zip(columns, estimates, strict=True):
            summary.setdefault(target, {})[metric] = estimate
        return summary

    def overall(self, site: str | None = None) -> dict[str, Estimate]:
        """The row of :meth:`summary` for all targets together: their mean, or the only target.

        Empty where there are several, and nothing was measured that is averaged over them.
        """
        return self.summary(site).get(self.overall_name, {})

    @property
    def overall_name(self) -> str:
        """The name of the row of :meth:`summary` for all targets together."""
        return MEAN_OF_TARGETS if len(self.targets) > 1 else self.targets[0]

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON: undefined is None, infinite is ``"inf"``. ``sites`` only if there are several."""
        content = {"subjects": self.table.to_dict("records"), **self._summaries()}
        return {key: plain(value) for key, value in content.items()}

    def write(self, folder: Path) -> None:
        """Write the table (``metrics.csv``), the summaries (``summary.json``) and the other tables that are not empty.

        Those are ``lesions.csv``, ``confusion.csv`` and ``reliability.csv``; what an earlier evaluation left goes.
        """
        for name in ("metrics", *_MORE):
            table = self.table if name == "metrics" else getattr(self, name)
            if len(table):
                write_table(folder / f"{name}.csv", list(table.columns), table.to_dict("records"))
            else:
                (folder / f"{name}.csv").unlink(missing_ok=True)
        with writing_beside(folder / "summary.json") as path:
            text = json.dumps(plain(self._summaries()), indent=2, allow_nan=False) + "\n"
            path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """Read what :meth:`write` wrote; the rows of ``metrics.csv`` may lie in any order."""
        more = {name: _read(folder / f"{name}.csv", columns) for name, columns in _MORE.items()}
        table = _read(folder / "metrics.csv", _COLUMNS)
        if table is None or not any(column in METRICS for column in table):
            raise MissingFile(f"'{folder}' has no metrics.csv with metrics", fix=_FIX)
        measured = [set(rows) for _, rows in table.groupby("target")["subject"]]
        if len(table) != len(measured) * len(measured[0]) or any(subjects != measured[0] for subjects in measured):
            raise BadFormat(f"'{folder / 'metrics.csv'}' does not have each subject once for each target", fix=_FIX)
        # Somebody may have sorted the rows: every target's come in the order of the first one's subjects.
        first = table.loc[table["target"] == table["target"].iloc[0], "subject"]
        place = {subject: i for i, subject in enumerate(first)}
        table = table.sort_values("subject", key=lambda names: names.map(place), kind="stable", ignore_index=True)
        summary = read_json(folder / "summary.json", BadFormat, fix=_FIX)
        with parsing(folder / "summary.json", BadFormat, fix=_FIX):
            unpaired, quantity = summary["unpaired"], summary.get("quantity")
            names = {str(what): [str(name) for name in found] for what, found in unpaired.items()}
            return cls(
                table,
                names,
                quantity=None if quantity is None else _quantity(quantity),
                simulated=summary.get("simulated", False) is True,
                **{name: table for name, table in more.items() if table is not None},
            )

    def _summaries(self) -> dict[str, object]:
        content: dict[str, object] = {"simulated": self.simulated, "summary": self.summary()}
        if len(self.sites) > 1:
            content["sites"] = {site: self.summary(site) for site in self.sites}
        if rows := [row for agreeing in self.agreements for row in agreeing.rows()]:
            content["agreement"] = rows
        if len(self.confusion):
            content["pooled"] = self.pooled.to_dict("records")
        if len(self.lesions):
            content["lesions_by_size"] = self.lesions_by_size.to_dict("records")
        if self.quantity is not None:
            content["quantity"] = self.quantity.as_dict()
            if self.quantity.threshold is not None:
                content["crossings"] = crossings(self.table, self.quantity.threshold)
        metrics = [self.described_metric(name) for name in self.metrics]
        definitions = {metric.name: f"{metric.title}: {metric.definition}" for metric in metrics}
        if len(self.reliability):
            content["calibration"] = {
                target: {"expected_calibration_error": r.expected_error, "mean_absolute_error": r.mean_absolute_error}
                for target, r in self.reliabilities().items()
            }
        return content | {"definitions": definitions, "unpaired": dict(self.unpaired)}

    def described_summary(self) -> list[dict[str, str]]:
        """:meth:`summary` as text for a reader, a row for each target and metric."""
        return [
            {
                "target": target,
                "metric": self.described_metric(metric).title,
                "mean ± SD": averaged(metric, estimate),
                # A single patient gives no interval.
                "95 % interval of the mean": " – ".join(formatted(metric, v) for v in estimate.ci95)
                if estimate.patients > 1
                else "",
                "n": estimate.count,
                "failed": estimate.failures,
                "undefined": str(estimate.undefined or ""),
            }
            for target, estimates in self.summary().items()
            for metric, estimate in estimates.items()
        ]

    def _repr_html_(self) -> str:
        rows = self.described_summary()
        caption = f"{len(self.subjects)} subjects{' (simulated)' if self.simulated else ''}"
        return html_table(caption, list(rows[0]), [list(row.values()) for row in rows])

    @cached_property
    def pooled(self) -> pd.DataFrame:
        """Precision, recall and F1 of every class, the background first, pooled over the voxels of all subjects.

        Columns: class, ``reference`` and ``predicted`` voxels and how many of them coincide (``right``), share of the
        reference's voxels, precision, recall, f1. Values of 0/0 are undefined, and so is F1, their harmonic mean, if
        precision or recall is. No rows if targets overlap.
        """
        pairs = self.confusion
        counted = {
            "reference": pairs.groupby("reference", sort=False),
            "predicted": pairs.groupby("prediction", sort=False),
            "right": pairs[pairs["reference"] == pairs["prediction"]].groupby("reference", sort=False),
        }
        counts = pd.DataFrame({name: rows["voxels"].sum() for name, rows in counted.items()}).astype(int)
        precision, recall = counts["right"] / counts["predicted"], counts["right"] / counts["reference"]
        either = (precision + recall).replace(0, 1)  # nothing right: 0 over anything
        measured = counts.assign(
            share=counts["reference"] / counts["reference"].sum(),
            precision=precision,
            recall=recall,
            f1=2 * precision * recall / either,
        )
        return measured.rename_axis("class").reset_index()

    @cached_property
    def background(self) -> dict[str, Estimate]:
        """Estimates of the background's precision, recall and Dice, as :meth:`summary` has them for targets.

        Empty if targets overlap, as the background is a class only where they do not.
        """
        pairs = self.confusion
        if not len(pairs):
            return {}
        mine = {name: pairs[name] == BACKGROUND for name in ("reference", "prediction")}
        counts = pd.DataFrame(
            {
                name: pairs["voxels"].where(counted, 0).groupby(pairs["subject"], sort=False).sum()
                for name, counted in {**mine, "right": mine["reference"] & mine["prediction"]}.items()
            }
        ).astype(float)
        values = pd.DataFrame(
            {
                "precision": counts["right"] / counts["prediction"],
                "recall": counts["right"] / counts["reference"],
                "dice": 2 * counts["right"] / (counts["prediction"] + counts["reference"]),
            }
        )
        whose = self.patients
        estimates = estimate_means(values.to_numpy(float), [whose[subject] for subject in values.index])
        return dict(zip(values, estimates, strict=True))

    def described_pooled(self) -> list[dict[str, str]]:
        """:attr:`pooled` as text for a reader."""
        return [
            {
                "class": str(row["class"]),
                "voxels": f"{row['reference']:,}",
                "share": f"{row['share']:.5f}",
                **{name: "0/0" if isnan(row[name]) else f"{row[name]:.3f}" for name in ("precision", "recall")},
                "F1": "0/0" if isnan(row["f1"]) else f"{row['f1']:.3f}",
            }
            for row in self.pooled.to_dict("records")
        ]

    @cached_property
    def lesions_by_size(self) -> pd.DataFrame:
        """Number of lesions by target and volume class, from ``from_ml`` up to but excluding ``to_ml``.

        Further columns: ``reference`` lesions and how many of them were ``found``, ``predicted`` lesions and how
        many of them are ``real``.
        """
        ends = np.array(LESION_SIZES_ML)
        place = np.searchsorted(ends, self.lesions["volume_ml"].to_numpy(float), side="right") - 1
        of, matched = self.lesions["of"], self.lesions["matched"].astype(bool)
        counts = pd.DataFrame(
            {
                "target": self.lesions["target"],
                "from_ml": ends[place],
                "to_ml": ends[place + 1],
                "reference": of == "reference",
                "found": (of == "reference") & matched,
                "predicted": of == "prediction",
                "real": (of == "prediction") & matched,
            }
        )
        return counts.groupby(["target", "from_ml", "to_ml"], sort=True, as_index=False).sum()

    def described_lesions(self) -> list[dict[str, str]]:
        """:meth:`lesions_by_size` as text for a reader."""
        return [
            {
                "target": str(row["target"]),
                "ml": _between(row["from_ml"], row["to_ml"]),
                "found": _share(row["found"], row["reference"]),
                "real": _share(row["real"], row["predicted"]),
            }
            for row in self.lesions_by_size.to_dict("records")
        ]

    @cached_property
    def agreements(self) -> tuple[Agreeing, ...]:
        """Agreement of each target's volumes and quantities with the references."""
        return tuple(agreements(self.table, self.quantity))

    def crossings(self) -> list[str]:
        """Which subjects lie on which side of the quantity's threshold, in words; empty without a threshold."""
        return [] if self.quantity is None else crossing_sentences(self.table, self.quantity)

    def described_metric(self, name: str) -> Metric:
        """A metric with the name and unit of the measured quantity."""
        return named_metric(name, self.quantity)

    def reliabilities(self) -> dict[str, Reliability]:
        """Reliability by target, with the voxels of all subjects pooled."""
        return {
            str(target): Reliability.of_columns({name: rows[name].to_numpy() for name in rows})
            for target, rows in self.reliability.groupby("target", sort=False)
        }


def reliability_table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Sum the subjects' rows by target and bin."""
    columns = ["target", "bin", "voxels", "sum_predicted", "sum_true", "sum_error"]
    table = pd.DataFrame(list(rows), columns=columns)
    return table.groupby(["target", "bin"], sort=False, as_index=False).sum() if len(table) else table


def averaged(metric: str, estimate: Estimate) -> str:
    """A mean as a table shows it: with the SD over patients, and the number of scans it covers if some failed."""
    mean, sd = formatted(metric, estimate.mean), formatted(metric, estimate.sd)
    spread = f"{mean} ± {sd}" if estimate.patients > 1 else mean
    return f"{spread} of the {estimate.n} that did not fail" if estimate.failed and estimate.n else spread


def _between(low: float, high: float) -> str:
    return f"below {high:g}" if low == 0 else f"{low:g} or more" if high == inf else f"{low:g} to {high:g}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "–"


def _read(path: Path, columns: Collection[str]) -> pd.DataFrame | None:
    """Read a table with at least these columns; None if there is no file. Raises :class:`BadFormat`."""
    if not path.exists():
        return None
    with parsing(path, BadFormat, fix=_FIX):
        rows = read_table(path)
        if not rows or not set(columns) <= set(rows[0]):
            raise BadFormat(f"'{path}' has no rows with columns {', '.join(columns)}", fix=_FIX)
        table = pd.DataFrame(rows)
        # A subject may be called "NA"; only a metric may be missing.
        for column in table:
            if column in METRICS or column in _NUMBERS:
                table[column] = [_number(value) for value in table[column]]
            elif column == "matched":
                table[column] = [{"True": True, "False": False}[value] for value in table[column]]
    return table


def _number(text: str) -> float:
    if text.isdecimal() and len(text) < 16:
        return int(text)
    return float(text) if text else np.nan


def _quantity(saved: Mapping[str, Any]) -> QuantityMap:
    threshold = saved["threshold"]
    return QuantityMap(
        str(saved["channel"]), float(saved["margin_mm"]), None if threshold is None else float(threshold)
    )


def plain(value: object) -> object:
    """A value for JSON, which has no NaN and no infinity: undefined is None, infinite is ``"inf"``."""
    match value:
        case Estimate():
            return plain(asdict(value))
        case dict():
            return {str(key): plain(item) for key, item in value.items()}
        case list() | tuple():
            return [plain(item) for item in value]
        case float() if isnan(value):
            return None
        case float() if not isfinite(value):
            return "inf" if value > 0 else "-inf"
    return value
