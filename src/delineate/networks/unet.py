"""The U-Net family, 2D and 3D."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import reduce
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step, Steps, Widths
from delineate.networks.blocks import (
    ActivationKind,
    NormKind,
    Recomputing,
    activation,
    convolution,
    he_normal,
    normalisation,
    upsampling,
)
from delineate.specification import Layers


class UNetSpec(Architecture):
    """A U-Net (Ronneberger et al. 2015; Çiçek et al. 2016): encoder, decoder, long skips.

    ``widths`` are the channels of each level, the first at full resolution. ``strides`` gives the factor
    by which each level below the first is coarser along each axis (default 2 everywhere), and
    ``kernels`` each level's kernel (default 3): thick slices need stride and kernel 1 across them at
    first. ``downsample``: a max-pool, or a stride in the level's first convolution. ``convolutions``
    is the number in each block; ``decoder_convolutions`` that in the decoder's blocks, if it differs
    (one saves a third of the work, most of it at full resolution). ``short_skips`` adds a block's input
    to its output (through a 1-convolution where widths differ), in the encoder or in all blocks.
    ``dropout`` acts on the outputs of the two deepest encoder levels. ``deep_supervision`` is the number
    of coarser decoder levels that also predict: in training the network returns a tuple of logits, the
    finest first (Lee et al. 2015).

    ``residual_blocks``: the encoder is a stem of one convolution, and at each level as many residual blocks, instead
    of ``convolutions`` (nnU-Net's residual encoder, Isensee et al. 2024). ``members``: as many networks of this form,
    each with weights of its own; the mean of their logits counts.
    """

    kind: Literal["unet"] = "unet"
    widths: Widths = (32, 64, 128, 256)
    strides: Steps | None = None
    kernels: Steps | None = None
    convolutions: Layers = 2
    decoder_convolutions: Layers | None = None
    norm: NormKind = "instance"
    activation: ActivationKind = "leaky_relu"
    short_skips: Literal["none", "encoder", "all"] = "none"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    downsample: Literal["stride", "max_pool"] = "stride"
    upsample: Literal["transposed", "linear"] = "transposed"
    deep_supervision: Annotated[int, Field(ge=0, le=12)] = 0
    residual_blocks: Annotated[tuple[Layers, ...], Field(max_length=12)] | None = None
    members: Annotated[int, Field(ge=1, le=64)] = 1

    @model_validator(mode="after")
    def _fits(self) -> UNetSpec:
        for name, steps, wanted in (
            ("strides", self.strides, len(self.widths) - 1),
            ("kernels", self.kernels, len(self.widths)),
        ):
            if steps is not None and (len(steps) != wanted or any(len(s) != self.dimensions for s in steps)):
                raise ValueError(
                    f"{name} has {[list(s) for s in steps]}; give {wanted} entries of {self.dimensions} numbers, "
                    f"for {len(self.widths)} widths in {self.dimensions}D"
                )
        if self.residual_blocks is not None and len(self.residual_blocks) != len(self.widths):
            raise ValueError(
                f"residual_blocks has {list(self.residual_blocks)}; give {len(self.widths)} numbers, one for each width"
            )
        if self.deep_supervision > len(self.widths) - 2:
            raise ValueError(
                f"deep_supervision is {self.deep_supervision}, but {len(self.widths)} widths have "
                f"{len(self.widths) - 2} decoder levels below the finest"
            )
        return self

    @property
    def level_strides(self) -> tuple[Step, ...]:
        return self.strides or ((2,) * self.dimensions,) * (len(self.widths) - 1)

    @property
    def level_kernels(self) -> tuple[Step, ...]:
        return self.kernels or ((3,) * self.dimensions,) * len(self.widths)

    @property
    def divisor(self) -> Step:
        return tuple(math.prod(s[axis] for s in self.level_strides) for axis in range(self.dimensions))

    @property
    def recomputes(self) -> bool:
        return True

    def body(self, inputs: int, outputs: int) -> nn.Module:
        if self.members == 1:
            return UNet(self, inputs, outputs)
        return Members([UNet(self, inputs, outputs) for _ in range(self.members)])


class ConvBlock(Recomputing):
    """Convolution, normalisation, activation, repeated; optionally with a short skip around them.

    The channels of several inputs are joined.
    """

    def __init__(
        self,
        spec: UNetSpec,
        inputs: int,
        outputs: int,
        kernel: Step,
        *,
        stride: Step | int = 1,
        count: int,
        short_skip: bool,
    ) -> None:
        super().__init__()
        d = spec.dimensions
        # A bias before a normalisation that subtracts the mean would do nothing.
        bias = spec.norm in ("none", "group")
        layers: list[nn.Module] = []
        for i in range(count):
            first = i == 0
            layers += [
                convolution(d, inputs if first else outputs, outputs, kernel, stride=stride if first else 1, bias=bias),
                normalisation(spec.norm, d, outputs),
                activation(spec.activation),
            ]
        self.layers = nn.Sequential(*layers[:-1])
        self.last = layers[-1]
        self.skip: nn.Module | None = None
        if short_skip:
            same = inputs == outputs and math.prod(stride if isinstance(stride, tuple) else (stride,)) == 1
            self.skip = nn.Identity() if same else convolution(d, inputs, outputs, 1, stride=stride)

    def forward(self, *parts: Tensor) -> Tensor:
        layers, inputs = list(self.layers), parts
        for first in range(0, len(layers), 3):
            inputs = (self.through(layers[first : first + 3], *inputs),)
        [y] = inputs
        if self.skip is not None:
            y = y + self.skip(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1))
        return self.last(y)


class ResidualBlock(Recomputing):
    """Two convolutions with normalisation, and the input added before the last activation.

    Where the block strides or widens, the input is averaged over the stride and goes through a 1-convolution with
    normalisation (ResNet-D, He et al. 2019).
    """

    def __init__(self, spec: UNetSpec, inputs: int, outputs: int, kernel: Step, stride: Step) -> None:
        super().__init__()
        d, bias = spec.dimensions, spec.norm in ("none", "group")
        self.layers = nn.Sequential(
            convolution(d, inputs, outputs, kernel, stride=stride, bias=bias),
            normalisation(spec.norm, d, outputs),
            activation(spec.activation),
            convolution(d, outputs, outputs, kernel, bias=bias),
            normalisation(spec.norm, d, outputs),
        )
        pool: Any = nn.AvgPool3d if d == 3 else nn.AvgPool2d
        self.pool = nn.Identity() if math.prod(stride) == 1 else pool(stride)
        self.project: nn.Module = nn.Identity()
        if inputs != outputs:
            widen = convolution(d, inputs, outputs, 1, bias=bias)
            self.project = nn.Sequential(widen, normalisation(spec.norm, d, outputs))
        self.last = activation(spec.activation)

    def forward(self, x: Tensor) -> Tensor:
        layers = list(self.layers)
        y = self.through(layers[3:], self.through(layers[:3], x))
        return self.last(y + self.project(self.pool(x)))


def _residual_level(spec: UNetSpec, level: int, inputs: int, stride: Step) -> nn.Sequential:
    """A level of the residual encoder; the first begins with the stem."""
    assert spec.residual_blocks is not None
    width, kernel, layers = spec.widths[level], spec.level_kernels[level], list[nn.Module]()
    if level == 0:
        layers.append(ConvBlock(spec, inputs, width, kernel, count=1, short_skip=False))
        inputs = width
    for _ in range(spec.residual_blocks[level]):
        layers.append(ResidualBlock(spec, inputs, width, kernel, stride))
        inputs, stride = width, (1,) * spec.dimensions
    return nn.Sequential(*layers)


class Members(nn.Module):
    """The mean of the logits of several networks, at each level that they predict."""

    def __init__(self, members: list[UNet]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        answers = [member(x) for member in self.members]
        if isinstance(answers[0], tuple):
            return tuple(self._mean(level) for level in zip(*answers, strict=True))
        return self._mean(answers)

    def _mean(self, answers: Sequence[Tensor]) -> Tensor:
        return torch.mul(reduce(torch.add, answers), 1 / len(answers))


class UNet(nn.Module):
    """Logits (N, K, *space) of images (N, C, *space); every side must be a multiple of ``divisor``."""

    def __init__(self, spec: UNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        d, widths, kernels = spec.dimensions, spec.widths, spec.level_kernels
        count, skips = spec.convolutions, spec.short_skips
        pooled = spec.downsample == "max_pool"
        pool = nn.MaxPool3d if d == 3 else nn.MaxPool2d
        self.encoder, self.pools = nn.ModuleList(), nn.ModuleList()
        for level, stride in enumerate([(1,) * d, *spec.level_strides]):
            self.pools.append(pool(stride) if pooled and level else nn.Identity())
            before, stride = (inputs if level == 0 else widths[level - 1]), ((1,) * d if pooled else stride)
            if spec.residual_blocks is not None:
                self.encoder.append(_residual_level(spec, level, before, stride))
                continue
            self.encoder.append(
                ConvBlock(
                    spec,
                    before,
                    widths[level],
                    kernels[level],
                    stride=stride,
                    count=count,
                    short_skip=skips != "none",
                )
            )
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        count = spec.decoder_convolutions or spec.convolutions
        for level in reversed(range(len(widths) - 1)):
            self.up.append(upsampling(spec.upsample, d, widths[level + 1], widths[level], spec.level_strides[level]))
            self.decoder.append(
                ConvBlock(
                    spec, 2 * widths[level], widths[level], kernels[level], count=count, short_skip=skips == "all"
                )
            )
        self.dropout = nn.Dropout(spec.dropout)
        self.head = convolution(d, widths[0], outputs, 1)
        # Heads for the levels below the finest, finer levels first.
        self.coarse_heads = nn.ModuleList(
            convolution(d, widths[level], outputs, 1) for level in range(1, spec.deep_supervision + 1)
        )
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        skips = []
        for level, (pool, block) in enumerate(zip(self.pools, self.encoder, strict=True)):
            x = block(pool(x))
            if level >= len(self.encoder) - 2:
                x = self.dropout(x)
            skips.append(x)
        skips.pop()
        decoded = []
        for up, block in zip(self.up, self.decoder, strict=True):
            x = block(up(x), skips.pop())
            decoded.append(x)
        logits = self.head(x)  # (N, K, *space)
        if not (self.coarse_heads and self.training):
            return logits
        coarser = reversed(decoded[:-1])
        return (logits, *(head(x) for head, x in zip(self.coarse_heads, coarser, strict=False)))
