"""``delineate evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delineate.cli.options import Json, TargetsOption

if TYPE_CHECKING:
    from delineate.evaluation import Estimate, Evaluation

SHOWN = {
    "dice": "Dice",
    "precision": "precision",
    "recall": "recall",
    "hd95_mm": "HD95, mm",
    "volume_ml": "volume, ml",
    "reference_volume_ml": "reference, ml",
    "volume_error_percent": "error, %",
}


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted labels, <subject>.nii.gz.")],
    references: Annotated[Path, typer.Argument(help="Folder of reference labels, or a data set.")],
    targets: TargetsOption = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder for metrics.csv and summary.json.")] = None,
    json: Json = False,
) -> None:
    """Measure predictions against references, by subject and target."""
    from delineate.cli.parsing import parse_targets
    from delineate.cli.terminal import print_json
    from delineate.evaluation import evaluate_folders

    evaluation = evaluate_folders(predictions, references, parse_targets(targets))
    if out is not None:
        evaluation.write(out)
    if json:
        print_json(evaluation.as_dict())
    else:
        print_evaluation(evaluation, subjects=True)


def print_evaluation(evaluation: Evaluation, *, subjects: bool = False) -> None:
    """The summary as a table on standard output, after the rows of every subject where asked for."""
    from delineate.cli.terminal import print_table

    if subjects:
        rows = evaluation.table.to_dict("records")
        cells = [[r["subject"], r["target"], *(f"{r[metric]:.3f}" for metric in SHOWN)] for r in rows]
        print_table("", ["subject", "target", *SHOWN.values()], cells)
        typer.echo()
    summary = [
        [target, metric, *_estimate_cells(estimates[metric])]
        for target, estimates in evaluation.summary().items()
        for metric in SHOWN
        if metric in estimates
    ]
    print_table("", ["target", "metric", "mean ± SD", "95 % interval of the mean", "n", "undefined"], summary)
    for what, names in evaluation.unpaired.items():
        typer.echo(f"{what}: {len(names)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})")


def _estimate_cells(estimate: Estimate) -> list[str]:
    low, high = estimate.ci95
    if estimate.n == 1:  # one value has no spread
        return [f"{estimate.mean:.3f}", "", "1", str(estimate.undefined or "")]
    return [
        f"{estimate.mean:.3f} ± {estimate.sd:.3f}",
        f"{low:.3f} – {high:.3f}",
        str(estimate.n),
        str(estimate.undefined or ""),
    ]
