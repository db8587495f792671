"""DeepLabv3+ with the Xception backbone."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from delineate.networks.base import Architecture, Step
from delineate.networks.blocks import glorot_uniform, keras_batch_norm


class DeepLabSpec(Architecture):
    """DeepLabv3+ (Chen et al. 2018) at output stride 8, in the Keras form whose parameters the prostate study counts.

    Slices are input channels, and the middle one is segmented. Upsampling is bilinear with aligned
    corners. Padding follows Keras: the stem's strided convolutions pad only after the image, strided
    separable ones on both sides.
    """

    kind: Literal["deeplab"] = "deeplab"
    dimensions: Literal[2] = 2

    @property
    def least_batch(self) -> int:
        # The pooled branch has one value per channel and image: BatchNorm over a single one is undefined.
        return 2

    @property
    def divisor(self) -> Step:
        return (8, 8)

    def body(self, inputs: int, outputs: int) -> DeepLab:
        return DeepLab(inputs, outputs)


class DeepLab(nn.Module):
    """Logits (N, K, X, Y) of images (N, C, X, Y)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.ZeroPad2d((0, 1, 0, 1)),
            nn.Conv2d(inputs, 32, 3, stride=2, bias=False),
            keras_batch_norm(2, 32),
            nn.ReLU(inplace=True),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            keras_batch_norm(2, 64),
            nn.ReLU(inplace=True),
        )
        self.entry1 = XceptionBlock(64, (128, 128, 128), stride=2)
        self.entry2 = XceptionBlock(128, (256, 256, 256), stride=2)
        self.entry3 = XceptionBlock(256, (728, 728, 728))
        self.middle = nn.Sequential(*[XceptionBlock(728, (728,) * 3, rate=2, shortcut="identity") for _ in range(16)])
        self.exit1 = XceptionBlock(728, (728, 1024, 1024), rate=2)
        self.exit2 = XceptionBlock(1024, (1536, 1536, 2048), rate=4, shortcut="none", relu_after=True)
        self.pyramid = Pyramid(2048, rates=(12, 24, 36))
        self.skip = _projection(256, 48)
        self.decoder = nn.Sequential(
            Separable(304, 256, relu_after=True, eps=1e-5), Separable(256, 256, relu_after=True, eps=1e-5)
        )
        self.head = nn.Conv2d(256, outputs, 1)
        self.apply(glorot_uniform)

    def forward(self, image: Tensor) -> Tensor:
        x = self.entry1(self.stem(image))
        inner = self.entry2.first_two(x)  # a quarter of the size
        fine = self.skip(inner)
        x = self.exit2(self.exit1(self.middle(self.entry3(self.entry2.finished(x, inner)))))
        x = _enlarge(self.pyramid(x), fine.shape[2:])
        x = self.head(self.decoder(torch.cat([x, fine], dim=1)))
        return _enlarge(x, image.shape[2:])


class Separable(nn.Module):
    """Depthwise 3×3 and pointwise convolution with BatchNorm after each; ReLU before both, or after each."""

    def __init__(
        self, inputs: int, outputs: int, *, stride: int = 1, rate: int = 1, relu_after: bool = False, eps: float = 1e-3
    ) -> None:
        super().__init__()
        self.relu_after = relu_after
        self.depthwise = nn.Conv2d(
            inputs, inputs, 3, stride, padding=rate, dilation=rate, groups=inputs, bias=False
        )  # (N, C, X, Y) → (N, C, X / stride, Y / stride)
        self.depthwise_norm = keras_batch_norm(2, inputs, eps)
        self.pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pointwise_norm = keras_batch_norm(2, outputs, eps)

    def forward(self, x: Tensor) -> Tensor:
        if not self.relu_after:
            return self.pointwise_norm(self.pointwise(self.depthwise_norm(self.depthwise(F.relu(x)))))
        x = F.relu(self.depthwise_norm(self.depthwise(x)))
        return F.relu(self.pointwise_norm(self.pointwise(x)))


class XceptionBlock(nn.Module):
    """Three separable convolutions, the last with the stride, and a shortcut around them."""

    def __init__(
        self,
        inputs: int,
        widths: tuple[int, int, int],
        *,
        stride: int = 1,
        rate: int = 1,
        shortcut: Literal["projection", "identity", "none"] = "projection",
        relu_after: bool = False,
    ) -> None:
        super().__init__()
        a, b, c = widths
        self.convolutions = nn.ModuleList(
            [
                Separable(inputs, a, rate=rate, relu_after=relu_after),
                Separable(a, b, rate=rate, relu_after=relu_after),
                Separable(b, c, stride=stride, rate=rate, relu_after=relu_after),
            ]
        )
        self.shortcut: nn.Module | None = None
        if shortcut == "identity":
            self.shortcut = nn.Identity()
        elif shortcut == "projection":
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, c, 1, stride=stride, bias=False),
                keras_batch_norm(2, c),
            )

    def first_two(self, x: Tensor) -> Tensor:
        """The second separable convolution's output, which the decoder also uses."""
        return self.convolutions[1](self.convolutions[0](x))

    def finished(self, x: Tensor, inner: Tensor) -> Tensor:
        """The block's output, from its input and the output of :meth:`first_two`."""
        y = self.convolutions[2](inner)
        return y if self.shortcut is None else y + self.shortcut(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.finished(x, self.first_two(x))


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling: five views of the features, joined to 256 channels."""

    def __init__(self, inputs: int, rates: tuple[int, ...]) -> None:
        super().__init__()
        self.overall = _projection(inputs, 256)
        self.pointwise = _projection(inputs, 256)
        self.atrous = nn.ModuleList([Separable(inputs, 256, rate=r, relu_after=True, eps=1e-5) for r in rates])
        self.join = nn.Sequential(_projection(256 * (2 + len(rates)), 256), nn.Dropout(0.1))

    def forward(self, x: Tensor) -> Tensor:
        overall = self.overall(x.mean((2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.join(torch.cat([overall, self.pointwise(x), *(view(x) for view in self.atrous)], dim=1))


def _projection(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 1, bias=False), keras_batch_norm(2, outputs, 1e-5), nn.ReLU(inplace=True)
    )


def _enlarge(x: Tensor, size: torch.Size) -> Tensor:
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=True)
