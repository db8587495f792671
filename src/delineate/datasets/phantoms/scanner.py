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
"""Planes simulated and averaged for each slice: thick slices mix what lies above each other."""

_SLAB = 4
"""Slices rendered at once: few enough to stay in the processor's caches."""


@dataclass(frozen=True)
class Scanner:
    """A simulated scanner and its protocol; each of its ``sequences`` is a channel.

    ``shape`` and ``spacing_mm`` are along right, front and up; files are stored in ``orientation``.
    ``centre_mm`` is where the middle of the field of view lies, about; an ``oblique`` one is tilted by
    some degrees. ``slices`` are how many slices a scan may have, where that differs from scan to scan.
    ``noise`` is the deviation in each quadrature channel relative to muscle's signal, or in
    Hounsfield units; ``bias`` the deviation of the coils' log sensitivity; ``blur`` the share of a
    voxel's signal that its neighbours in the plane get; ``gain`` the number that muscle's signal is
    stored as.
    ``stripped`` names the part outside of which all is set to zero, as after skull stripping.
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

    @property
    def channels(self) -> tuple[str, ...]:
        """Names of the channels, a fat fraction among them where water and fat are told apart."""
        kinds = {sequence.kind for sequence in self.sequences}
        return tuple(s.channel for s in self.sequences) + (("fat_fraction",) if {"water", "fat"} <= kinds else ())

    def acquire(
        self, anatomy: Anatomy, values: Mapping[str, int], rng: np.random.Generator
    ) -> tuple[Volume, LabelVolume]:
        """A scan (C, X, Y, Z) of int16 and its label: a named part has its value where it fills half a voxel.

        Of parts within each other the later one in ``values`` counts.
        """
        drawn = self
        if self.slices is not None:
            drawn = replace(self, shape=(*self.shape[:2], int(rng.integers(*self.slices, endpoint=True))))
        grid = drawn._placed(rng)
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
            if name in shares:  # not every patient has all of them
                label[shares[name] > 0.5] = value
        if self.stripped:
            voxels[:, shares[self.stripped] < 0.5] = 0
        how = grid.axes_to(self.orientation)
        stored = grid.permute(*how)
        turned = np.stack([permute_axes(channel, *how) for channel in voxels])
        return Volume(turned, stored), LabelVolume(permute_axes(label, *how), stored)

    def _seen(self, anatomy: Anatomy, grid: Grid) -> tuple[Field, dict[str, Field]]:
        """Noiseless signals (C, X, Y, Z) and shares of the parts, averaged over each slice's thickness."""
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
        """What is stored of a channel: blurred, uneven, noisy, on the scanner's scale."""
        signal = _blurred(signal, self.blur)
        if sequence.kind == "ct":
            noise = self.noise * rng.standard_normal(signal.shape, dtype=np.float32)
            return np.clip(signal + 5 * grain * (signal > -200) + 2 * _blurred(noise, self.blur), -1024, 3071)
        # Water and fat share a scale: their ratio is what is measured.
        of = replace(sequence, kind="water") if sequence.kind == "fat" else sequence
        muscle = of.signal(TISSUES["muscle"], self.field_tesla)
        received = signal / np.float32(muscle) * (1 + 0.045 * grain) * np.exp(np.float32(self.bias) * coils)
        return np.minimum(self.gain * rician(received, self.noise, rng), 32767)

    def _placed(self, rng: np.random.Generator) -> Grid:
        """The field of view, near the body's centre and, unless it is a CT, a little oblique."""
        tilt_x, tilt_z = np.radians(rng.uniform(-4, 4, size=2)) * self.oblique
        about_x = np.array([[1, 0, 0], [0, np.cos(tilt_x), -np.sin(tilt_x)], [0, np.sin(tilt_x), np.cos(tilt_x)]])
        about_z = np.array([[np.cos(tilt_z), -np.sin(tilt_z), 0], [np.sin(tilt_z), np.cos(tilt_z), 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = about_x @ about_z @ np.diag(self.spacing_mm)
        middle = self.centre_mm + rng.uniform(-6, 6, size=3)
        affine[:3, 3] = middle - affine[:3, :3] @ (np.array(self.shape) - 1) / 2
        return Grid(self.shape, affine)


def rician(signal: NDArray[np.float32], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Magnitude of a complex signal with normal noise in both channels (Gudbjartsson and Patz 1995)."""
    real, imaginary = noise * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.hypot(signal + real, imaginary)


def _blurred(image: Field, share: float) -> Field:
    """Each voxel gives half of ``share`` to its neighbours along the first axis, then along the second."""
    for axis in (0, 1):
        around = np.take(image, np.clip(np.arange(-1, image.shape[axis] + 1), 0, image.shape[axis] - 1), axis=axis)
        before, middle, after = (np.take(around, range(i, i + image.shape[axis]), axis=axis) for i in range(3))
        image = (1 - share) * middle + share / 2 * (before + after)
    return image.astype(np.float32)
