"""``delineate plan``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from delineate.cli.options import Data, Images, Json, Labels, Layout, Memory, Precision, Set, TargetsOption, Threads
from delineate.cli.train import Epochs, Minutes, Recipe, Steps

if TYPE_CHECKING:
    import torch

    from delineate.studies.sizing import Guess, Sized, Sizes


def plan(
    recipe: Recipe,
    data: Data,
    memory: Memory = None,
    fold: Annotated[int, typer.Option("--fold", min=0, help="Hold out this fold.")] = 0,
    split: Annotated[
        Path | None, typer.Option("--split", help="Use this split file (default: the one that training would make).")
    ] = None,
    minutes: Minutes = None,
    steps: Steps = None,
    epochs: Epochs = None,
    set: Set = None,
    layout: Layout = "auto",
    images: Images = None,
    labels: Labels = None,
    targets: TargetsOption = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            help="Run on auto, cpu, cuda, cuda:1 or mps, or only estimate for a GPU elsewhere: 'RTX 3060 12GB'.",
        ),
    ] = "auto",
    precision: Precision = "auto",
    threads: Threads = None,
    json: Json = False,
) -> None:
    """Show what a training will take before it starts: memory, time and disk space on this machine.

    Trains for three steps of the full size on a few subjects, validates, predicts two, and leaves nothing behind.
    If the training does not fit into memory, tries the batch in parts, activations computed again, bfloat16, smaller
    batches, smaller tiles, minicubes, 2.5D and 2D, and says what each would take and how far its network sees.

    For a GPU that is not in this machine, nothing is tried: memory is counted and time estimated from published rates.

    Exit status: 0 if the recipe fits, 1 if it does not.
    """
    from delineate.cli.parsing import data_changes, gigabytes
    from delineate.cli.terminal import Terminal, print_json
    from delineate.compute import plan_compute
    from delineate.datasets.splits import check_split, load_split
    from delineate.errors import RecipeError
    from delineate.estimation import GPUS, gpu_named
    from delineate.recipe import DataSpec, load_recipe
    from delineate.studies.sizing import guess_training, size_training
    from delineate.training.options import Reporter, RunOptions
    from delineate.training.preparation import budget_changes, derived_recipe, new_split

    changes = [*budget_changes(minutes, steps, epochs), *data_changes(layout, images, labels, targets), *(set or [])]
    limit_gb = gigabytes(memory)
    elsewhere = gpu_named(device)
    if elsewhere is None and " " in device:
        raise RecipeError(f"no figures of a GPU '{device[:40]}' are known", fix=f"use one of {', '.join(GPUS)}")
    if elsewhere is not None and recipe == "auto":
        raise RecipeError("auto derives a recipe for this machine, not for another GPU", fix="name a recipe")
    with Terminal() as terminal:
        if recipe == "auto":
            dataset = DataSpec.of_changes(changes).open(data)
            reporter = Reporter(terminal.say, terminal.progress, status=terminal.status)
            options = RunOptions(
                device=device, threads=threads, precision=precision, memory_gb=limit_gb, fold=fold, split_file=split
            )
            named = derived_recipe(dataset, options, reporter, changes).recipe
        else:
            named = load_recipe(recipe, changes)
            dataset = named.data.open(data)
        if elsewhere is not None:
            sizes = guess_training(named, data, elsewhere, limit_gb or elsewhere.memory_gb)
        else:
            chosen = new_split(named.training, dataset, dataset) if split is None else load_split(split)
            check_split(chosen, dataset)
            target = plan_compute(device=device, threads=threads).device
            sizes = size_training(
                named,
                data,
                chosen,
                fold,
                limit_gb or _memory_gb(target),
                device=device,
                threads=threads,
                precision=precision,
                progress=lambda what: terminal.say(f"trying {what}"),
            )
    if json:
        print_json(_plain(sizes))
    else:
        _print(sizes, named.training.batch_size, device)
    if not sizes.recipe.fits(sizes.memory_gb):
        raise typer.Exit(1)


def _memory_gb(device: torch.device) -> float:
    """The GPU's memory, or what is free of the machine's."""
    import torch

    from delineate.core.limits import available_memory_bytes

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory / 1e9
    return available_memory_bytes() / 1e9


def _plain(sizes: Sizes) -> dict[str, Any]:
    from dataclasses import asdict

    from delineate.studies.sizing import Guess
    from delineate.studies.trials import Trial

    def row(one: Sized) -> dict[str, Any]:
        found: dict[str, Any] = {"error": str(one.trial)}
        if isinstance(one.trial, Trial):
            found = {"trial": asdict(one.trial)}
        elif isinstance(one.trial, Guess):
            found = {"estimate": asdict(one.trial)}
        return {
            "what": one.what,
            "changes": list(one.changes),
            "precision": one.precision,
            "fits": one.fits(sizes.memory_gb),
            "sees_mm": one.sees_mm,
            **found,
        }

    return {
        "memory_gb": sizes.memory_gb,
        "recipe": row(sizes.recipe),
        "variants": [row(variant) for variant in sizes.variants],
    }


def _print(sizes: Sizes, batch: int, device: str) -> None:
    from delineate.cli.terminal import print_table
    from delineate.io.files import free_bytes, home_folder
    from delineate.studies.sizing import Guess
    from delineate.studies.trials import Trial, duration

    limit = f"{sizes.memory_gb:.1f} GB"
    trial, fits = sizes.recipe.trial, sizes.recipe.fits(sizes.memory_gb)
    if isinstance(trial, Trial):
        on_gpu = "" if trial.device_gb is None else f", {trial.device_gb:.1f} GB on the GPU"
        steps = "as many as the minutes allow" if trial.total_steps is None else f"{trial.total_steps:,}"
        kept = max(0.0, trial.peak_gb - trial.program_gb - trial.data_gb - trial.network_gb)
        parts = (
            f"{trial.program_gb:.1f} program, {trial.data_gb:.1f} data, {trial.network_gb:.1f} network and optimiser, "
            f"{kept:.1f} a step or a prediction"
        )
        per_step = f"{trial.seconds_a_step:.3g} s for {batch} tile{'s' if batch > 1 else ''}"
        rows = [
            ["memory", f"{trial.peak_gb:.1f} GB{on_gpu}: {'fits' if fits else 'does not fit'} into {limit}"],
            ["", parts],
            ["time", f"{duration(60 * trial.expected_minutes)} from start to report"],
            ["a step", per_step + (", compiled" if trial.compiled else "")],
            ["steps", steps],
            ["preparing", duration(trial.preparing_seconds)],
            ["a validation", duration(trial.validating_seconds)],
            ["measuring", f"{duration(trial.predicting_seconds)} for each held-out subject"],
            ["disk", _disk(trial.prepared_gb, free_bytes(home_folder()) / 1e9)],
            ["sees", _seen(sizes.recipe)],
        ]
        print_table("on this machine, by three steps", ["", ""], rows)
    elif isinstance(trial, Guess):
        rows = [
            ["memory", f"{trial.device_gb:.1f} GB on the GPU: {'fits' if fits else 'does not fit'} into {limit}"],
            ["a step", f"{_span(trial)} for {batch} tile{'s' if batch > 1 else ''}"],
            ["sees", _seen(sizes.recipe)],
        ]
        print_table(f"on a {device}: estimated, not measured", ["", ""], rows)
    else:
        typer.echo(f"does not fit into {limit}: {trial}")
    if not sizes.variants:
        if not fits:
            typer.echo("no smaller variant of this recipe is known: use a machine with more memory")
        return
    rows = []
    for one in sizes.variants:
        found = one.trial
        if isinstance(found, Trial):
            taken = found.peak_gb if found.device_gb is None else found.device_gb
            cells = [f"{taken:.1f} GB", f"{found.seconds_a_step:.3g} s", duration(60 * found.expected_minutes)]
        elif isinstance(found, Guess):
            cells = [f"{found.device_gb:.1f} GB", _span(found), ""]
        else:
            cells = ["too much", "", ""]
        rows.append([one.what, "yes" if one.fits(sizes.memory_gb) else "no", *cells, _seen(one)])
    print_table(f"what would fit into {limit}", ["variant", "fits", "memory", "a step", "in all", "sees"], rows)
    chosen = sizes.first_fitting
    if chosen is None:
        typer.echo("none of them fits: use a machine with more memory")
    else:
        settings = " ".join(f"--set '{change}'" for change in chosen.changes)
        settings += "" if chosen.precision is None else f"--precision {chosen.precision}"
        typer.echo(f"add to train, for {chosen.what}:\n  {settings}")


def _disk(prepared_gb: float, free_gb: float) -> str:
    """What prepared subjects take, and what to do if there is too little room."""
    taken = f"{prepared_gb:.2g} GB of prepared subjects"
    if prepared_gb <= free_gb:
        return taken
    return f"{taken}, {free_gb:.2g} GB are free: --cache-gb trains on some at a time"


def _span(guess: Guess) -> str:
    least, most = guess.seconds_a_step
    return f"{least:.2g} to {most:.2g} s"


def _seen(one: Sized) -> str:
    return "unknown" if one.sees_mm is None else " × ".join(f"{mm:.0f}" for mm in one.sees_mm) + " mm"
