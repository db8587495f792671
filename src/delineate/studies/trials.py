"""What a training will take, from a few of its steps in a process of their own; and how much compute a step is."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

from delineate.compute import Precision
from delineate.datasets.splits import Split
from delineate.errors import DelineateError, OutOfMemory, RecipeError, StudyError, TrainingError
from delineate.networks.cost import step_cost
from delineate.recipe import Recipe
from delineate.sampling.tiles import Whole, geometry_for

LEAST_STEPS = 3
"""The first step warms up, the last is followed by validation; those in between are timed."""

REQUEST, ANSWER = "request", "answer"
"""Files in a trial's folder."""


@dataclass(frozen=True)
class Trial:
    """What a few steps of a recipe on its data took, and what its whole training is expected to take.

    ``seconds_a_step`` leaves out the first step, which allocates memory and, if ``compiled``, compiles.
    ``preparing_seconds``: inspecting and preparing all subjects; a run that finds them prepared spends less.
    ``validating_seconds``: one validation. ``predicting_seconds``: predicting and measuring one held-out subject;
    the noise that an untrained network predicts takes longer to measure than what a trained one does.
    ``peak_gb``: memory of the process, with the prepared subjects that the whole run keeps in memory; ``program_gb``,
    ``data_gb`` and ``network_gb`` (weights, gradients, the optimiser's moments) are parts of it, and the rest is what a
    step or a prediction keeps. ``device_gb``: memory of a CUDA GPU. ``prepared_gb``: disk space of the prepared
    subjects. ``total_steps``: after how many steps training ends at the latest, None if
    only minutes limit it. ``expected_minutes``: the whole run, from the start of its process to its report.
    """

    steps: int
    seconds_a_step: float
    preparing_seconds: float
    validating_seconds: float
    predicting_seconds: float
    peak_gb: float
    program_gb: float
    data_gb: float
    network_gb: float
    device_gb: float | None
    prepared_gb: float
    compiled: bool
    total_steps: int | None
    expected_minutes: float


def try_recipe(
    recipe: Recipe,
    data: Path,
    split: Split,
    fold: int,
    *,
    device: str = "auto",
    threads: int | None = None,
    precision: Precision = "auto",
    steps: int = LEAST_STEPS,
    memory_gb: float | None = None,
) -> Trial:
    """Train for a few steps in a process of its own, validate, predict a held-out subject, and leave nothing behind.

    It is the real training, compiled if the whole run would be, but on the smallest and the largest training subject
    and on the largest of the others in each role. Of the rest, only the scans' headers are read. In a volume that takes
    long to predict, the network runs for some seconds, and the tiles that are left count as if they took as long.

    ``memory_gb``: its process gets no more than this, where the system can limit it (Linux).

    Raises what the training raises, such as :class:`RecipeError`, :class:`OutOfMemory` if memory runs out, and
    :class:`TrainingError` if its process crashes or is killed.
    """
    if steps < LEAST_STEPS:
        raise StudyError(f"{steps} steps are too few for a trial", fix=f"take at least {LEAST_STEPS}")
    with TemporaryDirectory(prefix="delineate-trial-") as name:
        folder = Path(name)
        (folder / REQUEST).write_bytes(
            pickle.dumps(Request(recipe, data, split, fold, device, threads, precision, steps, memory_gb))
        )
        status = _answered_apart(folder)
        if not (folder / ANSWER).exists():
            raise _crash(recipe.name, status, (folder / "log").read_text(encoding="utf-8", errors="replace"))
        found = pickle.loads((folder / ANSWER).read_bytes())
    if isinstance(found, DelineateError):
        raise found
    assert isinstance(found, Trial)
    return found


def jobs_within(trials: Iterable[Trial], memory_gb: float, cores: int, *, device_memory_gb: float | None = None) -> int:
    """How many runs fit side by side, whichever they are: at least one, and at most one for each core.

    Runs on a GPU take turns unless its memory is given.
    """
    known = list(trials)
    limits = [float(cores), *(memory_gb / trial.peak_gb for trial in known)]
    limits += [(device_memory_gb or 0.0) / trial.device_gb for trial in known if trial.device_gb]
    return max(1, int(min(limits)))


def steps_for_gflop(
    recipe: Recipe,
    channels: int,
    gflop: float,
    *,
    outputs: int | None = None,
    volume_shape: Sequence[int] | None = None,
) -> int:
    """How many training steps a budget of GFLOP pays for, to compare methods on equal compute.

    Counted are the multiplications and additions of the network, forward and backward, on the tiles of a batch, and
    not those of the loss, augmentation and validation. ``outputs`` is needed if the recipe does not name its
    targets, ``volume_shape`` if its tiles are as large as the volumes. Raises :class:`RecipeError` if either is
    missing, or if the budget does not pay for one step.
    """
    if outputs is None:
        if recipe.data.targets is None:
            raise RecipeError(f"recipe '{recipe.name}' names no targets", fix="name them in data.targets")
        outputs = recipe.data.targets.targets().outputs
    if volume_shape is None and (isinstance(recipe.tiles, Whole) or None in recipe.tiles.shape):
        raise RecipeError(
            f"the tiles of recipe '{recipe.name}' are as large as the volumes", fix="give their size in tiles.shape"
        )
    geometry = geometry_for(recipe.tiles, volume_shape or (1, 1, 1), (1.0, 1.0, 1.0), recipe.network)
    sides = [side for axis, side in enumerate(geometry.input_shape) if axis != geometry.slice_axis]
    inputs, batch = channels * geometry.slices, recipe.training.batch_size
    a_step = step_cost(recipe.network, inputs, outputs, sides, batch).gflop
    if gflop < a_step:
        raise RecipeError(
            f"a step of recipe '{recipe.name}' takes {a_step:.3g} GFLOP, and the budget is {gflop:.3g}",
            fix="give more, or reduce training.batch_size",
        )
    return int(gflop / a_step)


def duration(seconds: float) -> str:
    """A length of time in words, rounded to what matters: ``45 s``, ``12 min``, ``2 h 10 min``, ``3 d 4 h``."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if round(seconds) < 60:
        return f"{round(seconds)} s"
    if minutes < 60:
        return f"{minutes} min"
    large, small, units = (*divmod(minutes, 60), "h min") if minutes < 48 * 60 else (*divmod(hours, 24), "d h")
    first, second = units.split()
    return f"{large} {first} {small} {second}" if small else f"{large} {first}"


@dataclass(frozen=True)
class Request:
    """What a trial's process is asked; ``asked`` is when, so that its start counts."""

    recipe: Recipe
    data: Path
    split: Split
    fold: int
    device: str = "auto"
    threads: int | None = None
    precision: Precision = "auto"
    steps: int = LEAST_STEPS
    memory_gb: float | None = None
    asked: float = field(default_factory=time.time)


def _answered_apart(folder: Path) -> int:
    """Have the request in ``folder`` answered by another process, which does not outlive this one; its exit status."""
    command = [sys.executable, "-c", "from delineate.studies.trying import answer; answer()", str(folder)]
    # The user's key is made when it is first used, and a trial leaves nothing behind.
    environment = {**os.environ, "DELINEATE_KEY": str(folder / "key")}
    with (folder / "log").open("wb") as log:
        # In a session of its own, so that whatever it has started can be killed with it; the pipe tells it of our end.
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, start_new_session=True
        )
        assert process.stdin is not None
        with process.stdin:
            try:
                return process.wait()
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


def _crash(name: str, status: int, log: str) -> TrainingError:
    """The error of a process that ended without an answer."""
    last = next((line.strip() for line in reversed(log.splitlines()) if line.strip()), f"it ended with status {status}")
    how = f"was killed by signal {-status} ({signal.strsignal(-status)})" if status < 0 else f"failed: {last[:500]}"
    what = f"the trial of recipe '{name}' {how}"
    if status == -signal.SIGKILL or "memory" in last.lower():
        return OutOfMemory(what, fix="reduce training.batch_size or the tiles; `delineate plan` tries what fits")
    return TrainingError(what, fix="run `delineate train` with this recipe to see more")
