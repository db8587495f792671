"""Curves of a training: CSV files that a resumed run continues, events for TensorBoard, and a run in MLflow."""

from __future__ import annotations

import csv
import io
import platform
import re
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from delineate.io.files import appending, writing_beside
from delineate.training.mlflow_server import mlflow_client, no_answer

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


class MlflowLogger(_RunLogger):
    """The same numbers as a run of MLflow's experiment ``experiment``, sent every ten seconds.

    A server that stops answering must not end a training of days: ``warn`` is told once, the numbers wait, and each ten
    minutes and at the end they are sent again.
    """

    def __init__(self, address: str, experiment: str, warn: Callable[[str], None]) -> None:
        super().__init__()
        self._address, self._experiment, self._warn = address, experiment, warn
        self._client: Any = None
        self._run = ""
        self._waiting: list[tuple[str, float, int, int]] = []  # name, value, milliseconds since 1970, step
        self._next = time.monotonic()
        self._warned = False

    @property
    def name(self) -> str:
        return "mlflow"

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        now = round(1000 * time.time())
        # Targets may have names that MLflow refuses.
        named = ((re.sub(r"[^A-Za-z0-9_/.\- ]", "_", name), value) for name, value in metrics.items())
        self._waiting += [(name, float(value), now, step or 0) for name, value in named]
        if time.monotonic() >= self._next:
            self._send()

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._send("FINISHED" if status == "success" else "FAILED")

    def _send(self, ended: str | None = None) -> None:
        try:
            self._sent(ended)
        except Exception as error:  # whatever a foreign client raises, the training goes on
            self._next = time.monotonic() + 600
            if not self._warned:
                self._warned = True
                self._warn(f"{no_answer(self._address, error)}; the training goes on, and its numbers are kept for it")
        else:
            self._next = time.monotonic() + 10

    def _sent(self, ended: str | None) -> None:
        from mlflow.entities import Metric

        if self._client is None:
            client = mlflow_client(self._address)
            known = client.get_experiment_by_name(self._experiment)
            number = client.create_experiment(self._experiment) if known is None else known.experiment_id
            self._run = client.create_run(number).info.run_id
            self._client = client
        while self._waiting:
            self._client.log_batch(self._run, [Metric(*number) for number in self._waiting[:1000]])
            del self._waiting[:1000]
        if ended is not None:
            self._client.set_terminated(self._run, ended)


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
