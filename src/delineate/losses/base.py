"""What every loss shares: its call, and how a target's classes and ignored voxels are read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from delineate.core.targets import IGNORED

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``loss(logits, target, image)`` → scalar.

Logits (N, K, *space), target (N, T, *space) uint8, image (N, C, *input).
"""


def known_voxels(target: Tensor) -> Tensor:
    """Whether each voxel counts, (N, T, *space)."""
    return target != IGNORED


def one_hot(target: Tensor, classes: int) -> Tensor:
    """Class indices (N, 1, *space) → float32 (N, K, *space); ignored voxels are zero everywhere."""
    index = torch.arange(classes, device=target.device, dtype=target.dtype).view(1, -1, *[1] * (target.ndim - 2))
    return (target == index).float()
