"""Charts as inline SVG; they use the page's colours, so they follow its light or dark mode."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from io import StringIO
from itertools import cycle
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from delineate.core.warning_filters import filtered_warnings
from delineate.evaluation.agreement import Agreeing, Compared
from delineate.evaluation.table import LESION_SIZES_ML, Evaluation
from delineate.metrics.catalogue import METRICS
from delineate.metrics.statistics import Estimate
from delineate.reporting.overlays import UNFITTING

# Drawn in these colours, written as CSS variables that fall back on them outside the page.
INK, MUTED, LINE = "#1b2024", "#5a656e", "#d9dee2"
SERIES = ("#0b6aa5", "#c4540a", "#00805d", "#94457a", "#7a6300", "#56606a")
_VARIABLES = {INK: "ink", MUTED: "muted", LINE: "line"} | {c: f"series-{i}" for i, c in enumerate(SERIES, start=1)}

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a name may hold dollar signs
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "legend.frameon": False,
    "legend.labelcolor": MUTED,
    "lines.linewidth": 1.6,
}
_NAME_HEIGHT = 0.065
"""Of a small letter with some space, as a share of the axes' height."""
_WIDTH = 4.8  # inches: at half the page's width, the text is as large as the page's
_MOST_POINTS = 400
NO_UNIT, COUNT, UNKNOWN = " (no unit)", " (count)", " (unit not known)"
"""What stands behind the name of an axis without a unit."""


@dataclass(frozen=True)
class Chart:
    """A figure of a page: its title, one sentence on how to read it, and the drawing as inline SVG."""

    title: str
    reading: str
    svg: str


_BOXES = (
    "Points are subjects, the box is their middle half, the thick line the median; whiskers reach the furthest value "
    "within 1.5 box lengths."
)


def loss_chart(learning: pd.DataFrame, validation_loss: pd.DataFrame | None = None) -> Chart:
    """The loss over steps: its mean, and the band that contains 80 % of steps around it.

    ``learning`` has a row for each logged step, columns ``step`` and ``loss``; ``validation_loss`` the
    columns ``step`` and ``validation_loss``.
    """
    last = int(learning["step"].max())

    def draw(axes: Axes) -> None:
        _smoothed(axes, learning["step"], learning["loss"], SERIES[0], "training, augmented")
        axes.set(xlabel=_STEP, ylabel=f"loss{NO_UNIT}")
        if validation_loss is not None:
            values = validation_loss["validation_loss"]
            _smoothed(axes, validation_loss["step"], values, SERIES[1], "validation subjects")
            axes.legend(loc="upper right", fontsize=9)
        _log_if_wide(axes)

    beside = " and validation" if validation_loss is not None else ""
    reading = "Falling is learning; the line is the mean and its band holds 80 % of the steps around it."
    if validation_loss is not None:
        reading += " If validation rises while training falls, the network memorises."
    return _chart(draw, f"Training{beside} loss", reading, f"Training{beside} loss over {last} steps", height=2.7)


_STEP = f"training step{COUNT}"


def steps_chart(values: Mapping[str, pd.Series], what: str) -> Chart:
    """Figures by training step, a line for each method, on a logarithmic scale beyond a factor of five.

    ``what`` ends with its unit behind a comma, if it has one.
    """

    def draw(axes: Axes) -> None:
        for k, (name, series) in enumerate(values.items()):
            style = ("-", "--", ":", "-.")[k // len(SERIES) % 4]
            few = series.iloc[:: max(1, len(series) // _MOST_POINTS)]
            axes.plot(few.index, few.to_numpy(), style, color=SERIES[k % len(SERIES)], linewidth=1.3, label=name)
        axes.set(xlabel=_STEP, ylabel=what if ", " in what else f"{what}{NO_UNIT}")
        _log_if_wide(axes)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=8, ncols=3)

    better = "higher" if what.startswith("Dice") else "lower"
    reading = (
        f"Each line is the mean of an arm's runs; {better} is better, and a line still moving is not done learning."
    )
    title = f"{what[:1].upper()}{what[1:].partition(', ')[0]} over training steps"
    return _chart(
        draw,
        title,
        reading,
        f"{what} over training steps: {', '.join(values)}",
        height=2.7 + 0.16 * -(-len(values) // 3),
    )


def _log_if_wide(axes: Axes) -> None:
    """A logarithmic axis where the first steps would flatten all others onto it."""
    low, high = axes.dataLim.intervaly
    if low > 0 and high > 5 * low:
        axes.set(yscale="log", ylabel=f"{axes.get_ylabel()} (log scale)")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter("{x:g}")


def _smoothed(axes: Axes, steps: pd.Series, values: pd.Series, colour: str, label: str) -> None:
    """Means of 30 to 120 stretches of steps (fewer if there are fewer steps), and the band with 80 % of each."""
    table = np.column_stack([steps, values])
    parts = np.array_split(table, min(120, max(len(table) // 4, min(len(table), 30))))
    middle = [part[:, 0].mean() for part in parts]
    low, high = np.array([np.percentile(part[:, 1], [10, 90]) for part in parts]).T
    axes.fill_between(middle, low, high, color=colour, alpha=0.18, linewidth=0)
    axes.plot(middle, [part[:, 1].mean() for part in parts], color=colour, label=label)


def validation_chart(validation: pd.DataFrame) -> Chart:
    """Dice on the validation subjects over steps, for each target and their mean, with the best marked.

    Columns ``step``, ``dice``, and ``dice_<target>`` for each target; others are not drawn.
    """
    targets = [str(c) for c in validation.columns if str(c).startswith("dice_")]
    best = validation.loc[validation["dice"].idxmax()]

    def draw(axes: Axes) -> None:
        if len(targets) > 1:
            for i, column in enumerate(targets):
                colour = SERIES[1 + i % (len(SERIES) - 1)]
                axes.plot(validation["step"], validation[column], color=colour, linewidth=1, label=column[5:])
        axes.plot(validation["step"], validation["dice"], color=SERIES[0], linewidth=2, label="mean")
        axes.plot(best["step"], best["dice"], "o", color=SERIES[0], markersize=6)
        axes.annotate(
            f"best {best['dice']:.3f}", (best["step"], best["dice"]), (0, 7), textcoords="offset points", ha="center"
        )
        axes.margins(x=0.06, y=0.14)
        axes.set(xlabel=_STEP, ylabel=f"validation Dice{NO_UNIT}")
        if len(targets) > 1:
            axes.legend(loc="lower right", fontsize=9)

    reading = "A curve that is level at its right end has learned what it can; one that still rises was stopped early."
    said = f"Validation Dice; best {best['dice']:.3f} at step {int(best['step'])}"
    return _chart(draw, "Dice of the validation subjects during training", reading, said, height=2.7)


def metric_chart(evaluation: Evaluation, metric: str, label: str) -> Chart:
    """Every subject's value of a metric, a row for each target, with median, quartiles and whiskers.

    Whiskers end at the furthest value within 1.5 interquartile ranges of the box (Tukey 1977). Failed and
    undefined values are counted beside their row. Colours show sites, if there are two to six of them.
    """
    table, targets = evaluation.outcomes, evaluation.targets
    colours = _site_colours(evaluation.sites)

    def draw(axes: Axes) -> None:
        for row, target in enumerate(targets):
            of_target = table[table["target"] == target]
            values = of_target[metric].to_numpy(float)
            defined = np.isfinite(values)
            shades = [colours.get(site, SERIES[0]) for site in of_target["site"]]
            _row(axes, row, values[defined], [s for s, use in zip(shades, defined, strict=True) if use])
            _count_others(axes, row, values)
        _name_rows(axes, targets)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(_measured(metric, label))
        if colours:
            _site_legend(axes, colours, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(colours))

    height = 0.75 + 0.5 * len(targets) + (0.25 if colours else 0)
    said = f"{label} by target, {len(evaluation.subjects)} subjects"
    return _chart(draw, f"{METRICS[metric].label} of every subject", _reading(metric), said, height)


def _measured(metric: str, label: str) -> str:
    return label if METRICS[metric].unit else f"{label}{NO_UNIT}"


def _reading(metric: str) -> str:
    better = {"higher": " Further right is better.", "lower": " Further left is better."}
    return _BOXES + better.get(METRICS[metric].better or "", "")


def methods_chart(evaluations: Mapping[str, Evaluation], metric: str, label: str) -> Chart:
    """Every subject's mean over targets of a metric, a row for each method; drawn like :func:`metric_chart`.

    Failed and undefined values are counted in the same way. If there are two to six sites, each method has a
    row for each site, with the methods grouped by site.
    """
    sites = sorted({site for evaluation in evaluations.values() for site in evaluation.sites})
    shown: list[str | None] = [*sites] if 1 < len(sites) <= len(SERIES) else [None]
    rows: list[tuple[str, NDArray[np.float64], str]] = []
    for site in shown:
        for (name, evaluation), colour in zip(evaluations.items(), cycle(SERIES), strict=False):
            means = evaluation.mean_of_targets(metric)
            if site is not None:
                table = evaluation.table
                means = means[means.index.isin(table.loc[table["site"] == site, "subject"])]
            values = means.to_numpy(float)
            called = name if site is None else f"{site or 'no site'}: {name}"
            rows.append((called, values, colour))

    def draw(axes: Axes) -> None:
        for row, (_, values, colour) in enumerate(rows):
            defined = values[np.isfinite(values)]
            _row(axes, row, defined, [colour] * len(defined))
            _count_others(axes, row, values)
        _name_rows(axes, [name for name, _, _ in rows])
        for end in range(len(evaluations), len(rows), len(evaluations)):
            axes.axhline(end - 0.5, color=LINE, linewidth=0.8)
        axes.spines["left"].set_visible(False)
        axes.set_xlabel(_measured(metric, label))

    by = "by site and method" if len(shown) > 1 else "by method"
    title, said = f"{METRICS[metric].label} of every subject, {by}", f"{label} of every subject, {by}"
    return _chart(draw, title, _reading(metric), said, height=0.75 + 0.5 * len(rows))


def curve_chart(curves: Mapping[str, Sequence[tuple[float, Estimate]]], axis: str, metric: str) -> Chart:
    """Means and their 95 % intervals over what is counted along ``axis``, a line for each of ``curves``."""

    label = METRICS[metric].title
    rows = 1 if sum(len(name) + 4 for name in curves) < _WIDTH * 9 else len(curves)

    def draw(axes: Axes) -> None:
        for (name, points), colour in zip(curves.items(), cycle(SERIES), strict=False):
            x, means = [count for count, _ in points], [estimate.mean for _, estimate in points]
            ends = np.array([estimate.ci95 for _, estimate in points], float)
            axes.fill_between(x, ends[:, 0], ends[:, 1], color=colour, alpha=0.15, linewidth=0)
            axes.plot(x, means, "o-", color=colour, markersize=4, label=name)
        axes.set(xlabel=f"{axis}{COUNT}", ylabel=_measured(metric, label))
        axes.set_xticks(sorted({count for points in curves.values() for count, _ in points}))
        if len(curves) > 1:  # above the axes: inside, it would lie on one of the bands
            columns = len(curves) // rows
            axes.get_figure().legend(loc="outside upper right", ncols=columns, fontsize=9)  # type: ignore[union-attr]

    reading = (
        "Each point is the mean over held-out patients, its band the 95 % interval; overlapping bands settle nothing."
    )
    said = f"{label} over {axis}, with 95 % intervals"
    return _chart(draw, f"{METRICS[metric].label} over {axis}", reading, said, height=2.8 + 0.2 * rows)


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    """A name for each row, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.grid(visible=False, axis="y")


def _row(axes: Axes, row: int, values: NDArray[np.float64], colours: Sequence[str]) -> None:
    """Points, box and whiskers of one target."""
    if not values.size:
        return
    if values.size <= _MOST_POINTS:
        # Multiples of the golden ratio spread neighbours evenly without randomness.
        height = (np.arange(values.size) * 0.618) % 1 - 0.5
        axes.scatter(values, row + 0.4 * height, s=9, c=list(colours), alpha=0.55, linewidths=0)
    low, median, high = np.percentile(values, [25, 50, 75])
    within = values[(values >= low - 1.5 * (high - low)) & (values <= high + 1.5 * (high - low))]
    axes.barh(row, high - low, 0.5, low, facecolor="none", edgecolor=INK, linewidth=0.9)
    axes.hlines([row, row], [within.min(), high], [low, within.max()], color=INK, linewidth=0.9)
    axes.vlines(median, row - 0.25, row + 0.25, color=INK, linewidth=2.2)


def _count_others(axes: Axes, row: int, values: NDArray[np.float64]) -> None:
    """Write beside a row how many of its values cannot be drawn."""
    counts = ((int(np.isinf(values).sum()), "failed"), (int(np.isnan(values).sum()), "undefined"))
    if said := ", ".join(f"{n} {what}" for n, what in counts if n):
        axes.annotate(
            said, (1, row), (0, 14), ("axes fraction", "data"), "offset points", ha="right", va="center", fontsize=8,
            color=MUTED,
        )  # fmt: skip


def _name_points(axes: Axes, points: Sequence[tuple[str, float, float]]) -> None:
    """Write names beside points (name, x, y), inside the axes, and one above the other where points are neighbours."""
    middle, (bottom, top) = sum(axes.get_xlim()) / 2, axes.get_ylim()
    step = _NAME_HEIGHT * (top - bottom)
    for left in (True, False):
        at = -np.inf
        for name, x, y in sorted(points, key=lambda point: point[2]):
            if (x < middle) == left:
                at = max(y, at + step)
                axes.annotate(
                    name, (x, at), (5 if left else -5, 0), textcoords="offset points",
                    ha="left" if left else "right", va="center", fontsize=8, annotation_clip=False,
                )  # fmt: skip


def _site_colours(sites: Collection[str]) -> dict[str, str]:
    """A colour for each site, if there are two to six; else none."""
    return dict(zip(sorted(set(sites)), SERIES, strict=False)) if 1 < len(set(sites)) <= len(SERIES) else {}


def _site_legend(axes: Axes, colours: dict[str, str], **place: Any) -> None:
    for site, colour in colours.items():
        axes.scatter([], [], s=16, color=colour, linewidths=0, label=site or "no site")
    axes.legend(fontsize=9, handletextpad=0, **place)


def agreement_chart(agreeing: Agreeing, *, band_percent: float | None = None) -> Chart:
    """Bland–Altman plot: each subject's error against its reference, with bias and limits of agreement.

    Errors of volumes are in percent if enough references have a volume. The 95 % intervals (by patient) are
    shaded; subjects beyond the limits are named, those left out counted. If errors are in percent, a band of
    ±``band_percent`` around zero is shaded. Colours show sites, if there are two to six of them. A threshold of
    the reference is drawn.
    """
    compared, found, true = agreeing.compared, agreeing.shown, agreeing.reference
    difference = agreeing.predicted - true
    unit = compared.difference_unit
    if agreeing.in_percent:
        with np.errstate(divide="ignore", invalid="ignore"):  # a percentage of zero is not drawn
            difference, unit = 100 * difference / true, "%"
    drawn = np.isfinite(difference)
    low, high = found.limits
    colours, without = _site_colours(agreeing.sites), agreeing.without(found).removeprefix("; ")

    def draw(axes: Axes) -> None:
        if band_percent is not None and agreeing.in_percent:
            axes.axhspan(-band_percent, band_percent, color=SERIES[2], alpha=0.15, linewidth=0)
        for interval in (found.low_ci95, found.high_ci95, found.bias_ci95):
            axes.axhspan(*interval, color=SERIES[0], alpha=0.12, linewidth=0)
        lines, largest = [(found.bias, "bias"), (low, "−1.96 SD"), (high, "+1.96 SD")], np.abs(true[drawn]).max()
        if high - low <= 1e-9 * largest:  # one line, but for rounding, as of maps of whole percents
            lines = lines[:1]
            axes.set_ylim(found.bias - 0.1 * largest, found.bias + 0.1 * largest)
        if compared.threshold is not None:
            axes.axvline(compared.threshold, color=MUTED, linewidth=1, linestyle="--")
            axes.annotate(
                _limit(compared), (compared.threshold, 0), (3, 3), ("data", "axes fraction"), "offset points",
                fontsize=8, color=MUTED,
            )  # fmt: skip
        digits = 1 if unit == "%" else 2
        for value, name in lines:
            axes.axhline(value, color=SERIES[0], linewidth=1.6 if name == "bias" else 1, linestyle="-")
            text = f"{name}\n{value:+.{digits}f} {_SHORT.get(unit, unit)}".replace("-", "−").rstrip()
            axes.annotate(
                text, (1, value), (4, 0),
                ("axes fraction", "data"), "offset points", va="center", fontsize=8, color=MUTED, annotation_clip=False,
            )  # fmt: skip
        shades = [colours.get(site, INK) for site, use in zip(agreeing.sites, drawn, strict=True) if use]
        axes.scatter(true[drawn], difference[drawn], s=14, c=shades, alpha=0.7, linewidths=0)
        axes.margins(y=0.12)
        _name_points(axes, [(agreeing.subjects[i], true[i], difference[i]) for i in found.outliers[:6]])
        if without:
            axes.set_title(without, loc="left", fontsize=9, color=MUTED)
        axes.set(
            xlabel=_with_unit(f"{agreeing.target}, reference {compared.name}", compared.unit),
            ylabel=_with_unit("error", unit),
        )

    said = f" {unit} " if unit else " "
    text = (
        f"Bland-Altman plot of {agreeing.target}, {compared.name}, {found.n} subjects: bias {found.bias:.2f}{said}"
        f"limits {low:.2f} to {high:.2f}{said}{len(found.outliers)} beyond them{agreeing.without(found)}"
    )
    title = f"Error of the {compared.name} of {agreeing.target} (Bland–Altman)"
    reading = "Points above zero are predicted too large; 95 % of new subjects are expected between the outer lines."
    if band_percent is not None and agreeing.in_percent:
        reading += f" Green: within ±{band_percent:g} %."
    return _chart(draw, title, reading, text, height=2.9)


def _limit(compared: Compared) -> str:
    return f"threshold {compared.threshold:g} {compared.unit}".rstrip()


_SHORT = {"percentage points": "pp"}


def identity_chart(agreeing: Agreeing) -> Chart:
    """Predicted against reference value of each subject, the line of identity, and the concordance correlation.

    A threshold is drawn along both axes, and subjects that the prediction puts on its wrong side are named.
    """
    compared, found = agreeing.compared, agreeing.concordance
    said, true = agreeing.predicted, agreeing.reference
    colours = _site_colours(agreeing.sites)

    def draw(axes: Axes) -> None:
        limit = 0.0 if compared.threshold is None else compared.threshold
        least, most = min(0.0, limit, said.min(), true.min()), max(limit, said.max(), true.max())
        ends = [least, most + 0.05 * (most - least)]
        axes.plot(ends, ends, color=MUTED, linewidth=1)
        axes.scatter(true, said, s=14, c=[colours.get(s, SERIES[0]) for s in agreeing.sites], alpha=0.7, linewidths=0)
        if compared.threshold is not None:
            for line in (axes.axvline, axes.axhline):
                line(compared.threshold, color=MUTED, linewidth=1, linestyle="--")
            # The wrong side: at or above the threshold in only one of the two.
            below, above = compared.threshold - least, ends[1] - compared.threshold
            for corner, size in (
                ((least, compared.threshold), (below, above)), ((compared.threshold, least), (above, below)),
            ):  # fmt: skip
                axes.add_patch(Rectangle(corner, *size, color=SERIES[1], alpha=0.1, linewidth=0))
            axes.annotate(
                _limit(compared), (1, compared.threshold), (0, 3),
                ("axes fraction", "data"), "offset points", ha="right", fontsize=8, color=MUTED,
            )  # fmt: skip
            wrong = np.flatnonzero((said >= compared.threshold) != (true >= compared.threshold))[:6]
            for place, i in enumerate(wrong):  # one below the other, as such subjects are neighbours
                axes.annotate(
                    agreeing.subjects[i],
                    (true[i], said[i]),
                    (5, -13 - 9 * place),
                    textcoords="offset points",
                    fontsize=8,
                )
        if colours:
            _site_legend(axes, colours, loc="lower right" if compared.threshold is None else "center right")
        axes.set(
            xlabel=_with_unit(f"{agreeing.target}, reference {compared.name}", compared.unit),
            ylabel=_with_unit(f"predicted {compared.name}", compared.unit),
            xlim=ends,
            ylim=ends,
        )
        interval = f"concordance {found.value:.3f} ({found.ci95[0]:.3f} to {found.ci95[1]:.3f})"
        axes.set_title(interval.replace("-", "−"), loc="left", fontsize=9, color=MUTED)

    what = f"{agreeing.target}, {compared.name}"
    title = f"Predicted and reference {compared.name} of {agreeing.target}"
    reading = "Points on the line agree exactly; above it, the prediction is larger."
    if compared.threshold is not None:
        reading += " Subjects in a shaded corner are on the wrong side of the threshold."
    text = f"Predicted against reference, {what}, {found.n} subjects: concordance {found.value:.3f}"
    return _chart(draw, title, reading, text, 2.9)


def _with_unit(name: str, unit: str) -> str:
    return f"{name}, {unit}" if unit else f"{name}{UNKNOWN}"


def lesion_chart(evaluation: Evaluation, target: str) -> Chart:
    """Share of reference lesions that are detected, and of predicted lesions that are real, by volume."""
    sizes, ends = evaluation.lesions_by_size, LESION_SIZES_ML
    sizes = sizes[sizes["target"] == target]
    first, last = ends.index(sizes["from_ml"].min()), ends.index(sizes["to_ml"].max())
    # Size classes without lesions keep their place on the axis.
    counts = sizes.set_index("from_ml")[["reference", "found", "predicted", "real"]].reindex(ends[first:last]).fillna(0)
    places = np.arange(len(counts))

    def draw(axes: Axes) -> None:
        series = (("found", "reference", "reference, detected"), ("real", "predicted", "predicted, real"))
        for colour, (part, whole, label), shift in zip(SERIES, series, (-0.2, 0.2), strict=False):
            n = counts[whole].to_numpy(float)
            share = counts[part].to_numpy(float) / np.maximum(n, 1)
            axes.bar(places + shift, share, 0.36, color=colour, alpha=0.75, label=label)
            for place, value, many in zip(places + shift, share, n, strict=True):
                axes.annotate(
                    f"{many:.0f}", (place, value), (0, 3), textcoords="offset points", ha="center", fontsize=8,
                    color=MUTED,
                )  # fmt: skip
        bounds = ["∞" if end == np.inf else f"{end:g}" for end in ends[first : last + 1]]
        axes.set_xticks(np.arange(len(bounds)) - 0.5, bounds)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel=f"volume of a lesion of {target}, ml", ylabel=f"share of lesions{NO_UNIT}", ylim=(0, 1.15))
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, fontsize=9)

    rows = [row for row in evaluation.described_lesions() if row["target"] == target]
    said = "; ".join(f"{row['ml']} ml: detected {row['found']}, real {row['real']}" for row in rows)
    reading = (
        "Taller is better: 1 means that all are found, or all are real; the number above a bar counts its lesions."
    )
    return _chart(draw, f"Lesions of {target} by size", reading, f"Lesions of {target} by size: {said}", height=3.0)


def confusion_chart(evaluation: Evaluation) -> Chart:
    """Confusion matrix of voxels of all subjects together: shares of each reference class (row).

    With up to five classes there is room for the voxel counts below the shares.
    """
    counts = evaluation.confusion.pivot_table("voxels", "reference", "prediction", aggfunc="sum", sort=False)
    names = [str(name) for name in counts.columns]
    shares = counts.to_numpy(float) / np.maximum(counts.to_numpy(float).sum(axis=1, keepdims=True), 1)
    counted = len(names) <= 5

    def draw(axes: Axes) -> None:
        for (i, j), share in np.ndenumerate(shares):
            axes.add_patch(Rectangle((j - 0.5, i - 0.5), 1, 1, color=SERIES[0], alpha=0.6 * share, linewidth=0))
            empty = counts.iloc[i].sum() == 0
            axes.text(
                j, i, "–" if empty else f"{share:.1%}", ha="center", va="bottom" if counted else "center", fontsize=9
            )
            if counted:
                voxels = f"{counts.iloc[i, j]:,.0f}".replace(",", "\N{THIN SPACE}")
                axes.text(j, i + 0.06, voxels, ha="center", va="top", fontsize=7.5)
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xticks(range(len(names)), names)
        axes.set_yticks(range(len(names)), [str(name) for name in counts.index])
        axes.tick_params(length=0, labelcolor=INK)
        axes.grid(visible=False)
        axes.set(xlabel="predicted class", ylabel="reference class")

    said = "; ".join(f"{name} {shares[i, i]:.1%} correct" for i, name in enumerate(counts.index))
    reading = (
        "Each row shares out the voxels of one reference class; a perfect prediction has 100 % along the diagonal."
    )
    height = 0.9 + 0.45 * len(names)
    return _chart(draw, "Which class voxels were taken for", reading, f"Confusion matrix of voxels: {said}", height)


_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def class_chart(evaluation: Evaluation) -> Chart:
    """Voxels of each class in the references of all subjects together, on a log scale."""
    voxels = evaluation.confusion.groupby("reference", sort=False)["voxels"].sum()
    names, counts = [str(name) for name in voxels.index], voxels.to_numpy(float)
    shares = counts / max(counts.sum(), 1)

    def draw(axes: Axes) -> None:
        axes.barh(range(len(names)), np.maximum(counts, 0.5), 0.6, color=SERIES[0], alpha=0.75)
        for i, (count, share) in enumerate(zip(counts, shares, strict=True)):
            axes.annotate(
                f"{share:.3%}", (max(count, 0.5), i), (4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        axes.set_xscale("log")
        axes.set_xlim(0.5, 12 * max(counts.max(), 1))
        axes.xaxis.set_major_formatter(lambda value, _: f"10{str(round(np.log10(value))).translate(_RAISED)}")
        _name_rows(axes, names)
        axes.set_xlabel(f"voxels in the references{COUNT} (log scale)")

    said = ", ".join(f"{name} {share:.3%}" for name, share in zip(names, shares, strict=True))
    reading = "The scale is logarithmic: each gridline is ten times the one before; rare classes are the hard ones."
    height = 0.8 + 0.35 * len(names)
    return _chart(draw, "How common each class is", reading, f"Classes by voxels: {said}", height)


def reliability_chart(evaluation: Evaluation) -> Chart:
    """How often voxels of a given probability belong to the target; the diagonal is perfect calibration."""
    found = evaluation.reliabilities()

    def draw(axes: Axes) -> None:
        axes.plot([0, 1], [0, 1], color=MUTED, linewidth=1)
        for colour, (target, reliability) in zip(cycle(SERIES), found.items(), strict=False):
            predicted, true = reliability.curve
            label = f"{target}: calibration error {reliability.expected_error:.4f}"
            axes.plot(predicted, true, marker="o", markersize=3.5, color=colour, linewidth=1.2, label=label)
        axes.set(
            xlabel=f"predicted probability{NO_UNIT}", ylabel=f"observed share in target{NO_UNIT}", xlim=(0, 1),
            ylim=(0, 1),
        )  # fmt: skip
        axes.legend(loc="upper left", fontsize=8.5)

    said = "; ".join(f"{target} expected calibration error {r.expected_error:.4f}" for target, r in found.items())
    reading = "On the diagonal, probabilities mean what they say; below it, the network is too sure of the target."
    said = f"Reliability of probabilities, {len(evaluation.subjects)} subjects: {said}"
    return _chart(draw, "How far probabilities can be believed", reading, said, height=2.9)


DENSITY_BINS_PERCENT = (0.0, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
"""Edges of the bins of :func:`density_chart`, the same for every evaluation, so that charts can be compared."""


def density_chart(
    evaluation: Evaluation,
    target: str,
    metric: str,
    label: str,
    *,
    edges_percent: Sequence[float] = DENSITY_BINS_PERCENT,
) -> Chart:
    """A metric over how dense the target is, in bins from the first to the last that holds a subject.

    Needs ``density_percent``; a bin holds its lower edge, the last its upper one, too. Boxes as in
    :func:`metric_chart`; subjects beyond the whiskers are drawn and named, failed ones counted.
    """
    table = evaluation.outcomes[evaluation.outcomes["target"] == target]
    failed = int(np.isinf(table[metric].astype(float)).sum())
    table = table[np.isfinite(table[metric].astype(float))].sort_values("density_percent")
    edges = np.asarray(edges_percent)
    of_bin = np.searchsorted(edges[1:-1], table["density_percent"].to_numpy(float), side="right")
    bins = range(of_bin.min(), of_bin.max() + 1)

    def draw(axes: Axes) -> None:
        for row, number in enumerate(bins):
            part = table[of_bin == number]
            if part.empty:  # keeps its place, so that neighbours are neighbours
                continue
            values = part[metric].to_numpy(float)
            _row(axes, row, values, [SERIES[0]] * len(values))
            low, high = np.percentile(values, [25, 75])
            reach = 1.5 * (high - low)
            for value, name in zip(values, part["subject"], strict=True):
                if not low - reach <= value <= high + reach:
                    axes.annotate(
                        name, (value, row), (0, 8), textcoords="offset points", ha="center", fontsize=8, color=MUTED
                    )
        labels = [f"{edges[b]:g}–{edges[b + 1]:g} (n {np.count_nonzero(of_bin == b)})" for b in bins]
        _name_rows(axes, labels)
        axes.set(xlabel=_measured(metric, label), ylabel="share of all voxels, %")

    beside = f"; {failed} failed" if failed else ""
    text = f"{label} of {target} over its density, {len(table)} subjects{beside}"
    reading = f"{_BOXES} Rows go from sparse to dense targets; n counts subjects{beside}."
    title = f"{label.partition(', ')[0]} of {target} over its density"
    return _chart(draw, title, reading, text, height=0.9 + 0.5 * len(bins))


def _chart(draw: Callable[[Axes], None], title: str, reading: str, said: str, height: float) -> Chart:
    """One pair of axes, ``height`` in inches; ``said`` and what its axes show are its alternative text."""
    # The salt goes into every id: charts on one page must not share any.
    # The page's fonts draw the text; glyphs missing from the font that measures it here do not matter.
    with mpl.rc_context(_STYLE | {"svg.hashsalt": said}), filtered_warnings("ignore", UNFITTING):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        axes = figure.subplots()
        draw(axes)
        written = StringIO()
        figure.savefig(written, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    across, up = axes.get_xlabel(), axes.get_ylabel() or "names of rows"
    return Chart(
        title, reading, _inline(written.getvalue(), f"{said}. Horizontal axis: {across}. Vertical axis: {up}.")
    )


def _inline(document: str, description: str) -> str:
    """An SVG document as an element of a page: only the drawing, in the page's fonts and colours."""
    # The document's style sheet would apply to the whole page.
    svg = re.sub(r"<(metadata|style).*?</\1>", "", document[document.index("<svg") :], flags=re.DOTALL)
    referred = set(re.findall(r"#([\w.-]+)[)\"]", svg))
    svg = re.sub(r' id="([^"]+)"', lambda found: found[0] if found[1] in referred else "", svg)
    svg = re.sub(r"font-family: [^;\"]*; ?", "", svg)
    svg = re.sub(r"\s*\n\s*", " ", svg)
    for colour, name in _VARIABLES.items():
        svg = svg.replace(colour, f"var(--{name}, {colour})")
    view = re.search(r'viewBox="[^"]*"', svg)
    opening = f'<svg class="chart" role="img" aria-label="{escape(description)}" {view[0] if view else ""}>'
    return opening + svg.split(">", 1)[1]
