"""The U-Net with a VGG11 encoder of the liver volume study."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import channel_adapter

BLOCKS = ((0,), (3,), (6, 8), (11, 13), (16, 18))
"""Indices of VGG11's convolutions in ``features``, by level."""
WIDTHS = (64, 128, 256, 512, 512)


def _in_words(value: Any) -> Any:
    """Bundles of earlier versions say true and false."""
    return ("encoder" if value else "none") if isinstance(value, bool) else value


class VGGUNetSpec(Architecture):
    """TernausNet (Iglovikov & Shvets 2018): VGG11 without BatchNorm as encoder, five pools.

    A 1-convolution maps the image to VGG's three channels. It is initialised by a fixed rule (one
    channel is repeated, two are followed by the first again, three pass unchanged; of more, each of
    the three takes an equal share) and learned from there. ``short_skips: encoder`` adds 1-convolutions around the
    encoder's blocks from the second on, before the last ReLU. ``dropout`` acts on the outputs of
    the two deepest blocks, as in the study's own U-Net. ``weights``: ``imagenet``, ``random``, or
    the path of a VGG11 file.
    """

    kind: Literal["vgg_unet"] = "vgg_unet"
    dimensions: Literal[2] = 2
    short_skips: Annotated[Literal["none", "encoder"], BeforeValidator(_in_words)] = "none"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5
    weights: str = "imagenet"

    @property
    def divisor(self) -> Step:
        return (32, 32)

    def body(self, inputs: int, outputs: int) -> VGGUNet:
        return VGGUNet(self, inputs, outputs)

    def start_from_published(self, network: nn.Module) -> str | None:
        from delineate.pretrained.weights import load_features

        weights, _ = load_features("vgg11", self.weights)
        if weights is None:
            return "the encoder starts from random weights instead of VGG11's"
        missing, _ = network.load_state_dict(weights, strict=False)
        lacking = [name for name in missing if name.startswith("features.")]
        assert not lacking, lacking  # load_features has checked every key and shape
        return f"encoder from VGG11 ({self.weights}), {len(weights)} tensors"


class VGGUNet(nn.Module):
    """Logits (N, K, X, Y) of images (N, C, X, Y). ``features`` has torchvision's key names."""

    def __init__(self, spec: VGGUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.adapt = channel_adapter(2, inputs, 3)
        widths = (3, *WIDTHS)
        self.features = nn.ModuleDict()
        self.shortcuts = nn.ModuleList()
        for level, indices in enumerate(BLOCKS):
            for i, index in enumerate(indices):
                before = widths[level] if i == 0 else WIDTHS[level]
                self.features[str(index)] = nn.Conv2d(before, WIDTHS[level], 3, padding=1)
            if spec.short_skips == "encoder" and level > 0:
                self.shortcuts.append(nn.Conv2d(widths[level], WIDTHS[level], 1))
        self.pool, self.relu = nn.MaxPool2d(2), nn.ReLU(inplace=True)
        self.dropout = nn.Dropout(spec.dropout)
        self.centre = _decoder(512, 512, 256)
        self.decoder = nn.ModuleList(
            [_decoder(768, 512, 256), _decoder(768, 512, 128), _decoder(384, 256, 64), _decoder(192, 128, 32)]
        )
        self.last = nn.Sequential(nn.Conv2d(96, 32, 3, padding=1), nn.ReLU(inplace=True))
        self.head = nn.Conv2d(32, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.adapt(x), []
        for level, indices in enumerate(BLOCKS):
            x = self.pool(x) if level else x
            x = self._block(level, indices, x)
            if level >= len(BLOCKS) - 2:
                x = self.dropout(x)
            skips.append(x)
        x = self.centre(self.pool(x))
        for block in self.decoder:
            x = block(torch.cat([x, skips.pop()], dim=1))
        return self.head(self.last(torch.cat([x, skips.pop()], dim=1)))

    def _block(self, level: int, indices: tuple[int, ...], x: Tensor) -> Tensor:
        y = x
        for i, index in enumerate(indices):
            y = self.features[str(index)](y if i == 0 else self.relu(y))
        if self.shortcuts and level > 0:
            y = y + self.shortcuts[level - 1](x)
        return self.relu(y)


def _decoder(inputs: int, middle: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, middle, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.ConvTranspose2d(middle, outputs, 3, stride=2, padding=1, output_padding=1),
        nn.ReLU(inplace=True),
    )
