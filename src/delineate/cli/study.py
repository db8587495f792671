"""``delineate study``: experiments of many runs, from one file to one report."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Device, Json, studies

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delineate.cli.terminal import Terminal
    from delineate.datasets.dataset import Dataset
    from delineate.errors import DelineateError
    from delineate.recipe import Recipe
    from delineate.studies.designs import PlannedRun
    from delineate.studies.results import StudyResults
    from delineate.studies.specification import Size, Study
    from delineate.studies.trials import Trial

_MOST_JOBS = 256

app = Commands(help="Run experiments of many trainings, and report the results.")

Name = Annotated[str, typer.Argument(help="A packaged study or a YAML file.", autocompletion=studies)]
SizeOption = Annotated[
    Literal["quick", "paper"],
    typer.Option("--size", help="Run the study at this size; quick takes a quarter of an hour on two cores."),
]
StudyData = Annotated[
    list[str] | None,
    typer.Option("--data", help="Read this data set; name=folder where a study has several. Can be repeated."),
]
PhantomFlag = Annotated[
    bool, typer.Option("--phantom", help="Simulate the data sets that are not given, where the study says how.")
]


Final = Annotated[
    bool, typer.Option("--final", help="Measure the locked subjects too: once, when everything else has been decided.")
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
    data: StudyData = None,
    phantom: PhantomFlag = False,
    size: SizeOption = "quick",
    final: Final = False,
    trial: Annotated[
        bool, typer.Option("--try", help="Train each arm for three steps, to tell its time and memory on this machine.")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Print the runs of a study, their subjects and budgets, and with --try their time and memory; write nothing."""
    from tempfile import TemporaryDirectory

    from delineate.cli.terminal import Terminal, print_json, print_table
    from delineate.compute import check_device
    from delineate.studies.deriving import AutoRecipes
    from delineate.studies.planning import plan_runs

    check_device(device)
    chosen, beside = _load(study)
    known = _size(chosen, size)
    with TemporaryDirectory() as scratch:
        places = _places(chosen, data, phantom, known, Path(scratch))
        with Terminal() as terminal:
            derive = AutoRecipes(device=device, progress=terminal.progress)
            planned = plan_runs(chosen, known, _opened(chosen, beside, places), beside, final=final, derive=derive)
        tried: list[dict[str, Any]] = []
        if trial:
            with Terminal() as terminal:
                tried = _trial_rows(_tried(planned.runs, places, device, terminal), planned.runs)
    rows = [
        {
            "run": run.name,
            "arm": run.label,
            "trained on": len(run.split.training_of(run.fold)),
            "held out": len(run.split.held_out(run.fold)),
            "budget": "tests only" if run.weights_of else _budget(run.recipe),
            "after": run.needs or "",
        }
        for run in planned.runs
    ]
    if json:
        print_json({"runs": rows, "pending": list(planned.pending), "trials": tried})
        return
    print_table("", list(rows[0]) if rows else [], [[str(value) for value in row.values()] for row in rows])
    typer.echo(f"{len(rows)} runs; {_expected(planned.runs)}")
    for line in planned.pending:
        typer.echo(f"later: {line}")
    if tried:
        _print_trials(tried)


@app.command("run")
def run(
    study: Name,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the study to this folder.")],
    data: StudyData = None,
    phantom: PhantomFlag = False,
    size: SizeOption = "quick",
    jobs: Annotated[
        str | None,
        typer.Option(
            "--jobs",
            help="Run this many at a time, or auto: as many as memory and cores hold, by trial steps of each arm "
            "(default: 1, or as many as a cluster has room for).",
        ),
    ] = None,
    only: Annotated[
        str | None, typer.Option("--only", help="Run only this part of the runs, such as 2/5, in a job array.")
    ] = None,
    final: Final = False,
    device: Device = "auto",
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster", help="Run on the ray cluster at ray://HOST:PORT; local starts a ray on this machine."
        ),
    ] = None,
    cpus_a_run: Annotated[
        int | None,
        typer.Option(
            "--cpus-a-run", min=1, max=1024, help="Use this many CPUs for each run on a cluster (default: 1)."
        ),
    ] = None,
    gpus_a_run: Annotated[
        float | None,
        typer.Option(
            "--gpus-a-run",
            min=0,
            max=64,
            help="Use this many GPUs for each run on a cluster, such as 0.5 (default: 1, or 0 if it has none).",
        ),
    ] = None,
    memory_gb_a_run: Annotated[
        float | None,
        typer.Option(
            "--memory-gb-a-run",
            min=0,
            max=10_000,
            help="Hold this much memory for each run on a cluster, in GB (default: 0).",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Run a study: every training in its own process, then the report.

    Run the same command again to resume: finished runs are kept, stopped or failed ones are repeated. A run that fails
    stops none but those that need it. Exit status: 0 all done, 1 some failed, 130 after Ctrl-C.
    """
    from contextlib import ExitStack

    from delineate.cli.terminal import Terminal, print_json
    from delineate.compute import check_device
    from delineate.core.limits import usable_cores
    from delineate.studies.conducting import conduct
    from delineate.studies.deriving import AutoRecipes
    from delineate.studies.planning import Plan, plan_runs
    from delineate.studies.reporting import draw_pictures, write_study_report
    from delineate.studies.results import collect
    from delineate.studies.running import Launcher, LocalProcesses, RunStatus, StudyFolder

    asked = {"--cpus-a-run": cpus_a_run, "--gpus-a-run": gpus_a_run, "--memory-gb-a-run": memory_gb_a_run}
    if cluster is None:
        check_device(device)
        for option, value in asked.items():
            if value is not None:
                raise typer.BadParameter(f"{option} needs --cluster")
    chosen, beside = _load(study)
    folder = StudyFolder(out)
    folder.check(chosen, size)
    known, at_once = _size(chosen, size), _jobs(jobs, cluster)
    with Terminal() as terminal, ExitStack() as stack:
        launcher: Launcher
        derive = AutoRecipes(folder.path, device, terminal.progress)
        if cluster is None:
            places = _places(chosen, data, phantom, known, out / "data")
            launcher = LocalProcesses()
            if at_once is None:
                first = plan_runs(chosen, known, _opened(chosen, beside, places), beside, derive=derive)
                at_once = _room(_tried(first.runs, places, device, terminal))
                terminal.say(f"runs at a time that this machine has room for: {at_once}")
            options = ["--device", device]
            if at_once > 1:  # otherwise every process would use all cores
                options += ["--threads", str(max(1, usable_cores() // at_once))]
        else:
            from delineate.cluster import Request, connected
            from delineate.studies.cluster import RayCluster

            gpus = 0.0 if gpus_a_run is None and device == "cpu" else gpus_a_run
            requested = Request(cpus_a_run or 1, gpus, memory_gb_a_run or 0.0)
            workers = RayCluster(stack.enter_context(connected(cluster)), requested)
            folder = StudyFolder(out.resolve())
            places = _places(chosen, data, phantom, known, folder.path / "data")
            places = {name: place.resolve() for name, place in places.items()}
            workers.check_folders(folder.path, tuple(places.values()))
            launcher, options = workers, workers.options(device)
            at_once = at_once or min(workers.room, _MOST_JOBS)
            terminal.say(f"runs at a time that the cluster has room for: {workers.room}")
        datasets = _opened(chosen, beside, places)
        # A quick run is over before compiling its network has paid off.
        options += ["--compile", "off" if size == "quick" else "auto"]

        plans: list[Plan] = []

        def on_plan(planned: Plan) -> None:
            plans.append(planned)
            terminal.say(f"{len(planned.runs)} runs; {_expected(planned.runs)}")
            for line in planned.pending:
                terminal.say(f"later: {line}")

        def on_change(planned: PlannedRun, status: RunStatus) -> None:
            names = [entry.name for entry in folder.open_plan().runs]
            done = sum(folder.status(name).state == "done" for name in names)
            text = f"{planned.name}: {status.state}" + (f": {status.failure}" if status.failure else "")
            (terminal.say_failure if status.state == "failed" else terminal.say)(text)
            terminal.progress("runs", done, len(names))

        def reported() -> tuple[StudyResults, Path]:
            planned, runs = folder.open()
            results = collect(folder, chosen, runs)
            draw_pictures(results, folder, datasets, terminal.say_failure)
            return results, write_study_report(results, out, size=size, data_sets=planned.data_sets)

        try:
            _, finished = conduct(
                chosen,
                size,
                datasets,
                places,
                folder,
                launcher,
                beside=beside,
                derive=derive,
                final=final,
                only=only,
                jobs=at_once,
                options=options,
                on_plan=on_plan,
                on_change=on_change,
            )
        except BaseException:
            if plans:  # otherwise it was refused, and changes nothing
                reported()
            raise
        results, page = reported()
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
    page = write_study_report(results, folder, size=planned.size, data_sets=planned.data_sets)
    if json:
        print_json({"runs": {n: s.state for n, s in results.statuses.items()}, "report": str(page)})
    else:
        _print(results, page)


def _load(name: str) -> tuple[Study, Path]:
    """A study, and the folder that its recipes' paths are relative to."""
    from delineate.studies.specification import load_study, study_file

    return load_study(name), study_file(name).parent


def _size(study: Study, name: str) -> Size:
    from delineate.errors import StudyError

    known = study.sizes.get(name)  # type: ignore[call-overload]
    if known is None:
        raise StudyError(f"study '{study.name}' has no size {name}", fix=f"its sizes are {', '.join(study.sizes)}")
    return known


def _places(study: Study, given: list[str] | None, phantom: bool, size: Size, simulated: Path) -> dict[str, Path]:
    """The folder of each data set: as given, or simulated if ``phantom``."""
    from delineate.cli.terminal import Terminal
    from delineate.errors import StudyError
    from delineate.studies.phantoms import simulate

    places: dict[str, Path] = {}
    for text in given or []:
        name, sign, rest = text.partition("=")
        name, place = (name, rest) if sign and name in study.data else (next(iter(study.data)), text)
        if name in places:
            raise typer.BadParameter(f"--data gives '{name}' twice")
        places[name] = Path(place)
    for name, data in study.data.items():
        if name in places:
            continue
        if not phantom:
            raise StudyError(
                f"the study needs data set '{name}'{f' ({data.description})' if data.description else ''}",
                fix=f"give --data {name + '=' if len(study.data) > 1 else ''}FOLDER"
                + (", or --phantom" if data.phantom else ""),
            )
        if data.phantom is None:
            raise StudyError(
                f"study '{study.name}' does not say which scans to simulate for '{name}'", fix="give --data"
            )
        places[name] = simulated / name if len(study.data) > 1 else simulated
        with Terminal() as terminal:
            told = partial(terminal.progress, f"simulating '{name}'" if len(study.data) > 1 else "simulating")
            simulate(data.phantom, size, name, places[name], told)
    return {name: places[name] for name in study.data}


def _opened(study: Study, beside: Path, places: dict[str, Path]) -> dict[str, Dataset]:
    """The data sets, each read as the recipe of the first arm on it says."""
    from delineate.studies.planning import data_of_arm

    found: dict[str, Dataset] = {}
    for stage in study.parts:
        for arm in stage.compared.values():
            name = study.data_of(stage, arm)
            if name not in found and arm.weights_of is None:
                found[name] = data_of_arm(study, stage, arm, beside).open(places[name])
    for name, place in places.items():  # only tested on
        if name not in found:
            first = study.parts[0]
            found[name] = data_of_arm(study, first, next(iter(first.compared.values())), beside).open(place)
    return found


def _jobs(text: str | None, cluster: str | None) -> int | None:
    """How many runs at a time; None if it is still to be found out."""
    if text == "auto" or (text is None and cluster is not None):
        return None
    if text is not None and not (text.isdecimal() and 1 <= int(text) <= _MOST_JOBS):
        raise typer.BadParameter(f"--jobs takes auto or a number from 1 to {_MOST_JOBS}, not '{text[:40]}'")
    return int(text or 1)


def _tried(
    runs: Sequence[PlannedRun], places: dict[str, Path], device: str, terminal: Terminal
) -> dict[str, Trial | DelineateError]:
    """What trial steps of each arm's first training took; a failing trial stops no other."""
    from delineate.errors import DelineateError
    from delineate.studies.trials import try_recipe

    first: dict[str, PlannedRun] = {}
    for run in runs:
        if run.weights_of is None:
            first.setdefault(run.label, run)
    found: dict[str, Trial | DelineateError] = {}
    for done, (label, run) in enumerate(first.items(), start=1):
        # The weights that it would start from are not there yet, and change neither time nor memory.
        recipe = run.recipe.model_copy(update={"start": None})
        try:
            found[label] = try_recipe(recipe, places[run.data], run.split, run.fold, device=device)
        except DelineateError as error:
            found[label] = error
            terminal.say_failure(f"{label}: {error}")
        terminal.progress("trials", done, len(first))
    return found


def _room(tried: dict[str, Trial | DelineateError]) -> int:
    """How many runs fit into what is free of this machine's memory, and its cores, by trials of their arms."""
    from delineate.core.limits import available_memory_bytes, usable_cores
    from delineate.studies.trials import Trial, jobs_within

    good = [trial for trial in tried.values() if isinstance(trial, Trial)]
    return min(jobs_within(good, available_memory_bytes() / 1e9, usable_cores()), _MOST_JOBS)


def _trial_rows(tried: dict[str, Trial | DelineateError], runs: Sequence[PlannedRun]) -> list[dict[str, Any]]:
    """Plain values: of each arm its number of trainings, and the trial or the error."""
    from dataclasses import asdict

    from delineate.studies.trials import Trial

    counts = Counter(run.label for run in runs if run.weights_of is None)
    return [
        {"arm": arm, "runs": counts[arm], **(asdict(found) if isinstance(found, Trial) else {"error": str(found)})}
        for arm, found in tried.items()
    ]


def _print_trials(tried: list[dict[str, Any]]) -> None:
    from delineate.cli.terminal import print_table
    from delineate.studies.trials import duration

    good = [row for row in tried if "error" not in row]
    rows = [
        [row["arm"], str(row["runs"]), f"{row['seconds_a_step']:.3g} s", str(row["total_steps"] or ""),
         f"{row['peak_gb']:.1f} GB", duration(60 * row["expected_minutes"])]
        for row in good
    ]  # fmt: skip
    print_table("three trial steps of each arm", ["arm", "runs", "a step", "steps", "memory", "a run"], rows)
    total = sum(60 * row["expected_minutes"] * row["runs"] for row in good)
    typer.echo(f"expected on this machine, one run after another: {duration(total)}")
    if failed := [str(row["arm"]) for row in tried if "error" in row]:
        typer.echo(f"without {', '.join(failed)}, whose trials failed")


def _budget(recipe: Recipe) -> str:
    training = recipe.training
    budget = {"minutes": training.minutes, "steps": training.steps, "epochs": training.epochs}
    return ", ".join(f"{limit:g} {unit}" for unit, limit in budget.items() if limit is not None) or "none"


def _expected(runs: Sequence[PlannedRun]) -> str:
    """The training time that the recipes allow, if they all limit it."""
    minutes = [run.recipe.training.minutes for run in runs if run.weights_of is None]
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
    for lines in results.findings.values():
        for line in lines:
            typer.echo(line)
    typer.echo(f"{results.done} of {len(results.runs)} runs are done; report  {page}")
