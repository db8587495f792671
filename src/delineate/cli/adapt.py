"""``delineate adapt``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delineate.cli.options import (
    Cache,
    CacheGb,
    Compile,
    Data,
    Device,
    Images,
    Json,
    Labels,
    Layout,
    Precision,
    RulesFile,
    Set,
    TargetsOption,
    Threads,
)

if TYPE_CHECKING:
    from delineate.training.adapted import Adapted


def adapt(
    bundle: Annotated[Path, typer.Argument(help="The bundle to adapt, its run, or an installed model's name.")],
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Write the adapted bundle and the measurements to this folder.")
    ],
    original: Annotated[
        Path | None,
        typer.Option(
            "--original",
            help="Read the data that the bundle was trained on, to rehearse it and to measure what is forgotten.",
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.01, help="Train for this many minutes, once for each fold and once more."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps",
            min=1,
            help="Train for this many optimiser steps, once for each fold and once more (default: 200).",
        ),
    ] = None,
    folds: Annotated[
        int,
        typer.Option(
            "--folds",
            min=2,
            max=100,
            help="Split the new scans into at most this many parts, patients whole, and hold out each in turn.",
        ),
    ] = 3,
    set: Set = None,
    layout: Layout = "auto",
    images: Images = None,
    labels: Labels = None,
    rules: RulesFile = None,
    targets: TargetsOption = None,
    leave_out_broken: Annotated[
        bool, typer.Option("--leave-out-broken", help="Adapt without the subjects that inspection finds broken.")
    ] = False,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: Threads = None,
    cache: Cache = None,
    cache_gb: CacheGb = None,
    json: Json = False,
) -> None:
    """Adapt a bundle to a new scanner with one to ten labelled scans, and measure what that gained and what it cost.

    Run the same command again to resume. Exit status: 0 complete, 1 failed, 2 wrong usage or recipe, 3 stopped by the
    file OUT/stop, 130 by Ctrl-C, 143 by SIGTERM.
    """
    from delineate.api.adapting import adapt_and_report
    from delineate.cli.parsing import data_changes
    from delineate.cli.terminal import Terminal, print_json
    from delineate.recipe import DataSpec
    from delineate.training.options import Reporter, RunOptions, check_possible

    options = RunOptions(
        cache=cache,
        cache_gb=cache_gb,
        leave_out_broken=leave_out_broken,
        device=device,
        precision=precision,
        compile=compile,
        threads=threads,
    )
    check_possible(options)
    new = DataSpec.of_changes(data_changes(layout, images, labels, targets, rules)).open(data)
    with Terminal() as terminal:
        report = Reporter(terminal.say, terminal.progress, status=terminal.status)
        found = adapt_and_report(
            bundle,
            new,
            original,
            out,
            options,
            report,
            minutes=minutes,
            steps=steps,
            folds=folds,
            changes=set or [],
        )
    if json:
        print_json(found.as_dict())
    if found.stopped is not None:
        raise typer.Exit(found.stopped)
    if not json:
        _print(found)


def _print(found: Adapted) -> None:
    from delineate.cli.terminal import print_table
    from delineate.metrics.catalogue import METRICS, formatted
    from delineate.reporting.adaptation import changes_of, described

    metric = "dice"
    rows = []
    for scans, change in changes_of(found).items():
        means = [formatted(metric, one.overall()[metric].mean) for one in (change.before, change.after)]
        rows.append([scans, *means, change.before.overall()[metric].count, change.verdict])
    if rows:
        print_table(f"{METRICS[metric].title}, mean over patients", ["scans", "before", "after", "n", "verdict"], rows)
    for scans, change in changes_of(found).items():
        if change.difference is not None:
            typer.echo(f"{scans}: {change.difference}")
    for line in (described(found), *found.notes):
        typer.echo(line)
    typer.echo(f"bundle  {found.folder / 'bundle'}\nreport  {found.folder / 'report.html'}")
