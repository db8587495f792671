"""A custom network: dilated convolutions at full resolution, without down- or upsampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor, nn

from delineate.networks.base import Architecture

__all__ = ["OwnNetSpec"]


class OwnNetSpec(Architecture):
    """Residual blocks of equal width, each with twice the dilation of the previous one."""

    kind: Literal["own_net"] = "own_net"
    width: Annotated[int, Field(ge=1, le=1024)] = 16
    blocks: Annotated[int, Field(ge=1, le=6)] = 3

    @property
    def divisor(self) -> tuple[int, ...]:
        return (1,) * self.dimensions

    @property
    def smallest(self) -> tuple[int, ...]:
        return (2,) * self.dimensions  # normalising over a single voxel gives only zeros

    def body(self, inputs: int, outputs: int) -> nn.Module:
        convolution = nn.Conv3d if self.dimensions == 3 else nn.Conv2d
        blocks = [Block(self.width, 2**i, self.dimensions) for i in range(self.blocks)]
        return nn.Sequential(convolution(inputs, self.width, 1), *blocks, convolution(self.width, outputs, 1))


class Block(nn.Module):
    """A dilated convolution with normalisation and ReLU, added to its input."""

    def __init__(self, width: int, dilation: int, dimensions: int) -> None:
        super().__init__()
        three = dimensions == 3
        self.convolve = (nn.Conv3d if three else nn.Conv2d)(width, width, 3, padding=dilation, dilation=dilation)
        self.normalise = (nn.InstanceNorm3d if three else nn.InstanceNorm2d)(width, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        added: Tensor = x + self.normalise(self.convolve(x)).relu()
        return added
