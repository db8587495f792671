"""What an adaptation plans and what it finds: values that are written, reported and returned."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from delineate.errors import DatasetError, DelineateError
from delineate.evaluation.change import Change
from delineate.io.documents import Document
from delineate.recipe import Recipe
from delineate.training.options import Stop

PLAN = "adaptation.json"
WRITTEN = (
    PLAN,
    "folds",
    "final",
    "bundle",
    "new",
    "original",
    "report.html",
    "card.html",
    "result.json",
    "subjects.csv",
)
"""What an adaptation writes into its folder."""


class AdaptationPlan(Document):
    """What is adapted and how: the digest of the ``origin``'s weights, the recipe, and each subject's part.

    ``folds`` are those of the new subjects; a single one, if they are all of one patient, is never held out.
    ``rehearsed`` original subjects are trained on again, ``unseen`` ones measure what is forgotten.
    """

    error: ClassVar[type[DelineateError]] = DatasetError
    fix: ClassVar[str] = "restore it, or use another --out"

    origin: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    data_set: str
    recipe: Recipe
    folds: tuple[tuple[str, ...], ...]
    rehearsed: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def new(self) -> tuple[str, ...]:
        """All new subjects."""
        return tuple(name for fold in self.folds for name in fold)

    @property
    def measurable(self) -> bool:
        """Whether a part of the new subjects can be held out while the rest is trained on."""
        return len(self.folds) > 1


@dataclass(frozen=True)
class Adapted:
    """Result of an adaptation.

    ``share`` is that of the fine-tuned weights. ``gain`` is measured on the new subjects, each predicted by a network
    that was not trained on its patient; ``forgetting`` on original subjects that no training has seen. Where one
    is None, ``notes`` say why. ``stopped`` is why it ended early; None if it is complete.
    """

    folder: Path
    plan: AdaptationPlan
    share: float | None = None
    gain: Change | None = None
    forgetting: Change | None = None
    notes: tuple[str, ...] = ()
    simulated: bool = False
    stopped: Stop | None = None

    def as_dict(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            "bundle": str(self.folder / "bundle"),
            "finished": self.stopped is None,
            "share_of_fine_tuned_weights": self.share,
            "gain": None if self.gain is None else self.gain.as_dict(),
            "forgetting": None if self.forgetting is None else self.forgetting.as_dict(),
            "notes": list(self.notes),
        }
