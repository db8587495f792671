"""How a recipe is run, and where the run reports what happens."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from importlib.util import find_spec
from pathlib import Path

from delineate.compute import Compile, Precision, check_device
from delineate.core.text import printable_lines
from delineate.errors import RecipeError
from delineate.io.files import appending
from delineate.training.events import MESSAGES, Cause, Event, append_event, drop_unfinished

Say = Callable[[str], None]
Progress = Callable[[str, int, int], None]


class Stop(IntEnum):
    """Why a run ended early; the value is the exit status of the command."""

    FILE = 3
    INTERRUPT = 130
    TERMINATE = 143

    @property
    def cause(self) -> Cause:
        causes: dict[Stop, Cause] = {
            Stop.FILE: "the stop file",
            Stop.INTERRUPT: "Ctrl-C",
            Stop.TERMINATE: "a signal to end",
        }
        return causes[self]


@dataclass(frozen=True)
class RunOptions:
    """How a recipe is run, apart from what the recipe itself says.

    ``fold`` is held out and never seen in training; ``None`` trains on all but the locked test set.
    ``cache`` holds prepared subjects, shared by runs; all of them may take ``cache_gb``. ``split_file`` is reused by
    later runs. ``memory_gb`` is what training may take, by default what is free, or the GPU's; if it is infinite,
    nothing is counted. A recipe whose steps would take more is refused or, to ``fit``, replaced by a variant that takes
    less.
    """

    fold: int | None = 0
    split_file: Path | None = None
    cache: Path | None = None
    cache_gb: float | None = None
    leave_out_broken: bool = False
    evaluate: bool = True
    device: str = "auto"
    precision: Precision = "auto"
    compile: Compile = "auto"
    devices: int = 1
    threads: int | None = None
    mlflow: str | None = None
    memory_gb: float | None = None
    fit: bool = False


def check_possible(options: RunOptions) -> None:
    """Raise :class:`RecipeError` if this machine lacks what the options need, before any work begins."""
    check_device(options.device, options.devices)
    if options.mlflow is not None:
        if find_spec("mlflow") is None:
            raise RecipeError("logging needs the mlflow package", fix="pip install 'delineate[mlflow]'")
        from delineate.training.mlflow_server import check_mlflow

        check_mlflow(options.mlflow)


@dataclass(frozen=True)
class Reporter:
    """Where a run reports what happens: to the terminal, and to ``messages.txt`` and ``events.jsonl`` in its folder.

    ``messages`` collects all messages. ``logs`` is the folder of the two files.
    ``progress(stage, done, total)`` is called with how far a stage is, and just before that
    ``status`` with a few words about it.
    """

    say: Say = lambda text: None
    progress: Progress = lambda what, done, total: None
    logs: Path | None = None
    messages: list[str] = field(default_factory=list)
    silent: bool = False
    status: Say = lambda text: None

    def __call__(self, text: str) -> None:
        if self.silent:
            return
        self.messages.append(text)
        self.say(text)
        if self.logs is not None:
            with appending(self.logs / MESSAGES) as file:
                file.write((time.strftime("%Y-%m-%d %H:%M:%S ") + printable_lines(text) + "\n").encode())

    def event(self, event: Event) -> None:
        """Record an event and report it in words."""
        if self.logs is not None and not self.silent:
            append_event(self.logs, event)
        self(event.text)

    def of_run(self, folder: Path, *, first: bool) -> Reporter:
        """A reporter that also writes to a run folder and passes every message on to this one.

        Helper processes (not ``first``) only train: they report nothing.
        """
        if not first:
            return Reporter(silent=True)
        drop_unfinished(folder / "logs")
        return Reporter(self, self.progress, folder / "logs", status=self.status)
