"""The recurrent-residual U-Net."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import NormKind, activation, convolution, he_normal, normalisation, upsampling


class RecurrentUNetSpec(Architecture):
    """R2U-Net (Alom et al. 2018): each block applies two convolutions recurrently, and adds its input.

    A recurrent convolution sees the block's input plus its own last output, ``recurrences`` times after
    the first, with the same kernel. A 1-convolution brings the input to the block's width.
    """

    kind: Literal["recurrent_unet"] = "recurrent_unet"
    widths: Annotated[tuple[int, ...], Field(min_length=2)] = (64, 128, 256, 512, 1024)
    recurrences: Annotated[int, Field(ge=1)] = 2
    norm: NormKind = "batch"

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.widths) - 1),) * self.dimensions

    def body(self, inputs: int, outputs: int) -> RecurrentUNet:
        return RecurrentUNet(self, inputs, outputs)


class RecurrentUNet(nn.Module):
    """Logits (N, K, *space) of images (N, C, *space)."""

    def __init__(self, spec: RecurrentUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        d, widths = spec.dimensions, spec.widths
        self.encoder = nn.ModuleList(
            [RecurrentBlock(spec, i, o) for i, o in zip((inputs, *widths), widths, strict=False)]
        )
        self.pool = nn.MaxPool3d(2) if d == 3 else nn.MaxPool2d(2)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in reversed(list(pairwise(widths))):
            self.up.append(upsampling("transposed", d, coarse, fine, (2,) * d))
            self.decoder.append(RecurrentBlock(spec, 2 * fine, fine))
        self.head = convolution(d, widths[0], outputs, 1)
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


class RecurrentBlock(nn.Module):
    def __init__(self, spec: RecurrentUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        d = spec.dimensions
        self.recurrences = spec.recurrences
        self.project = convolution(d, inputs, outputs, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                convolution(d, outputs, outputs, 3, bias=spec.norm in ("none", "group")),
                normalisation(spec.norm, d, outputs),
                activation("relu"),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.project(x)
        for layer in self.layers:
            seen = y
            y = layer(seen)
            for _ in range(self.recurrences):
                y = layer(seen + y)
        return x + y
