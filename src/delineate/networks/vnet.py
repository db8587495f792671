"""V-Net."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import he_normal
from delineate.specification import Filters, Layers


class VNetSpec(Architecture):
    """V-Net (Milletari et al. 2016): residual stages of convolutions 5^d, with strided convolutions between them.

    With BatchNorm and ELU, as in the implementations in use (including MONAI's). ``stages`` are the numbers
    of convolutions in the encoder stages, ``decoder_stages`` those in the decoder's, coarsest first.
    ``dropout`` acts at the start of the two deepest encoder and decoder stages, and on the skips.
    """

    kind: Literal["vnet"] = "vnet"
    dimensions: Literal[2, 3] = 3
    first_filters: Filters = 16
    stages: Annotated[tuple[Layers, ...], Field(min_length=2, max_length=12)] = (1, 1, 2, 3, 2)
    decoder_stages: Annotated[tuple[Layers, ...], Field(min_length=1, max_length=12)] = (2, 2, 1, 1)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.5

    @model_validator(mode="after")
    def _mirrored(self) -> VNetSpec:
        if len(self.decoder_stages) != len(self.stages) - 1:
            raise ValueError(
                f"stages has {len(self.stages)} entries, decoder_stages {len(self.decoder_stages)}; give it one fewer"
            )
        return self

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.stages) - 1),) * self.dimensions

    def body(self, inputs: int, outputs: int) -> VNet:
        return VNet(self, inputs, outputs)


class VNet(nn.Module):
    """Logits (N, K, *space) of images (N, C, *space)."""

    def __init__(self, spec: VNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        d, first, depth = spec.dimensions, spec.first_filters, len(spec.stages)
        self.first = first
        self.entry = _convolutions(d, inputs, first, spec.stages[0])
        self.down, self.encoder = nn.ModuleList(), nn.ModuleList()
        for level, count in enumerate(spec.stages[1:], start=1):
            width = first * 2**level
            deep = level >= depth - 2
            self.down.append(
                nn.Sequential(
                    _kind(d)(width // 2, width, 2, stride=2, bias=False), _norm(d, width), nn.ELU(inplace=True)
                )
            )
            self.encoder.append(_Stage(d, width, count, spec.dropout if deep else 0.0))
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        before = first * 2 ** (depth - 1)
        for i, count in enumerate(spec.decoder_stages):
            width = first * 2 ** (depth - 1 - i)  # half from below, half from the skip
            self.up.append(
                nn.Sequential(
                    nn.Dropout(spec.dropout if i < 2 else 0.0),
                    _transposed(d)(before, width // 2, 2, stride=2),
                    _norm(d, width // 2),
                    nn.ELU(inplace=True),
                )
            )
            self.decoder.append(_Stage(d, width, count, 0.0))
            before = width
        self.skip_dropout = nn.Dropout(spec.dropout)
        self.last = nn.Sequential(*_convolutions(d, before, outputs, 1), nn.ELU(inplace=True))
        self.head = _kind(d)(outputs, outputs, 1)
        self.apply(he_normal)

    def forward(self, image: Tensor) -> Tensor:
        repeats = -(-self.first // image.shape[1])
        repeated = torch.cat([image] * repeats, dim=1)[:, : self.first]
        x = F.elu(self.entry(image) + repeated)
        skips = []
        for down, stage in zip(self.down, self.encoder, strict=True):
            skips.append(x)
            x = stage(down(x))
        for up, stage in zip(self.up, self.decoder, strict=True):
            x = stage(torch.cat([up(x), self.skip_dropout(skips.pop())], dim=1))
        return self.head(self.last(x))


class _Stage(nn.Module):
    """ELU of the sum of some convolutions and their input."""

    def __init__(self, d: int, width: int, count: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        layers: list[nn.Module] = []
        for _ in range(count):
            layers += [*_convolutions(d, width, width, 1), nn.ELU(inplace=True)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.elu(self.layers(self.dropout(x)) + x)


def _convolutions(d: int, inputs: int, outputs: int, count: int) -> nn.Sequential:
    """Convolutions, each with BatchNorm, and ELUs between them."""
    layers: list[nn.Module] = []
    for i in range(count):
        layers += [nn.ELU(inplace=True)] if i else []
        layers += [_kind(d)(inputs if i == 0 else outputs, outputs, 5, padding=2, bias=False), _norm(d, outputs)]
    return nn.Sequential(*layers)


def _kind(d: int) -> Any:
    return nn.Conv3d if d == 3 else nn.Conv2d


def _transposed(d: int) -> Any:
    return nn.ConvTranspose3d if d == 3 else nn.ConvTranspose2d


def _norm(d: int, channels: int) -> nn.Module:
    return nn.BatchNorm3d(channels) if d == 3 else nn.BatchNorm2d(channels)
