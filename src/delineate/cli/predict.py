"""``delineate predict``."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from delineate.cli.options import Compile, Device, Json, Precision, Threads

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delineate.core.subject import Subject
    from delineate.inference.fingerprint import Oddity
    from delineate.inference.review import Review

Flips = Annotated[
    str | None, typer.Option("--flips", help="Axes mirrored at test time, such as x or xyz; '' for none.")
]


def predict(
    bundle: Annotated[Path, typer.Argument(help="A run's folder bundle/.")],
    inputs: Annotated[list[Path], typer.Argument(help="Scans, or folders of them in any known layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for a label of each subject.")],
    format: Annotated[
        Literal["nii.gz", "mha", "nrrd", "vtk", "vti", "dcm"],
        typer.Option("--format", help="Of the labels; dcm: DICOM-SEG, for DICOM scans."),
    ] = "nii.gz",
    also: Annotated[
        list[Path] | None, typer.Option("--also", help="Another bundle: probabilities are averaged; may be repeated.")
    ] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Only subjects that none of the bundles was trained or chosen on.")
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images",
            help="Pattern of a channel, such as T1='*/t1.nii', or of a DICOM series' description; may be repeated.",
        ),
    ] = None,
    flips: Flips = None,
    mirrored: Annotated[
        bool,
        typer.Option("--mirrored", help="Predict mirrored too, where training did: how well both agree is told."),
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write them too, to OUT/probabilities, a channel for each target.")
    ] = False,
    overlap: Annotated[float | None, typer.Option("--overlap", min=0, max=0.9, help="Overlap of tiles.")] = None,
    memory_gb: Annotated[
        float, typer.Option("--memory-gb", min=0.01, help="Memory that one scan's probabilities may take.")
    ] = 1.0,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Segment scans, each on its own grid. Not for diagnosis."""
    from delineate.bundle import Bundle
    from delineate.cli.parsing import parse_patterns
    from delineate.cli.terminal import Terminal, print_json, print_table
    from delineate.compute import plan_compute, torch_threads
    from delineate.inference.batch import find_subjects, predict_subjects, unseen_by
    from delineate.inference.predictor import Predictor
    from delineate.inference.review import write_queue

    bundles = [Bundle.load(folder) for folder in [bundle, *(also or [])]]
    subjects = find_subjects(inputs, bundles[0].channels, parse_patterns(images))
    if unseen:
        subjects = unseen_by(bundles, subjects)
    plan = plan_compute(
        device=device,
        precision=precision,
        compile=compile,
        threads=threads,
        expected_seconds=float(len(subjects)),  # about a second a scan
    )
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    reviews: list[Review] = []
    with Terminal() as terminal, torch_threads(plan.threads):
        for choice in plan.choices:
            terminal.say(f"{choice.what}: {choice.choice} ({choice.why})")
        predictor = Predictor(
            bundles,
            plan,
            overlap=overlap,
            flips=flips,
            budget_bytes=int(memory_gb * 1e9),
            mirrored=mirrored,
            probabilities=probabilities,
        )

        def warn(subject: Subject, odd: Sequence[Oddity]) -> None:
            terminal.say(f"{subject.id}: unlike the training scans: {'; '.join(oddity.text for oddity in odd)}")

        outcomes = predict_subjects(
            predictor,
            subjects,
            out,
            suffix=f".{format}",
            on_oddities=warn,
            probabilities=out / "probabilities" if probabilities else None,
        )
        for done, outcome in enumerate(outcomes, start=1):
            terminal.progress("predicting", done, len(subjects))
            if outcome.error is not None:
                failed.append({"subject": outcome.subject.id, "error": str(outcome.error)})
                terminal.say(f"{outcome.subject.id}: {outcome.error}")
            else:
                assert outcome.review is not None
                reviews.append(outcome.review)
                rows.append(
                    {
                        "subject": outcome.subject.id,
                        "file": str(outcome.path),
                        "seconds": outcome.seconds,
                        "targets": outcome.review.targets,
                        "unusual": list(outcome.review.oddities),
                        "need": outcome.review.need,
                    }
                )
    write_queue(out / "review.csv", reviews)
    if json:
        print_json({"predictions": rows, "failed": failed})
    else:
        _print_queue(reviews)
        stages = ["preprocess", "network", "undo", "postprocess"]
        total = {stage: sum(row["seconds"][stage] for row in rows) for stage in stages}
        seconds = sum(total.values()) or 1.0
        print_table("", ["stage", "s", "%"], [[s, f"{t:.2f}", f"{100 * t / seconds:.0f}"] for s, t in total.items()])
        seams = [t["seam"] for row in rows for t in row["targets"].values() if t["seam"] == t["seam"]]
        if seams:
            typer.echo(f"probabilities change {median(seams):.2f} times as much across tiles' borders as beside them")
        typer.echo(f"{len(rows)} predictions in {out}" + (f", {len(failed)} failed" if failed else ""))
    if failed:
        raise typer.Exit(1)


_SHOWN = 10


def _print_queue(reviews: list[Review]) -> None:
    """What to look at first, the neediest on top."""
    from delineate.cli.terminal import print_table
    from delineate.inference.confidence import LEVEL
    from delineate.inference.review import queue

    rows = [
        [
            row["subject"],
            row["target"],
            _with_range(row["volume_ml"], row["volume_low_ml"], row["volume_high_ml"], ".2f"),
            _with_range(row["expected_dice"], row["dice_low"], row["dice_high"], ".3f"),
            "" if row["agreement"] != row["agreement"] else f"{row['agreement']:.3f}",
            "yes" if row["unusual"] else "",
        ]
        for one in queue(reviews)[:_SHOWN]
        for row in one.rows()
    ]
    if rows:
        interval = f"({LEVEL:.0%})"
        columns = ["subject", "target", f"volume, ml {interval}", f"expected Dice {interval}", "agreement", "unusual"]
        print_table("to look at first", columns, rows)
        if len(reviews) > _SHOWN:
            typer.echo(f"and {len(reviews) - _SHOWN} more, in review.csv")


def _with_range(value: float, low: float, high: float, spec: str) -> str:
    if value != value:
        return "–"
    return f"{value:{spec}}" if low != low else f"{value:{spec}} ({low:{spec}} – {high:{spec}})"
