"""The 2D U-Net of the brain tumour comparison."""

from __future__ import annotations

from collections import OrderedDict
from typing import Literal

import torch
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.specification import Filters

LEVELS = 4


class BudaUNetSpec(Architecture):
    """2D U-Net of Buda et al. 2019, with the key names of its published weights.

    Block: (convolution 3² without bias, BatchNorm, ReLU) twice, the bottleneck too; transposed
    convolutions 2² enlarge.
    """

    kind: Literal["buda_unet"] = "buda_unet"
    dimensions: Literal[2] = 2
    first_filters: Filters = 32

    @property
    def divisor(self) -> Step:
        return (2**LEVELS,) * 2

    def body(self, inputs: int, outputs: int) -> BudaUNet:
        return BudaUNet(inputs, outputs, self.first_filters)


class BudaUNet(nn.Module):
    """Logits (N, K, X, Y) of images (N, C, X, Y)."""

    def __init__(self, inputs: int, outputs: int, first_filters: int) -> None:
        super().__init__()
        widths = [first_filters * 2**level for level in range(LEVELS)]
        self.pool = nn.MaxPool2d(2)
        before = inputs
        for level, width in enumerate(widths, start=1):
            self.add_module(f"encoder{level}", _block(before, width, f"enc{level}"))
            before = width
        self.bottleneck = _block(before, 2 * before, "bottleneck")
        for level, width in reversed(list(enumerate(widths, start=1))):
            self.add_module(f"upconv{level}", nn.ConvTranspose2d(2 * width, width, 2, stride=2))
            self.add_module(f"decoder{level}", _block(2 * width, width, f"dec{level}"))
        self.conv = nn.Conv2d(first_filters, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        skips = {}
        for level in range(1, LEVELS + 1):
            skips[level] = self.get_submodule(f"encoder{level}")(x)
            x = self.pool(skips[level])
        x = self.bottleneck(x)
        for level in range(LEVELS, 0, -1):
            up = self.get_submodule(f"upconv{level}")(x)
            x = self.get_submodule(f"decoder{level}")(torch.cat([up, skips[level]], dim=1))
        return self.conv(x)


def _block(inputs: int, outputs: int, name: str) -> nn.Sequential:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for i, before in ((1, inputs), (2, outputs)):
        layers[f"{name}conv{i}"] = nn.Conv2d(before, outputs, 3, padding=1, bias=False)
        layers[f"{name}norm{i}"] = nn.BatchNorm2d(outputs)
        layers[f"{name}relu{i}"] = nn.ReLU(inplace=True)
    return nn.Sequential(layers)
