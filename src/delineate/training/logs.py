"""Curves of a training: CSV files that a resumed run continues, and events for TensorBoard."""

from __future__ import annotations

import csv
import io
import platform
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from delineate.io.files import appending, writing_beside

TRAINING_CURVE, VALIDATION_LOSS_CURVE, VALIDATION_CURVE = "training.csv", "validation_loss.csv", "validation.csv"
EPOCH_CURVE = "epochs.csv"


class _RunLogger(Logger):
    """A logger that writes only numbers: the recipe is saved elsewhere, and a run has a single version."""

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the recipe is written elsewhere."""


class CurveLogger(_RunLogger):
    """Appends each step's numbers to ``training.csv``, each validation's to ``validation.csv``.

    ``validation_loss.csv`` has the loss on tiles of the validation subjects, at regular steps; ``epochs.csv`` the
    minutes spent at the end of each epoch.

    Lightning's own CSV logger empties the folder when a run is resumed; this one drops only the
    rows after the step that training resumes from.
    """

    def __init__(self, folder: Path, resumed_from: int) -> None:
        super().__init__()
        self.folder = folder
        # Losses are numbered by the steps before theirs, validations and epochs by the steps done.
        _keep_until(folder / TRAINING_CURVE, resumed_from - 1)
        _keep_until(folder / VALIDATION_LOSS_CURVE, resumed_from - 1)
        _keep_until(folder / VALIDATION_CURVE, resumed_from)
        _keep_until(folder / EPOCH_CURVE, resumed_from)

    @property
    def name(self) -> str:
        return "curves"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        curve = {"loss": TRAINING_CURVE, "validation_loss": VALIDATION_LOSS_CURVE, "epoch": EPOCH_CURVE}
        path = self.folder / curve.get(next(iter(metrics)), VALIDATION_CURVE)
        row = {"step": step, **{name: f"{value:.6g}" for name, value in metrics.items()}}
        header = [] if path.exists() else [list(row)]
        with appending(path) as file:
            file.write(_csv([*header, list(row.values())]))


class EventLogger(_RunLogger):
    """The same numbers as events for TensorBoard; a resumed run starts a new file.

    Written immediately and by the training itself: TensorBoard's own writer uses a thread, which
    would die with a traceback on a full disk, and loses the last minutes of a run that is killed.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        # TensorBoard reads files with such names, in the order of their timestamps.
        self._path = folder / f"events.out.tfevents.{int(time.time()):010d}.{platform.node()}.{time.time_ns()}"

    @property
    def name(self) -> str:
        return "tensorboard"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=name, simple_value=float(value)) for name, value in metrics.items()]
        events = [Event(wall_time=time.time(), step=step or 0, summary=Summary(value=values))]
        if not self._path.exists():
            events.insert(0, Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(event.SerializeToString() for event in events)

    def _append(self, records: Iterable[bytes]) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        with appending(self._path) as file:
            writer = RecordWriter(file)
            for record in records:
                writer.write(record)


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode()


def _keep_until(path: Path, step: int) -> None:
    """Keep the rows of ``path`` up to ``step``; a last row cut short by a crash goes too."""
    if not path.exists():
        return
    with path.open(newline="", encoding="utf-8") as file:
        header, *rows = list(csv.reader(file)) or [[]]
    kept = [row for row in rows if len(row) == len(header) and row[0].isdecimal() and int(row[0]) <= step]
    if not kept:
        path.unlink()
        return
    text = _csv([header, *kept])
    if text != path.read_bytes():
        with writing_beside(path) as beside:
            beside.write_bytes(text)
