"""Losses that judge the overlap of whole regions."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from delineate.losses.base import Loss, known_voxels, one_hot


class DiceSpec(BaseModel):
    """Soft Dice loss (Milletari et al. 2016, with plain sums in the denominator), mean over targets.

    Takes logits; probabilities are formed inside (softmax where targets exclude each other, else
    sigmoid). Background is left out. ``smooth`` is added above and below: a target absent from
    both reference and prediction gives 0. ``over_batch`` pools a target's voxels over the batch
    before dividing, steadier where a tile may miss the target; otherwise each sample counts alone.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["dice"] = "dice"
    smooth: Annotated[float, Field(gt=0)] = 1.0
    over_batch: bool = True

    def build(self, exclusive: bool) -> Loss:
        def dice_loss(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            known = known_voxels(target)
            if exclusive:
                probability = torch.softmax(logits.float(), dim=1)[:, 1:]
                reference = one_hot(target, logits.shape[1])[:, 1:]
            else:
                probability, reference = torch.sigmoid(logits.float()), (target == 1).float()
            probability = probability * known
            space = [*([0] if self.over_batch else []), *range(2, logits.ndim)]
            overlap = (probability * reference).sum(space)
            size = probability.sum(space) + reference.sum(space)
            return (1 - (2 * overlap + self.smooth) / (size + self.smooth)).mean()

        return dice_loss
