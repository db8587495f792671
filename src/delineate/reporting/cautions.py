"""What a reader should know before the numbers: unfinished training, weights still improving, biased volumes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np
import pandas as pd

from delineate.evaluation.table import Evaluation
from delineate.recipe import TrainingSpec

_SPENT = 0.99
"""Share of a budget from which it counts as spent."""


@dataclass(frozen=True, eq=False)
class Training:
    """How far training got: its curves, as stored in ``logs/``, and the budget.

    ``steps_an_epoch`` is None for a run of an earlier version, which had no epochs.
    """

    spec: TrainingSpec
    learning: pd.DataFrame | None
    validation: pd.DataFrame | None
    steps_an_epoch: int | None = None

    @property
    def steps(self) -> int:
        """Steps done; each loss is numbered by the steps before it."""
        return 0 if self.learning is None or self.learning.empty else int(self.learning["step"].iloc[-1]) + 1

    @property
    def minutes(self) -> float:
        """Minutes spent up to the last validation, which ends the budget; undefined without a validation."""
        if self.validation is None or self.validation.empty or "minutes" not in self.validation:
            return nan
        return float(self.validation["minutes"].iloc[-1])

    @property
    def epochs(self) -> float:
        """Passes over all items; undefined where their length is not known."""
        return self.steps / self.steps_an_epoch if self.steps_an_epoch else nan

    @property
    def scores(self) -> list[tuple[int, float]]:
        """Step and score of each validation; the weights are selected by this score."""
        if self.validation is None:
            return []
        table, each = self.validation, [c for c in self.validation.columns if str(c).startswith("dice_")]
        score = table["dice"] if self.spec.validation.metric == "dice" else table[each].min(axis=1)
        return [(int(step), float(value)) for step, value in zip(table["step"], score, strict=True)]

    @property
    def best(self) -> int:
        """Index of the best validation, the first among equals; -1 if there was none."""
        values = [score for _, score in self.scores]
        return int(np.argmax(values)) if values else -1

    @property
    def spent(self) -> float:
        """The share of the budget that was used; undefined if it is not known."""
        spec = self.spec
        limits = ((self.steps, spec.steps), (self.minutes, spec.minutes), (self.epochs, spec.epochs))
        shares = [done / budget for done, budget in limits if budget is not None and done == done]
        return max(shares, default=nan)

    @property
    def gave_up(self) -> bool:
        """Whether training ended because validation had stopped improving."""
        patience = self.spec.validation.patience
        return patience is not None and len(self.scores) - 1 - self.best >= patience


def cautions(training: Training, evaluation: Evaluation | None) -> list[str]:
    """The sentences, most serious first; none for a finished training without bias."""
    found = [*_of_training(training)]
    return found if evaluation is None else [*found, *_of_volumes(evaluation)]


def _of_training(training: Training) -> Iterator[str]:
    spec, scores, best = training.spec, training.scores, training.best
    if training.spent < _SPENT and not training.gave_up:
        parts = []
        if spec.steps is not None:
            parts.append(f"{training.steps} of {spec.steps} steps")
        if spec.minutes is not None and training.minutes == training.minutes:
            parts.append(f"{training.minutes:.1f} of {spec.minutes:g} minutes")
        if spec.epochs is not None:
            parts.append(f"{training.epochs:.3g} of {spec.epochs} epochs")
        yield f"Unfinished: {', '.join(parts)} done. Run the same command again to resume."
    if spec.keep == "last":
        return  # as the recipe says
    if not scores:
        yield f"The weights were never validated: they are those of the last of {training.steps} steps."
    elif len(scores) == 1:
        yield f"The weights were validated only once, at step {scores[0][0]}; they may still have been improving."
    elif best == len(scores) - 1:
        before = max(score for _, score in scores[:-1])
        step, score = scores[-1]
        yield (
            f"Undertrained: the best weights are those of the last validation (step {step}, Dice {score:.3f}; "
            f"previous best {before:.3f}), so the network was still improving. Train longer for a fair result."
        )


def _of_volumes(evaluation: Evaluation) -> Iterator[str]:
    for agreeing in evaluation.agreements:
        rows: list[dict[str, Any]] = [row for row in agreeing.rows() if row["of"] == "volume"]
        for row in rows:
            low, high = row["bias_ci95"]
            if low > 0 or high < 0:
                size = f"{abs(row['bias']):.3g} {row['unit']} too {'large' if low > 0 else 'small'}"
                ends = " to ".join(f"{end:+.3g}".replace("-", "−") for end in (low, high))
                yield (
                    f"Biased volumes: {row['target']} predicted {size} on average "
                    f"(95 % interval {ends} {row['unit']}, n = {row['n']})."
                )
                break
