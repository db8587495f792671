"""Run a study, each run in a process of its own; resume, retry, and keep what is done.

A study folder::

    OUT/
        plan.json             the study, its size and its runs
        recipes/NAME.yaml     the recipe of each run
        splits/NAME.json      and its split
        runs/NAME/            what `delineate train` writes
        runs/NAME.json        the state of the run, and why it failed
        runs/NAME.log         its messages
        report.html, results.csv, differences.csv
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from delineate.datasets.splits import load_split, save_split
from delineate.errors import MissingFile, OutputError, StudyError
from delineate.io.documents import Document
from delineate.io.files import writing_beside
from delineate.io.overwriting import check_folder
from delineate.recipe import load_recipe, to_yaml
from delineate.studies.planning import PlannedRun
from delineate.studies.specification import Study
from delineate.training.lock import in_use

State = Literal["waiting", "running", "done", "failed", "stopped"]

PLAN = "plan.json"
_WRITTEN = (PLAN, "recipes", "splits", "runs", "report.html", "results.csv", "differences.csv")


@dataclass(frozen=True)
class Entry:
    """A run by name; its recipe and split are in files of that name."""

    name: str
    arm: str
    seed: int
    fold: int
    count: int | None
    direction: str


class StudyPlan(Document):
    """A study folder's ``plan.json``: the study, its size, the data set, and the runs in order."""

    study: Study
    size: str
    data_set: str
    runs: tuple[Entry, ...]


class RunStatus(Document):
    """The state of a run.

    ``failure`` is the last line that a failed run printed; ``seconds`` is the time of all its attempts.
    """

    state: State
    failure: str = ""
    seconds: float = 0.0
    attempts: int = 0


@dataclass(frozen=True)
class StudyFolder:
    """The files of a study."""

    path: Path

    def run(self, name: str) -> Path:
        """A run's own folder."""
        return self.path / "runs" / name

    def status_file(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.json"

    def log(self, name: str) -> Path:
        return self.path / "runs" / f"{name}.log"

    def recipe(self, name: str) -> Path:
        return self.path / "recipes" / f"{name}.yaml"

    def split(self, name: str) -> Path:
        return self.path / "splits" / f"{name}.json"

    def status(self, name: str) -> RunStatus:
        """The state of a run so far."""
        path = self.status_file(name)
        return RunStatus.read(path) if path.exists() else RunStatus(state="waiting")

    def open(self) -> tuple[StudyPlan, tuple[PlannedRun, ...]]:
        """The study in the folder, with its runs. Raises :class:`MissingFile` if there is none."""
        if not (self.path / PLAN).exists():
            raise MissingFile(f"'{self.path}' holds no study", fix="give a folder that `delineate study run` wrote")
        plan = StudyPlan.read(self.path / PLAN)
        runs = (
            PlannedRun(
                entry.name,
                entry.arm,
                entry.seed,
                entry.fold,
                load_recipe(self.recipe(entry.name)),
                load_split(self.split(entry.name)),
                entry.count,
                entry.direction,
            )
            for entry in plan.runs
        )
        return plan, tuple(runs)

    def check(self) -> None:
        """Raise :class:`OutputError` if the folder cannot be written to, or holds files that no study wrote."""
        check_folder(self.path)
        there = [name for name in _WRITTEN if os.path.lexists(self.path / name)]
        if there and PLAN not in there:
            raise OutputError(
                f"'{self.path}' holds {', '.join(there)}, but no study", fix="choose another --out, or move them away"
            )

    def begin(self, study: Study, size: str, data_set: str, runs: Sequence[PlannedRun]) -> None:
        """Write the plan, and the recipe and split of each run, or check that they are the same.

        Raises :class:`StudyError` if the folder holds another study, and :class:`OutputError` if it holds
        something else.
        """
        self.check()
        entries = (Entry(r.name, r.arm, r.seed, r.fold, r.count, r.direction) for r in runs)
        plan = StudyPlan(study=study, size=size, data_set=data_set, runs=tuple(entries))
        if not (self.path / PLAN).exists():
            plan.write(self.path / PLAN)
        same = StudyPlan.read(self.path / PLAN) == plan
        for run in runs:
            recipe, split = self.recipe(run.name), self.split(run.name)
            if same and not recipe.exists():
                with writing_beside(recipe) as beside:
                    beside.write_text(to_yaml(run.recipe.as_dict()), encoding="utf-8")
            if same and not split.exists():
                save_split(split, run.split)
            same = same and load_recipe(recipe) == run.recipe and load_split(split) == run.split
        if not same:
            raise StudyError(
                f"'{self.path}' holds another study, or this one at another size, on other data or with recipes "
                "that have changed since",
                fix="use another --out",
            )


@dataclass
class _Children:
    """Running processes. A signal that ends the study ends them too; each leaves a run that can be resumed."""

    processes: set[subprocess.Popen] = field(default_factory=set)
    stopping: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stop(self) -> None:
        self.stopping.set()
        with self.lock:
            for process in self.processes:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)


def run_study(
    folder: StudyFolder,
    runs: Sequence[PlannedRun],
    data: Path,
    *,
    jobs: int = 1,
    options: Sequence[str] = (),
    on_change: Callable[[PlannedRun, RunStatus], None] = lambda run, status: None,
) -> bool:
    """Run what is not done, ``jobs`` runs at a time; a run that fails does not stop the others.

    ``options`` are passed to every `delineate train`. ``on_change`` is called when a run starts or ends. Returns
    whether all runs are done. SIGINT and SIGTERM stop the running ones so that they can be resumed, and raise
    KeyboardInterrupt.
    """
    children = _Children()

    def one(run: PlannedRun) -> RunStatus:
        before = folder.status(run.name)
        if before.state == "done" or children.stopping.is_set():
            return before
        status = before.model_copy(update={"state": "running", "attempts": before.attempts + 1, "failure": ""})
        status.write(folder.status_file(run.name))
        on_change(run, status)
        began = time.monotonic()
        code, last = _train(folder, run, data, options, children)
        state: State = "done" if code == 0 else "stopped" if children.stopping.is_set() or code == 3 else "failed"
        seconds = before.seconds + time.monotonic() - began
        status = status.model_copy(
            update={"state": state, "seconds": seconds, "failure": last if state == "failed" else ""}
        )
        status.write(folder.status_file(run.name))
        on_change(run, status)
        return status

    with _stopping(children), ThreadPoolExecutor(jobs) as pool:
        waiting: set[Future[RunStatus]] = {pool.submit(one, run) for run in runs}
        found: list[RunStatus] = []
        while waiting:
            # Without a timeout, a signal would be noticed at the end of a run only.
            done, waiting = wait(waiting, timeout=0.2, return_when=FIRST_COMPLETED)
            found += [future.result() for future in done]
    if children.stopping.is_set():
        raise KeyboardInterrupt
    return all(status.state == "done" for status in found)


def _train(
    folder: StudyFolder, run: PlannedRun, data: Path, options: Sequence[str], children: _Children
) -> tuple[int, str]:
    """Train one run in a process of its own; return its exit status and the last line that it printed."""
    # A run that a killed study left behind finishes by itself; the command below then finds it complete.
    while in_use(folder.run(run.name)) and not children.stopping.wait(1.0):
        pass
    command = [
        sys.executable, "-m", "delineate", "train", str(folder.recipe(run.name)), "--data", str(data),
        "--out", str(folder.run(run.name)), "--fold", str(run.fold), "--split", str(folder.split(run.name)), *options,
    ]  # fmt: skip
    path = folder.log(run.name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as log:
        # In a session of its own: a Ctrl-C reaches it once, through us.
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
        with children.lock:
            children.processes.add(process)
        if children.stopping.is_set():
            process.send_signal(signal.SIGTERM)
        try:
            code = process.wait()
        finally:
            with children.lock:
                children.processes.discard(process)
    lines = path.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return code, next((line for line in reversed(lines) if line.strip()), f"it ended with status {code}")


@contextmanager
def _stopping(children: _Children) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, lambda *_: children.stop())
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def part_of(runs: Sequence[PlannedRun], only: str) -> tuple[PlannedRun, ...]:
    """The runs of part ``i/n``, counted from 1, for one task of a job array. Raises :class:`StudyError`."""
    index, _, parts = only.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and 1 <= int(index) <= int(parts) <= 10**6):
        raise StudyError(f"'{only[:40]}' is no part of the runs", fix="write for example --only 2/5")
    return tuple(runs[int(index) - 1 :: int(parts)])
