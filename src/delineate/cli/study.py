"""``delineate study``: experiments of many runs, from one file to one report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Device, Json, studies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delineate.datasets.dataset import Dataset
    from delineate.recipe import Recipe
    from delineate.studies.planning import PlannedRun
    from delineate.studies.results import StudyResults
    from delineate.studies.specification import Study

app = Commands(help="Run experiments of many trainings, and report the results.")

Name = Annotated[str, typer.Argument(help="A packaged study or a YAML file.", autocompletion=studies)]
SizeOption = Annotated[
    Literal["quick", "paper"],
    typer.Option("--size", help="Run the study at this size; quick takes a quarter of an hour on two cores."),
]
StudyData = Annotated[
    Path | None, typer.Option("--data", help="Read this data set; its layout is recognised (see also --phantom).")
]
PhantomFlag = Annotated[
    bool, typer.Option("--phantom", help="Simulate the study's scans into OUT/data, if it names a kind of phantom.")
]


@app.command("list")
def list_studies(json: Json = False) -> None:
    """List the packaged studies."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.studies.specification import load_study, packaged_studies

    found = {name: load_study(name) for name in packaged_studies()}
    if json:
        print_json({name: study.question for name, study in found.items()})
        return
    rows = [[name, study.question, ", ".join(study.sizes)] for name, study in found.items()]
    print_table("", ["study", "question", "sizes"], rows)


@app.command("show")
def show(study: Name, json: Json = False) -> None:
    """Print a study with every default written out, to save, change and run."""
    from delineate.cli.terminal import print_json
    from delineate.recipe import to_yaml
    from delineate.studies.specification import load_study

    values = load_study(study).model_dump(mode="json")
    if json:
        print_json(values)
    else:
        typer.echo(to_yaml(values), nl=False)


@app.command("plan")
def plan(
    study: Name,
    data: Annotated[Path, typer.Option("--data", help="Read this data set.")],
    size: SizeOption = "quick",
    json: Json = False,
) -> None:
    """Print the runs of a study, their subjects and their training time, without running anything."""
    from delineate.cli.terminal import print_json, print_table

    chosen, beside = _load(study)
    dataset = _opened(chosen, beside, data)
    runs = _planned(chosen, size, dataset, beside)
    rows = [
        [run.name, run.arm, str(len(run.split.training_of(run.fold))), str(len(run.split.held_out(run.fold))),
         _budget(run.recipe)]
        for run in runs
    ]  # fmt: skip
    columns = ["run", "arm", "trained on", "held out", "budget"]
    if json:
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
        return
    print_table("", columns, rows)
    typer.echo(f"{len(runs)} runs; {_expected(runs)}")


@app.command("run")
def run(
    study: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the study to this folder.")],
    data: StudyData = None,
    phantom: PhantomFlag = False,
    size: SizeOption = "quick",
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=256, help="Run this many trainings at a time.")] = 1,
    only: Annotated[
        str | None, typer.Option("--only", help="Run only this part of the runs, such as 2/5, in a job array.")
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Run a study: every training in its own process, then the report.

    Run the same command again to resume: finished runs are kept, stopped or failed ones are repeated. A run that fails
    does not stop the others. Exit status: 0 all done, 1 some failed, 130 after Ctrl-C.
    """
    from delineate.cli.terminal import Terminal, print_json
    from delineate.compute import check_device, usable_cores
    from delineate.studies.reporting import write_study_report
    from delineate.studies.results import collect
    from delineate.studies.running import RunStatus, StudyFolder, part_of, run_study

    check_device(device)
    if (data is None) == (not phantom):
        raise typer.BadParameter("give either --data or --phantom")
    chosen, beside = _load(study)
    folder = StudyFolder(out)
    folder.check()
    place = data if data is not None else _simulated(chosen, out)
    dataset = _opened(chosen, beside, place)
    runs = _planned(chosen, size, dataset, beside)
    folder.begin(chosen, size, dataset.name, runs)
    some = runs if only is None else part_of(runs, only)
    options = ["--device", device]
    if jobs > 1:  # otherwise every process would use all cores
        options += ["--threads", str(max(1, usable_cores() // jobs))]
    with Terminal() as terminal:
        terminal.say(f"{len(some)} runs; {_expected(some)}")

        def on_change(planned: PlannedRun, status: RunStatus) -> None:
            done = sum(folder.status(one.name).state == "done" for one in some)
            text = f"{planned.name}: {status.state}" + (f": {status.failure}" if status.failure else "")
            (terminal.say_failure if status.state == "failed" else terminal.say)(text)
            terminal.progress("runs", done, len(some))

        try:
            finished = run_study(folder, some, place, jobs=jobs, options=options, on_change=on_change)
        finally:
            results = collect(folder, chosen, runs)
            page = write_study_report(results, out, size=size, data_set=dataset.name)
    if json:
        states = {name: status.state for name, status in results.statuses.items()}
        print_json({"study": str(out), "runs": states, "report": str(page)})
    else:
        _print(results, page)
    if not finished:
        raise typer.Exit(1)


@app.command("report")
def report(
    folder: Annotated[Path, typer.Argument(help="A study's folder, finished or not.")], json: Json = False
) -> None:
    """Write the report of the runs finished so far."""
    from delineate.cli.terminal import print_json
    from delineate.studies.reporting import write_study_report
    from delineate.studies.results import collect
    from delineate.studies.running import StudyFolder

    kept = StudyFolder(folder)
    planned, runs = kept.open()
    results = collect(kept, planned.study, runs)
    page = write_study_report(results, folder, size=planned.size, data_set=planned.data_set)
    if json:
        print_json({"runs": {n: s.state for n, s in results.statuses.items()}, "report": str(page)})
    else:
        _print(results, page)


def _load(name: str) -> tuple[Study, Path]:
    """A study, and the folder that its recipes' paths are relative to."""
    from delineate.studies.specification import load_study, study_file

    return load_study(name), study_file(name).parent


def _opened(study: Study, beside: Path, data: Path) -> Dataset:
    """The data set, read as the recipe of the first arm says."""
    from delineate.studies.planning import arm_recipe
    from delineate.studies.specification import Size

    first = next(iter(study.compared.values()))
    return arm_recipe(study, first, Size(), beside).data.open(data)


def _planned(study: Study, size: str, dataset: Dataset, beside: Path) -> tuple[PlannedRun, ...]:
    from delineate.errors import StudyError
    from delineate.studies.planning import plan_runs

    known = study.sizes.get(size)  # type: ignore[call-overload]
    if known is None:
        raise StudyError(f"study '{study.name}' has no size {size}", fix=f"its sizes are {', '.join(study.sizes)}")
    return plan_runs(study, known, dataset, beside)


def _simulated(study: Study, out: Path) -> Path:
    from delineate.datasets.phantoms.writing import write_phantoms
    from delineate.errors import StudyError

    if study.phantom is None:
        raise StudyError(f"study '{study.name}' does not say which scans to simulate", fix="give --data")
    write_phantoms(out / "data", study.phantom.patients, study.phantom.kind, seed=study.phantom.seed)
    return out / "data"


def _budget(recipe: Recipe) -> str:
    training = recipe.training
    budget = {"minutes": training.minutes, "steps": training.steps, "epochs": training.epochs}
    return ", ".join(f"{limit:g} {unit}" for unit, limit in budget.items() if limit is not None) or "none"


def _expected(runs: Sequence[PlannedRun]) -> str:
    """The training time that the recipes allow, if they all limit it."""
    minutes = [run.recipe.training.minutes for run in runs]
    if any(m is None for m in minutes):
        return "how long they train depends on their steps or epochs"
    return f"they train for {sum(m for m in minutes if m is not None):.0f} minutes at most, one after another"


def _print(results: StudyResults, page: Path) -> None:
    from delineate.cli.terminal import print_table
    from delineate.metrics.catalogue import formatted

    rows, metric = [], results.study.metric
    for group, evaluation in results.pooled.items():
        if (estimate := evaluation.overall().get(metric)) is not None:
            low, high = (formatted(metric, v) for v in estimate.ci95)
            rows.append([group, formatted(metric, estimate.mean), f"{low} to {high}", str(estimate.patients)])
    if rows:
        print_table(metric, ["runs", "mean", "95 % interval", "patients"], rows)
    for line in (*results.gains(), *results.differences()):
        typer.echo(str(line))
    typer.echo(f"{results.done} of {len(results.runs)} runs are done; report  {page}")
