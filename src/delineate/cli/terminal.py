"""What a person sees: results, messages and a progress line with an ETA, but never a terminal command in a name."""

from __future__ import annotations

import json
import math
import sys
import time
import traceback
from enum import IntEnum
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TextIO

from delineate.core.text import printable, printable_lines

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from delineate.compute import Choice

SECONDS_BETWEEN_LINES = 30.0
"""How often progress is printed where there is no terminal to redraw, as in a log file."""


class Loudness(IntEnum):
    """How much is printed besides results and errors."""

    QUIET, NORMAL, VERBOSE = range(3)


_loudness = Loudness.NORMAL


def speak(loudness: Loudness) -> None:
    """Set how much is printed from now on."""
    global _loudness
    _loudness = loudness


class Guarded:
    """A text stream that spells out control characters: a terminal takes everything printed to it for text.

    Names of files, subjects and targets come from outside and may hold escape sequences. Once :func:`guard`
    has been called, everything printed passes through here, except what rich draws with escape sequences of
    its own: :class:`Terminal` and :func:`print_table` guard the parts of that.
    """

    def __init__(self, stream: TextIO) -> None:
        self.raw = stream

    def write(self, text: str) -> int:
        self.raw.write(printable_lines(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self.raw.flush()

    def isatty(self) -> bool:
        return self.raw.isatty()

    def fileno(self) -> int:
        return self.raw.fileno()

    @property
    def encoding(self) -> str:
        return self.raw.encoding

    @property
    def errors(self) -> str | None:
        return self.raw.errors


def guard() -> None:
    """From now on, nothing that is printed, logged or issued as a warning controls the terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, Guarded):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")  # for letters that the terminal's encoding lacks
            setattr(sys, name, Guarded(stream))


def _raw(stream: Any) -> Any:
    return stream.raw if isinstance(stream, Guarded) else stream


class Terminal:
    """Progress and messages on standard error, so that standard output carries results only."""

    def __init__(self) -> None:
        from rich.console import Console  # takes a tenth of a second, which --help can do without

        self.console = Console(file=_raw(sys.stderr), highlight=False, markup=False, emoji=False)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._stage, self._status, self._last_line = "", "", 0.0

    def __enter__(self) -> Self:
        if self.console.is_terminal and _loudness > Loudness.QUIET:
            from rich.progress import BarColumn, Progress, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.text import Text

            class Remaining(TimeRemainingColumn):
                """The time left as it was told or, if nobody knows better, as the speed so far suggests."""

                def render(self, task: Task) -> Text:
                    told = task.fields.get("eta_s")
                    if told is None:
                        return super().render(task)
                    return Text(duration(max(0.0, told)), style="progress.remaining")

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.percentage:>3.0f}%"),
                TimeElapsedColumn(),
                TextColumn("ETA"),
                Remaining(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True, speed_estimate_period=120)
            self._bar.start()
            sys.stdout, sys.stderr = Guarded(sys.stdout), Guarded(sys.stderr)  # around rich's, which keep the bar below
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            sys.stdout, sys.stderr = _raw(sys.stdout), _raw(sys.stderr)
            self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the progress, except with --quiet."""
        if _loudness > Loudness.QUIET:
            self.say_failure(text)

    def say_failure(self, text: str) -> None:
        """Print a line above the progress, even with --quiet."""
        self.console.print(printable_lines(text), soft_wrap=True)

    def say_choice(self, choice: Choice) -> None:
        """Print how something is computed, and why."""
        self.say(f"{choice.what}: {choice.choice} ({choice.why})")

    def status(self, text: str) -> None:
        """Set a note about a stage, shown with the progress that follows."""
        self._status = printable(text)

    def progress(self, what: str, done: int, total: int, eta_s: float | None = None) -> None:
        """Show how far a stage has got and, if it is known, how many seconds are left."""
        stage = printable(what)
        what, self._status = f"{stage}: {self._status}" if self._status else stage, ""
        if self._bar is None:
            self._print_now_and_then(stage, what, done, total, eta_s)
            return
        if stage != self._stage or self._task is None:
            self._stage = stage
            if self._task is not None:
                self._bar.remove_task(self._task)
            self._task = self._bar.add_task(what, total=total)
        self._bar.update(self._task, description=what, completed=done, total=total, eta_s=eta_s)

    def _print_now_and_then(self, stage: str, what: str, done: int, total: int, eta_s: float | None) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._last_line = stage, now
        if now - self._last_line >= SECONDS_BETWEEN_LINES:
            self._last_line = now
            left = "" if eta_s is None else f", {duration(eta_s)} left"
            self.say(f"{what}: {100 * done // total} %{left}")


def duration(seconds: float) -> str:
    """Seconds as ``H:MM:SS``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def print_json(value: Any) -> None:
    """Print strict JSON on standard output: numbers that JSON lacks become null."""
    # JSON spells out all control characters but this one.
    print(json.dumps(_strict(value), indent=1).replace("\x7f", "\\u007f"))


def print_error(error: BaseException, code: str, message: str, fix: str = "", *, as_json: bool) -> None:
    """Print a line on standard error, after a traceback with --verbose; with --json, also JSON on standard output."""
    if _loudness is Loudness.VERBOSE:
        traceback.print_exception(error, file=sys.stderr)
    print(f"error {error}" if str(error).startswith(code) else f"error {code}: {message}", file=sys.stderr)
    if as_json:
        print_json({"error": {"code": code, "message": message, "fix": fix}})


def print_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Print a table on standard output; columns that look like numbers are right-aligned."""
    from rich.console import Console
    from rich.table import Table

    title, columns, rows = printable(title), list(map(printable, columns)), [list(map(printable, row)) for row in rows]
    table = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        numeric = all(row[i][:1] in "0123456789-−–∞±" or not row[i] for row in rows)
        table.add_column(column, justify="right" if numeric and rows else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console = Console(file=_raw(sys.stdout), highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console = Console(file=_raw(sys.stdout), highlight=False, markup=False, emoji=False, width=200)
    console.print(table)


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
