"""The residual U-Net of the liver tumour study."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import glorot_uniform


class ResidualUNetSpec(Architecture):
    """2D U-Net of residual blocks with BatchNorm, after Chlebus et al. 2018 with fewer channels.

    The study's figure is lost; chosen: blocks of two convolutions 3² without bias and a shortcut
    (1² with BatchNorm where widths differ), max-pools, transposed convolutions 2², and ``dropout``
    before each convolution of the decoder's blocks.
    """

    kind: Literal["residual_unet"] = "residual_unet"
    dimensions: Literal[2] = 2
    widths: Annotated[tuple[int, ...], Field(min_length=2)] = (32, 64, 128, 256)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.widths) - 1),) * 2

    def body(self, inputs: int, outputs: int) -> ResidualUNet:
        return ResidualUNet(self, inputs, outputs)


class ResidualUNet(nn.Module):
    """Logits (N, K, X, Y) of images (N, C, X, Y)."""

    def __init__(self, spec: ResidualUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        before = (inputs, *spec.widths)
        self.encoder = nn.ModuleList([ResidualBlock(i, o) for i, o in zip(before, spec.widths, strict=False)])
        self.pool = nn.MaxPool2d(2)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in reversed(list(pairwise(spec.widths))):
            self.up.append(nn.ConvTranspose2d(coarse, fine, 2, stride=2))
            self.decoder.append(ResidualBlock(2 * fine, fine, dropout=spec.dropout))
        self.head = nn.Conv2d(spec.widths[0], outputs, 1)
        self.apply(glorot_uniform)

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(torch.cat([up(x), skips.pop()], dim=1))
        return self.head(x)


class ResidualBlock(nn.Module):
    """ReLU of (convolution, BatchNorm, ReLU, convolution, BatchNorm) and the block's input."""

    def __init__(self, inputs: int, outputs: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Dropout(dropout),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.layers(x) + self.shortcut(x))
