"""Losses that treat every voxel separately."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from delineate.core.targets import Targets
from delineate.losses.base import Loss, LossSpecification, class_weights, full_precision, known_voxels, softened
from delineate.specification import Weight

Soft = tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(gt=0, le=1)]]
Weights = Annotated[dict[str, Weight], Field(max_length=256)]


class CrossEntropySpec(LossSpecification):
    """Cross entropy from logits, averaged over the voxels that count.

    Exclusive targets: softmax over background and targets. Overlapping: a binary cross entropy each.
    ``weights`` by target name or ``background``: a voxel has the weight of its class (for
    overlapping targets: the target's where it is present, the background's where it is not), and
    the average is over weights. ``soft_labels`` replace the reference's 0 and 1; for exclusive
    targets they are scaled to a sum of 1. If no voxel counts, the loss is 0.
    """

    kind: Literal["cross_entropy"] = "cross_entropy"
    weights: Weights | None = None
    soft_labels: Soft | None = None

    @property
    def mean_over_samples(self) -> bool:
        return self.weights is None

    def build(self, targets: Targets) -> Loss:
        weights, soft = class_weights(self.weights, targets), self.soft_labels

        def cross_entropy(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            terms = Terms(logits, target, targets, weights)
            if soft is None:
                return terms.mean(-terms.log_present)
            right, wrong = terms.labels(soft)
            return terms.mean(-(right * terms.log_present + wrong * terms.log_absent))

        return cross_entropy


class FocalSpec(LossSpecification):
    """Focal loss (Lin et al. 2017): cross entropy times (1 - p)^``focusing`` of the right class.

    ``weights`` and the empty case are as for cross entropy.
    """

    kind: Literal["focal"] = "focal"
    focusing: Annotated[float, Field(ge=0, le=100)] = 2.0
    weights: Weights | None = None

    @property
    def mean_over_samples(self) -> bool:
        return self.weights is None

    def build(self, targets: Targets) -> Loss:
        weights = class_weights(self.weights, targets)

        def focal(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            terms = Terms(logits, target, targets, weights)
            # The wrong classes' probability, without the cancellation of 1 - p.
            wrong = -torch.expm1(terms.log_present)
            return terms.mean(-(wrong.clamp_min(torch.finfo(wrong.dtype).tiny) ** self.focusing) * terms.log_present)

        return focal


class Terms:
    """Log-probabilities (N, 1 or T, *space) of what is present at each voxel, and weights to average by.

    ``log_absent``: summed over the classes that are not present.
    """

    def __init__(self, logits: Tensor, target: Tensor, targets: Targets, weights: list[float]) -> None:
        logits, known = full_precision(logits), known_voxels(target)
        self.classes = logits.shape[1]
        self.reference: Tensor | None = None  # of overlapping targets
        table = torch.tensor(weights, dtype=logits.dtype, device=logits.device)
        if targets.exclusive:
            log_probability = F.log_softmax(logits, dim=1)
            index = target.masked_fill(~known, 0).long()
            self.log_present = log_probability.gather(1, index)
            self.log_absent = log_probability.sum(1, keepdim=True) - self.log_present
            weight = table[index]
        else:
            present = target == 1
            self.reference = present.to(logits.dtype)
            sign = self.reference * 2 - 1
            self.log_present, self.log_absent = F.logsigmoid(sign * logits), F.logsigmoid(-sign * logits)
            own = table[1:].view(1, -1, *[1] * (logits.ndim - 2))
            weight = torch.where(present, own, table[0])
        self.weight = weight * known

    def labels(self, soft: tuple[float, float]) -> tuple[Tensor | float, Tensor | float]:
        """The soft labels that go with :attr:`log_present` and :attr:`log_absent`.

        Those of exclusive targets are scaled to a sum of 1 over a voxel's classes; where an overlapping target
        has the label s, its absence has 1 - s.
        """
        absent, present = soft
        if self.reference is None:
            total = present + (self.classes - 1) * absent
            return present / total, absent / total
        right = softened(self.reference, (1 - absent, present))
        return right, 1 - right

    def mean(self, loss: Tensor) -> Tensor:
        # If no voxel counts: 0 / 1.
        total = self.weight.sum()
        return (loss * self.weight).sum() / torch.where(total > 0, total, 1.0)
