"""MONAI's U-Net of residual units, with the tensor names of its published weights."""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step, Steps, Widths
from delineate.networks.blocks import ActivationKind, NormKind, activation, convolution, he_normal, normalisation

OddSides = Annotated[tuple[Annotated[int, Field(ge=1, le=31)], ...], Field(max_length=3)]


class MonaiUNetSpec(Architecture):
    """MONAI's U-Net (Kerfoot et al. 2018): residual units with a stride in the first convolution, concatenated skips.

    ``widths`` are the channels of each level. ``strides`` gives the factor by which each level but the last is coarser
    than the one before, the first one than the image (default 2): nothing but the last block works at full resolution.
    ``residual_units`` is the number of convolutions that a sum bridges; 0: a single convolution without a sum.
    ``kernel`` and ``up_kernel``, of the transposed convolutions, are odd (default 3).
    """

    kind: Literal["monai_unet"] = "monai_unet"
    widths: Widths = (16, 32, 64, 128, 256)
    strides: Steps | None = None
    residual_units: Annotated[int, Field(ge=0, le=16)] = 2
    kernel: OddSides | None = None
    up_kernel: OddSides | None = None
    norm: NormKind = "instance"
    activation: ActivationKind = "prelu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _fits(self) -> MonaiUNetSpec:
        levels, d = len(self.widths) - 1, self.dimensions
        if self.strides is not None and (len(self.strides) != levels or any(len(s) != d for s in self.strides)):
            raise ValueError(
                f"strides has {[list(s) for s in self.strides]}; give {levels} entries of {d} numbers, for "
                f"{len(self.widths)} widths in {d}D"
            )
        for name, kernel in (("kernel", self.kernel), ("up_kernel", self.up_kernel)):
            if kernel is not None and (len(kernel) != d or any(side % 2 == 0 for side in kernel)):
                raise ValueError(f"{name} is {list(kernel)}; give {d} odd numbers")
        return self

    @property
    def level_strides(self) -> tuple[Step, ...]:
        return self.strides or ((2,) * self.dimensions,) * (len(self.widths) - 1)

    @property
    def divisor(self) -> Step:
        return tuple(math.prod(s[axis] for s in self.level_strides) for axis in range(self.dimensions))

    def body(self, inputs: int, outputs: int) -> MonaiUNet:
        return MonaiUNet(self, inputs, outputs)


class MonaiUNet(nn.Module):
    """Logits (N, K, *space) of images (N, C, *space); every side must be a multiple of ``divisor``."""

    def __init__(self, spec: MonaiUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.model = self._level(spec, 0, inputs, outputs)
        self.apply(he_normal)

    def _level(self, spec: MonaiUNetSpec, level: int, inputs: int, outputs: int) -> nn.Sequential:
        """A level with those below it, from what comes down to what goes up."""
        width, stride, deepest = spec.widths[level], spec.level_strides[level], level == len(spec.widths) - 2
        below: nn.Module
        if deepest:
            below = _down(spec, width, spec.widths[-1], (1,) * spec.dimensions)
        else:
            below = self._level(spec, level + 1, width, width)
        joined = width + (spec.widths[-1] if deepest else width)
        up = _up(spec, joined, outputs, stride, last=level == 0)
        return nn.Sequential(_down(spec, inputs, width, stride), Skip(below), up)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


class Skip(nn.Module):
    """What a module is given, and what it makes of it."""

    def __init__(self, submodule: nn.Module) -> None:
        super().__init__()
        self.submodule = submodule

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.submodule(x)], dim=1)


class Unit(nn.Sequential):
    """A convolution, or a transposed one; normalisation, dropout and activation follow unless it is ``bare``."""

    def __init__(
        self, spec: MonaiUNetSpec, inputs: int, outputs: int, stride: Step, *, up: bool = False, bare: bool = False
    ) -> None:
        d = spec.dimensions
        # A bias before a normalisation that subtracts the mean would do nothing.
        bias = bare or spec.norm in ("none", "group")
        kernel = (spec.up_kernel if up else spec.kernel) or (3,) * d
        layers: dict[str, nn.Module] = {}
        if up:
            transposed: Any = nn.ConvTranspose3d if d == 3 else nn.ConvTranspose2d
            half, rest = tuple(k // 2 for k in kernel), tuple(s - 1 for s in stride)
            layers["conv"] = transposed(inputs, outputs, kernel, stride, half, rest, bias=bias)
        else:
            layers["conv"] = convolution(d, inputs, outputs, kernel, stride=stride, bias=bias)
        if not bare:
            after = {
                "N": normalisation(spec.norm, d, outputs),
                "D": nn.Dropout(spec.dropout),
                "A": activation(spec.activation),
            }
            layers["adn"] = nn.Sequential(OrderedDict(after))
        super().__init__(OrderedDict(layers))


class ResidualUnit(nn.Module):
    """The sum of ``count`` convolutions in a row and the input, convolved where size or width differ."""

    def __init__(
        self, spec: MonaiUNetSpec, inputs: int, outputs: int, stride: Step, count: int, *, bare: bool = False
    ) -> None:
        super().__init__()
        d, strided = spec.dimensions, math.prod(stride) != 1
        units: dict[str, nn.Module] = {}
        for i in range(count):
            start, step = (inputs, stride) if i == 0 else (outputs, (1,) * d)
            units[f"unit{i}"] = Unit(spec, start, outputs, step, bare=bare and i == count - 1)
        self.conv = nn.Sequential(OrderedDict(units))
        self.residual: nn.Module = nn.Identity()
        if strided or inputs != outputs:
            kernel = (spec.kernel or 3) if strided else 1
            self.residual = convolution(d, inputs, outputs, kernel, stride=stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.residual(x)


def _down(spec: MonaiUNetSpec, inputs: int, outputs: int, stride: Step) -> nn.Module:
    if spec.residual_units == 0:
        return Unit(spec, inputs, outputs, stride)
    return ResidualUnit(spec, inputs, outputs, stride, spec.residual_units)


def _up(spec: MonaiUNetSpec, inputs: int, outputs: int, stride: Step, *, last: bool) -> nn.Module:
    if spec.residual_units == 0:
        return Unit(spec, inputs, outputs, stride, up=True, bare=last)
    residual = ResidualUnit(spec, outputs, outputs, (1,) * spec.dimensions, 1, bare=last)
    return nn.Sequential(Unit(spec, inputs, outputs, stride, up=True), residual)
