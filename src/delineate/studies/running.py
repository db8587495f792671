"""Run a study, each run in a process of its own; resume, retry, and keep what is done.

A study folder::

    OUT/
        plan.json             the study, its size and its runs
        recipes/NAME.yaml     the recipe of each run
        splits/NAME.json      and its split
        auto/DATA-BUDGET.yaml what `auto` derived, with the reasons
        runs/NAME/            what `delineate train` or `delineate test` writes
        runs/NAME.json        the state of the run, and why it failed
        runs/NAME.log         its messages
        final.json            when the locked test began, and of which runs it consists
        pictures/             one subject under every arm
        report.html, results.csv, differences.csv, runs.csv
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, Protocol

from pydantic import AwareDatetime, Field

from delineate.datasets.series_rules import SeriesRule
from delineate.datasets.splits import load_split, save_split
from delineate.errors import MissingFile, OutputError, StudyError
from delineate.io.documents import Document
from delineate.io.files import writing_beside
from delineate.io.overwriting import check_folder
from delineate.recipe import DataSpec, load_recipe, to_yaml
from delineate.studies.designs import Entry, PlannedRun
from delineate.studies.planning import Rankings, Scores
from delineate.studies.processes import Ended, end_of, start
from delineate.studies.specification import Study
from delineate.training.lock import in_use

_MOST_LOST = 4
"""A run is repeated until it has lost this many workers: it may be what kills them, by its memory for example."""

State = Literal["waiting", "running", "done", "failed", "stopped"]

PLAN, FINAL = "plan.json", "final.json"
_WRITTEN = (
    PLAN,
    "recipes",
    "splits",
    "runs",
    FINAL,
    "report.html",
    "results.csv",
    "differences.csv",
    "runs.csv",
    "pictures",
)


_MOST_SAID = 500
"""Characters of a run's error that a study repeats."""


class StudyPlan(Document):
    """A study folder's ``plan.json``: the study, its size, its data sets by name, and the runs in order.

    ``scores``: what later stages and trials were planned from. ``rankings``: in which order subjects are moved.
    """

    study: Study
    size: str
    data_sets: dict[str, str]
    runs: tuple[Entry, ...]
    scores: dict[str, float | None] = Field(default_factory=dict)
    rankings: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class FinalTest(Document):
    """A study folder's ``final.json``: when the locked test began, and of which runs it consists."""

    began: AwareDatetime
    runs: tuple[str, ...]


class RunStatus(Document):
    """The state of a run.

    ``failure`` is what the last error of a failed run said; ``seconds`` is the time of all its attempts, ``peak_gb``
    the most memory that its process held.
    """

    state: State
    failure: str = ""
    seconds: float = 0.0
    attempts: int = 0
    peak_gb: Annotated[float, Field(ge=0)] = 0.0


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

    @property
    def begun(self) -> bool:
        """Whether there is a study in the folder."""
        return (self.path / PLAN).exists()

    def open_plan(self) -> StudyPlan:
        """The plan of the study in the folder. Raises :class:`MissingFile` if there is none."""
        if not self.begun:
            raise MissingFile(f"'{self.path}' holds no study", fix="give a folder that `delineate study run` wrote")
        return StudyPlan.read(self.path / PLAN)

    def open(self) -> tuple[StudyPlan, tuple[PlannedRun, ...]]:
        """The study in the folder, with its runs. Raises :class:`MissingFile` if there is none."""
        plan = self.open_plan()
        runs = (
            PlannedRun(
                recipe=load_recipe(self.recipe(entry.name)), split=load_split(self.split(entry.name)), **vars(entry)
            )
            for entry in plan.runs
        )
        return plan, tuple(runs)

    def check(self, study: Study, size: str) -> None:
        """Raise :class:`StudyError` if the folder holds another study, or this one at another size.

        Raises :class:`OutputError` if it cannot be written to, or holds files that no study wrote.
        """
        check_folder(self.path)
        there = [name for name in _WRITTEN if os.path.lexists(self.path / name)]
        if there and PLAN not in there:
            raise OutputError(
                f"'{self.path}' holds {', '.join(there)}, but no study", fix="choose another --out, or move them away"
            )
        if self.begun:
            before = self.open_plan()
            if (before.study, before.size) != (study, size):
                raise self._another()

    def _another(self) -> StudyError:
        return StudyError(
            f"'{self.path}' holds another study, or this one at another size, on other data or with recipes "
            "that have changed since",
            fix="use another --out",
        )

    def scores(self) -> dict[str, float | None]:
        """What the study in the folder has been planned from; nothing if there is none."""
        return dict(self.open_plan().scores) if self.begun else {}

    def rankings(self) -> dict[str, tuple[str, ...]]:
        """The orders of subjects that the study in the folder has been planned from; none if there is no study."""
        return dict(self.open_plan().rankings) if self.begun else {}

    def begin(
        self,
        study: Study,
        size: str,
        data_sets: Mapping[str, str],
        runs: Sequence[PlannedRun],
        scores: Scores,
        rankings: Rankings = MappingProxyType({}),
    ) -> None:
        """Write the plan, and the recipe and split of each run, or check that they are the same.

        Runs that the plan in the folder does not have yet are added. Raises :class:`StudyError` if the folder holds
        another study, and :class:`OutputError` if it holds something else.
        """
        self.check(study, size)
        entries = {run.name: run.entry for run in runs}
        before = self.open_plan() if self.begun else None
        same = True
        if before is not None:
            kept = {entry.name: entry for entry in before.runs}
            left_out = study.locked_stages  # without --final
            alike = [entries.get(n, e if e.stage in left_out else None) == e for n, e in kept.items()]
            same = before.data_sets == dict(data_sets) and all(alike)
            entries = kept | entries
        plan = StudyPlan(
            study=study,
            size=size,
            data_sets=dict(data_sets),
            runs=tuple(entries.values()),
            scores=dict(scores),
            rankings=dict(rankings),
        )
        for run in runs:
            recipe, split = self.recipe(run.name), self.split(run.name)
            same = same and (not recipe.exists() or load_recipe(recipe) == run.recipe)
            same = same and (not split.exists() or load_split(split) == run.split)
        if not same:
            raise self._another()
        if plan != before:
            plan.write(self.path / PLAN)
        for run in runs:
            recipe, split = self.recipe(run.name), self.split(run.name)
            if not recipe.exists():
                with writing_beside(recipe) as beside:
                    beside.write_text(to_yaml(run.recipe.as_dict()), encoding="utf-8")
            if not split.exists():
                save_split(split, run.split)

    def begin_final(self, runs: Sequence[str]) -> None:
        """Record that the locked test begins. Raises :class:`StudyError` if it is over, or was of other runs."""
        path = self.path / FINAL
        if not path.exists():
            FinalTest(began=datetime.now(UTC), runs=tuple(runs)).write(path)
            return
        final = FinalTest.read(path)
        over = all(self.status(name).state == "done" for name in final.runs)
        if over or set(final.runs) != set(runs):
            raise StudyError(
                f"the locked test of '{self.path}' was done on {final.began:%Y-%m-%d}: a second look would be "
                "training on it",
                fix="see the report, or lock other subjects away in a new study",
            )


class Launcher(Protocol):
    """Where the processes of a study run."""

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        """Run ``delineate`` with the arguments of ``command`` to its end, appending its messages to ``log``."""

    def stop(self) -> None:
        """Ask every process to stop so that it can be resumed."""


@dataclass
class LocalProcesses:
    """Processes on this machine. A signal that ends the study ends them too; each leaves a run that can be resumed."""

    processes: set[subprocess.Popen] = field(default_factory=set)
    stopping: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        process = start(command, log)
        with self.lock:
            self.processes.add(process)
            if self.stopping:
                process.send_signal(signal.SIGTERM)
        ended = end_of(process)
        with self.lock:
            self.processes.discard(process)
        return ended

    def stop(self) -> None:
        with self.lock:
            self.stopping = True
            for process in self.processes:
                with suppress(ProcessLookupError):
                    process.send_signal(signal.SIGTERM)


def run_study(
    folder: StudyFolder,
    runs: Sequence[PlannedRun],
    data: Mapping[str, Path],
    launcher: Launcher,
    *,
    jobs: int = 1,
    options: Sequence[str] = (),
    on_change: Callable[[PlannedRun, RunStatus], None] = lambda run, status: None,
) -> bool:
    """Run what is not done, ``jobs`` runs at a time; a run that fails stops none but those that need it.

    ``options`` are passed to every command. ``on_change`` is called when a run starts or ends. Runs that need one
    which is neither done nor among ``runs`` wait. Returns whether all runs are done. SIGINT and SIGTERM stop the
    running ones so that they can be resumed, and raise KeyboardInterrupt.
    """
    stopping = threading.Event()

    def one(run: PlannedRun, before: RunStatus) -> None:
        log, began, lost = folder.log(run.name), time.monotonic(), 0
        while True:
            # A run that a killed study left behind finishes by itself; the command below then finds it complete.
            while in_use(folder.run(run.name)) and not stopping.wait(1.0):
                pass
            known = log.stat().st_size if log.exists() else 0
            ended = launcher(_command(folder, run, data[run.data], options), log)
            if not ended.lost or stopping.is_set():
                break
            lost += 1
            with log.open("a", encoding="utf-8") as file:
                file.write(f"the worker of this run was lost{'; it is repeated elsewhere' * (lost < _MOST_LOST)}\n")
            if lost == _MOST_LOST:
                break
        stopped = stopping.is_set() or ended.code == 3
        state: State = "done" if ended.code == 0 else "stopped" if stopped else "failed"
        changes = {
            "state": state,
            "seconds": before.seconds + time.monotonic() - began,
            "failure": _last_words(log, known, ended.code) if state == "failed" else "",
            "peak_gb": max(before.peak_gb, ended.peak_gb),
        }
        _change(run, before.model_copy(update=changes))

    def _change(run: PlannedRun, status: RunStatus) -> None:
        status.write(folder.status_file(run.name))
        on_change(run, status)

    waiting = [run for run in runs if folder.status(run.name).state != "done"]
    running: set[Future[None]] = set()
    with _stopping(stopping, launcher), ThreadPoolExecutor(jobs) as pool:
        while waiting or running:
            for run in list(waiting):
                if stopping.is_set() or len(running) >= jobs:
                    break
                before, needed = folder.status(run.name), run.needs and folder.status(run.needs).state
                if needed == "failed" and run.needs not in {other.name for other in waiting}:
                    waiting.remove(run)
                    _change(run, before.model_copy(update={"state": "failed", "failure": f"{run.needs} failed"}))
                elif needed in (None, "done"):
                    waiting.remove(run)
                    begun = {"state": "running", "attempts": before.attempts + 1, "failure": ""}
                    before = before.model_copy(update=begun)
                    _change(run, before)
                    running.add(pool.submit(one, run, before))
            if not running:
                break  # the rest needs runs of others
            # Without a timeout, a signal would be noticed at the end of a run only.
            done, running = wait(running, timeout=0.2, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
    if stopping.is_set():
        raise KeyboardInterrupt
    return all(folder.status(run.name).state == "done" for run in runs)


def _command(folder: StudyFolder, run: PlannedRun, data: Path, options: Sequence[str]) -> list[str]:
    """The arguments of ``delineate`` that train or test one run."""
    places = ["--data", str(data), "--out", str(folder.run(run.name)), "--fold", str(run.fold)]
    places += ["--split", str(folder.split(run.name))]
    if run.weights_of is not None:
        changes = [part for change in run.changes for part in ("--set", change)]
        return ["test", str(folder.run(run.weights_of)), *places, *_reading(run.recipe.data), *changes, *options]
    start = []
    if run.start_from is not None:
        start = ["--set", f"start.weights={folder.run(run.start_from).resolve()}"]
    return ["train", str(folder.recipe(run.name)), *places, *start, *options]


def _reading(data: DataSpec) -> list[str]:
    """How a test reads its data set, which may be another than that of the network's own recipe."""
    named = {} if data.images is None or isinstance(data.images, str) else data.images
    images = [data.images] if isinstance(data.images, str) else [f"{c}={_written(p)}" for c, p in named.items()]
    found = ["--layout", data.layout, *(part for pattern in images for part in ("--images", pattern))]
    return [*found, *(["--labels", _written(data.labels)] if data.labels else [])]


def _written(rule: str | SeriesRule) -> str:
    """A pattern, or a rule as options take it."""
    return rule if isinstance(rule, str) else rule.model_dump_json(exclude_defaults=True)


def _last_words(log: Path, known: int, code: int) -> str:
    """What a run's last error said, or else the signal that ended it and its last line.

    The first ``known`` bytes of its log are of earlier attempts.
    """
    written = log.read_bytes()[known:] if log.exists() else b""
    lines = written.decode(errors="replace").strip().splitlines()
    errors = [i for i, line in enumerate(lines) if line.startswith("error E_")]
    said = " ".join(" ".join(lines[errors[-1] if errors else -1 :]).split())
    if code < 0 and not errors:
        said = ": ".join(filter(None, [f"killed by signal {-code} ({signal.strsignal(-code)})", said]))
    said = said if len(said) <= _MOST_SAID else f"{said[:_MOST_SAID]} …"
    return said or f"it ended with status {code}"


@contextmanager
def _stopping(stopping: threading.Event, launcher: Launcher) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        stopping.set()
        launcher.stop()

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number in before:
            signal.signal(number, stop)
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
