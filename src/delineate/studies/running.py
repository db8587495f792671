"""Runs of a study, one process each: started, resumed, retried, and left as they were found.

A study's folder::

    OUT/
        study.yaml, plan.json what it is, and its runs; the same command resumes them
        recipes/NAME.yaml     each run's recipe
        splits/NAME.json      and who is held out
        runs/NAME/            what `delineate train` leaves
        runs/NAME.json        whether it is done, failed (and why) or under way
        runs/NAME.log         what it said
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
from delineate.studies.specification import Study, load_study
from delineate.training.lock import in_use

State = Literal["waiting", "running", "done", "failed", "stopped"]

STUDY, PLAN = "study.yaml", "plan.json"
_WRITTEN = (STUDY, PLAN, "recipes", "splits", "runs", "report.html", "results.csv", "differences.csv")


@dataclass(frozen=True)
class Entry:
    """A run by name; its recipe and split lie in files of that name."""

    name: str
    arm: str
    seed: int
    fold: int
    count: int | None
    direction: str


class StudyPlan(Document):
    """A study's ``plan.json``: at which size it is run, on which data set, and its runs in order."""

    size: str
    data_set: str
    runs: tuple[Entry, ...]


class RunStatus(Document):
    """What became of a run.

    ``failure`` is the last line that a failed run said; ``seconds`` are of all its attempts.
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
        """What became of a run so far."""
        path = self.status_file(name)
        return RunStatus.read(path) if path.exists() else RunStatus(state="waiting")

    def open(self) -> tuple[Study, StudyPlan, tuple[PlannedRun, ...]]:
        """The study that the folder holds, with its runs. Raises :class:`MissingFile` where it holds none."""
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
        return load_study(self.path / STUDY), plan, tuple(runs)

    def check(self) -> None:
        """Raise :class:`OutputError` where the folder cannot be written to or holds what is no study's."""
        check_folder(self.path)
        there = [name for name in _WRITTEN if os.path.lexists(self.path / name)]
        if there and PLAN not in there:
            raise OutputError(
                f"'{self.path}' holds {', '.join(there)}, and no study", fix="choose another --out, or move them away"
            )

    def begin(self, study: Study, size: str, data_set: str, runs: Sequence[PlannedRun]) -> None:
        """Write the study, its plan, and each run's recipe and split, or find that they are there.

        Raises :class:`StudyError` where the folder holds another study, and :class:`OutputError` where it holds
        something else.
        """
        entries = (Entry(r.name, r.arm, r.seed, r.fold, r.count, r.direction) for r in runs)
        plan = StudyPlan(size=size, data_set=data_set, runs=tuple(entries))
        self.check()
        if (self.path / PLAN).exists():
            if self.open() != (study, plan, tuple(runs)):
                raise StudyError(
                    f"'{self.path}' holds another study, or this one at another size, on other data or with recipes "
                    "that have changed since",
                    fix="use another --out",
                )
            return
        texts = {self.path / STUDY: to_yaml(study.model_dump(mode="json"))}
        texts |= {self.recipe(run.name): to_yaml(run.recipe.as_dict()) for run in runs}
        for path, text in texts.items():
            with writing_beside(path) as beside:
                beside.write_text(text, encoding="utf-8")
        for run in runs:
            save_split(self.split(run.name), run.split)
        plan.write(self.path / PLAN)  # last: a folder with a plan is whole


@dataclass
class _Children:
    """Processes under way, which a signal that ends the study ends, too: each leaves a run that resumes."""

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
    said: Callable[[PlannedRun, RunStatus], None] = lambda run, status: None,
) -> bool:
    """Run what is not done, ``jobs`` at a time; a run that fails does not stop the others.

    ``options`` are given to every `delineate train`. ``said`` is told of each run that starts or ends. Returns whether
    all are done.
    On SIGINT and SIGTERM the runs under way are stopped where they can resume, and KeyboardInterrupt is raised.
    """
    children = _Children()

    def one(run: PlannedRun) -> RunStatus:
        before = folder.status(run.name)
        if before.state == "done" or children.stopping.is_set():
            return before
        status = before.model_copy(update={"state": "running", "attempts": before.attempts + 1, "failure": ""})
        status.write(folder.status_file(run.name))
        said(run, status)
        began = time.monotonic()
        code, last = _train(folder, run, data, options, children)
        state: State = "done" if code == 0 else "stopped" if children.stopping.is_set() or code == 3 else "failed"
        seconds = before.seconds + time.monotonic() - began
        status = status.model_copy(
            update={"state": state, "seconds": seconds, "failure": last if state == "failed" else ""}
        )
        status.write(folder.status_file(run.name))
        said(run, status)
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
    """Train one run in a process of its own; returns its exit status and the last line that it said."""
    # One that a killed study left behind ends by itself; training it again then finds it done.
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
    """Runs of part ``i/n``, counted from 1, as the tasks of a job array take them. Raises :class:`StudyError`."""
    index, _, parts = only.partition("/")
    if not (index.isdecimal() and parts.isdecimal() and 1 <= int(index) <= int(parts) <= 10**6):
        raise StudyError(f"'{only[:40]}' is no part of the runs", fix="write for example --only 2/5")
    return tuple(runs[int(index) - 1 :: int(parts)])
