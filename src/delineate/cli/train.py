"""``delineate train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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
    Memory,
    Precision,
    RulesFile,
    Set,
    TargetsOption,
    Threads,
    trainable,
)

Recipe = Annotated[
    str, typer.Argument(help="A packaged recipe, a YAML file, or auto to derive one.", autocompletion=trainable)
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Write the run to this folder, one training at a time.")]
Fold = Annotated[
    str,
    typer.Option("--fold", help="Hold out this fold (for a split without folds, 0 is its test set), or train on all."),
]
Minutes = Annotated[
    float | None,
    typer.Option("--minutes", min=0.01, help="Train for this many minutes (default: the recipe's; auto: 60)."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", min=1, help="Train for this many optimiser steps (default: the recipe's).")
]
Epochs = Annotated[
    int | None,
    typer.Option("--epochs", min=1, help="Train for this many passes over all items (default: the recipe's)."),
]


def train(
    recipe: Recipe,
    data: Data,
    out: Out,
    fold: Fold = "0",
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    set: Set = None,
    split: Annotated[
        Path | None,
        typer.Option("--split", help="Use this split file, or write it for later runs (default: OUT/split.json)."),
    ] = None,
    layout: Layout = "auto",
    images: Images = None,
    labels: Labels = None,
    rules: RulesFile = None,
    targets: TargetsOption = None,
    leave_out_broken: Annotated[
        bool, typer.Option("--leave-out-broken", help="Train without the subjects that inspection finds broken.")
    ] = False,
    evaluate: Annotated[
        bool, typer.Option("--evaluate/--no-evaluate", help="Predict and measure the held-out subjects at the end.")
    ] = True,
    device: Device = "auto",
    devices: Annotated[
        int,
        typer.Option(
            "--devices",
            min=1,
            help="Train on this many devices together (on a CPU: processes); this one command starts them.",
        ),
    ] = 1,
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: Threads = None,
    cache: Cache = None,
    cache_gb: CacheGb = None,
    memory: Memory = None,
    fit: Annotated[
        bool,
        typer.Option("--fit", help="Train the recipe's first variant that fits if it takes too much memory."),
    ] = False,
    mlflow: Annotated[str | None, typer.Option("--mlflow", help="Log to MLflow at this tracking address too.")] = None,
    json: Json = False,
) -> None:
    """Train on a folder of scans, measure the held-out fold and write a report.

    Run the same command again to resume a run that was stopped. Exit status: 0 complete (even if stopped early for
    lack of progress), 1 failed, 2 wrong usage or recipe, 3 stopped by the file OUT/stop, 130 by Ctrl-C, 143 by SIGTERM.
    """
    from delineate.api.training import train_and_report
    from delineate.cli.parsing import data_changes, gigabytes
    from delineate.cli.terminal import Terminal, print_json
    from delineate.recipe import DataSpec, load_recipe
    from delineate.training.options import Reporter, RunOptions, check_possible
    from delineate.training.preparation import budget_changes

    changes = [
        *budget_changes(minutes, steps, epochs),
        *data_changes(layout, images, labels, targets, rules),
        *(set or []),
    ]
    # Quick checks come first.
    options = RunOptions(
        fold=None if fold == "all" else _fold(fold),
        split_file=split,
        cache=cache,
        cache_gb=cache_gb,
        leave_out_broken=leave_out_broken,
        evaluate=evaluate,
        device=device,
        precision=precision,
        compile=compile,
        devices=devices,
        threads=threads,
        mlflow=mlflow,
        memory_gb=gigabytes(memory),
        fit=fit,
    )
    check_possible(options)
    named = None if recipe == "auto" else load_recipe(recipe, changes)
    dataset = (named.data if named else DataSpec.of_changes(changes)).open(data)
    with Terminal() as terminal:
        report = Reporter(terminal.say, terminal.progress, status=terminal.status)
        result = train_and_report(named, dataset, out, options, report, changes)
    if result.helper:
        return  # with status 0 even if stopped: the first process would take any other for a failure
    if json:
        measured = None if result.evaluation is None else result.evaluation.as_dict()
        print_json({"run": str(out), "steps": result.steps, "finished": result.finished, "evaluation": measured})
    elif result.evaluation is not None:
        from delineate.cli.evaluate import print_evaluation

        print_evaluation(result.evaluation)
    if result.stopped is not None:
        raise typer.Exit(result.stopped)
    if not json:
        typer.echo(f"bundle  {out / 'bundle'}\nreport  {out / 'report.html'}")


def _fold(text: str) -> int:
    from delineate.errors import RecipeError

    if not text.isdecimal():
        raise RecipeError(f"fold '{text}' is not a number", fix="use --fold 0, or --fold all to hold nothing out")
    return int(text)
