"""What happens around the training steps: saving, validating, watching, stopping, showing progress."""

from __future__ import annotations

import math
import signal
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import lightning
import torch

from delineate.bundle import save_weights
from delineate.preprocessing.cache import PreparedSubject
from delineate.sampling.batches import BatchSource
from delineate.training.events import Collapsed, GaveUp, Stopped, Validated
from delineate.training.module import Delineator
from delineate.training.options import Reporter, Stop
from delineate.training.validation import Score, summary, validate

SECONDS_BETWEEN_STATES = 45.0
"""A killed run loses at most this and the step it was in, less than a minute."""


class Keeper(lightning.Callback):
    """Writes the state from which a run resumes, at regular intervals and at the end of training."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last = time.monotonic()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        due = time.monotonic() - self._last > SECONDS_BETWEEN_STATES
        if trainer.world_size > 1:
            due = bool(trainer.strategy.broadcast(due, src=0))
        if due:
            trainer.save_checkpoint(self.path)
            self._last = time.monotonic()

    def on_train_end(self, trainer: lightning.Trainer, module: Delineator) -> None:  # type: ignore[override]
        trainer.save_checkpoint(self.path)


class Validator(lightning.Callback):
    """Validates at even shares of the budget, keeps the best weights (or the last), and ends a run that stalls.

    ``raised``: the training had ended, and now has a larger budget.
    """

    def __init__(
        self, subjects: Sequence[PreparedSubject], folder: Path, report: Reporter, *, raised: bool = False
    ) -> None:
        self.subjects, self.folder, self.report, self.raised = subjects, folder, report, raised
        self.best, self.best_step, self.last_step, self.done, self.since_best = -math.inf, -1, -1, 0, 0
        self.score = math.nan
        self._taken, self._ended = 0.0, -math.inf

    def state_dict(self) -> dict[str, Any]:
        kept = ("best", "best_step", "last_step", "done", "since_best")
        return {name: getattr(self, name) for name in kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best, self.best_step = float(state_dict["best"]), int(state_dict["best_step"])
        self.done, self.since_best = int(state_dict["done"]), int(state_dict["since_best"])
        self.last_step = int(state_dict.get("last_step", -1))  # states of earlier versions lack it

    def on_train_start(self, trainer: lightning.Trainer, module: Delineator) -> None:  # type: ignore[override]
        spec = module.spec.validation
        module.update_progress(trainer.global_step)
        # Of a budget that was raised, a smaller share is spent than when it was validated last.
        self.done = min(self.done, self._due(module))
        if spec.patience is not None and self.since_best >= spec.patience:
            if self.raised:
                self.since_best = 0
            else:  # stopped between giving up and its end
                trainer.should_stop = True

    @staticmethod
    def _due(module: Delineator) -> int:
        """How many validations the share of the budget that is spent pays for."""
        return int(module.progress * module.spec.validation.times + 1e-9)

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        spec, due = module.spec.validation, self._due(module)
        if due <= self.done or not self.subjects or self._too_soon(module):
            return
        self.done = due
        started = module.budget.elapsed()
        module.refresh_statistics()
        scores = self._scores(trainer, module)
        self._ended = module.budget.elapsed()
        self._taken = self._ended - started
        means = summary(scores, spec.metric)
        self.score = means.score
        row = {"dice": means.dice, **{f"dice_{name}": dice for name, dice in means.targets.items()}}
        row |= {f"volume_error_ml_{name}": error for name, error in means.error_ml.items()}
        for logger in trainer.loggers:
            logger.log_metrics({**row, "minutes": module.budget.elapsed() / 60}, step=trainer.global_step)
        judged = not math.isnan(self.score)  # it is where no subject has any target
        better = judged and self.score > self.best
        if better:
            self.best, self.best_step, self.since_best = self.score, trainer.global_step, 0
        elif judged:
            self.since_best += 1
        self.last_step = trainer.global_step
        if (better or not judged or module.spec.keep == "last") and trainer.is_global_zero:
            about = {"step": trainer.global_step, "validation_dice": f"{means.dice:.4f}"}
            save_weights(self.folder, module.kept_network.state_dict(), about)
        self.report.event(
            Validated(
                step=trainer.global_step,
                minutes=module.budget.elapsed() / 60,
                dice=means.dice,
                targets=means.targets,
                best=better,
            )
        )
        if spec.patience is not None and self.since_best >= spec.patience:
            self.report.event(GaveUp(step=trainer.global_step, patience=spec.patience))
            trainer.should_stop = True

    def _too_soon(self, module: Delineator) -> bool:
        """Whether validating large scans again would take more than about a tenth of a budget of minutes."""
        if module.budget.seconds is None or module.progress >= 1.0:
            return False
        soon = module.budget.elapsed() < self._ended + 9 * self._taken
        if module.trainer.world_size > 1:
            soon = bool(module.trainer.strategy.broadcast(soon, src=0))
        return soon

    def _scores(self, trainer: lightning.Trainer, module: Delineator) -> list[dict[str, Score]]:
        """Scores of all subjects, which the processes share among them."""
        own = validate(
            module.kept_network, module.bundle, module.plan, self.subjects[trainer.global_rank :: trainer.world_size]
        )
        if trainer.world_size == 1:
            return own
        from torch.distributed import all_gather_object

        gathered: list[Any] = [None] * trainer.world_size
        all_gather_object(gathered, own)
        return [score for part in gathered for score in part]


class ValidationLoss(lightning.Callback):
    """Measures the loss on tiles of the validation subjects every ``every`` steps, before the step is taken."""

    def __init__(self, source: BatchSource, every: int) -> None:
        self.source, self.every = source, every

    def on_train_batch_start(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        step = trainer.global_step
        if step % self.every or not trainer.is_global_zero:
            return
        loss = module.loss_on(self.source, step // self.every)
        for logger in trainer.loggers:
            logger.log_metrics({"validation_loss": loss}, step)


class EpochClock(lightning.Callback):
    """Notes the minutes spent whenever every item of a pass has been taken once more."""

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        epoch, more = divmod(trainer.global_step, module.source.steps_an_epoch)
        if not more:
            for logger in trainer.loggers:
                logger.log_metrics({"epoch": epoch, "minutes": module.budget.elapsed() / 60}, trainer.global_step)


class CollapseWatch(lightning.Callback):
    """Reports when, past a given step, the network predicts only background, or a target everywhere."""

    def __init__(self, after_step: int, report: Reporter) -> None:
        self.after_step, self.report = after_step, report
        self.in_a_row, self.warned = 0, False

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        if (trainer.global_step - 1) % 25 or trainer.global_step < self.after_step or self.warned:
            return
        seen = module.foreground
        if seen.reference:
            flooded = seen.predicted > 0.95 * seen.voxels and seen.reference < 0.5 * seen.voxels
            self.in_a_row = self.in_a_row + 1 if flooded or not seen.predicted else 0
        if self.in_a_row >= 3:
            self.warned = True
            self.report.event(
                flood(trainer.global_step, module) if seen.predicted else loss_of_targets(trainer.global_step, module)
            )


def flood(step: int, module: Delineator) -> Collapsed:
    """A target is predicted nearly everywhere, with the fixes that suit the recipe."""
    fixes = []
    if _soft(module.bundle.recipe.loss.model_dump()):
        fixes.append(
            "no soft labels (--set loss.soft_labels=null), or Dice over squares (--set loss.denominator=squares): "
            "if targets are rare, overlap over plain sums with a background of 0.1 everywhere is largest when "
            "everything is predicted as target"
        )
    fixes.append(f"a lower learning rate (--set training.optimiser.learning_rate={module.learning_rate / 3:.1g})")
    fixes.append("check with `delineate data inspect` what the label values mean")
    return Collapsed(step=step, predicts="a target nearly everywhere", fixes=tuple(fixes))


def _soft(loss: Any) -> bool:
    """Whether any part of a loss takes soft labels, and not as Dice over squares does."""
    if isinstance(loss, dict):
        soft = bool(loss.get("soft_labels")) and loss.get("denominator") != "squares"
        return soft or any(map(_soft, loss.values()))
    return isinstance(loss, list | tuple) and any(map(_soft, loss))


def loss_of_targets(step: int, module: Delineator) -> Collapsed:
    """Only background is predicted, with the fixes that suit the recipe."""
    recipe, fixes = module.bundle.recipe, []
    if recipe.sampler.kind not in ("class_balanced", "class_centred"):
        fixes.append("--set 'sampler={kind: class_balanced}' (half of the tiles then hold a target)")
    if recipe.loss.kind == "cross_entropy":
        fixes.append("add a Dice loss (--set loss.kind=dice), since cross entropy tolerates missing rare targets")
    fixes.append(f"a lower learning rate (--set training.optimiser.learning_rate={module.learning_rate / 3:.1g})")
    fixes.append("check with `delineate data inspect` that labels lie on the organ")
    return Collapsed(step=step, predicts="background alone", fixes=tuple(fixes))


class Stopper(lightning.Callback):
    """Ends training when the budget is spent, a file ``stop`` appears, or Ctrl-C or SIGTERM arrives.

    Signals are handled within ``with stopper:``, around the whole fit. ``asked`` is why the run should end,
    even if that came too late to cut the training short; ``cut_short`` is whether it was cut short.
    """

    def __init__(self, stop_file: Path, report: Reporter) -> None:
        self.stop_file, self.report = stop_file, report
        self.asked: Stop | None = None
        self.cut_short = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._listen()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def on_train_start(self, trainer: lightning.Trainer, module: Delineator) -> None:  # type: ignore[override]
        # Lightning has replaced the handler by its own, which ends training without saving.
        self._listen()

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        if self.asked is None and self.stop_file.exists():
            self.asked = Stop.FILE
        asked = self.asked or 0
        if trainer.world_size > 1:
            # Whichever process was asked, all stop after the same step.
            wanted = torch.tensor(asked, device=module.device)
            asked = int(trainer.strategy.reduce(wanted, reduce_op="max"))
        if asked:
            self.asked, self.cut_short = Stop(asked), True
            self.report.event(Stopped(step=trainer.global_step, cause=self.asked.cause))
            trainer.should_stop = True
        elif module.progress >= 1.0:
            trainer.should_stop = True

    def on_exception(self, trainer: lightning.Trainer, module: Delineator, error: BaseException) -> None:  # type: ignore[override]
        # Helpers would wait for this process, or fail with a traceback because it is gone.
        if trainer.strategy.launcher is not None:
            trainer.strategy.launcher.kill(signal.SIGKILL)

    def _listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return  # Python handles signals only in the main thread
        for number in (signal.SIGINT, signal.SIGTERM):
            before = signal.signal(number, self._on_signal)
            self._before.setdefault(number, before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise SystemExit(Stop.INTERRUPT)  # the second Ctrl-C does not wait for the step
        self.asked = Stop.INTERRUPT if number == signal.SIGINT else Stop.TERMINATE


class KeepThreads(lightning.Callback):
    """Keeps torch at the plan's number of threads, which Lightning changes when it starts helpers."""

    def __init__(self, count: int) -> None:
        self.count = count

    def on_train_start(self, trainer: lightning.Trainer, module: Delineator) -> None:  # type: ignore[override]
        torch.set_num_threads(self.count)


class StepProgress(lightning.Callback):
    """Reports how much of the budget is spent, with loss, validation score and speed."""

    def __init__(self, report: Reporter, validator: Validator) -> None:
        self.report, self.validator = report, validator
        self._last, self._seconds_per_step = time.monotonic(), math.nan

    def on_train_batch_end(self, trainer: lightning.Trainer, module: Delineator, *_: Any) -> None:  # type: ignore[override]
        now = time.monotonic()
        taken, self._last = now - self._last, now
        # A running mean soon forgets the compilation in the first step.
        smooth = self._seconds_per_step if self._seconds_per_step == self._seconds_per_step else taken
        self._seconds_per_step = 0.9 * smooth + 0.1 * taken
        score = f", Dice {self.validator.score:.3f}" if self.validator.score == self.validator.score else ""
        self.report.status(f"loss {module.last_loss:.3f}{score}, {self._seconds_per_step:.2f} s/step")
        self.report.progress("training", int(1000 * module.progress), 1000)
