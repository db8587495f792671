"""``delineate demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import Device


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Write everything to this folder.")] = Path("demo"),
    subjects: Annotated[int, typer.Option("--subjects", min=10, help="Simulate this many scans.")] = 60,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.1, help="Train for this many minutes (default: as the recipe `demo` says)."),
    ] = None,
    device: Device = "auto",
) -> None:
    """Simulate scans from two scanners, train on them, predict unseen ones, measure them and write a report."""
    from delineate.cli.evaluate import print_evaluation
    from delineate.cli.terminal import Terminal
    from delineate.datasets.layouts import open_dataset
    from delineate.datasets.phantoms.writing import write_phantoms
    from delineate.errors import OutputError
    from delineate.recipe import load_recipe
    from delineate.reporting.run import write_run_report
    from delineate.training.folder import check_run_folder
    from delineate.training.lock import holding
    from delineate.training.options import Reporter, RunOptions, check_possible
    from delineate.training.run import train

    scans, options = out / "simulated_scans", RunOptions(cache=out / "prepared", device=device)
    check_possible(options)
    with Terminal() as terminal, holding(out / "run"):
        if not (scans / "dataset.json").exists():
            terminal.say(f"simulating {subjects} scans of livers with tumours, from two scanners")
            write_phantoms(scans, subjects)
        dataset = open_dataset(scans)
        if (there := len(dataset.subjects)) != subjects:
            raise OutputError(
                f"'{scans}' holds {there} simulated scans, not {subjects}",
                fix=f"use another --out, or --subjects {there} to go on with these",
            )
        check_run_folder(out / "run", dataset)
        recipe = load_recipe("demo", [] if minutes is None else [f"training.minutes={minutes}"])
        reporter = Reporter(terminal.say, terminal.progress, status=terminal.status)
        result = train(recipe, dataset, out / "run", options, reporter)
        if result.stopped is not None:
            raise typer.Exit(result.stopped)
        report = write_run_report(out / "run", dataset)
    if result.evaluation is not None:
        print_evaluation(result.evaluation)
    typer.echo(f"Simulated scans, no patients: these numbers only show that every step works.\nreport  {report}")
