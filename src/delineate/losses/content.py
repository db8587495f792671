"""The Siamese content loss: masks are compared by what a pre-trained network sees through them."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.losses.base import LossSpecification, judged
from delineate.losses.pixelwise import Soft
from delineate.pretrained.vgg import VGG19Features
from delineate.pretrained.weights import load_features


class SiameseContentSpec(LossSpecification):
    """Squared distance between VGG19's features of the image under the true and the predicted mask.

    Features are the outputs of the first max-pools, ``pools`` of them, taken as one vector. ``reduction``: ``paper``
    divides the squared distance by that vector's length, ``sum`` by nothing, ``mean`` averages each
    layer separately and then the layers. The loss is a mean over samples and targets. ``channel`` of the image
    (``null``: the middle one) is shown to VGG as three equal channels; the mask multiplies it before VGG's own
    preprocessing, which expects 0…1. ``intensities``: ``prepared``, for recipes that scale scans to 0…1 themselves,
    shows the image as it is; ``stretched`` scales each sample to 0…1. Slices of a volume are treated one by one.

    ``trained`` makes it a game: VGG's weights ascend the loss at ``learning_rate`` while the network
    descends it. Ignored voxels are masked in both.
    """

    kind: Literal["siamese_content"] = "siamese_content"
    weights: str = "imagenet"
    pools: Annotated[int, Field(ge=1, le=5)] = 2
    soft_labels: Soft | None = (0.1, 0.9)
    reduction: Literal["paper", "sum", "mean"] = "paper"
    channel: Annotated[int, Field(ge=0, le=1023)] | None = None
    intensities: Literal["stretched", "prepared"] = "stretched"
    trained: bool = False
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1e-5

    def build(self, targets: Targets) -> SiameseContent:
        return SiameseContent(self, targets)


class SiameseContent(nn.Module):
    """``loss(logits, target, image)``; ``adversary`` are the parameters that ascend it."""

    def __init__(self, spec: SiameseContentSpec, targets: Targets) -> None:
        super().__init__()
        self.spec, self.targets = spec, targets
        weights, preprocessing = load_features("vgg19", spec.weights)
        self.vgg = VGG19Features(preprocessing, spec.pools)
        if weights is not None:
            own = self.vgg.state_dict()
            self.vgg.load_state_dict({key: weights[key] for key in own})
        self.vgg.requires_grad_(spec.trained)

    @property
    def adversary(self) -> list[nn.Parameter]:
        return [p for p in self.vgg.parameters() if p.requires_grad]

    def forward(self, logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
        if min(logits.shape[2:4]) < 2**self.spec.pools:
            pixels = "×".join(map(str, logits.shape[2:4]))
            raise RecipeError(
                f"loss siamese_content halves images {self.spec.pools} times; got {pixels} pixels",
                fix="use larger tiles, or fewer pools",
            )
        with torch.autocast(logits.device.type, enabled=False):
            probability, reference, known = judged(
                logits.to(self.vgg.input.mean.dtype), target, self.targets, self.spec.soft_labels
            )
            if self.targets.exclusive:
                probability, reference = probability[:, 1:], reference[:, 1:]
            shown = self._shown(image, logits.shape[2:])
            predicted = self._features(shown * probability * known)
            # Only an adversary learns from the true branch.
            with torch.set_grad_enabled(self.spec.trained and torch.is_grad_enabled()):
                true = self._features(shown * reference * known)
            squared = [((p - t) ** 2).flatten(1) for p, t in zip(predicted, true, strict=True)]
            if self.spec.reduction == "mean":
                return torch.stack([s.mean() for s in squared]).mean()
            distance = torch.cat(squared, 1)
            return (distance.mean(1) if self.spec.reduction == "paper" else distance.sum(1)).mean()

    def _shown(self, image: Tensor, size: torch.Size) -> Tensor:
        """The chosen channel (N, 1, *space) of the middle of the image, scaled to 0…1 if ``stretched``."""
        channel = image.shape[1] // 2 if self.spec.channel is None else self.spec.channel
        image = image[:, channel : channel + 1].to(self.vgg.input.mean.dtype)
        for axis, n in enumerate(size, start=2):
            image = image.narrow(axis, (image.shape[axis] - n) // 2, n)
        if self.spec.intensities == "prepared":
            return image
        space = tuple(range(2, image.ndim))
        low, high = image.amin(space, keepdim=True), image.amax(space, keepdim=True)
        return (image - low) / torch.where(high > low, high - low, torch.ones_like(high))

    def _features(self, masked: Tensor) -> tuple[Tensor, ...]:
        """VGG's layers of each target's masked slices, all as samples."""
        if masked.ndim == 5:  # (N, T, X, Y, Z): slices are images
            masked = masked.movedim(-1, 1).flatten(0, 1)
        pictures = masked.flatten(0, 1).unsqueeze(1)
        return self.vgg(pictures.expand(-1, 3, -1, -1))


def has_random_features(loss: nn.Module) -> bool:
    """Whether a loss compares features with random, untrained weights."""
    return any(isinstance(m, SiameseContent) and m.spec.weights == "random" for m in loss.modules())


def adversaries(loss: nn.Module) -> list[tuple[list[nn.Parameter], float]]:
    """Parameters anywhere in a loss that ascend it, with their learning rate."""
    found = [(m.adversary, m.spec.learning_rate) for m in loss.modules() if isinstance(m, SiameseContent)]
    return [(parameters, rate) for parameters, rate in found if parameters]
