"""Losses from the overlap of whole regions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.losses.base import BACKGROUND, Judged, Loss, LossSpecification, class_weights, judged, softened
from delineate.losses.pixelwise import Soft, Weights
from delineate.specification import PositiveWeight, Weight


class _Overlap(LossSpecification):
    """Fields that overlap losses share.

    ``smooth`` is added above and below: a target absent from both reference and prediction gives 0.
    ``over_batch`` pools a target's voxels over the batch before dividing, which is more stable if a tile
    may miss the target; otherwise each sample counts separately. The background is left out unless
    ``include_background``, which is for exclusive targets. ``weights`` by target name (or ``background``, if that is
    included) weight the mean over targets. ``soft_labels`` are the reference's values for absent and present.
    """

    smooth: PositiveWeight = 1.0
    over_batch: bool = True
    include_background: bool = False
    weights: Weights | None = None
    soft_labels: Soft | None = None

    @property
    def mean_over_samples(self) -> bool:
        return not self.over_batch

    def by_class(
        self, targets: Targets, score: Callable[[Tensor, Tensor, Tensor], Tensor], *, squares: bool = False
    ) -> Loss:
        """Weighted mean over classes of ``score(overlap, only predicted, only in the reference)``; see :func:`sums`.

        Raises :class:`RecipeError` for settings of a background that does not count, and for weights that are all 0.
        """
        background, weighed = self.include_background, BACKGROUND in (self.weights or {})
        if (background or weighed) and not targets.exclusive:
            raise RecipeError(
                f"loss {self.kind}: overlapping targets have no background in common, so none can be included",
                fix="remove include_background and the background's weight, or set data.targets.mode: exclusive",
            )
        if weighed and not background:
            raise RecipeError(
                f"loss {self.kind}: weights name the background, which is not included",
                fix="add include_background: true, or remove its weight",
            )
        weights = class_weights(self.weights, targets, background=background)

        def loss(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            probability, reference, known = judged(logits, target, targets, self.soft_labels)
            if targets.exclusive and not background:
                probability, reference = probability[:, 1:], reference[:, 1:]
            overlap, excess, missed = sums(Judged(probability, reference, known), self.over_batch, squares=squares)
            weight = torch.tensor(weights, dtype=probability.dtype, device=probability.device)
            return (score(overlap, excess, missed) * weight / weight.mean()).mean()

        return loss


class DiceSpec(_Overlap):
    """Soft Dice loss, mean over targets: 1 - (2Σpy + s) / (Σp + Σy + s), s being ``smooth``.

    ``denominator: squares`` has Σp² + Σy² in place of Σp + Σy (Milletari et al. 2016). For masks and
    labels of 0 and 1 the two are equal. For soft labels they differ: with squares, a prediction that equals them is
    always best; with sums, one that is 1 everywhere may be better (docs/losses.md).

    Takes logits; probabilities are formed inside (softmax if targets exclude each other, else sigmoid).
    """

    kind: Literal["dice"] = "dice"
    denominator: Literal["sums", "squares"] = "sums"

    def build(self, targets: Targets) -> Loss:
        def one_minus_dice(overlap: Tensor, excess: Tensor, missed: Tensor) -> Tensor:
            return 1 - (2 * overlap + self.smooth) / (2 * overlap + excess + missed + self.smooth)

        return self.by_class(targets, one_minus_dice, squares=self.denominator == "squares")


class TverskySpec(_Overlap):
    """Tversky loss (Salehi et al. 2017): false positives and negatives have the given weights; 0.5 each is Dice."""

    kind: Literal["tversky"] = "tversky"
    fp_weight: Weight = 0.3
    fn_weight: Weight = 0.7

    def build(self, targets: Targets) -> Loss:
        return self.by_class(targets, self.one_minus_index)

    def one_minus_index(self, overlap: Tensor, excess: Tensor, missed: Tensor) -> Tensor:
        wrong = self.fp_weight * excess + self.fn_weight * missed
        return 1 - (overlap + self.smooth) / (overlap + wrong + self.smooth)


class FocalTverskySpec(TverskySpec):
    """Focal Tversky loss (Abraham & Khan 2019): (1 - Tversky index)^(1 / ``gamma``), ``gamma`` from 1 to 3.

    ``reduction: sum`` adds the classes up instead of taking their mean.
    """

    kind: Literal["focal_tversky"] = "focal_tversky"  # type: ignore[assignment]
    gamma: Annotated[float, Field(ge=1, le=3)] = 4 / 3
    reduction: Literal["mean", "sum"] = "mean"

    def build(self, targets: Targets) -> Loss:
        def focal(overlap: Tensor, excess: Tensor, missed: Tensor) -> Tensor:
            wrong = self.one_minus_index(overlap, excess, missed)
            # A root has no finite slope at 0: below this, a class counts as perfect.
            bent = wrong.clamp_min(1e-7) ** (1 / self.gamma)
            bent = torch.where(wrong > 1e-7, bent, torch.zeros_like(bent))
            return bent * bent.shape[-1] if self.reduction == "sum" else bent

        return self.by_class(targets, focal)


class GeneralisedDiceSpec(LossSpecification):
    """Generalised Dice loss (Sudre et al. 2017): classes weighted by one over their squared volume.

    The background is a class; each overlapping target has its own. A class that is absent from the
    reference takes the largest weight of those present. If no voxel counts, the loss is 0.
    """

    kind: Literal["generalised_dice"] = "generalised_dice"
    over_batch: bool = True
    soft_labels: Soft | None = None

    @property
    def mean_over_samples(self) -> bool:
        return not self.over_batch

    def build(self, targets: Targets) -> Loss:
        def generalised_dice(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            seen = judged(logits, target, targets, self.soft_labels)
            if not targets.exclusive:
                # Each target has its own background.
                absent = softened((target == 0).to(seen.reference.dtype), self.soft_labels)
                seen = Judged(
                    torch.cat([1 - seen.probability, seen.probability], 1),
                    torch.cat([absent, seen.reference], 1),
                    torch.cat([seen.known, seen.known], 1),
                )
            overlap, excess, missed = sums(seen, self.over_batch)
            volume = overlap + missed
            weight = torch.where(volume > 0, volume, torch.inf) ** -2
            greatest = weight.amax(-1, keepdim=True)
            weight = torch.where(volume > 0, weight, torch.where(greatest > 0, greatest, torch.ones_like(greatest)))
            weight = weight.detach()
            size = (weight * (2 * overlap + excess + missed)).sum(-1)
            loss = 1 - 2 * (weight * overlap).sum(-1) / torch.where(size > 0, size, torch.ones_like(size))
            return torch.where(size > 0, loss, torch.zeros_like(loss)).mean()

        return generalised_dice


def sums(seen: Judged, over_batch: bool, *, squares: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap, excess and missed volume in voxels, (K,) over the batch or (N, K).

    With ``squares``, the predicted and the true volume are sums of squares.
    """
    probability, reference = seen.probability * seen.known, seen.reference * seen.known
    space = [*([0] if over_batch else []), *range(2, probability.ndim)]
    overlap = (probability * reference).sum(space)
    predicted, true = (x.square() if squares else x for x in (probability, reference))
    return overlap, predicted.sum(space) - overlap, true.sum(space) - overlap
