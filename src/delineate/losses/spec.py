"""The registry of losses is this type: a new loss is a class and one word here."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from delineate.losses.base import Loss
from delineate.losses.overlap import DiceSpec
from delineate.losses.pixelwise import CrossEntropySpec


class WeightedLoss(BaseModel):
    """One term of a sum."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    weight: Annotated[float, Field(gt=0)] = 1.0
    loss: Annotated[CrossEntropySpec | DiceSpec, Field(discriminator="kind")]


class SumSpec(BaseModel):
    """A weighted sum of losses."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["sum"] = "sum"
    terms: Annotated[tuple[WeightedLoss, ...], Field(min_length=1)]

    def build(self, exclusive: bool) -> Loss:
        terms = [(term.weight, term.loss.build(exclusive)) for term in self.terms]

        def weighted_sum(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            first, *rest = (weight * loss(logits, target, image) for weight, loss in terms)
            return sum(rest, start=first)

        return weighted_sum


LossSpec = Annotated[CrossEntropySpec | DiceSpec | SumSpec, Field(discriminator="kind")]

DICE_AND_CROSS_ENTROPY = SumSpec(terms=(WeightedLoss(loss=DiceSpec()), WeightedLoss(loss=CrossEntropySpec())))
