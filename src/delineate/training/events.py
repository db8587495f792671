"""What happened in a run, when, and with which numbers: ``logs/events.jsonl``, one line per event.

Reports and programs read these; ``logs/messages.txt`` says the same in words.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, Field

from delineate.errors import BadFormat
from delineate.io.files import appending, parsing, read_bytes, writing_beside
from delineate.specification import Specification, from_json, to_json

EVENTS, MESSAGES = "events.jsonl", "messages.txt"
_MOST_BYTES = 2**28

Count = Annotated[int, Field(ge=0, le=2**53)]
Minutes = Annotated[float, Field(ge=0, le=1e9)]
Share = Annotated[float, Field(ge=0, le=1)]
Cause = Literal["the stop file", "Ctrl-C", "a signal to end"]


class _Event(Specification):
    """``at`` is the time, ``step`` the number of steps done; ``text`` describes it in words."""

    at: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    step: Count = 0

    @property
    def text(self) -> str:
        raise NotImplementedError


class Started(_Event):
    """A run starts or is resumed: the number of subjects in each role."""

    kind: Literal["started"] = "started"
    training: Count
    validation: Count
    held_out: Count

    @property
    def text(self) -> str:
        return (
            f"{self.training} subjects for training, {self.validation} from the training folds for validation, "
            f"{self.held_out} held out"
        )


class Planned(_Event):
    """Items and steps in a pass over the data, and the number of steps after which training ends at the latest."""

    kind: Literal["planned"] = "planned"
    items: Count
    batch_size: Count
    steps_an_epoch: Count
    steps: Count | None = None

    @property
    def text(self) -> str:
        epoch = f"an epoch is {self.steps_an_epoch} steps: {self.items} items, {self.batch_size} per step"
        if self.steps is None:
            return epoch
        return f"{epoch}; {self.steps} steps in total are {self.steps / self.steps_an_epoch:.3g} epochs"


class Resumed(_Event):
    """Training resumes after ``step`` steps; any steps done beyond them are repeated."""

    kind: Literal["resumed"] = "resumed"

    @property
    def text(self) -> str:
        return f"resuming from step {self.step}"


class Validated(_Event):
    """Mean Dice over the validation subjects, for all targets and for each; ``best``: whether it is the best so far."""

    kind: Literal["validated"] = "validated"
    minutes: Minutes
    dice: Share
    targets: Annotated[Mapping[str, Share], Field(max_length=2**16)]
    best: bool

    @property
    def text(self) -> str:
        each = ", ".join(f"{name} {dice:.3f}" for name, dice in self.targets.items())
        best = ", best so far" if self.best else ""
        return f"step {self.step}, {self.minutes:.1f} min: validation Dice {self.dice:.3f} ({each}){best}"


class Collapsed(_Event):
    """The network predicts only background, or a target nearly everywhere; ``fixes`` suit its recipe."""

    kind: Literal["collapsed"] = "collapsed"
    predicts: Literal["background alone", "a target nearly everywhere"]
    fixes: Annotated[tuple[str, ...], Field(max_length=16)]

    @property
    def text(self) -> str:
        fixes = "; ".join(self.fixes)
        return f"COLLAPSE: at step {self.step} the network predicts {self.predicts}. Likely fixes: {fixes}"


class GaveUp(_Event):
    """Validation did not improve ``patience`` times in a row: training ends before its budget is spent."""

    kind: Literal["gave_up"] = "gave_up"
    patience: Count

    @property
    def text(self) -> str:
        return f"no improvement in {self.patience} validations: training ends early"


class Stopped(_Event):
    """The run was asked to stop; the same command resumes it."""

    kind: Literal["stopped"] = "stopped"
    cause: Cause

    @property
    def text(self) -> str:
        after = f" after step {self.step}" if self.step else ""
        return f"stopping on {self.cause}{after}; the same command resumes from here"


class Trained(_Event):
    """The budget is spent. ``gpu_gb``: the most memory that was reserved on the GPU, if it trained on one."""

    kind: Literal["trained"] = "trained"
    minutes: Minutes
    epochs: Annotated[float, Field(ge=0, le=1e9)] | None = None
    gpu_gb: Annotated[float, Field(ge=0, le=1e9)] | None = None

    @property
    def text(self) -> str:
        epochs = "" if self.epochs is None else f" ({self.epochs:.3g} epochs)"
        return f"trained {self.step} steps{epochs} in {self.minutes:.1f} min"


class Finished(_Event):
    """Everything is done, including the evaluation of the held-out subjects, if there are any."""

    kind: Literal["finished"] = "finished"
    measured: Count

    @property
    def text(self) -> str:
        return f"finished after {self.step} steps; {self.measured} held-out subjects measured"


class Divided(_Event):
    """The GPU's memory did not hold a step: from here on, a batch passes the network in ``parts``.

    ``differing``: what now sees a part at a time where it saw the batch.
    """

    kind: Literal["divided"] = "divided"
    batch_size: Count
    parts: Count
    differing: Annotated[tuple[str, ...], Field(max_length=16)] = ()

    @property
    def text(self) -> str:
        same = (
            f"; {' and '.join(self.differing)} now see a part at a time" if self.differing else ", with equal results"
        )
        return (
            f"step {self.step} did not fit into the GPU's memory: batches of {self.batch_size} now pass in "
            f"{self.parts} parts{same}"
        )


class Fitted(_Event):
    """The recipe was changed to take less memory: ``what`` in words, and the ``changes`` as ``--set`` takes them."""

    kind: Literal["fitted"] = "fitted"
    what: str
    changes: Annotated[tuple[str, ...], Field(max_length=64)]
    needed_gb: Annotated[float, Field(ge=0, le=1e9)]
    memory_gb: Annotated[float, Field(ge=0, le=1e9)]

    @property
    def text(self) -> str:
        settings = " ".join(f"--set '{change}'" for change in self.changes)
        return (
            f"the recipe would take about {self.needed_gb:.1f} GB of {self.memory_gb:.1f} GB: "
            f"trained instead is {self.what} ({settings})"
        )


class Warned(_Event):
    """Something that readers of the results should know."""

    kind: Literal["warned"] = "warned"
    message: str

    @property
    def text(self) -> str:
        return self.message


Event = (
    Started
    | Planned
    | Resumed
    | Validated
    | Collapsed
    | GaveUp
    | Stopped
    | Trained
    | Finished
    | Divided
    | Fitted
    | Warned
)
_ANY: Any = Annotated[Event, Field(discriminator="kind")]


def to_line(event: Event) -> bytes:
    """``event`` as a line of JSON."""
    return to_json(event, indent=None).encode() + b"\n"


def from_line(line: bytes) -> Event:
    """The event of a line. Raises :class:`ValueError`."""
    event: Event = from_json(_ANY, line)
    return event


def append_event(logs: Path, event: Event) -> None:
    """Add ``event`` to a run's ``logs``. Raises :class:`OutputError`, which leaves the file intact."""
    with appending(logs / EVENTS) as file:
        file.write(to_line(event))


def drop_unfinished(logs: Path) -> None:
    """Remove a last line that a killed process left incomplete, so that more can be added."""
    path = logs / EVENTS
    if not path.exists():
        return
    content = read_bytes(path, _MOST_BYTES)
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with writing_beside(path) as beside:
            beside.write_bytes(whole)


def read_events(logs: Path) -> tuple[Event, ...]:
    """All events in a run's ``logs``, oldest first; none for runs of earlier versions.

    Raises :class:`BadFormat` for a damaged file; a last line that a killed process left incomplete is ignored.
    """
    path = logs / EVENTS
    if not path.exists():
        return ()
    with parsing(path, BadFormat, fix="delete it; the report is then written without it"):
        return tuple(from_line(line) for line in read_bytes(path, _MOST_BYTES).split(b"\n")[:-1])


def without_undone(events: Iterable[Event]) -> list[Event]:
    """``events`` without those of steps that a resumed run repeated."""
    kept: list[Event] = []
    for event in events:
        if isinstance(event, Resumed):
            kept = [one for one in kept if one.step <= event.step]
        kept.append(event)
    return kept
