"""VGG's convolutions (Simonyan & Zisserman 2015), under torchvision's key names."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

VGGName = Literal["vgg11", "vgg19"]
Preprocessing = Literal["torchvision", "caffe"]

# Widths of the convolutions, each followed by a ReLU; None is a max-pool.
_LAYERS: dict[str, tuple[int | None, ...]] = {
    "vgg11": (64, None, 128, None, 256, 256, None, 512, 512, None, 512, 512, None),
    "vgg19": (64, 64, None, 128, 128, None, *[256] * 4, None, *[512] * 4, None, *[512] * 4, None),
}


def expected_shapes(name: VGGName) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of the convolutions, by key, such as ``features.0.weight``."""
    shapes: dict[str, tuple[int, ...]] = {}
    index, before = 0, 3
    for width in _LAYERS[name]:
        if width is not None:
            shapes[f"features.{index}.weight"] = (width, before, 3, 3)
            shapes[f"features.{index}.bias"] = (width,)
            before = width
        index += 1 if width is None else 2
    return shapes


class VGGInput(nn.Module):
    """Images (N, 3, X, Y) with values from 0 to 1, as a VGG saw them in its training.

    ``torchvision``: less the mean of each channel (RGB), over its standard deviation. ``caffe``, and Keras:
    values up to 255, less the mean of each channel (BGR).
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        mean, scale = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        if preprocessing == "caffe":
            mean, scale = ([x / 255 for x in (103.939, 116.779, 123.68)], [1 / 255] * 3)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor(scale).view(1, 3, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        return torch.addcmul(-self.mean / self.scale, image, 1 / self.scale)


class VGG19Features(nn.Module):
    """The outputs of VGG19's first max-pools, of (N, 64, X / 2, Y / 2), (N, 128, X / 4, Y / 4), … up to five.

    Takes images (N, 3, X, Y) of RGB values from 0 to 1, and applies the preprocessing that the weights were
    trained with.
    """

    def __init__(self, preprocessing: Preprocessing, pools: int = 2) -> None:
        super().__init__()
        self.caffe = preprocessing == "caffe"
        self.input = VGGInput(preprocessing)
        layers: list[nn.Module] = []
        before, left = 3, pools
        for width in _LAYERS["vgg19"]:
            if width is not None:
                layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU()]
                before = width
                continue
            layers.append(nn.MaxPool2d(2))
            left -= 1
            if not left:
                break
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                # PyTorch's default halves the signal at each layer, which would leave random features almost blind.
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        self.features = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = self.input(image.flip(1) if self.caffe else image)
        pooled = []
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.MaxPool2d):
                pooled.append(x)
        return tuple(pooled)
