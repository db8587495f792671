"""What a scanner makes of a body: contrast, resolution, orientation, a bias field and noise."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, Shape3, permute_axes
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.phantoms.anatomy import Anatomy, Field, SmoothField
from delineate.datasets.phantoms.tissues import TISSUES, Sequence

_MOST_SUBSLICES = 3
"""Planes simulated and averaged for each slice: thick slices mix whatever lies above each other."""

_FEWEST = 8
"""A coarser scan keeps this many voxels along an axis, or all where there are fewer."""

_SLAB = 4
"""Slices rendered at a time: few enough to stay in the processor's caches."""


@dataclass(frozen=True)
class Scanner:
    """A simulated scanner and its protocol; each of its ``sequences`` is a channel.

    ``shape`` and ``spacing_mm`` are along right, front and up; files are stored in ``orientation``.
    ``centre_mm`` is approximately the middle of the field of view; an ``oblique`` one is tilted by a
    few degrees. ``slices`` is the range of slices that a scan may have, where that varies.
    ``noise`` is the standard deviation in each quadrature channel relative to muscle's signal, or in
    Hounsfield units; ``bias`` that of the coils' log sensitivity; ``blur`` the fraction of a voxel's
    signal that spreads to its neighbours in the plane; ``gain`` the stored value of muscle's signal.
    ``stripped`` names the part outside which everything is set to zero, as after skull stripping.
    ``coarse`` divides the number of voxels along each axis, over the same field of view.
    """

    name: str
    shape: Shape3
    spacing_mm: tuple[float, float, float]
    sequences: tuple[Sequence, ...]
    orientation: str = "LPS"
    slices: tuple[int, int] | None = None
    field_tesla: float = 1.5
    noise: float = 0.05
    bias: float = 0.1
    blur: float = 0.2
    gain: float = 250.0
    centre_mm: tuple[float, float, float] = (0.0, 0.0, 0.0)
    stripped: str = ""
    oblique: bool = True
    coarse: float = 1.0

    @property
    def channels(self) -> tuple[str, ...]:
        """Channel names, with a fat fraction if there are water and fat images."""
        kinds = {sequence.kind for sequence in self.sequences}
        return tuple(s.channel for s in self.sequences) + (("fat_fraction",) if {"water", "fat"} <= kinds else ())

    def acquire(
        self, anatomy: Anatomy, values: Mapping[str, int], rng: np.random.Generator
    ) -> tuple[Volume, LabelVolume]:
        """An int16 scan (C, X, Y, Z) and its label: a voxel has a named part's value if the part fills half of it.

        Where parts lie within each other, the later one in ``values`` counts.
        """
        drawn = self
        if self.slices is not None:
            drawn = replace(self, shape=(*self.shape[:2], int(rng.integers(*self.slices, endpoint=True))))
        placed = drawn._placed(rng)
        grid = placed.resample([min(n, max(_FEWEST, round(n / self.coarse))) for n in placed.shape])
        image, shares = drawn._seen(anatomy, grid)
        (grain,) = SmoothField.draw(rng, (6.0, 25.0)).on(grid)
        (coils,) = SmoothField.draw(rng, (250.0, 800.0)).on(grid)
        channels = [
            drawn._received(signal, sequence, grain, coils, rng)
            for signal, sequence in zip(image, self.sequences, strict=True)
        ]
        if len(channels) < len(self.channels):
            water, fat = (channels[[s.kind for s in self.sequences].index(kind)] for kind in ("water", "fat"))
            channels.append(100 * fat / np.maximum(water + fat, 1))
        voxels = np.rint(np.stack(channels)).astype(np.int16)
        label = np.zeros(grid.shape, dtype=np.uint8)
        for name, value in values.items():
            if name in shares:  # not every patient has every part
                label[shares[name] > 0.5] = value
        if self.stripped:
            voxels[:, shares[self.stripped] < 0.5] = 0
        how = grid.axes_to(self.orientation)
        stored = grid.permute(*how)
        turned = np.stack([permute_axes(channel, *how) for channel in voxels])
        return Volume(turned, stored), LabelVolume(permute_axes(label, *how), stored)

    def _seen(self, anatomy: Anatomy, grid: Grid) -> tuple[Field, dict[str, Field]]:
        """Noise-free signals (C, X, Y, Z) and the parts' shares, averaged over each slice's thickness."""
        x, y, z = grid.shape
        planes = int(np.clip(round(self.spacing_mm[2] / self.spacing_mm[0]), 1, _MOST_SUBSLICES))
        signals = {
            name: np.array([s.signal(anatomy.tissue(name), self.field_tesla) for s in self.sequences], np.float32)
            for name in TISSUES
        }
        image = np.empty((len(self.sequences), *grid.shape), np.float32)
        shares = {name: np.empty(grid.shape, np.float32) for name in anatomy.names}

        def render(first: int) -> None:
            slab = grid.crop((0, 0, first), (x, y, min(_SLAB, z - first)))
            fine = slab.resample((x, y, slab.shape[2] * planes))
            signal, parts = anatomy.render(fine, signals)
            image[..., first : first + _SLAB] = signal.reshape(*signal.shape[:3], -1, planes).mean(axis=-1)
            for name, share in parts.items():
                shares[name][..., first : first + _SLAB] = share.reshape(x, y, -1, planes).mean(axis=-1)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(render, range(0, z, _SLAB)))
        return image, shares

    def _received(
        self, signal: Field, sequence: Sequence, grain: Field, coils: Field, rng: np.random.Generator
    ) -> Field:
        """A channel as stored: blurred, with bias field and noise, on the scanner's scale."""
        signal = _blurred(signal, self.blur)
        if sequence.kind == "ct":
            noise = self.noise * rng.standard_normal(signal.shape, dtype=np.float32)
            return np.clip(signal + 5 * grain * (signal > -200) + 2 * _blurred(noise, self.blur), -1024, 3071)
        # Water and fat share a scale, since their ratio is measured.
        of = replace(sequence, kind="water") if sequence.kind == "fat" else sequence
        muscle = of.signal(TISSUES["muscle"], self.field_tesla)
        received = signal / np.float32(muscle) * (1 + 0.045 * grain) * np.exp(np.float32(self.bias) * coils)
        return np.minimum(self.gain * rician(received, self.noise, rng), 32767)

    def _placed(self, rng: np.random.Generator) -> Grid:
        """The field of view: near the body's centre and, except on CT, slightly oblique."""
        tilt_x, tilt_z = np.radians(rng.uniform(-4, 4, size=2)) * self.oblique
        about_x = np.array([[1, 0, 0], [0, np.cos(tilt_x), -np.sin(tilt_x)], [0, np.sin(tilt_x), np.cos(tilt_x)]])
        about_z = np.array([[np.cos(tilt_z), -np.sin(tilt_z), 0], [np.sin(tilt_z), np.cos(tilt_z), 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = about_x @ about_z @ np.diag(self.spacing_mm)
        middle = self.centre_mm + rng.uniform(-6, 6, size=3)
        affine[:3, 3] = middle - affine[:3, :3] @ (np.array(self.shape) - 1) / 2
        return Grid(self.shape, affine)


def rician(signal: NDArray[np.float32], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Magnitude of a complex signal with Gaussian noise in both channels (Gudbjartsson and Patz 1995)."""
    real, imaginary = noise * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.hypot(signal + real, imaginary)


def _blurred(image: Field, share: float) -> Field:
    """The image after each voxel spreads half of ``share`` to its neighbours along the first axis, then the second."""
    for axis in (0, 1):
        around = np.take(image, np.clip(np.arange(-1, image.shape[axis] + 1), 0, image.shape[axis] - 1), axis=axis)
        before, middle, after = (np.take(around, range(i, i + image.shape[axis]), axis=axis) for i in range(3))
        image = (1 - share) * middle + share / 2 * (before + after)
    return image.astype(np.float32)
