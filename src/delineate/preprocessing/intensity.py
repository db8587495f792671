"""Steps that change intensities and leave every voxel where it is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import scipy  # loads its submodules on first use
from numpy.typing import NDArray
from pydantic import Field, model_validator

from delineate.core.grid import AXES, Grid
from delineate.core.volume import Volume
from delineate.errors import RecipeError
from delineate.preprocessing.step import Step, Undo, Unmoved, as_float
from delineate.specification import Intensity

PerChannel = Annotated[tuple[Intensity, ...], Field(max_length=1024)]
Channels = Annotated[tuple[Annotated[int, Field(ge=0, le=1023)], ...], Field(min_length=1, max_length=1024)]
T = TypeVar("T")


class ClipPercentiles(Step):
    """Clip each channel to two of its percentiles, ``lower`` and ``upper`` (0 to 100).

    ``within="nonzero"`` takes them over the voxels that are not zero and leaves zeros alone.
    ``scope="cohort"`` takes them over the training subjects, each with at most 50 000 voxels, and
    keeps them as ``low`` and ``high``, one per channel; giving these makes a fixed window. ``channels`` are clipped,
    counted from 0; the others stay as they are.

    For more than a million voxels, percentiles are taken over a regular lattice of at most that many, unless
    ``every_voxel`` of a patient counts.
    """

    kind: Literal["clip_percentiles"] = "clip_percentiles"
    lower: float = Field(default=0.5, ge=0, le=100)
    upper: float = Field(default=99.5, ge=0, le=100)
    within: Literal["all", "nonzero"] = "all"
    scope: Literal["patient", "cohort"] = "patient"
    every_voxel: bool = False
    channels: Channels | None = None
    low: PerChannel | None = None
    high: PerChannel | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        if self.lower >= self.upper:
            raise ValueError(f"lower is {self.lower}, upper {self.upper}; give lower < upper")
        _check_fitted(self.scope, self.low, self.high, "low and high")
        return self

    @property
    def needs_fit(self) -> bool:
        return self.scope == "cohort" and self.low is None

    def fit(self, scans: Iterable[Volume]) -> Self:
        if not self.needs_fit:
            return self
        samples = [[self._sample(c, at_most=50_000) for c in _those(as_float(scan), self.channels)] for scan in scans]
        bounds = [self._percentiles(np.concatenate(channel)) for channel in _by_channel(samples)]
        low, high = zip(*bounds, strict=True)
        return self.model_copy(update={"low": low, "high": high})

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        voxels = as_float(volume)
        result = _unless_all(voxels, self.channels)
        chosen = _those(voxels, self.channels)
        for channel, (low, high), out in zip(chosen, self._bounds(chosen), _those(result, self.channels), strict=True):
            np.clip(channel, np.float32(low), np.float32(high), out=out)
            if self.within == "nonzero":
                np.copyto(out, np.float32(0), where=channel == 0)
        return Volume(result, volume.grid), Unmoved.on(volume.grid)

    def _bounds(self, channels: Sequence[NDArray[np.float32]]) -> list[tuple[float, float]]:
        if self.scope == "patient":
            return [
                self._percentiles(self._sample(channel, at_most=channel.size if self.every_voxel else 1_000_000))
                for channel in channels
            ]
        return _fitted(self, self.low, self.high, channels=len(channels))

    def _sample(self, channel: NDArray[np.float32], at_most: int) -> NDArray[np.float32]:
        return _chosen(lattice(channel, at_most), self.within)

    def _percentiles(self, values: NDArray[np.float32]) -> tuple[float, float]:
        """Both percentiles; 0 and 0 if there are no voxels at all."""
        if not values.size:
            return 0.0, 0.0
        low, high = np.percentile(values, (self.lower, self.upper))
        return float(low), float(high)


class Denoise(Step):
    """Remove the noise of magnitude MR: the linear estimator of a Rician signal in a moving window.

    Aja-Fernández et al. 2008, eq. 13: from a window's second and fourth moments, the squared signal is
    <M²> − 2σ² where nothing varies but noise, and M² − 2σ² where the signal itself does. Windows have
    ``width`` voxels along each axis within a slice, and one across. ``sigma`` is the noise's standard
    deviation in each quadrature channel, in the scan's own units; None: measured in each channel, in
    air (the mode of the local second moment among the darkest fifth of the windows).
    """

    kind: Literal["denoise"] = "denoise"
    width: int = Field(default=5, ge=3, le=15)
    sigma: float | None = Field(default=None, gt=0, le=1e30)

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        across = volume.grid.slice_axis
        size = tuple(1 if axis == across else self.width for axis in range(3))
        voxels = as_float(volume)
        result = np.empty_like(voxels)
        for channel, out in zip(voxels, result, strict=True):
            # Moments of large numbers lose their differences in float32.
            square = channel.astype(np.float64) ** 2
            second, fourth = (scipy.ndimage.uniform_filter(moment, size) for moment in (square, square**2))
            variance = (self.sigma if self.sigma is not None else _noise(second)) ** 2
            spread, noise = fourth - second**2, 4 * variance * (second - variance)
            # Where nothing varies there is nothing to keep, and nothing to remove without noise.
            keep = np.full_like(second, float(variance == 0))
            np.divide(spread - noise, spread, out=keep, where=spread > 1e-12 * second**2)
            np.clip(keep, 0, 1, out=keep)
            out[...] = np.sqrt(np.maximum(second - 2 * variance + keep * (square - second), 0))
        return Volume(result, volume.grid), Unmoved.on(volume.grid)


def _noise(second: NDArray[np.float64]) -> float:
    """Noise in each quadrature channel: in air the second moment is twice its square. 0 where there is no air."""
    darkest = np.sort(second.ravel())[: max(1, second.size // 5)]
    if darkest[len(darkest) // 2] == 0:  # blanked out: there is no air to measure in
        return 0.0
    darkest = darkest[darkest > 0]
    counts, edges = np.histogram(darkest, bins=max(10, min(200, darkest.size // 50)))
    mode = int(counts.argmax())
    return float(np.sqrt((edges[mode] + edges[mode + 1]) / 4))


class Normalise(Step):
    """Bring each channel to a common range: (voxel - shift) / scale.

    ============  ============  ====================
    ``method``    shift         scale
    ============  ============  ====================
    ``minmax``    minimum       maximum - minimum
    ``zscore``    mean          standard deviation
    ``max``       0             largest magnitude
    ============  ============  ====================

    over the voxels of a slice, a patient or the training cohort (``scope``). A scale of 0 counts as
    1: a constant image becomes 0 (with ``max``, only if it is 0). ``within="nonzero"`` measures over
    the voxels that are not zero and leaves zeros alone; ``within="filled"`` does so with those that are not zero in
    any channel, holes between them filled. Slices lie ``across`` an axis: by default the grid's
    (``Grid.slice_axis``). ``channels`` are normalised, counted from 0; the others stay as they are.

    A cohort's statistics give every voxel the same weight and are kept as ``shift`` and ``scale``, one
    per channel; giving these makes a fixed scaling.
    """

    kind: Literal["normalise"] = "normalise"
    method: Literal["minmax", "zscore", "max"] = "zscore"
    scope: Literal["slice", "patient", "cohort"] = "patient"
    within: Literal["all", "nonzero", "filled"] = "all"
    across: Literal["x", "y", "z", "thickest"] = "thickest"
    channels: Channels | None = None
    shift: PerChannel | None = None
    scale: PerChannel | None = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        _check_fitted(self.scope, self.shift, self.scale, "shift and scale")
        if self.scale is not None and 0 in self.scale:
            raise ValueError("scale 0 would divide by zero; give 1 for a constant channel")
        return self

    @property
    def needs_fit(self) -> bool:
        return self.scope == "cohort" and self.shift is None

    def fit(self, scans: Iterable[Volume]) -> Self:
        if not self.needs_fit:
            return self
        moments = [self._moments(as_float(scan)) for scan in scans]
        shift, scale = zip(*(reduce(add, c).scaling(self.method) for c in _by_channel(moments)), strict=True)
        return self.model_copy(update={"shift": shift, "scale": scale})

    def _moments(self, voxels: NDArray[np.float32]) -> list[Moments]:
        outline = self._outline(voxels)
        return [Moments.of(_chosen(channel, self.within, outline)) for channel in _those(voxels, self.channels)]

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        voxels = as_float(volume)
        result = _unless_all(voxels, self.channels)
        before, after = _those(voxels, self.channels), _those(result, self.channels)
        outline = self._outline(voxels)
        if self.scope == "cohort":
            fitted = _fitted(self, self.shift, self.scale, channels=len(before))
            for channel, (shift, scale), out in zip(before, fitted, after, strict=True):
                self._rescale(channel, shift, scale, out, outline)
        else:
            outlines = None if outline is None else self._parts([outline] * len(before), volume.grid)
            for values, out in zip(self._parts(before, volume.grid), self._parts(after, volume.grid), strict=True):
                inside = None if outlines is None else next(outlines)
                scaling = Moments.of(_chosen(values, self.within, inside)).scaling(self.method)
                self._rescale(values, *scaling, out, inside)
        return Volume(result, volume.grid), Unmoved.on(volume.grid)

    def _parts(self, channels: Sequence[NDArray], grid: Grid) -> Iterator[NDArray]:
        """The arrays that are normalised separately: channels, or their slices."""
        if self.scope != "slice":
            return iter(channels)
        axis = grid.slice_axis if self.across == "thickest" else AXES.index(self.across)
        return (plane for channel in channels for plane in np.moveaxis(channel, axis, 0))

    def _outline(self, voxels: NDArray[np.float32]) -> NDArray[np.bool_] | None:
        """Where any channel is not zero, holes filled, if ``within`` asks for it."""
        if self.within != "filled":
            return None
        # Transposed, because it works on C-ordered arrays and scans are Fortran-ordered.
        filled: NDArray[np.bool_] = scipy.ndimage.binary_fill_holes((voxels != 0).any(0).T).T
        return filled

    def _rescale(
        self, values: NDArray, shift: float, scale: float, out: NDArray[np.float32], inside: NDArray[np.bool_] | None
    ) -> None:
        np.subtract(values, np.float32(shift), out=out)
        np.multiply(out, np.float32(1 / scale), out=out)
        if self.within != "all":
            np.copyto(out, np.float32(0), where=values == 0 if inside is None else ~inside)


@dataclass(frozen=True)
class Moments:
    """Count, mean, sum of squared deviations, and range of a set of voxels; ``+`` joins sets."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    least: float = np.inf
    largest: float = -np.inf

    @classmethod
    def of(cls, values: NDArray[np.float32]) -> Moments:
        if not values.size:
            return cls()
        mean = float(values.mean(dtype=np.float64))
        deviations = values - np.float32(mean)
        np.multiply(deviations, deviations, out=deviations)
        squares = float(deviations.sum(dtype=np.float64))
        return cls(values.size, mean, squares, float(values.min()), float(values.max()))

    def __add__(self, other: Moments) -> Moments:
        """The moments of both sets together (Chan et al. 1979)."""
        count = self.count + other.count
        if not count:
            return self
        distance = other.mean - self.mean
        return Moments(
            count,
            self.mean + distance * other.count / count,
            self.squares + other.squares + distance**2 * self.count * other.count / count,
            min(self.least, other.least),
            max(self.largest, other.largest),
        )

    def scaling(self, method: Literal["minmax", "zscore", "max"]) -> tuple[float, float]:
        """Shift and scale of :class:`Normalise`; 0 and 1 for an empty set."""
        if not self.count:
            return 0.0, 1.0
        if method == "minmax":
            return self.least, (self.largest - self.least) or 1.0
        if method == "max":
            return 0.0, max(abs(self.least), abs(self.largest)) or 1.0
        # A constant's deviation is only the rounding error of its mean, so the range decides.
        constant = self.least == self.largest
        return self.mean, 1.0 if constant else (self.squares / self.count) ** 0.5


def lattice(channel: NDArray, at_most: int) -> NDArray:
    """A copy (n,) of every k-th voxel along each axis of ``channel`` (X, Y, Z), n at most ``at_most``."""
    steps = [1, 1, 1]
    while np.prod(counts := [-(-size // step) for size, step in zip(channel.shape, steps, strict=True)]) > at_most:
        steps[int(np.argmax(counts))] += 1
    x, y, z = steps
    return channel[::x, ::y, ::z].flatten(order="K")


def _chosen(values: NDArray, within: str, outline: NDArray[np.bool_] | None = None) -> NDArray:
    if within == "all":
        return values
    if outline is not None:
        return values.T[outline.T]
    values = values.ravel(order="K")  # in memory order: masking a Fortran-ordered array is ten times slower
    return values[values != 0]


def _those(voxels: NDArray, channels: tuple[int, ...] | None) -> list[NDArray]:
    """Views of the chosen channels of ``voxels`` (C, X, Y, Z); of all for None."""
    if channels is None:
        return list(voxels)
    if max(channels) >= len(voxels):
        raise RecipeError(
            f"the preprocessing is for channel {max(channels)}, but the scan has {len(voxels)}, counted from 0",
            fix="change the step's channels",
        )
    return [voxels[channel] for channel in channels]


def _unless_all(voxels: NDArray[np.float32], channels: tuple[int, ...] | None) -> NDArray[np.float32]:
    """An array for the result: empty if all channels will be written, else a copy."""
    return np.empty_like(voxels) if channels is None else voxels.copy(order="K")


def _by_channel(scans: list[list[T]]) -> list[tuple[T, ...]]:
    """Measurements of each scan's channels, regrouped by channel."""
    if not scans:
        raise RecipeError("there is no training subject to fit the preprocessing on", fix="give at least one")
    counts = sorted({len(channels) for channels in scans})
    if len(counts) > 1:
        raise RecipeError(f"training subjects have {counts} channels", fix="leave out those that lack some")
    return list(zip(*scans, strict=True))


def _check_fitted(scope: str, first: PerChannel | None, second: PerChannel | None, names: str) -> None:
    if (first is None) != (second is None) or len(first or ()) != len(second or ()):
        raise ValueError(f"{names} belong together, one number per channel each; give both or neither")
    if first is not None and scope != "cohort":
        raise ValueError(f"{names} are given, but scope is {scope}; set scope: cohort, or drop them")


def _fitted(
    step: Step, first: PerChannel | None, second: PerChannel | None, channels: int
) -> list[tuple[float, float]]:
    """A cohort's two numbers for each channel."""
    if first is None or second is None:
        raise RecipeError(
            f"'{step.model_dump()['kind']}' over the cohort is not fitted", fix="fit it on training subjects"
        )
    if len(first) != channels:
        raise RecipeError(f"the preprocessing was fitted on {len(first)} channels, but this scan has {channels}")
    return list(zip(first, second, strict=True))
