"""Self-contained pages: no file, script or font is loaded from elsewhere, so they open anywhere, offline."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, PackageLoader, StrictUndefined

from delineate.calibration import Intervals
from delineate.compute import Choice
from delineate.core.text import printable_lines
from delineate.datasets.inspection import SubjectRow
from delineate.evaluation.agreement import LEAST_PATIENTS, Agreeing, crossings, signed
from delineate.evaluation.change import JUDGED_BY, Change
from delineate.evaluation.forgetting import AFTER, BEFORE
from delineate.evaluation.methods import MethodDifference
from delineate.evaluation.table import MEAN_OF_TARGETS, Evaluation, Summary, averaged
from delineate.io.files import writing_beside
from delineate.metrics.catalogue import METRICS, Metric, formatted
from delineate.metrics.statistics import Estimate
from delineate.reporting.cautions import cautions, cautions_of_groups
from delineate.reporting.classes import ClassRow
from delineate.reporting.figures import (
    Chart,
    agreement_chart,
    class_chart,
    confusion_chart,
    curve_chart,
    density_chart,
    identity_chart,
    lesion_chart,
    loss_chart,
    methods_chart,
    metric_chart,
    reliability_chart,
    steps_chart,
    validation_chart,
)
from delineate.reporting.overlays import COLOURS, MARKS, Overlay, Palette, View, picture, slice_pictures


@dataclass(frozen=True, eq=False)
class RunReport:
    """Content of a run's page.

    ``learning`` has the columns step, loss; ``validation_loss`` step, validation_loss; ``validation`` step, dice,
    dice_<target>. ``validated`` says which subjects validation uses. ``notes``: what a reader should know before the
    numbers. ``crop``: a WebP of what a crop fitted to the composite image keeps. ``seams``: each target's median seam
    score, and the number of subjects behind it. ``classes``: voxels of each class for training and for test. ``card``:
    the page of the bundle's model card, beside this one.
    """

    title: str
    description: str
    simulated: bool
    data_rows: Sequence[SubjectRow]
    learning: pd.DataFrame | None
    validation: pd.DataFrame | None
    evaluation: Evaluation | None
    overlays: Sequence[Overlay]
    recipe_yaml: str
    plan: Sequence[Choice]
    provenance: Mapping[str, str]
    notes: Sequence[str] = field(default=())
    crop: bytes | None = None
    intervals: Intervals | None = None
    validation_loss: pd.DataFrame | None = None
    seams: Mapping[str, tuple[float, int]] = field(default_factory=dict)
    classes: Sequence[ClassRow] = ()
    validated: str = ""
    card: str = ""


@dataclass(frozen=True, eq=False)
class EvaluationReport:
    """Content of an evaluation's page. ``notes``: what a reader should know before the numbers."""

    title: str
    description: str
    evaluation: Evaluation
    overlays: Sequence[Overlay] = ()
    band_percent: float | None = None
    palette: Palette = "distinct"
    notes: Sequence[str] = ()

    @property
    def simulated(self) -> bool:
        """Whether the scans are simulated."""
        return self.evaluation.simulated


@dataclass(frozen=True, eq=False)
class MethodsReport:
    """Content of a comparison's page: methods measured on the same subjects, and how they differ."""

    title: str
    description: str
    evaluations: Mapping[str, Evaluation]
    differences: Sequence[MethodDifference]

    @property
    def simulated(self) -> bool:
        """Whether the scans of any method are simulated."""
        return any(evaluation.simulated for evaluation in self.evaluations.values())


@dataclass(frozen=True, eq=False)
class StudySection:
    """What the page of a study tells of one stage and data set.

    ``evaluations`` are the pooled held-out subjects of each group of runs, ``curves`` means of the study's metric over
    what ``axis`` counts. ``findings`` are sentences. ``learning`` has figures by what they are, arm and step;
    ``measures`` is a table of runs' measures by arm, ``picture`` a WebP of one ``pictured`` subject under every arm.
    """

    title: str
    evaluations: Mapping[str, Evaluation]
    findings: Sequence[str] = ()
    curves: Mapping[str, Sequence[tuple[float, Estimate]]] = field(default_factory=dict)
    axis: str = ""
    learning: Mapping[str, Mapping[str, pd.Series]] = field(default_factory=dict)
    measures: tuple[Sequence[str], Sequence[Sequence[str]]] = ((), ())
    picture: bytes | None = None
    pictured: str = ""


@dataclass(frozen=True, eq=False)
class StudyReport:
    """What the page of a study tells.

    ``deviations``: where it departs from the report that it is named after. ``claims`` are sentences with what our
    figures say of them; ``published`` tables are others' figures with ours beside them: source, columns, rows. ``runs``
    have a name, a page if there is one, a state, minutes, and why they failed.
    """

    title: str
    description: str
    simulated: bool
    notes: Sequence[str]
    metric: str
    sections: Sequence[StudySection]
    deviations: Sequence[str] = ()
    claims: Sequence[tuple[str, str, str]] = ()
    published: Sequence[tuple[str, Sequence[str], Sequence[Sequence[str]]]] = ()
    runs: Sequence[tuple[str, str, str, str, str]] = ()


@dataclass(frozen=True, eq=False)
class AdaptationReport:
    """Content of an adaptation's page: what changed on each group of subjects, by the group's name.

    ``card``: the page of the bundle's model card, beside this one.
    """

    title: str
    description: str
    simulated: bool
    notes: Sequence[str]
    changes: Mapping[str, Change]
    card: str = ""


@dataclass(frozen=True, eq=False)
class CardReport:
    """Content of a model card's page: headings, paragraphs, lists and tables, as ``(kind, content)``."""

    title: str
    description: str
    simulated: bool
    blocks: Sequence[tuple[str, Any]]


Report = RunReport | EvaluationReport | MethodsReport | StudyReport | AdaptationReport | CardReport


def write_report(path: Path, report: Report) -> None:
    """Write the page of a run, an evaluation or whatever else, whole or not at all. Raises :class:`OutputError`."""
    name = "evaluation.html.j2"
    if isinstance(report, EvaluationReport):
        content = _measured(report.evaluation, report.overlays, report.band_percent, report.palette)
    elif isinstance(report, MethodsReport):
        name, content = "methods.html.j2", _measured(None, []) | {"methods": _methods(report)}
    elif isinstance(report, StudyReport):
        name, content = "study.html.j2", _measured(None, []) | {"stages": _study(report)}
    elif isinstance(report, AdaptationReport):
        name, content = "adaptation.html.j2", _measured(None, []) | {"groups": _changed(report)}
    elif isinstance(report, CardReport):
        name, content = "card.html.j2", _measured(None, [])
    else:
        content = _measured(report.evaluation, report.overlays)
        name = "run.html.j2"
        content |= {
            "training": _training_charts(report),
            "data": _data_summary(report.data_rows),
            "crop": None if report.crop is None else _embedded(report.crop),
        }
    content["notes"] = [*getattr(report, "notes", ()), *_cautions(report)]
    page = _environment().get_template(name).render(report=report, **content, **_scripts())
    with writing_beside(path) as beside:
        beside.write_bytes(page.encode("utf-8", "backslashreplace"))


def _cautions(report: Report) -> list[str]:
    """What follows from the evaluations of a report; a run's notes hold it already, beside what its training says."""
    match report:
        case EvaluationReport():
            return cautions(None, report.evaluation)
        case MethodsReport():
            return cautions_of_groups(report.evaluations)
        case StudyReport():
            whole = [(section.title, section.evaluations) for section in report.sections if section.evaluations]
            return [
                f"{title}: {sentence}" if title and len(whole) > 1 else sentence
                for title, evaluations in whole
                for sentence in cautions_of_groups(evaluations)
            ]
        case AdaptationReport():
            return [
                f"{name[:1].upper()}{name[1:]}, after the adaptation: {sentence}"
                for name, change in report.changes.items()
                for sentence in cautions(None, change.after)
            ]
        case _:
            return []


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("delineate.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        # Names may hold what no page can: control characters and lone surrogates.
        finalize=lambda value: printable_lines(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = zip
    environment.filters["measured"] = formatted
    environment.filters["by"] = lambda values: " × ".join(f"{v:.4g}" for v in values)
    return environment


def _scripts() -> dict[str, str]:
    """The page's only script and its digest: the page's policy lets nothing else run, whatever a name contains."""
    script = (Path(__file__).parent / "templates" / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": script, "script_digest": digest}


def _measured(
    evaluation: Evaluation | None,
    overlays: Sequence[Overlay],
    band_percent: float | None = None,
    palette: Palette = "distinct",
) -> dict[str, Any]:
    """What the templates show of an evaluation, if there is one."""
    if evaluation is None:
        return {"measured": None}
    summary = evaluation.summary()
    dice = summary.get(evaluation.overall_name, {}).get("dice")
    shown = [
        (overlay, [_picture(overlay, view, palette) for view in overlay.views], _slices(overlay, palette))
        for overlay in overlays
    ]
    # An element's id must not contain spaces, but a subject's name may.
    anchors = {overlay.subject: f"subject-{i}" for i, overlay in enumerate(overlays)}
    return {
        "measured": {
            "headline": None if dice is None else _estimate(METRICS["dice"], dice),
            "charts": _charts(evaluation, band_percent),
            "absent": _absent(evaluation),
            "summary": _summary_rows(evaluation, summary),
            "sites": _site_rows(evaluation) if len(evaluation.sites) > 1 else [],
            "agreement": [row for agreeing in evaluation.agreements for row in agreeing.described()],
            "errors": [agreeing.error_sizes() for agreeing in evaluation.agreements],
            "pooled": evaluation.described_pooled(),
            "lesions": evaluation.described_lesions(),
            "quantity": _quantity_headline(evaluation),
            "quantities": _quantities(evaluation),
            "rows": evaluation.table.to_dict("records"),
            "unpaired": evaluation.unpaired,
            "columns": [evaluation.described_metric(name) for name in evaluation.metrics],
            "legend": _legend(overlays, palette),
            "pictures": [one for one in shown if one[0].rank],
            "others": [one for one in shown if not one[0].rank],
            "anchors": anchors,
        }
    }


def _quantity_headline(evaluation: Evaluation) -> list[tuple[str, str]]:
    """What a reader of a quantity wants to know first, for one target: how far off it is, and who changes sides."""
    quantity = evaluation.quantity
    if quantity is None or len(evaluation.targets) > 1:
        return []
    shown = [
        (", ".join(filter(None, [f"Bias of {compared.name}", compared.difference_unit])), signed(agreeing.shown.bias))
        for agreeing in evaluation.agreements
        if (compared := agreeing.compared).predicted == "quantity_mean"
    ]
    if quantity.threshold is not None:
        for found in crossings(evaluation.table, quantity.threshold).values():
            limit = quantity.with_unit(quantity.threshold)
            shown.append((f"On the right side of {limit}", f"{found['right']} of {found['n']}"))
    return shown


def _quantities(evaluation: Evaluation, *, drawn: bool = True) -> list[dict[str, Any]]:
    """What a radiologist asks about a quantity, for each target: who is on which side, and how well they agree."""
    quantity = evaluation.quantity
    if quantity is None or not {"quantity_mean", "reference_quantity_mean"} <= set(evaluation.table.columns):
        return []
    agreeing = {found.target: found for found in evaluation.agreements if found.compared.predicted == "quantity_mean"}
    sides = {} if quantity.threshold is None else crossings(evaluation.table, quantity.threshold)
    return [
        {
            "target": target,
            "sides": sides.get(target),
            "limit": None if quantity.threshold is None else quantity.with_unit(quantity.threshold),
            "agreement": _agreement_in_words(found) if (found := agreeing.get(target)) else "",
            "charts": [identity_chart(found), agreement_chart(found)] if found and drawn else [],
            "absent": "" if found else _too_few(target, f"mean {quantity.title}"),
        }
        for target in evaluation.targets
    ]


def _agreement_in_words(agreeing: Agreeing) -> str:
    """Bias and limits of a quantity as sentences."""
    found, unit = agreeing.absolute, agreeing.compared.difference_unit
    unit = f" {unit}" if unit else ""
    low, high = found.bias_ci95
    interval = f"95 % interval {signed(low)} to {signed(high)}, n = {found.count}"
    if low > 0 or high < 0:
        side = f"{abs(found.bias):.2f}{unit} too {'high' if low > 0 else 'low'} ("
    else:
        side = f"neither too high nor too low beyond chance ({signed(found.bias)}{unit}; "
    ends = f"{signed(found.limits[0])} and {signed(found.limits[1])}{unit}"
    return (
        f"On average, predictions read {side}{interval}). For a new patient, expect a reading between {ends} from the "
        "reference's (95 % limits of agreement)."
    )


def _too_few(target: str, what: str) -> str:
    return (
        f"Agreement of the {what} of {target} is not shown: fewer than {LEAST_PATIENTS} patients have it, and limits "
        "of agreement from fewer mean nothing."
    )


def _absent(evaluation: Evaluation) -> list[str]:
    """What a reader may look for in vain, and why it is missing."""
    found = [
        _too_few(target, "volume")
        for target in evaluation.targets
        if {"volume_ml", "reference_volume_ml"} <= set(evaluation.table.columns)
        and not any(a.target == target and a.compared.predicted == "volume_ml" for a in evaluation.agreements)
    ]
    if len(evaluation.sites) < 2:
        found.append("Nothing is shown by site: all subjects are from one site, or their sites are not known.")
    if not len(evaluation.reliability):
        found.append("The reliability of probabilities is not shown: no probabilities were measured.")
    return found


_LEAST_FOR_BINS = 6
_MOST_READ = 6
"""Groups of runs whose quantities are drawn and put into words; of more, tables hold them."""
_MOST_ROWS = 16
"""Of a chart that has a row for each group."""


def _charts(evaluation: Evaluation, band_percent: float | None) -> list[list[Chart]]:
    """Groups of charts: distributions of at most four averaged metrics; agreement; these over density; the rest."""
    averaged = [name for name in evaluation.metrics if METRICS[name].better]
    chosen = [name for name in ("dice", "hd95_mm") if name in averaged] or averaged[:2]
    chosen += [name for name in averaged if name not in chosen and name not in ("precision", "recall")][
        : 4 - len(chosen)
    ]
    distributions = [metric_chart(evaluation, name, METRICS[name].title) for name in chosen]
    pairs = [
        [identity_chart(agreeing), agreement_chart(agreeing, band_percent=band_percent)]
        for agreeing in evaluation.agreements
        if agreeing.compared.predicted != "quantity_mean"  # has a section of its own
    ]
    charts = [lesion_chart(evaluation, target) for target in evaluation.lesions["target"].unique()]
    if len(evaluation.confusion):
        charts += [confusion_chart(evaluation), class_chart(evaluation)]
    if len(evaluation.reliability):
        charts.append(reliability_chart(evaluation))
    return [group for group in (distributions, *pairs, _over_density(evaluation, chosen), charts) if group]


def _over_density(evaluation: Evaluation, metrics: Sequence[str], of: str = "") -> list[Chart]:
    """Charts of metrics over the density of targets, where it was measured and enough subjects have them."""
    if "density_percent" not in evaluation.metrics:
        return []
    rows = {target: evaluation.table[evaluation.table["target"] == target] for target in evaluation.targets}
    return [
        density_chart(evaluation, target, name, f"{of}{METRICS[name].title}")
        for target in evaluation.targets
        for name in metrics
        if name in evaluation.metrics and np.isfinite(rows[target][name].astype(float)).sum() >= _LEAST_FOR_BINS
    ]


def _methods(report: MethodsReport) -> dict[str, Any]:
    metrics = list(dict.fromkeys(difference.metric for difference in report.differences))
    rows = []
    for name, evaluation in report.evaluations.items():
        whole = evaluation.overall()
        rows += [{"method": name, **_estimate(METRICS[metric], whole[metric])} for metric in metrics]
    return {
        "charts": [methods_chart(report.evaluations, metric, METRICS[metric].title) for metric in metrics],
        "differences": [str(difference) for difference in report.differences],
        "rows": rows,
    }


def _study(report: StudyReport) -> list[dict[str, Any]]:
    return [_section(section, report.metric) for section in report.sections]


def _section(section: StudySection, metric: str) -> dict[str, Any]:
    rows, pooled, agreement, errors, sides, over_density = [], [], [], [], [], []
    few = len(section.evaluations) <= _MOST_READ
    for name, evaluation in section.evaluations.items():
        estimates = evaluation.overall()
        shown = dict.fromkeys((metric, "dice", "hd95_mm", "assd_mm"))
        rows += [{"group": name, **_estimate(METRICS[m], estimates[m])} for m in shown if m in estimates]
        pooled += [{"runs": name, **row} for row in evaluation.described_pooled()]
        agreement += [{"runs": name, **row} for agreeing in evaluation.agreements for row in agreeing.described()]
        errors += [{"runs": name, **agreeing.error_sizes()} for agreeing in evaluation.agreements]
        sides += [{"runs": name, **found} for found in _quantities(evaluation, drawn=few) if found["sides"]]
        over_density += _over_density(evaluation, ["avd_percent"], of=f"{name}: ")
    label = METRICS[metric].title
    charts = []
    if section.curves:
        charts.append(curve_chart(section.curves, section.axis, metric))
    elif section.evaluations and len(section.evaluations) <= _MOST_ROWS:
        charts.append(methods_chart(section.evaluations, metric, label))
    return {
        "section": section,
        "rows": rows,
        "charts": charts,
        "over_density": over_density,
        "learning": [steps_chart(values, what) for what, values in section.learning.items()],
        "pooled": pooled,
        "agreement": agreement,
        "errors": errors,
        "sides": sides,
        "read": sides if few else [],
        "picture": None if section.picture is None else _embedded(section.picture),
    }


def _changed(report: AdaptationReport) -> list[dict[str, Any]]:
    groups = []
    for name, change in report.changes.items():
        both = {BEFORE: change.before, AFTER: change.after}
        rows = [
            {"when": when, **_estimate(METRICS[metric], estimate)}
            for when, evaluation in both.items()
            for metric, estimate in evaluation.overall().items()
            if METRICS[metric].better
        ]
        groups.append(
            {
                "name": name,
                "verdict": change.verdict,
                "differences": [str(difference) for difference in change.differences],
                "chart": methods_chart(both, JUDGED_BY, METRICS[JUDGED_BY].title),
                "rows": rows,
                "subjects": change.rows,
            }
        )
    return groups


def _training_charts(report: RunReport) -> list[Chart]:
    charts = []
    if report.learning is not None and len(report.learning):
        charts.append(loss_chart(report.learning, report.validation_loss))
    if report.validation is not None and len(report.validation):
        charts.append(validation_chart(report.validation))
    return charts


def _summary_rows(evaluation: Evaluation, summary: Summary) -> list[dict[str, Any]]:
    return [
        {"target": target, **_estimate(evaluation.described_metric(name), estimate)}
        for target, estimates in summary.items()
        if target != MEAN_OF_TARGETS or len(evaluation.targets) > 1
        for name, estimate in estimates.items()
    ]


def _site_rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    return [
        {"site": site or "no site", **_estimate(METRICS[name], estimate)}
        for site in evaluation.sites
        for name, estimate in evaluation.overall(site).items()
        if METRICS[name].better
    ]


def _estimate(metric: Metric, estimate: Estimate) -> dict[str, Any]:
    low, high = estimate.ci95
    return {
        "metric": metric.title,
        "mean": formatted(metric.name, estimate.mean),
        "spread": averaged(metric.name, estimate),
        "ci": f"{formatted(metric.name, low)} to {formatted(metric.name, high)}" if isfinite(low) else "–",
        "count": estimate.count,
        "failures": estimate.failures,
        "undefined": estimate.undefined,
    }


def _legend(overlays: Sequence[Overlay], palette: Palette) -> list[tuple[str, str]]:
    """Names and colours of the marks that appear in any picture."""
    shown = {int(mark) for overlay in overlays for view in overlay.views for mark in np.unique(view.agreement)}
    return [(name, COLOURS[palette][mark]) for mark, name in MARKS.items() if mark in shown]


def _embedded(webp: bytes) -> str:
    return f"data:image/webp;base64,{base64.b64encode(webp).decode('ascii')}"


def _picture(overlay: Overlay, view: View, palette: Palette) -> dict[str, str]:
    return {
        "source": _embedded(picture(view, palette)),
        "plane": view.plane,
        "text": f"{view.plane} slice of {overlay.subject}, prediction compared with reference",
    }


def _slices(overlay: Overlay, palette: Palette) -> dict[str, Any] | None:
    """Pictures of one subject to scroll through; None for a single one."""
    if len(overlay.slices) < 2:
        return None
    drawn = slice_pictures(overlay.slices, palette)
    first, n = overlay.slices[0], len(drawn)
    said = [f"{i} of {n}, {view.depth_mm - first.depth_mm:.0f} mm" for i, (view, _) in enumerate(drawn, start=1)]
    return {
        "plane": first.plane,
        "way": _WAYS[first.plane],
        "edges": first.edges,
        "middle": n // 2,
        "pictures": [
            {"source": _embedded(webp), "said": words, "text": f"{first.plane} slice {words}, of {overlay.subject}"}
            for words, (_, webp) in zip(said, drawn, strict=True)
        ],
    }


_WAYS = {"axial": "from head to feet", "coronal": "from front to back", "sagittal": "from right to left"}


def _data_summary(rows: Sequence[SubjectRow]) -> dict[str, str]:
    """The data set, one line each: sites, shapes, spacings, orientations, volumes."""
    if not rows:
        return {}
    sites = pd.Series([row.site or "no site" for row in rows]).value_counts(sort=False)
    volumes = pd.DataFrame([row.volume_ml for row in rows])
    summary = {
        "Subjects": str(len(rows)),
        "Sites": ", ".join(f"{site} ({n})" for site, n in sites.items()),
        "Voxels": _range([row.shape for row in rows]),
        "Spacing, mm": _range([row.spacing_mm for row in rows]),
        "Orientation": ", ".join(sorted({row.orientation for row in rows})),
    }
    for target in volumes.columns:
        column = volumes[target].dropna()
        summary[f"{target}, ml"] = f"{column.median():.3g} (median; {column.min():.3g} to {column.max():.3g})"
    return summary


def _range(triples: Sequence[Sequence[float]]) -> str:
    """Each axis' range, as 31–43 × 40–59 × 24–47."""
    axes = [(min(axis), max(axis)) for axis in zip(*triples, strict=True)]
    return " × ".join(f"{low:.4g}" if f"{low:.4g}" == f"{high:.4g}" else f"{low:.4g}–{high:.4g}" for low, high in axes)
