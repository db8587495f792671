"""How far off a prediction may be, from how far off others were whose truth is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor, inf, isfinite, nan


@dataclass(frozen=True)
class Conformal:
    """Split conformal prediction (Lei et al. 2018): ``errors`` are true minus predicted, one a subject.

    An interval covers a new subject with at least its level if the subject is of the same kind as
    those that the errors are of; nothing else is assumed.
    """

    errors: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "errors", tuple(sorted(e for e in self.errors if isfinite(e))))

    @property
    def best_level(self) -> float:
        """The highest level for which there are errors enough; 0 where there are none."""
        return max(0.0, 1 - 2 / (len(self.errors) + 1))

    def interval(self, level: float) -> tuple[float, float]:
        """What to add to a prediction: low and high, infinite where the errors are too few for the level."""
        n, tail = len(self.errors), (1 - level) / 2
        # Rounded, since 1 − 0.9 is a little less than 0.1.
        low, high = floor(round((n + 1) * tail, 9)), ceil(round((n + 1) * (1 - tail), 9))
        return (self.errors[low - 1] if low >= 1 else -inf, self.errors[high - 1] if high <= n else inf)

    def coverage(self, errors: Sequence[float], level: float) -> float:
        """Share of other subjects' ``errors`` that the interval holds. None: undefined.

        Of subjects of another kind: among those of one kind it is the level by construction.
        """
        low, high = self.interval(level)
        covered = [low <= error <= high for error in errors if isfinite(error)]
        return sum(covered) / len(covered) if covered else nan
