"""Tiramisu 3D: a U-Net of densely connected blocks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import KerasTransposed, Recomputing, glorot_uniform, keras_batch_norm
from delineate.specification import Filters, Layers


class TiramisuSpec(Architecture):
    """The fully convolutional DenseNet (Jégou et al. 2017) of the prostate comparison, in 3D.

    ``encoder``, ``bottleneck`` and ``decoder`` are the numbers of layers in each dense block. Encoder blocks
    pass on their input along with what they add; the bottleneck and the decoder upsample only what they
    add. The paper's parameter counts leave no room for normalisation, hence ``norm: none``; it does
    not state the dropout, which is 0.2 as in the original. ``recompute`` computes each dense layer again
    in the backward pass instead of keeping its input, which takes several times less memory for a
    third more work (Pleiss et al. 2017); ``training.checkpoint_activations`` does the same.
    """

    kind: Literal["tiramisu"] = "tiramisu"
    dimensions: Literal[3] = 3
    encoder: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=8)] = (7, 8, 9)
    bottleneck: Layers = 12
    decoder: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=8)] = (15, 16, 17)
    growth: Filters = 16
    first: Filters = 48
    norm: Literal["none", "batch"] = "none"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2
    recompute: bool = False

    @model_validator(mode="after")
    def _mirrored(self) -> TiramisuSpec:
        if len(self.encoder) != len(self.decoder):
            raise ValueError(
                f"encoder has {len(self.encoder)} blocks, decoder {len(self.decoder)}; give both the same number"
            )
        return self

    @property
    def divisor(self) -> Step:
        return (2 ** len(self.encoder),) * 3

    @property
    def recomputes(self) -> bool:
        return True

    def body(self, inputs: int, outputs: int) -> Tiramisu:
        return Tiramisu(self, inputs, outputs)


class Tiramisu(nn.Module):
    """Logits (N, K, X, Y, Z) of images (N, C, X, Y, Z)."""

    def __init__(self, spec: TiramisuSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv3d(inputs, spec.first, 3, padding=1, bias=False)
        stack, stacks = spec.first, []
        self.encoder, self.down = nn.ModuleList(), nn.ModuleList()
        for layers in spec.encoder:
            self.encoder.append(DenseBlock(spec, stack, layers))
            stack += layers * spec.growth
            stacks.append(stack)
            self.down.append(_transition_down(spec, stack))
        self.bottleneck = DenseBlock(spec, stack, spec.bottleneck)
        added = spec.bottleneck * spec.growth
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for layers in spec.decoder:
            self.up.append(KerasTransposed(3, added, added, bias=True))
            stack = added + stacks.pop()
            self.decoder.append(DenseBlock(spec, stack, layers))
            added = layers * spec.growth
        self.head = nn.Conv3d(stack + added, outputs, 1)
        self.apply(glorot_uniform)

    def forward(self, x: Tensor) -> Tensor:
        x, skips = self.first(x), []
        for block, down in zip(self.encoder, self.down, strict=True):
            skip = torch.cat([x, block(x)], dim=1)
            skips.append(skip)
            x = down(skip)
        added = self.bottleneck(x)
        for up, block in zip(self.up, self.decoder, strict=True):
            x = torch.cat([up(added), skips.pop()], dim=1)
            added = block(x)
        return self.head(torch.cat([x, added], dim=1))


class DenseBlock(Recomputing):
    """Layers that each see the block's input and everything added so far; returns what was added."""

    def __init__(self, spec: TiramisuSpec, inputs: int, layers: int) -> None:
        super().__init__()
        if spec.recompute:
            self.recompute = nullcontext
        self.layers = nn.ModuleList(
            nn.Sequential(
                _norm(spec, inputs + i * spec.growth),
                nn.ReLU(),
                nn.Conv3d(inputs + i * spec.growth, spec.growth, 3, padding=1, bias=False),
                nn.Dropout(spec.dropout),
            )
            for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(self.through([layer], *features))
        return torch.cat(features[1:], dim=1)


def _norm(spec: TiramisuSpec, channels: int) -> nn.Module:
    return keras_batch_norm(3, channels) if spec.norm == "batch" else nn.Identity()


def _transition_down(spec: TiramisuSpec, channels: int) -> nn.Sequential:
    return nn.Sequential(
        _norm(spec, channels),
        nn.ReLU(),
        nn.Conv3d(channels, channels, 1, bias=False),
        nn.Dropout(spec.dropout),
        nn.MaxPool3d(2),
    )
