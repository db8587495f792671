"""SegResNet, with the tensor names of MONAI's published weights."""

from __future__ import annotations

from collections import OrderedDict
from typing import Annotated, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import ActivationKind, NormKind, activation, convolution, he_normal, normalisation
from delineate.specification import Filters, Layers


class SegResNetSpec(Architecture):
    """SegResNet (Myronenko 2018) without its variational branch: residual blocks that normalise first, summed skips.

    ``blocks`` are the numbers of residual blocks at each level of the encoder, ``decoder_blocks`` those of the decoder,
    coarsest first. Each level has twice the filters of the one above, and GroupNorm needs them in eights. ``dropout``
    acts on whole channels after the first convolution.
    """

    kind: Literal["segresnet"] = "segresnet"
    first_filters: Filters = 16
    blocks: Annotated[tuple[Layers, ...], Field(min_length=2, max_length=12)] = (1, 2, 2, 4)
    decoder_blocks: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=12)] = (1, 1, 1)
    norm: NormKind = "group"
    activation: ActivationKind = "relu"
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    @model_validator(mode="after")
    def _mirrored(self) -> SegResNetSpec:
        if len(self.decoder_blocks) != len(self.blocks) - 1:
            raise ValueError(
                f"blocks has {len(self.blocks)} entries, decoder_blocks {len(self.decoder_blocks)}; give it one fewer"
            )
        return self

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.blocks) - 1),) * self.dimensions

    def body(self, inputs: int, outputs: int) -> SegResNet:
        return SegResNet(self, inputs, outputs)


class SegResNet(nn.Module):
    """Logits (N, K, *space) of images (N, C, *space); every side must be a multiple of ``divisor``."""

    def __init__(self, spec: SegResNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        d, first, deepest = spec.dimensions, spec.first_filters, len(spec.blocks) - 1
        self.convInit = _convolution(d, inputs, first, 3)
        self.dropout = nn.Dropout3d(spec.dropout) if d == 3 else nn.Dropout2d(spec.dropout)
        self.down_layers, self.up_samples, self.up_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(spec.blocks):
            width = first * 2**level
            down = _convolution(d, width // 2, width, 3, stride=2) if level else nn.Identity()
            self.down_layers.append(nn.Sequential(down, *(ResidualBlock(spec, width) for _ in range(count))))
        for i, count in enumerate(spec.decoder_blocks):
            width = first * 2 ** (deepest - 1 - i)
            enlarged = nn.Upsample(scale_factor=2.0, mode="trilinear" if d == 3 else "bilinear", align_corners=False)
            self.up_samples.append(nn.Sequential(_convolution(d, 2 * width, width, 1), enlarged))
            self.up_layers.append(nn.Sequential(*(ResidualBlock(spec, width) for _ in range(count))))
        self.conv_final = nn.Sequential(
            normalisation(spec.norm, d, first),
            activation(spec.activation),
            _convolution(d, first, outputs, 1, bias=True),
        )
        self.apply(he_normal)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(self.convInit(x))
        skips = []
        for down in self.down_layers:
            x = down(x)
            skips.append(x)
        skips.pop()
        for up, blocks in zip(self.up_samples, self.up_layers, strict=True):
            x = blocks(up(x) + skips.pop())
        return self.conv_final(x)  # (N, K, *space)


class ResidualBlock(nn.Module):
    """The input, and two convolutions of it, each after normalisation and activation."""

    def __init__(self, spec: SegResNetSpec, width: int) -> None:
        super().__init__()
        d = spec.dimensions
        self.norm1, self.norm2 = normalisation(spec.norm, d, width), normalisation(spec.norm, d, width)
        # Without a normalisation before it, the first would overwrite the input, which is added in the end.
        self.act1 = activation(spec.activation, inplace=spec.norm != "none")
        self.act2 = activation(spec.activation)
        self.conv1, self.conv2 = _convolution(d, width, width, 3), _convolution(d, width, width, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(self.act1(self.norm1(x)))
        return x + self.conv2(self.act2(self.norm2(y)))


def _convolution(d: int, inputs: int, outputs: int, kernel: int, *, stride: int = 1, bias: bool = False) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=convolution(d, inputs, outputs, kernel, stride=stride, bias=bias)))
