"""The 3D U-Net of the prostate comparison."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import KerasTransposed, glorot_uniform, keras_batch_norm


class ProstateUNetSpec(Architecture):
    """3D U-Net with BatchNorm on the input of each block, the image included; Keras' defaults.

    Block: BatchNorm, convolution 3³, ReLU, dropout, convolution 3³, ReLU; no biases but the head's.
    Long skips join the transposed convolution's output by concatenation.
    """

    kind: Literal["prostate_unet"] = "prostate_unet"
    dimensions: Literal[3] = 3
    widths: Annotated[tuple[int, ...], Field(min_length=2)] = (16, 32, 64, 128)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.widths) - 1),) * 3

    def body(self, inputs: int, outputs: int) -> ProstateUNet:
        return ProstateUNet(self, inputs, outputs)


class ProstateUNet(nn.Module):
    """Logits (N, K, X, Y, Z) of images (N, C, X, Y, Z)."""

    def __init__(self, spec: ProstateUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, *spec.widths)
        self.encoder = nn.ModuleList([_block(i, o, spec.dropout) for i, o in zip(widths, spec.widths, strict=False)])
        self.pool = nn.MaxPool3d(2)
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for fine, coarse in reversed(list(pairwise(spec.widths))):
            self.up.append(KerasTransposed(3, coarse, fine, bias=False))
            self.decoder.append(_block(2 * fine, fine, spec.dropout))
        self.head = nn.Conv3d(spec.widths[0], outputs, 1)
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


def _block(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        keras_batch_norm(3, inputs),
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    )
