"""How far a network sees, computed by its own forward pass with intervals in place of numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

Interval = tuple[NDArray[np.int64], NDArray[np.int64]]
LENGTH = 8192
"""Voxels along each axis: wider than any receptive field here, so that borders do not affect the middle."""


def receptive_field(network: nn.Module, inputs: int, divisor: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Smallest and largest width, in voxels, of the region that an output voxel depends on, along each axis.

    The width varies with a voxel's position between strides. Normalisation statistics over a whole image
    are not counted, but global pooling is: it makes the width that of the image, :data:`LENGTH`.
    Raises :class:`NotImplementedError` for layers whose reach is not known.
    """
    line = np.arange(LENGTH)
    network = copy.deepcopy(network).to("meta").eval()
    seen = network(Reach(inputs, [(line, line)] * len(divisor)))
    widths = []
    for (low, high), step in zip(seen.axes, divisor, strict=True):
        middle = slice(len(low) // 2, len(low) // 2 + step)
        extent = (high - low + 1)[middle]
        widths.append((int(extent.min()), int(extent.max())))
    return tuple(widths)


class Reach:
    """Stands in for a tensor (1, C, *space): along each axis, the first and last input voxel that each place sees."""

    def __init__(self, channels: int, axes: Sequence[Interval]) -> None:
        self.channels, self.axes = channels, list(axes)

    @property
    def shape(self) -> torch.Size:
        return torch.Size([1, self.channels, *(len(low) for low, _ in self.axes)])

    @property
    def ndim(self) -> int:
        return 2 + len(self.axes)

    def dim(self) -> int:
        return self.ndim

    def size(self, axis: int | None = None) -> Any:
        return self.shape if axis is None else self.shape[axis]

    dtype = torch.float32
    device = torch.device("meta")

    def float(self) -> Reach:
        return self

    def to(self, *_: Any) -> Reach:
        return self

    def __add__(self, other: Any) -> Reach:
        return _merged(self, other)

    def __getitem__(self, index: tuple[slice, slice]) -> Reach:
        return Reach(len(range(*index[1].indices(self.channels))), self.axes)

    def narrow(self, axis: int, start: int, length: int) -> Reach:
        axes = list(self.axes)
        low, high = axes[axis - 2]
        axes[axis - 2] = (low[start : start + length], high[start : start + length])
        return Reach(self.channels, axes)

    def mean(self, axes: Sequence[int], keepdim: bool) -> Reach:
        return Reach(self.channels, [(low[:1] * 0 + low.min(), high[:1] * 0 + high.max()) for low, high in self.axes])

    def expand(self, *sizes: int) -> Reach:
        pairs = zip(self.axes, sizes[2:], strict=True)
        return Reach(self.channels, [(low.repeat(n), high.repeat(n)) for (low, high), n in pairs])

    @classmethod
    def __torch_function__(cls, function: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = function.__name__
        if function in (torch.conv2d, torch.conv3d):
            return _convolution(*args, **kwargs)
        if function in (torch.conv_transpose2d, torch.conv_transpose3d):
            return _transposed(*args, **kwargs)
        if name.startswith(("max_pool", "avg_pool")):
            return _pool(*args, **kwargs)
        if function is torch.cat:
            merged = _merged(*args[0])
            return Reach(sum(x.channels for x in args[0]), merged.axes)
        if function is F.interpolate:
            return _interpolated(*args, **kwargs)
        if function is F.pad:
            return _padded(*args, **kwargs)
        if function is torch.var_mean:
            return torch.zeros(1, device="meta"), torch.zeros(1, device="meta")
        if name in POINTWISE:
            return _merged(*args)
        raise NotImplementedError(f"the reach of {name} is not known")


POINTWISE = (
    *("relu", "relu_", "leaky_relu", "leaky_relu_", "elu", "elu_", "prelu", "sigmoid", "add", "mul", "addcmul"),
    *("dropout", "dropout2d", "dropout3d", "feature_dropout", "batch_norm", "group_norm", "instance_norm"),
)


def _merged(*arguments: Any) -> Reach:
    """A reach that covers those of all arguments."""
    reaches = [x for x in arguments if isinstance(x, Reach)]
    axes = []
    for each in zip(*(x.axes for x in reaches), strict=True):
        low = np.minimum.reduce([interval[0] for interval in each])
        axes.append((low, np.maximum.reduce([interval[1] for interval in each])))
    return Reach(reaches[0].channels, axes)


def _window(interval: Interval, first: NDArray[np.int64], last: NDArray[np.int64]) -> Interval:
    """The interval of places that depend on places ``first`` … ``last``, clipped to the border."""
    low, high = interval
    return low[np.clip(first, 0, len(low) - 1)], high[np.clip(last, 0, len(high) - 1)]


def _sides(value: Any, d: int) -> tuple[int, ...]:
    return (value,) * d if isinstance(value, int) else tuple(value) * (d if len(value) == 1 else 1)


def _convolution(
    x: Reach, weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Reach:
    d, axes = len(x.axes), []
    each = zip(x.axes, weight.shape[2:], *(_sides(v, d) for v in (stride, padding, dilation)), strict=True)
    for interval, kernel, step, pad, spread in each:
        width = spread * (kernel - 1)
        count = (len(interval[0]) + 2 * pad - width - 1) // step + 1
        first = np.arange(count) * step - pad
        axes.append(_window(interval, first, first + width))
    return Reach(weight.shape[0], axes)


def _transposed(
    x: Reach,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Reach:
    d, axes = len(x.axes), []
    each = zip(x.axes, weight.shape[2:], *(_sides(v, d) for v in (stride, padding, output_padding)), strict=True)
    for interval, kernel, step, pad, extra in each:
        count = (len(interval[0]) - 1) * step - 2 * pad + kernel + extra
        # Output q depends on inputs p with 0 ≤ q + pad - p · step < kernel.
        q = np.arange(count) + pad
        axes.append(_window(interval, -((kernel - 1 - q) // step), q // step))
    return Reach(weight.shape[1] * groups, axes)


def _pool(x: Reach, kernel_size: Any, stride: Any = None, padding: Any = 0, *_: Any, **__: Any) -> Reach:
    d, axes = len(x.axes), []
    kernels = _sides(kernel_size, d)
    for interval, kernel, step, pad in zip(
        x.axes, kernels, _sides(stride or kernels, d), _sides(padding, d), strict=True
    ):
        count = (len(interval[0]) + 2 * pad - kernel) // step + 1
        first = np.arange(count) * step - pad
        axes.append(_window(interval, first, first + kernel - 1))
    return Reach(x.channels, axes)


def _interpolated(
    x: Reach,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    **_: Any,
) -> Reach:
    d, axes = len(x.axes), []
    lengths = [len(low) for low, _ in x.axes]
    factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor,) * d
    sizes = _sides(size, d) if size is not None else tuple(int(n * f) for n, f in zip(lengths, factors, strict=True))
    for interval, n, wanted in zip(x.axes, lengths, sizes, strict=True):
        q = np.arange(wanted)
        place = q * (n - 1) / max(wanted - 1, 1) if align_corners else (q + 0.5) * n / wanted - 0.5
        if mode == "nearest":
            nearest = q * n // wanted
            axes.append(_window(interval, nearest, nearest))
        else:
            axes.append(_window(interval, np.floor(place).astype(int), np.ceil(place).astype(int)))
    return Reach(x.channels, axes)


def _padded(x: Reach, pad: Sequence[int], *_: Any, **__: Any) -> Reach:
    axes = list(x.axes)
    # torch lists the last axis first.
    for i in range(len(pad) // 2):
        before, after = pad[2 * i], pad[2 * i + 1]
        place = np.arange(-before, len(axes[-1 - i][0]) + after)
        axes[-1 - i] = _window(axes[-1 - i], place, place)
    return Reach(x.channels, axes)
