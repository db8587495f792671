"""The residual U-Net of the liver tumour study."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step, Widths
from delineate.networks.blocks import EncoderDecoder, glorot_uniform


class ResidualUNetSpec(Architecture):
    """2D U-Net of residual blocks with BatchNorm, after Chlebus et al. 2018 with fewer channels.

    The study's figure is lost. Chosen here: blocks of two convolutions 3² without bias and a shortcut
    (1² with BatchNorm where widths differ), max-pools, transposed convolutions 2², and ``dropout``
    before each convolution in the decoder's blocks.
    """

    kind: Literal["residual_unet"] = "residual_unet"
    dimensions: Literal[2] = 2
    widths: Widths = (32, 64, 128, 256)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.widths) - 1),) * 2

    @property
    def recomputes(self) -> bool:
        return True

    def body(self, inputs: int, outputs: int) -> ResidualUNet:
        return ResidualUNet(self, inputs, outputs)


class ResidualUNet(EncoderDecoder):
    """Logits (N, K, X, Y) of images (N, C, X, Y)."""

    def __init__(self, spec: ResidualUNetSpec, inputs: int, outputs: int) -> None:
        widths, ladder = spec.widths, list(reversed(list(pairwise(spec.widths))))
        super().__init__(
            2,
            encoder=[ResidualBlock(i, o) for i, o in pairwise((inputs, *widths))],
            up=[nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in ladder],
            decoder=[ResidualBlock(2 * fine, fine, dropout=spec.dropout) for fine, _ in ladder],
            head=nn.Conv2d(widths[0], outputs, 1),
        )
        self.apply(glorot_uniform)


class ResidualBlock(nn.Module):
    """ReLU of the sum of (convolution, BatchNorm, ReLU, convolution, BatchNorm) and the block's input."""

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
