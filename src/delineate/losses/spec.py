"""The losses by kind. To add one to Delineate, write a class and list it here; others are found by entry points."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.losses.base import LossSpecification
from delineate.losses.combined import DeepSupervision, Region, Sum, target_indices
from delineate.losses.content import SiameseContentSpec
from delineate.losses.overlap import DiceSpec, FocalTverskySpec, GeneralisedDiceSpec, TverskySpec
from delineate.losses.pixelwise import CrossEntropySpec, FocalSpec
from delineate.specification import Kinds, PositiveWeight, Specification, specifications_in


class WeightedLoss(Specification):
    """One term of a sum."""

    weight: PositiveWeight = 1.0
    loss: LossSpec


class SumSpec(LossSpecification):
    """A weighted sum of losses."""

    kind: Literal["sum"] = "sum"
    terms: Annotated[tuple[WeightedLoss, ...], Field(min_length=1, max_length=32)]

    @property
    def mean_over_samples(self) -> bool:
        return all(term.loss.mean_over_samples for term in self.terms)

    def build(self, targets: Targets) -> Sum:
        return Sum([term.weight for term in self.terms], [term.loss.build(targets) for term in self.terms])


class RegionSpec(LossSpecification):
    """A loss that counts only voxels within the reference's masks of some targets (any of them).

    ``box`` uses their bounding box in each sample instead; ``dilate_voxels`` widens either on all
    sides. A sample without the region does not count. ``only``: of overlapping targets, these alone are
    restricted, and the others count everywhere, such as a tumour within the liver beside the liver itself (Chlebus et
    al. 2018).
    """

    kind: Literal["region"] = "region"
    loss: LossSpec
    within: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)]
    only: Annotated[tuple[str, ...], Field(min_length=1, max_length=256)] | None = None
    box: bool = False
    dilate_voxels: Annotated[int, Field(ge=0, le=256)] = 0

    def build(self, targets: Targets) -> Region:
        classes = target_indices(self.within, targets)
        if self.only is not None and targets.exclusive:
            raise RecipeError(
                "a region loss with `only` is for overlapping targets; these exclude each other",
                fix="remove only, or set data.targets.mode: overlapping",
            )
        only = None if self.only is None else target_indices(self.only, targets)
        return Region(self.loss.build(targets), classes, targets.exclusive, self.dilate_voxels, self.box, only)


class DeepSupervisionSpec(LossSpecification):
    """Sets the ``weights`` of a deeply supervised network's outputs, the finest first.

    Any loss accepts such outputs; without this, each has half the weight of the one before. It is the outermost loss:
    within another, there is only one output left.
    """

    kind: Literal["deep_supervision"] = "deep_supervision"
    loss: LossSpec
    weights: Annotated[tuple[PositiveWeight, ...], Field(min_length=1, max_length=12)] | None = None

    @property
    def mean_over_samples(self) -> bool:
        return self.loss.mean_over_samples

    def build(self, targets: Targets) -> DeepSupervision:
        return DeepSupervision(self.loss.build(targets), self.weights)


LOSSES: Kinds[LossSpecification] = Kinds(
    "losses",
    "loss",
    LossSpecification,
    (
        CrossEntropySpec,
        FocalSpec,
        DiceSpec,
        GeneralisedDiceSpec,
        TverskySpec,
        FocalTverskySpec,
        SiameseContentSpec,
        SumSpec,
        RegionSpec,
        DeepSupervisionSpec,
    ),
)
LossSpec = Annotated[LossSpecification, LOSSES]
for _model in (WeightedLoss, SumSpec, RegionSpec, DeepSupervisionSpec):
    _model.model_rebuild()

DICE_AND_CROSS_ENTROPY = SumSpec(terms=(WeightedLoss(loss=DiceSpec()), WeightedLoss(loss=CrossEntropySpec())))


def build_loss(spec: LossSpec, targets: Targets) -> DeepSupervision:
    """The loss for ``spec``, which also accepts the tuple of outputs from a deeply supervised network.

    Raises :class:`RecipeError` for deep supervision within another loss, where its weights would mean nothing.
    """
    inner = spec.loss if isinstance(spec, DeepSupervisionSpec) else spec
    if any(isinstance(part, DeepSupervisionSpec) for part in specifications_in(inner)):
        raise RecipeError(
            "loss: deep_supervision lies within another loss, where it sees a single output and its weights do nothing",
            fix="make it the outermost loss: {kind: deep_supervision, loss: …}",
        )
    loss = spec.build(targets)
    return loss if isinstance(loss, DeepSupervision) else DeepSupervision(loss, None)
