"""The 3D U-Net of the prostate comparison."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field
from torch import nn

from delineate.networks.base import Architecture, Step, Widths
from delineate.networks.blocks import EncoderDecoder, KerasTransposed, glorot_uniform, keras_batch_norm


class ProstateUNetSpec(Architecture):
    """3D U-Net with BatchNorm on the input of each block, the image included; Keras' defaults.

    Block: BatchNorm, convolution 3³, ReLU, dropout, convolution 3³, ReLU; only the head has biases.
    Long skips are concatenated with the transposed convolutions' output.
    """

    kind: Literal["prostate_unet"] = "prostate_unet"
    dimensions: Literal[3] = 3
    widths: Widths = (16, 32, 64, 128)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.2

    @property
    def divisor(self) -> Step:
        return (2 ** (len(self.widths) - 1),) * 3

    @property
    def recomputes(self) -> bool:
        return True

    def body(self, inputs: int, outputs: int) -> ProstateUNet:
        return ProstateUNet(self, inputs, outputs)


class ProstateUNet(EncoderDecoder):
    """Logits (N, K, X, Y, Z) of images (N, C, X, Y, Z)."""

    def __init__(self, spec: ProstateUNetSpec, inputs: int, outputs: int) -> None:
        widths, ladder = spec.widths, list(reversed(list(pairwise(spec.widths))))
        super().__init__(
            3,
            encoder=[_block(i, o, spec.dropout) for i, o in pairwise((inputs, *widths))],
            up=[KerasTransposed(3, coarse, fine, bias=False) for fine, coarse in ladder],
            decoder=[_block(2 * fine, fine, spec.dropout) for fine, _ in ladder],
            head=nn.Conv3d(widths[0], outputs, 1),
        )
        self.apply(glorot_uniform)


def _block(inputs: int, outputs: int, dropout: float) -> nn.Sequential:
    return nn.Sequential(
        keras_batch_norm(3, inputs),
        nn.Conv3d(inputs, outputs, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
        nn.Dropout(dropout),
        nn.Conv3d(outputs, outputs, 3, padding=1, bias=False),
        nn.ReLU(inplace=True),
    )
