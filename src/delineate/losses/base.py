"""What every loss shares: its call, and how logits and targets are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from delineate.core.targets import IGNORED, Targets
from delineate.errors import RecipeError
from delineate.specification import Specification

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(logits, target, image)`` → scalar.

Logits (N, K, *space), target (N, T, *space) uint8, image (N, C, *input).
"""
BACKGROUND = "background"


class LossSpecification(Specification):
    """The fields of a loss; ``build`` makes the loss for given targets."""

    if TYPE_CHECKING:
        kind: str  # every loss has its own

    @property
    def mean_over_samples(self) -> bool:
        """Whether a batch's loss is the mean of its samples', as long as no voxel is ignored."""
        return False

    def build(self, targets: Targets) -> Loss:
        raise NotImplementedError


class Judged(NamedTuple):
    """Class by class (N, K, *space): probabilities, the reference, and which voxels count (N, 1 or K, *space)."""

    probability: Tensor
    reference: Tensor
    known: Tensor


def full_precision(logits: Tensor) -> Tensor:
    """Half-precision logits in float32; a loss of many small terms needs it."""
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits


def known_voxels(target: Tensor) -> Tensor:
    """Whether each voxel counts, (N, T, *space)."""
    return target != IGNORED


def one_hot(target: Tensor, classes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Class indices (N, 1, *space) → (N, K, *space); ignored voxels are zero everywhere."""
    index = torch.arange(classes, device=target.device, dtype=target.dtype).view(1, -1, *[1] * (target.ndim - 2))
    return (target == index).to(dtype)


def judged(logits: Tensor, target: Tensor, targets: Targets, soft: tuple[float, float] | None) -> Judged:
    """Softmax probabilities with the background first, or a sigmoid for each overlapping target.

    ``soft`` are the reference's values for absent and present, by default 0 and 1.
    """
    logits = full_precision(logits)
    if targets.exclusive:
        probability, reference = torch.softmax(logits, 1), one_hot(target, logits.shape[1], logits.dtype)
    else:
        probability, reference = torch.sigmoid(logits), (target == 1).to(logits.dtype)
    return Judged(probability, softened(reference, soft), known_voxels(target).to(logits.dtype))


def softened(reference: Tensor, soft: tuple[float, float] | None) -> Tensor:
    return reference if soft is None else soft[0] + (soft[1] - soft[0]) * reference


def class_weights(weights: Mapping[str, float] | None, targets: Targets, *, background: bool = True) -> list[float]:
    """The weights of the background, unless it does not count, and of each target in order; 1 if none is given.

    Raises :class:`RecipeError` for a name that is not a target's, and if all are 0.
    """
    weights = weights or {}
    unknown = set(weights) - {BACKGROUND, *targets.names}
    if unknown:
        raise RecipeError(
            f"weights name {sorted(unknown)}, which are not targets", fix=f"known are {[BACKGROUND, *targets.names]}"
        )
    found = [float(weights.get(name, 1.0)) for name in (*([BACKGROUND] if background else []), *targets.names)]
    if not any(found):
        raise RecipeError("all weights are 0: no voxel would count", fix="give a target a weight above 0")
    return found
