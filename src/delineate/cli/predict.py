"""``delineate predict``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from delineate.cli.options import Compile, Device, Json, Precision, Threads

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
    with Terminal() as terminal, torch_threads(plan.threads):
        for choice in plan.choices:
            terminal.say(f"{choice.what}: {choice.choice} ({choice.why})")
        predictor = Predictor(bundles, plan, overlap=overlap, flips=flips, budget_bytes=int(memory_gb * 1e9))
        for done, outcome in enumerate(predict_subjects(predictor, subjects, out, suffix=f".{format}"), start=1):
            terminal.progress("predicting", done, len(subjects))
            if outcome.error is not None:
                failed.append({"subject": outcome.subject.id, "error": str(outcome.error)})
                terminal.say(f"{outcome.subject.id}: {outcome.error}")
            else:
                rows.append({"subject": outcome.subject.id, "file": str(outcome.path), "seconds": outcome.seconds})
    if json:
        print_json({"predictions": rows, "failed": failed})
    else:
        stages = ["preprocess", "network", "undo", "postprocess"]
        total = {stage: sum(row["seconds"][stage] for row in rows) for stage in stages}
        seconds = sum(total.values()) or 1.0
        print_table("", ["stage", "s", "%"], [[s, f"{t:.2f}", f"{100 * t / seconds:.0f}"] for s, t in total.items()])
        typer.echo(f"{len(rows)} predictions in {out}" + (f", {len(failed)} failed" if failed else ""))
    if failed:
        raise typer.Exit(1)
