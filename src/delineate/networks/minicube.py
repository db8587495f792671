"""The 3D networks that read minicubes of a brain, with and without context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import centre_crop
from delineate.specification import Filters


class ContextUNetSpec(Architecture):
    """3D U-Net with valid convolutions: every voxel of its output has seen its real surroundings.

    Two pools; ten voxels of context on each side. Convolutions 3³ with bias and ReLU, no
    normalisation; the decoder is padded, and its skips are cropped to the middle. Without ``context`` the encoder
    is padded too: the same network, which reads nothing beyond its output.
    """

    kind: Literal["context_unet"] = "context_unet"
    dimensions: Literal[3] = 3
    first_filters: Filters = 64
    context: bool = True

    @property
    def divisor(self) -> Step:
        return (4, 4, 4)

    @property
    def margin(self) -> Step:
        return (10, 10, 10) if self.context else (0, 0, 0)

    def body(self, inputs: int, outputs: int) -> ContextUNet:
        return ContextUNet(inputs, outputs, self.first_filters, self.context)


class ContextUNet(nn.Module):
    """Logits (N, K, X - 20, Y - 20, Z - 20) of images (N, C, X, Y, Z); without context, of their own size."""

    def __init__(self, inputs: int, outputs: int, width: int, context: bool) -> None:
        super().__init__()
        pad = 0 if context else 1
        self.encoder1 = _convolutions((inputs, width, width), (pad, pad))
        self.encoder2 = _convolutions((width, 2 * width, 2 * width), (pad, pad))
        self.bottom = _convolutions((2 * width, 4 * width, 4 * width), (1, pad))
        self.up2 = nn.ConvTranspose3d(4 * width, 2 * width, 2, stride=2)
        self.decoder2 = _convolutions((4 * width, 2 * width, 2 * width), (1, 1))
        self.up1 = nn.ConvTranspose3d(2 * width, width, 2, stride=2)
        self.decoder1 = _convolutions((2 * width, width, width), (1, 1))
        self.head = nn.Conv3d(width, outputs, 3, padding=1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.encoder1(x)
        skip2 = self.encoder2(self.pool(skip1))
        x = self.up2(self.bottom(self.pool(skip2)))
        x = self.up1(self.decoder2(torch.cat([x, centre_crop(skip2, x)], dim=1)))
        return self.head(self.decoder1(torch.cat([x, centre_crop(skip1, x)], dim=1)))


class MinicubeNetSpec(Architecture):
    """The small 3D network without context: 8, 8, 16 channels, three pools, wide transposed kernels.

    At the coarsest level one convolution is applied twice. Transposed convolutions of 10 and 9 make
    up for pairs of valid convolutions in the decoder. The original passed its logits through a ReLU,
    which makes no sense before a softmax and is left out.
    """

    kind: Literal["minicube_net"] = "minicube_net"
    dimensions: Literal[3] = 3

    @property
    def divisor(self) -> Step:
        return (8, 8, 8)

    @property
    def smallest(self) -> Step:
        return (24, 24, 24)  # valid convolutions at a quarter of the size need five voxels

    def body(self, inputs: int, outputs: int) -> MinicubeNet:
        return MinicubeNet(inputs, outputs)


class MinicubeNet(nn.Module):
    """Logits (N, K, X, Y, Z) of images (N, C, X, Y, Z)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.encoder1 = _convolutions((inputs, 8, 8), (1, 1))
        self.encoder2 = _convolutions((8, 8, 8), (1, 1))
        self.encoder3 = _convolutions((8, 16, 16), (1, 1))
        self.bottom = _convolutions((16, 16), (1,))
        self.up3 = nn.ConvTranspose3d(16, 16, 3, stride=2, padding=1, output_padding=1)
        self.decoder3 = _convolutions((32, 16, 16), (0, 0))
        self.up2 = nn.ConvTranspose3d(16, 8, 10, stride=2)
        self.decoder2 = _convolutions((16, 8, 8), (0, 0))
        self.up1 = nn.ConvTranspose3d(8, 4, 9, stride=2, output_padding=1)
        self.decoder1 = _convolutions((12, 6, 4), (1, 1))
        self.head = nn.Conv3d(4, outputs, 3, padding=1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x: Tensor) -> Tensor:
        skip1 = self.encoder1(x)
        skip2 = self.encoder2(self.pool(skip1))
        skip3 = self.encoder3(self.pool(skip2))
        x = self.bottom(self.bottom(self.pool(skip3)))
        x = self.decoder3(torch.cat([self.up3(x), skip3], dim=1))
        x = self.decoder2(torch.cat([self.up2(x), skip2], dim=1))
        return self.head(self.decoder1(torch.cat([self.up1(x), skip1], dim=1)))


def _convolutions(widths: Sequence[int], padding: Sequence[int]) -> nn.Sequential:
    """Convolutions 3³ with bias, a ReLU after each."""
    layers: list[nn.Module] = []
    for before, after, pad in zip(widths, widths[1:], padding, strict=False):
        layers += [nn.Conv3d(before, after, 3, padding=pad), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers)
