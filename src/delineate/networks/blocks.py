"""The small parts that networks are built from, in 2D and 3D."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NormKind = Literal["instance", "batch", "group", "none"]
ActivationKind = Literal["relu", "leaky_relu", "prelu"]


class InstanceNorm(nn.Module):
    """Normalisation of each sample and channel over space, with scale and shift.

    For a compiler, it is two moments and one multiply-add, which fuses with the activation that follows. On a CPU
    without one, it is torch's normalisation of batches, of one sample each, several times as fast. Both keep the
    memory format, which torch's own layer does not on a CPU, and have float32 moments whatever the input's type.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not _read_by_another():
            each = [self._alone(sample) for sample in torch.split(x, 1)]
            return each[0] if len(each) == 1 else torch.cat(each)
        space = tuple(range(2, x.ndim))
        variance, mean = torch.var_mean(x.float(), dim=space, correction=0, keepdim=True)
        shape = (1, -1, *[1] * len(space))
        scale = self.weight.view(shape) * torch.rsqrt(variance + self.eps)
        return torch.addcmul(self.bias.view(shape) - mean * scale, x, scale).to(x.dtype)

    def _alone(self, x: Tensor) -> Tensor:
        # The function behind F.batch_norm, which refuses a single voxel.
        return torch.batch_norm(x, self.weight, self.bias, None, None, True, 0.0, self.eps, False)


class GroupNorm(nn.GroupNorm):
    """Normalisation of each sample and group of channels over space.

    For channels-last tensors on the CPU, torch takes the mean's square from the mean of the squares, of which nothing
    right is left where the mean is far from 0. Its function for contiguous ones does not.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or _read_by_another():
            return super().forward(x)
        return torch.empty_like(x).copy_(super().forward(x.contiguous()))


def _read_by_another() -> bool:
    """Whether a compiler or tracer reads the operations, rather than PyTorch carrying them out."""
    return bool(torch.compiler.is_compiling() or torch.jit.is_tracing())  # type: ignore[attr-defined,no-untyped-call]


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


def channel_adapter(dimensions: int, inputs: int, outputs: int) -> nn.Module:
    """A 1-convolution to ``outputs`` channels, initialised to repeat the inputs in turn, or to average more of them."""
    adapter: Any = convolution(dimensions, inputs, outputs, 1)
    with torch.no_grad():
        adapter.weight.fill_(1 / inputs if inputs > outputs else 0)
        nn.init.zeros_(adapter.bias)
        if inputs <= outputs:
            for output in range(outputs):
                adapter.weight[output, output % inputs] = 1
    return adapter


def normalisation(kind: NormKind, dimensions: int, channels: int) -> nn.Module:
    """The normalisation layer of a kind; the identity for ``none``."""
    if kind == "instance":
        return InstanceNorm(channels)
    if kind == "batch":
        return nn.BatchNorm3d(channels) if dimensions == 3 else nn.BatchNorm2d(channels)
    if kind == "group":
        return GroupNorm(min(8, channels), channels)
    return nn.Identity()


def activation(kind: ActivationKind, *, inplace: bool = True) -> nn.Module:
    if kind == "prelu":
        return nn.PReLU()  # one slope for all channels
    return nn.LeakyReLU(0.01, inplace) if kind == "leaky_relu" else nn.ReLU(inplace)


class LinearUpsample(nn.Module):
    """Linear interpolation by whole factors, and a 1-convolution to the wanted channels."""

    def __init__(self, dimensions: int, inputs: int, outputs: int, stride: Sequence[int]) -> None:
        super().__init__()
        self.factor = tuple(float(s) for s in stride)
        self.mode = "trilinear" if dimensions == 3 else "bilinear"
        self.project = convolution(dimensions, inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        # Projecting first leaves fewer channels to interpolate; the two operations commute.
        return F.interpolate(self.project(x), scale_factor=self.factor, mode=self.mode, align_corners=False)


class KerasTransposed(nn.Module):
    """A transposed convolution 3^d with stride 2, aligned like Keras' "same": the first 2n of each axis are kept.

    ``padding=1, output_padding=1`` would give the same shape, shifted by one voxel.
    """

    def __init__(self, dimensions: int, inputs: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        kind: Any = nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d
        self.transposed = kind(inputs, outputs, 3, stride=2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.transposed(x)
        for axis in range(2, x.ndim):
            y = y.narrow(axis, 0, 2 * x.shape[axis])
        return y


def keras_batch_norm(dimensions: int, channels: int, eps: float = 1e-3) -> nn.Module:
    """BatchNorm with Keras' defaults; its momentum of 0.99 is 0.01 in torch."""
    kind: Any = nn.BatchNorm3d if dimensions == 3 else nn.BatchNorm2d
    return kind(channels, eps=eps, momentum=0.01)


CONVOLUTIONS = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def glorot_uniform(module: nn.Module) -> None:
    """For ``apply``: Glorot & Bengio 2010 for convolutions, zero biases; Keras' default."""
    if isinstance(module, CONVOLUTIONS):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def xavier_normal(module: nn.Module) -> None:
    """For ``apply``: the same variance, normally distributed."""
    if isinstance(module, CONVOLUTIONS):
        nn.init.xavier_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def he_normal(module: nn.Module) -> None:
    """For ``apply``: He et al. 2015 for convolutions, zero biases."""
    if isinstance(module, CONVOLUTIONS):
        nn.init.kaiming_normal_(module.weight, a=0.01, nonlinearity="leaky_relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def centre_crop(x: Tensor, like: Tensor) -> Tensor:
    """The middle of ``x``, cropped to the spatial size of ``like``."""
    for axis in range(2, x.ndim):
        n = like.shape[axis]
        x = x.narrow(axis, (x.shape[axis] - n) // 2, n)
    return x


def upsampling(
    kind: Literal["transposed", "linear"], dimensions: int, inputs: int, outputs: int, stride: Sequence[int]
) -> nn.Module:
    """A layer that enlarges by ``stride`` and changes the number of channels."""
    if kind == "linear":
        return LinearUpsample(dimensions, inputs, outputs, stride)
    transposed: Any = nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d
    return transposed(inputs, outputs, tuple(stride), tuple(stride))


class Recomputing(nn.Module):
    """A module whose layers' activations the backward pass can compute again instead of keeping them.

    ``recompute`` gives the context in which they are computed again; None: they are kept.
    """

    recompute: Callable[[], AbstractContextManager[Any]] | None = None

    def through(self, layers: Sequence[nn.Module], *parts: Tensor) -> Tensor:
        """What ``layers`` make of the channels of all ``parts``, which may be all that is kept."""
        if self.recompute is None or not torch.is_grad_enabled():
            return _joined(layers, *parts)
        if torch.compiler.is_compiling():  # which computes again what it needs, and no statistics
            return checkpoint(_joined, layers, *parts, use_reentrant=False)
        again = self.recompute

        def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
            return nullcontext(), _Again(layers, again)

        return checkpoint(_joined, layers, *parts, use_reentrant=False, context_fn=contexts)


def _joined(layers: Sequence[nn.Module], *parts: Tensor) -> Tensor:
    x = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    for layer in layers:
        x = layer(x)
    return x


class _Again:
    """Enters ``context``, and keeps BatchNorms' moving statistics from counting a batch twice; as often as needed."""

    def __init__(self, layers: Sequence[nn.Module], context: Callable[[], AbstractContextManager[Any]]) -> None:
        self.context, self._left = context, ExitStack()
        modules = [module for layer in layers for module in layer.modules()]
        self.norms = [module for module in modules if isinstance(module, nn.BatchNorm2d | nn.BatchNorm3d)]

    def __enter__(self) -> None:
        for norm in self.norms:
            self._left.callback(setattr, norm, "momentum", norm.momentum)
            norm.momentum = 0.0  # still tracked: what is kept for the backward pass must be as it was
            if norm.num_batches_tracked is not None:
                self._left.callback(norm.num_batches_tracked.copy_, norm.num_batches_tracked.clone())
        self._left.enter_context(self.context())

    def __exit__(self, *error: object) -> None:
        self._left.close()


class EncoderDecoder(Recomputing):
    """Blocks joined by max-pools by 2 on the way down and concatenated skips on the way up, as in most U-Nets.

    ``encoder`` begins at full resolution, ``up`` and ``decoder`` at the coarsest level.
    """

    def __init__(
        self, dimensions: int, encoder: list[nn.Module], up: list[nn.Module], decoder: list[nn.Module], head: nn.Module
    ) -> None:
        super().__init__()
        self.encoder, self.up, self.decoder = nn.ModuleList(encoder), nn.ModuleList(up), nn.ModuleList(decoder)
        self.pool = nn.MaxPool3d(2) if dimensions == 3 else nn.MaxPool2d(2)
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for level, block in enumerate(self.encoder):
            x = self.through([block], x if level == 0 else self.pool(x))
            skips.append(x)
        skips.pop()
        for up, block in zip(self.up, self.decoder, strict=True):
            x = self.through([block], up(x), skips.pop())
        return self.head(x)  # (N, K, *space)
