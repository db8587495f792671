"""The densely connected U-Net that generates white matter lesion masks."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import EncoderDecoder
from delineate.specification import Filters, Layers


class DenseUNetSpec(Architecture):
    """2D U-Net in which each convolution sees its block's input and all earlier outputs in the block.

    A block passes on the output of its last convolution. Convolution 3², BatchNorm, LeakyReLU 0.1; filters
    double at each max-pool; transposed convolutions 2² enlarge.
    """

    kind: Literal["dense_unet"] = "dense_unet"
    dimensions: Literal[2] = 2
    first_filters: Filters = 32
    pools: Annotated[int, Field(ge=1, le=10)] = 4
    convolutions: Layers = 2

    @property
    def divisor(self) -> Step:
        return (2**self.pools,) * 2

    def body(self, inputs: int, outputs: int) -> DenseUNet:
        return DenseUNet(self, inputs, outputs)


class DenseUNet(EncoderDecoder):
    """Logits (N, K, X, Y) of images (N, C, X, Y)."""

    def __init__(self, spec: DenseUNetSpec, inputs: int, outputs: int) -> None:
        widths = [spec.first_filters * 2**level for level in range(spec.pools + 1)]
        ladder = list(reversed(list(pairwise(widths))))
        super().__init__(
            2,
            encoder=[DenseBlock(i, o, spec.convolutions) for i, o in pairwise((inputs, *widths))],
            up=[nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in ladder],
            decoder=[DenseBlock(2 * fine, fine, spec.convolutions) for fine, _ in ladder],
            head=nn.Conv2d(widths[0], outputs, 1),
        )


class DenseBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, convolutions: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs + i * outputs, outputs, 3, padding=1),
                nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.1, inplace=True),
            )
            for i in range(convolutions)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return features[-1]
