"""The small parts that networks are built of, for 2D and 3D alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NormKind = Literal["instance", "batch", "group", "none"]
ActivationKind = Literal["relu", "leaky_relu"]


class InstanceNorm(nn.Module):
    """Normalisation of each sample and channel over space, with scale and shift.

    Written as two moments and one multiply-add: a compiler fuses the multiply-add with the
    activation that follows, and the memory format stays what it is (torch's own converts
    channels-last tensors on the CPU). Moments are float32 whatever the input is.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        space = tuple(range(2, x.ndim))
        variance, mean = torch.var_mean(x.float(), dim=space, correction=0, keepdim=True)
        shape = (1, -1, *[1] * len(space))
        scale = self.weight.view(shape) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(shape) - mean * scale, x, scale).to(x.dtype)


def convolution(
    dimensions: int,
    inputs: int,
    outputs: int,
    kernel: Sequence[int] | int,
    *,
    stride: Sequence[int] | int = 1,
    bias: bool = True,
) -> nn.Module:
    """A convolution that keeps the size (divided by ``stride``); odd kernels only."""
    kernel = (kernel,) * dimensions if isinstance(kernel, int) else tuple(kernel)
    stride = stride if isinstance(stride, int) else tuple(stride)
    kind: Any = nn.Conv3d if dimensions == 3 else nn.Conv2d
    return kind(inputs, outputs, kernel, stride, padding=tuple(k // 2 for k in kernel), bias=bias)


def normalisation(kind: NormKind, dimensions: int, channels: int) -> nn.Module:
    """The normalisation layer of a kind; the identity for ``none``."""
    if kind == "instance":
        return InstanceNorm(channels)
    if kind == "batch":
        return nn.BatchNorm3d(channels) if dimensions == 3 else nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(min(8, channels), channels)
    return nn.Identity()


def activation(kind: ActivationKind) -> nn.Module:
    return nn.LeakyReLU(0.01, inplace=True) if kind == "leaky_relu" else nn.ReLU(inplace=True)


class LinearUpsample(nn.Module):
    """Linear interpolation by whole factors, then a 1-convolution to the wanted channels."""

    def __init__(self, dimensions: int, inputs: int, outputs: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.factor = tuple(float(s) for s in stride)
        self.mode = "trilinear" if dimensions == 3 else "bilinear"
        self.project = convolution(dimensions, inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Projecting first means interpolating fewer channels; the two operations commute.
        return F.interpolate(self.project(x), scale_factor=self.factor, mode=self.mode, align_corners=False)


def upsampling(
    kind: Literal["transposed", "linear"], dimensions: int, inputs: int, outputs: int, stride: Sequence[int]
) -> nn.Module:
    """Enlarges by ``stride`` and changes the channels."""
    if kind == "linear":
        return LinearUpsample(dimensions, inputs, outputs, stride)
    transposed: Any = nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d
    return transposed(inputs, outputs, tuple(stride), tuple(stride))
