"""What an adaptation changed on subjects that it was not trained on: gained, lost, or too few to tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from delineate.evaluation.forgetting import AFTER, BEFORE
from delineate.evaluation.methods import MethodDifference, compare_methods
from delineate.evaluation.table import Evaluation

Verdict = Literal["gained", "lost", "not distinguishable", "too few to tell"]

JUDGED_BY = "dice"
"""The metric that decides the verdict."""


@dataclass(frozen=True)
class Change:
    """The same subjects before and after an adaptation.

    ``differences`` are after minus before, one for each metric that has a better end; none for a single subject.
    """

    before: Evaluation
    after: Evaluation
    differences: tuple[MethodDifference, ...] = ()

    @classmethod
    def between(cls, before: Evaluation, after: Evaluation) -> Change:
        """The change between two evaluations of the same subjects."""
        several = len(before.subjects) > 1
        return cls(before, after, tuple(compare_methods({AFTER: after, BEFORE: before})) if several else ())

    @property
    def difference(self) -> MethodDifference | None:
        """The difference that decides the verdict; None for a single subject."""
        return next((found for found in self.differences if found.metric == JUDGED_BY), None)

    @property
    def verdict(self) -> Verdict:
        """What can be concluded about the mean Dice of all patients like these."""
        found = self.difference
        if found is None or found.verdict == "too few to tell":
            return "too few to tell"
        if found.better is None:
            return "not distinguishable"
        return "gained" if found.better == AFTER else "lost"

    @property
    def rows(self) -> list[dict[str, object]]:
        """Dice of each subject and target before and after, and the difference."""
        keys = ["subject", "site", "target"]
        both = self.before.table[[*keys, JUDGED_BY]].merge(
            self.after.table[[*keys, JUDGED_BY]], on=keys, suffixes=(f"_{BEFORE}", f"_{AFTER}")
        )
        changed = both[f"{JUDGED_BY}_{AFTER}"] - both[f"{JUDGED_BY}_{BEFORE}"]
        return both.assign(change=changed).to_dict("records")

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "verdict": self.verdict,
            "subjects": self.rows,
            "differences": [found.as_dict() for found in self.differences],
        }
