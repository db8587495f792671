"""What a scanner makes of a body: contrast, resolution, orientation, a bias field and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, Shape3, permute_axes
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.phantoms.anatomy import Anatomy, SmoothField

ORGAN, LESION = 1, 2

_SUBSLICES = 3
"""Planes simulated and averaged for each slice: thick slices mix what lies above each other."""


@dataclass(frozen=True)
class Scanner:
    """A simulated scanner and its protocol.

    ``shape`` and ``spacing_mm`` are along right, front and up; files are stored in ``orientation``.
    ``signals`` are the tissues' noiseless signals, ``noise`` is the deviation in each quadrature
    channel, both relative to 1. ``bias`` is the deviation of the coils' log sensitivity, ``gain``
    the number that a signal of 1 is stored as.
    """

    name: str
    shape: Shape3
    spacing_mm: tuple[float, float, float]
    orientation: str
    signals: Mapping[str, float]
    noise: float
    bias: float
    gain: float

    def acquire(self, anatomy: Anatomy, rng: np.random.Generator) -> tuple[Volume, LabelVolume]:
        """A scan (1, X, Y, Z) of int16 and its label: 1 organ, 2 lesion, whatever fills half a voxel."""
        grid = self._placed(rng)
        x, y, z = grid.shape
        fine = grid.resample((x, y, z * _SUBSLICES))
        rendered = anatomy.render(fine, self.signals)
        signal, organ, lesion = (field.reshape(x, y, z, _SUBSLICES).mean(axis=3) for field in rendered)

        (grain,) = SmoothField.draw(rng, (8.0, 30.0)).on(grid)
        (coils,) = SmoothField.draw(rng, (300.0, 900.0)).on(grid)
        signal *= (1 + 0.03 * grain) * np.exp(self.bias * coils)
        voxels = np.rint(self.gain * rician(signal, self.noise, rng)).astype(np.int16)

        label = np.zeros(grid.shape, dtype=np.uint8)
        label[organ > 0.5] = ORGAN
        label[lesion > 0.5] = LESION
        how = grid.axes_to(self.orientation)
        stored = grid.permute(*how)
        return Volume(permute_axes(voxels, *how)[None], stored), LabelVolume(permute_axes(label, *how), stored)

    def _placed(self, rng: np.random.Generator) -> Grid:
        """The field of view, near the body's centre and a little oblique."""
        tilt_x, tilt_z = np.radians(rng.uniform(-4, 4, size=2))
        about_x = np.array([[1, 0, 0], [0, np.cos(tilt_x), -np.sin(tilt_x)], [0, np.sin(tilt_x), np.cos(tilt_x)]])
        about_z = np.array([[np.cos(tilt_z), -np.sin(tilt_z), 0], [np.sin(tilt_z), np.cos(tilt_z), 0], [0, 0, 1]])
        affine = np.eye(4)
        affine[:3, :3] = about_x @ about_z @ np.diag(self.spacing_mm)
        affine[:3, 3] = rng.uniform(-8, 8, size=3) - affine[:3, :3] @ (np.array(self.shape) - 1) / 2
        return Grid(self.shape, affine)


def rician(signal: NDArray[np.float32], noise: float, rng: np.random.Generator) -> NDArray[np.float32]:
    """Magnitude of a complex signal with normal noise in both channels (Gudbjartsson and Patz 1995)."""
    real, imaginary = noise * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    return np.hypot(signal + real, imaginary)


SCANNERS = (
    Scanner(
        name="north",
        shape=(104, 84, 24),
        spacing_mm=(3.6, 3.6, 7.0),
        orientation="LPS",
        signals={
            "air": 0.0,
            "fat": 1.0,
            "visceral fat": 0.85,
            "muscle": 0.36,
            "marrow": 0.55,
            "fluid": 0.12,
            "blood": 0.22,
            "organ": 0.58,
            "lesion": 0.36,
            "spleen": 0.42,
            "kidney": 0.40,
            "gut": 0.30,
            "full gut": 0.45,
        },
        noise=0.03,
        bias=0.12,
        gain=600.0,
    ),
    Scanner(
        name="south",
        shape=(120, 96, 20),
        spacing_mm=(3.1, 3.1, 8.5),
        orientation="LAS",
        signals={
            "air": 0.0,
            "fat": 0.62,
            "visceral fat": 0.50,
            "muscle": 0.22,
            "marrow": 0.40,
            "fluid": 1.0,
            "blood": 0.10,
            "organ": 0.36,
            "lesion": 0.58,
            "spleen": 0.70,
            "kidney": 0.75,
            "gut": 0.25,
            "full gut": 0.85,
        },
        noise=0.045,
        bias=0.22,
        gain=1500.0,
    ),
)
"""Two scanners: T1-weighted with dark lesions, and T2-weighted, noisier, thicker, with bright ones."""
