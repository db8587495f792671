"""Losses that judge every voxel by itself."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from delineate.core.targets import IGNORED
from delineate.losses.base import Loss, known_voxels


class CrossEntropySpec(BaseModel):
    """Cross entropy from logits, averaged over the voxels that count.

    Exclusive targets: softmax over background and targets. Overlapping: a binary cross entropy each.
    No voxel that counts: 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["cross_entropy"] = "cross_entropy"

    def build(self, exclusive: bool) -> Loss:
        return _softmax_cross_entropy if exclusive else _binary_cross_entropy


def _softmax_cross_entropy(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
    log_probability = F.log_softmax(logits.float(), dim=1)
    known = known_voxels(target)
    index = target.masked_fill(~known, 0).long()
    loss = -log_probability.gather(1, index) * known
    return loss.sum() / known.sum().clamp_min(1)


def _binary_cross_entropy(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
    known = (target != IGNORED).float()
    loss = F.binary_cross_entropy_with_logits(logits.float(), (target == 1).float(), weight=known, reduction="sum")
    return loss / known.sum().clamp_min(1)
