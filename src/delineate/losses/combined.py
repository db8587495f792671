"""Losses made of losses: sums, restriction to a region, deep supervision."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delineate.core.targets import IGNORED, Targets
from delineate.errors import RecipeError
from delineate.losses.base import Loss


class Sum(nn.Module):
    """A weighted sum of losses; a module, so that its terms' parameters are found."""

    def __init__(self, weights: Sequence[float], terms: Sequence[Loss]) -> None:
        super().__init__()
        self.weights, self.terms = tuple(weights), tuple(terms)
        self.modules_of_terms = nn.ModuleList([term for term in terms if isinstance(term, nn.Module)])

    def forward(self, logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
        first, *rest = (w * term(logits, target, image) for w, term in zip(self.weights, self.terms, strict=True))
        return sum(rest, start=first)


class Region(nn.Module):
    """A loss that ignores everything outside a region of the reference, in ``only`` these planes of it if given."""

    def __init__(
        self,
        loss: Loss,
        classes: Sequence[int],
        exclusive: bool,
        dilate: int,
        box: bool,
        only: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.loss, self.classes, self.exclusive, self.dilate, self.box = loss, tuple(classes), exclusive, dilate, box
        self.only = only

    def forward(self, logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
        if self.exclusive:
            region = torch.stack([target == k for k in self.classes]).any(0)
        else:
            region = (target[:, list(self.classes)] == 1).any(1, keepdim=True)
        region = _box(region) if self.box else region
        if self.dilate:
            width = 2 * self.dilate + 1
            pool = F.max_pool3d if region.ndim == 5 else F.max_pool2d
            region = pool(region.float(), width, stride=1, padding=self.dilate) > 0
        outside = ~region
        if self.only is not None:
            restricted = torch.zeros(target.shape[1], dtype=torch.bool, device=target.device)
            restricted[list(self.only)] = True
            outside = outside & restricted.view(1, -1, *[1] * (target.ndim - 2))
        return self.loss(logits, target.masked_fill(outside, IGNORED), image)


def _box(region: Tensor) -> Tensor:
    """The bounding box (N, 1, *space) of each sample's region; nothing where there is none."""
    box = region.flatten(1).any(1).view(-1, *[1] * (region.ndim - 1))
    for axis in range(2, region.ndim):
        others = [d for d in range(2, region.ndim) if d != axis]
        line = region.float().amax(others, keepdim=True)
        inside = (line.cummax(axis).values > 0) & (line.flip(axis).cummax(axis).values.flip(axis) > 0)
        box = box & inside
    return box


class DeepSupervision(nn.Module):
    """A loss for each of a network's outputs, the finest first, against the target at that size.

    A coarser target takes the value of the voxel nearest to each position's centre. ``weights`` are
    scaled to a sum of 1; by default each is half the one before. For a single output it is the loss itself.
    """

    def __init__(self, loss: Loss, weights: Sequence[float] | None) -> None:
        super().__init__()
        self.loss, self.weights = loss, weights

    def forward(self, logits: Tensor | tuple[Tensor, ...], target: Tensor, image: Tensor) -> Tensor:
        if isinstance(logits, Tensor):
            return self.loss(logits, target, image)
        weights = self.weights or [0.5**i for i in range(len(logits))]
        if len(weights) != len(logits):
            raise RecipeError(
                f"deep supervision has {len(weights)} weights, but the network has {len(logits)} outputs",
                fix="give one weight per output",
            )
        losses = []
        for answer, weight in zip(logits, weights, strict=True):
            size = list(answer.shape[2:])
            fitting = target if list(target.shape[2:]) == size else _nearest(target, size)
            seen = image if answer is logits[0] else F.interpolate(image, size=size, mode="area")
            losses.append(weight / sum(weights) * self.loss(answer, fitting, seen))
        return sum(losses[1:], start=losses[0])


def _nearest(target: Tensor, size: Sequence[int]) -> Tensor:
    for axis, wanted in enumerate(size, start=2):
        n = target.shape[axis]
        place = ((torch.arange(wanted, device=target.device) + 0.5) * n / wanted).long()
        target = target.index_select(axis, place)
    return target


def target_indices(names: Sequence[str], targets: Targets) -> list[int]:
    """Class numbers (exclusive) or planes (overlapping) of targets; raises :class:`RecipeError` for another name."""
    unknown = [name for name in names if name not in targets.names]
    if unknown:
        raise RecipeError(f"region '{unknown[0]}' is not a target", fix=f"known are {', '.join(targets.names)}")
    first = 1 if targets.exclusive else 0
    return [first + targets.names.index(name) for name in names]
