"""``delineate evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from delineate.cli.options import (
    Json,
    LesionOverlap,
    MarginMm,
    Metrics,
    Overwrite,
    Quantity,
    RulesFile,
    TargetsOption,
    Threshold,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delineate.datasets.dataset import Dataset
    from delineate.evaluation.table import Evaluation
    from delineate.metrics.statistics import Estimate


def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted labels, <subject>.nii.gz.")],
    references: Annotated[Path, typer.Argument(help="Folder of reference labels, or a data set.")],
    targets: TargetsOption = None,
    metrics: Metrics = "standard",
    lesion_overlap: LesionOverlap = 0.0,
    quantity: Quantity = None,
    margin_mm: MarginMm = 0.0,
    threshold: Threshold = None,
    probabilities: Annotated[
        Path | None,
        typer.Option("--probabilities", help="Read probabilities here (default: PREDICTIONS/probabilities, if any)."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write tables to this folder, as CSV and JSON.")
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a report to this file, such as page.html.")
    ] = None,
    band_percent: Annotated[
        float | None,
        typer.Option("--band", min=0, help="Draw this band of volume errors, in % (between operators: 1.7)."),
    ] = None,
    colours: Annotated[
        Literal["distinct", "purple"],
        typer.Option(
            "--colours", help="Colour overlays so that everyone can tell them apart, or purple where both agree."
        ),
    ] = "distinct",
    rules: RulesFile = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Measure predictions against references, for every subject and target."""
    from delineate.cli.parsing import parse_quantity, parse_reading, parse_targets
    from delineate.cli.terminal import print_json
    from delineate.datasets.layouts import open_dataset
    from delineate.evaluation.measure import Measuring, evaluate_folders, named_targets
    from delineate.evaluation.pairs import open_references

    beside = predictions / "probabilities"
    kept = probabilities or (beside if beside.is_dir() else None)
    read_within = parse_quantity(quantity, margin_mm, threshold)
    measuring = Measuring(metrics, lesion_overlap, read_within, kept)
    asked, (channels, label) = parse_targets(targets), parse_reading(None, None, rules)
    known = open_references(references) if rules is None else open_dataset(references, images=channels, labels=label)
    maps = None if read_within is None else read_within.maps
    _check_outputs(out, report, [predictions, *filter(None, (kept, maps))], known, overwrite)
    evaluation = evaluate_folders(predictions, known, asked, measuring)
    if out is not None:
        evaluation.write(out)
    if report is not None:
        from delineate.reporting.evaluation import write_evaluation_report

        marked = named_targets(known, measuring, asked)
        write_evaluation_report(
            report, evaluation, predictions, known, marked, band_percent=band_percent, palette=colours
        )
    if json:
        print_json(evaluation.as_dict())
        return
    print_evaluation(evaluation, subjects=True)
    print_details(evaluation)


def _check_outputs(
    out: Path | None, report: Path | None, predictions: Sequence[Path], known: Path | Dataset, overwrite: bool
) -> None:
    """Raise if labels or scans, or other files that may not be replaced, would be overwritten."""
    from delineate.evaluation.table import FILES
    from delineate.io.formats import suffix_of
    from delineate.io.overwriting import check_outputs

    folders, inputs = [*predictions], []
    if isinstance(known, Path):
        folders.append(known)
    else:
        inputs += [file for subject in known.subjects for file in subject.files]
    for path in folders:
        inputs += [file for file in path.iterdir() if suffix_of(file)] if path.is_dir() else [path]
    outputs = [report] if report is not None else []
    if out is not None:
        outputs += [out / name for name in FILES]
    check_outputs(outputs, inputs, overwrite=overwrite)


def print_details(evaluation: Evaluation) -> None:
    """Print everything except means: limits of agreement, lesions by size, calibration, sides of a threshold."""
    from delineate.cli.terminal import print_table

    rows = [list(row.values()) for agreeing in evaluation.agreements for row in agreeing.described()]
    if rows:
        columns = ["target", "of", "bias (95 %)", "limits of agreement", "concordance", "n", "beyond them"]
        print_table("agreement with the reference", columns, rows)
        sizes = [list(agreeing.error_sizes().values()) for agreeing in evaluation.agreements]
        print_table("sizes of errors", ["target", "of", "mean", "median", "largest", "within 5 %"], sizes)
    if pooled := [list(row.values()) for row in evaluation.described_pooled()]:
        columns = ["class", "voxels", "share", "precision", "recall", "F1"]
        print_table("voxels pooled over all subjects", columns, pooled)
    if sizes := [list(row.values()) for row in evaluation.described_lesions()]:
        print_table(
            "lesions by size", ["target", "ml", "reference lesions detected", "predicted lesions confirmed"], sizes
        )
    for target, reliability in evaluation.reliabilities().items():
        typer.echo(f"probabilities of {target}: expected calibration error {reliability.expected_error:.4f}")
    for line in evaluation.crossings():
        typer.echo(line)


def print_evaluation(evaluation: Evaluation, *, subjects: bool = False) -> None:
    """Print the summary as a table on standard output, after the rows of every subject if asked for."""
    from delineate.cli.terminal import print_table
    from delineate.metrics.catalogue import formatted

    if subjects:
        rows = evaluation.table.to_dict("records")
        cells = [[r["subject"], r["target"], *(formatted(m, r[m]) for m in evaluation.metrics)] for r in rows]
        print_table(
            "", ["subject", "target", *(evaluation.described_metric(m).title for m in evaluation.metrics)], cells
        )
        typer.echo()
    summary = [
        [target, evaluation.described_metric(metric).title, *_estimate_cells(metric, estimate)]
        for target, estimates in evaluation.summary().items()
        for metric, estimate in estimates.items()
    ]
    columns = ["target", "metric", "mean ± SD", "95 % interval of the mean", "n", "failed", "undefined"]
    print_table("", columns, summary)
    if evaluation.simulated:
        typer.echo("measured on simulated scans, not on patients")
    for what, names in evaluation.unpaired.items():
        typer.echo(f"{what}: {len(names)} ({', '.join(names[:5])}{', …' if len(names) > 5 else ''})")


def _estimate_cells(metric: str, estimate: Estimate) -> list[str]:
    from delineate.evaluation.table import averaged
    from delineate.metrics.catalogue import formatted

    low, high = (formatted(metric, v) for v in estimate.ci95)
    return [
        averaged(metric, estimate),
        f"{low} – {high}" if estimate.patients > 1 else "",  # one patient has no interval
        estimate.count,
        estimate.failures,
        str(estimate.undefined or ""),
    ]
