"""Carry a study out: plan what can be planned, run it, and plan further from its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from delineate.datasets.dataset import Dataset
from delineate.studies.deriving import AutoRecipes, Derive
from delineate.studies.designs import PlannedRun
from delineate.studies.ordering import by_distance, by_uncertainty
from delineate.studies.planning import Plan, plan_runs
from delineate.studies.results import collect
from delineate.studies.running import Launcher, RunStatus, StudyFolder, part_of, run_study
from delineate.studies.specification import Study


def conduct(
    study: Study,
    size: str,
    datasets: Mapping[str, Dataset],
    data: Mapping[str, Path],
    folder: StudyFolder,
    launcher: Launcher,
    *,
    beside: Path = Path(),
    derive: Derive | None = None,
    final: bool = False,
    only: str | None = None,
    jobs: int = 1,
    options: Sequence[str] = (),
    on_plan: Callable[[Plan], None] = lambda plan: None,
    on_change: Callable[[PlannedRun, RunStatus], None] = lambda run, status: None,
) -> tuple[Plan, bool]:
    """Run a study as far as it goes: the plan in the end, and whether all of its runs are done.

    Stages, trials and orders of subjects that build on results are planned from the scores and rankings that the folder
    keeps, so that a study that is resumed makes the same choices. By default, it keeps what ``derive`` makes as well.
    ``on_plan`` is called with each plan that has new runs; for the rest, see
    :func:`~delineate.studies.running.run_study`.
    """
    derive = derive or AutoRecipes(folder.path)
    scores, rankings = folder.scores(), folder.rankings()
    names = {name: dataset.name for name, dataset in datasets.items()}
    locked = study.locked_stages
    attempted: set[str] = set()  # here or, with `only`, by the other parts of a job array
    tried: set[str] = set()  # here
    finished = True
    while True:
        known = study.sizes[size]  # type: ignore[index]
        plan = plan_runs(study, known, datasets, beside, scores=scores, rankings=rankings, final=final, derive=derive)
        folder.begin(study, size, names, plan.runs, scores, rankings)
        if plan.comparisons:
            rankings |= {one.name: by_distance(one, datasets[one.data]) for one in plan.comparisons}
            continue
        finals = [run.name for run in plan.runs if run.stage in locked]
        if finals and not attempted & set(finals):
            folder.begin_final(finals)
        fresh = [run for run in plan.runs if run.name not in attempted]
        mine = fresh if only is None else part_of(fresh, only)
        if not fresh:
            return plan, finished
        on_plan(plan)
        finished = run_study(folder, mine, data, launcher, jobs=jobs, options=options, on_change=on_change) and finished
        attempted |= {run.name for run in fresh}
        tried |= {run.name for run in mine}  # what failed elsewhere may be repeated there just now
        scores = collect(folder, study, plan.runs).scores(tried) | scores
        for run in plan.runs:
            if run.ranks and run.name not in rankings and folder.status(run.name).state == "done":
                rankings[run.name] = by_uncertainty(folder.run(run.name), run.split.held_out(run.fold))
