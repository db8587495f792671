"""The tidy table of a measurement, and what it says of each target."""

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
from delineate.evaluation.agreement import Agreeing, QuantityMap, agreements, crossing_sentences, crossings
from delineate.io.files import parsing, read_json, writing_beside
from delineate.io.tables import read_table, write_table
from delineate.metrics.catalogue import METRICS, PROBABILITY_MAE, formatted
from delineate.metrics.reliability import Reliability
from delineate.metrics.statistics import Estimate, estimate_means

MEAN_OF_TARGETS = "mean of targets"

MISSED, RIGHTLY_NOTHING = "prediction empty", "both empty"
"""Cases of a target that is not in the prediction."""

Summary = dict[str, dict[str, Estimate]]
"""Target, then metric."""

_FIX = "copy it again, or measure again with `delineate evaluate -o`"
_COLUMNS = ("subject", "site", "target")
_NUMBERS = ("voxels", "bin", "sum_predicted", "sum_true", "sum_error", "covered", "volume_ml")

LESION_SIZES_ML = (0.0, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, inf)
"""Where one class of size ends and the next begins."""

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
    """The ``table`` has a row for each subject and target.

    Its columns are subject, site, patient, target, metrics by their names, and case: ``both``,
    ``reference empty``, ``prediction empty`` or ``both empty``. Without the column, each subject is
    its own patient. Ignored voxels are left out of everything.

    ``lesions`` has a row for each lesion, where lesions were counted: whether it is ``of`` the
    reference or the prediction, its volume, the share of it that the other covers, whether that
    makes a match. ``confusion`` counts voxels by subject, reference class and predicted class,
    where targets are exclusive. ``reliability`` adds up probabilities in bins by target, where
    there were any. ``quantity`` is what was read within targets; ``simulated`` says that the
    scans are.
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
        """The same of some subjects; without probabilities' bins, which are added up over all."""
        tables = {name: getattr(self, name) for name in ("table", "lesions", "confusion")}
        some = {name: table[table["subject"].isin(subjects)] for name, table in tables.items()}
        return replace(self, **some, reliability=reliability_table([]))

    @cached_property
    def outcomes(self) -> pd.DataFrame:
        """The ``table`` with failures as the worst there is, infinite, in every metric that is better high or low.

        A subject whose target was missed may have no value, such as precision: that is no reason to
        leave it out. What the reference leaves undefined stays so.
        """
        missed = (self.table["case"] if "case" in self.table else pd.Series("", self.table.index)) == MISSED
        # Probabilities are there, or not, whatever was found.
        judged = [m for m in self.metrics if METRICS[m].better and m != PROBABILITY_MAE]
        worst = {m: inf if METRICS[m].better == "lower" else -inf for m in judged}
        columns = {m: self.table[m].astype(float) for m in worst}
        return self.table.assign(**{m: v.mask(missed & v.isna(), worst[m]) for m, v in columns.items()})

    def mean_of_targets(self, metric: str) -> pd.Series[float]:
        """Each subject's outcome in a metric, averaged over targets; undefined where any is undefined."""
        values = self.outcomes.groupby("subject", sort=False)[metric]
        return values.agg(lambda v: v.astype(float).mean(skipna=False))

    def summary(self, site: str | None = None) -> Summary:
        """Estimates of every metric for every target, over all patients or those of one site.

        :data:`MEAN_OF_TARGETS` averages a subject's targets first; it is undefined for a subject
        whose value is undefined for any target, so that all subjects average the same things.
        """
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

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON: undefined is None, infinite ``"inf"``. ``sites`` only if there are several."""
        content = {"subjects": self.table.to_dict("records"), **self._summaries()}
        return {key: plain(value) for key, value in content.items()}

    def write(self, folder: Path) -> None:
        """Write ``metrics.csv``, the table, ``summary.json``, what was made of it, and what else there is.

        That is ``lesions.csv``, ``confusion.csv`` and ``reliability.csv``.
        """
        for name in ("metrics", *_MORE):
            table = self.table if name == "metrics" else getattr(self, name)
            if len(table):
                write_table(folder / f"{name}.csv", list(table.columns), table.to_dict("records"))
        with writing_beside(folder / "summary.json") as path:
            text = json.dumps(plain(self._summaries()), indent=2, allow_nan=False) + "\n"
            path.write_text(text, encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """What :meth:`write` wrote."""
        more = {name: _read(folder / f"{name}.csv", columns) for name, columns in _MORE.items()}
        table = _read(folder / "metrics.csv", _COLUMNS)
        if table is None or not any(column in METRICS for column in table):
            raise MissingFile(f"'{folder}' holds no metrics.csv with metrics", fix=_FIX)
        measured = [set(rows) for _, rows in table.groupby("target")["subject"]]
        if len(table) != len(measured) * len(measured[0]) or any(subjects != measured[0] for subjects in measured):
            raise BadFormat(f"'{folder / 'metrics.csv'}' does not have each subject once for each target", fix=_FIX)
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
        if len(self.lesions):
            content["lesions_by_size"] = self.lesions_by_size.to_dict("records")
        if self.quantity is not None:
            content["quantity"] = asdict(self.quantity)
            if self.quantity.threshold is not None:
                content["crossings"] = crossings(self.table, self.quantity.threshold)
        definitions = {name: f"{METRICS[name].title}: {METRICS[name].definition}" for name in self.metrics}
        if len(self.reliability):
            content["calibration"] = {
                target: {"expected_calibration_error": r.expected_error, "mean_absolute_error": r.mean_absolute_error}
                for target, r in self.reliabilities().items()
            }
        return content | {"definitions": definitions, "unpaired": dict(self.unpaired)}

    def described_summary(self) -> list[dict[str, str]]:
        """:meth:`summary` as a reader sees it, a row for each target and metric."""
        return [
            {
                "target": target,
                "metric": METRICS[metric].title,
                "mean ± SD": averaged(metric, estimate),
                # One patient has no interval.
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
    def lesions_by_size(self) -> pd.DataFrame:
        """How many lesions there are of a volume from ``from_ml`` up to below ``to_ml``, by target.

        Columns beside these: ``reference`` and how many of those were ``found``, ``predicted`` and how
        many of those are ``real``.
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
        """:meth:`lesions_by_size` as a reader sees it."""
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
        """Volumes and quantities beside the references', of each target."""
        return tuple(agreements(self.table, self.quantity))

    def crossings(self) -> list[str]:
        """Who lies on which side of the quantity's threshold, in words; nothing where there is none."""
        threshold = None if self.quantity is None else self.quantity.threshold
        return [] if threshold is None else crossing_sentences(self.table, threshold)

    def reliabilities(self) -> dict[str, Reliability]:
        """By target, all subjects' voxels together."""
        return {
            str(target): Reliability.of_columns({name: rows[name].to_numpy() for name in rows})
            for target, rows in self.reliability.groupby("target", sort=False)
        }


def reliability_table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """Rows of subjects' bins, added up by target and bin."""
    columns = ["target", "bin", "voxels", "sum_predicted", "sum_true", "sum_error"]
    table = pd.DataFrame(list(rows), columns=columns)
    return table.groupby(["target", "bin"], sort=False, as_index=False).sum() if len(table) else table


def averaged(metric: str, estimate: Estimate) -> str:
    """A mean as a table shows it: with the deviation of patients, and of which scans it is where some failed."""
    mean, sd = formatted(metric, estimate.mean), formatted(metric, estimate.sd)
    spread = f"{mean} ± {sd}" if estimate.patients > 1 else mean
    return f"{spread} of the {estimate.n} that did not fail" if estimate.failed and estimate.n else spread


def _between(low: float, high: float) -> str:
    return f"below {high:g}" if low == 0 else f"{low:g} or more" if high == inf else f"{low:g} to {high:g}"


def _share(part: int, whole: int) -> str:
    return f"{part} of {whole} ({100 * part / whole:.0f} %)" if whole else "–"


def _read(path: Path, columns: Collection[str]) -> pd.DataFrame | None:
    """A table with at least these columns; None where there is no file. Raises :class:`BadFormat`."""
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
    """A value as JSON has it, which knows no NaN and no infinity: undefined is None, infinite ``"inf"``."""
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
