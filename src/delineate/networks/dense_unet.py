"""The densely connected U-Net that generates white matter lesion masks."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from delineate.errors import RecipeError
from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import EncoderDecoder, keras_batch_norm
from delineate.pretrained.vgg import Preprocessing, VGGInput
from delineate.specification import Filters, Layers


class DenseUNetSpec(Architecture):
    """2D U-Net in which each convolution sees its block's input and all earlier outputs in the block.

    A block passes on the output of its last convolution. Convolution 3², BatchNorm, LeakyReLU 0.1; filters
    double at each max-pool; transposed convolutions 2² enlarge.

    ``batch_norm``: which library's constants; PyTorch's are eps 1e-5 and momentum 0.1, Keras' 1e-3 and 0.99 (PyTorch
    calls that 0.01). ``vgg_input``: an image from 0 to 1 is expanded to VGG's three channels (one is repeated,
    with two the first is repeated, three are red, green and blue) and preprocessed like VGG's images before the
    first convolution.
    """

    kind: Literal["dense_unet"] = "dense_unet"
    dimensions: Literal[2] = 2
    first_filters: Filters = 32
    pools: Annotated[int, Field(ge=1, le=10)] = 4
    convolutions: Layers = 2
    batch_norm: Literal["pytorch", "keras"] = "pytorch"
    vgg_input: Preprocessing | None = None

    @property
    def divisor(self) -> Step:
        return (2**self.pools,) * 2

    @property
    def recomputes(self) -> bool:
        return True

    def body(self, inputs: int, outputs: int) -> DenseUNet:
        return DenseUNet(self, inputs, outputs)


class DenseUNet(EncoderDecoder):
    """Logits (N, K, X, Y) of images (N, C, X, Y)."""

    def __init__(self, spec: DenseUNetSpec, inputs: int, outputs: int) -> None:
        if spec.vgg_input is not None and inputs > 3:
            raise RecipeError(
                f"vgg_input takes images of one to three channels, got {inputs}",
                fix="add project_inputs_to: 3 to the network, or remove vgg_input",
            )
        channels = inputs if spec.vgg_input is None else 3
        widths = [spec.first_filters * 2**level for level in range(spec.pools + 1)]
        ladder = list(reversed(list(pairwise(widths))))
        super().__init__(
            2,
            encoder=[DenseBlock(spec, i, o) for i, o in pairwise((channels, *widths))],
            up=[nn.ConvTranspose2d(coarse, fine, 2, stride=2) for fine, coarse in ladder],
            decoder=[DenseBlock(spec, 2 * fine, fine) for fine, _ in ladder],
            head=nn.Conv2d(widths[0], outputs, 1),
        )
        self.input = None if spec.vgg_input is None else VGGInput(spec.vgg_input)
        rgb = [channel % inputs for channel in range(3)]
        self.channels = rgb[::-1] if spec.vgg_input == "caffe" else rgb

    def forward(self, x: Tensor) -> Tensor:
        if self.input is not None:
            x = self.input(torch.cat([x[:, channel : channel + 1] for channel in self.channels], dim=1))
        logits: Tensor = super().forward(x)  # (N, K, X, Y)
        return logits


class DenseBlock(nn.Module):
    def __init__(self, spec: DenseUNetSpec, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(inputs + i * outputs, outputs, 3, padding=1),
                keras_batch_norm(2, outputs) if spec.batch_norm == "keras" else nn.BatchNorm2d(outputs),
                nn.LeakyReLU(0.1, inplace=True),
            )
            for i in range(spec.convolutions)
        )

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for layer in self.layers:
            features.append(layer(torch.cat(features, dim=1)))
        return features[-1]
