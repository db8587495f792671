"""The recurrent-residual U-Net."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

from torch import Tensor, nn

from delineate.networks.base import Architecture, Step, Widths
from delineate.networks.blocks import (
    EncoderDecoder,
    NormKind,
    activation,
    convolution,
    he_normal,
    normalisation,
    upsampling,
)
from delineate.specification import Layers


class RecurrentUNetSpec(Architecture):
    """R2U-Net (Alom et al. 2018): each block applies two convolutions recurrently, and adds its input.

    A recurrent convolution is applied to the block's input, then ``recurrences`` times more to that input
    plus its own last output, with the same kernel. A 1-convolution maps the input to the block's width.
    """

    kind: Literal["recurrent_unet"] = "recurrent_unet"
    widths: Widths = (64, 128, 256, 512, 1024)
    recurrences: Layers = 2
    norm: NormKind = "batch"

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.widths) - 1),) * self.dimensions

    @property
    def recomputes(self) -> bool:
        return True

    def body(self, inputs: int, outputs: int) -> RecurrentUNet:
        return RecurrentUNet(self, inputs, outputs)


class RecurrentUNet(EncoderDecoder):
    """Logits (N, K, *space) of images (N, C, *space)."""

    def __init__(self, spec: RecurrentUNetSpec, inputs: int, outputs: int) -> None:
        d, widths, ladder = spec.dimensions, spec.widths, list(reversed(list(pairwise(spec.widths))))
        super().__init__(
            d,
            encoder=[RecurrentBlock(spec, i, o) for i, o in pairwise((inputs, *widths))],
            up=[upsampling("transposed", d, coarse, fine, (2,) * d) for fine, coarse in ladder],
            decoder=[RecurrentBlock(spec, 2 * fine, fine) for fine, _ in ladder],
            head=convolution(d, widths[0], outputs, 1),
        )
        self.apply(he_normal)


class RecurrentBlock(nn.Module):
    def __init__(self, spec: RecurrentUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        d = spec.dimensions
        self.recurrences = spec.recurrences
        self.project = convolution(d, inputs, outputs, 1)
        self.layers = nn.ModuleList(
            nn.Sequential(
                convolution(d, outputs, outputs, 3, bias=spec.norm in ("none", "group")),
                normalisation(spec.norm, d, outputs),
                activation("relu"),
            )
            for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = y = self.project(x)
        for layer in self.layers:
            seen = y
            y = layer(seen)
            for _ in range(self.recurrences):
                y = layer(seen + y)
        return x + y
