"""Voxels with their grid: scans (channels first) and labels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid
from delineate.errors import BadShape


@dataclass(frozen=True, eq=False)
class Volume:
    """A scan: ``voxels`` (C, X, Y, Z) on a grid (X, Y, Z).

    >>> import numpy as np
    >>> from delineate import Grid
    >>> scan = Volume(np.zeros((1, 8, 8, 4)), Grid.of_spacing((8, 8, 4), spacing_mm=(1, 1, 3)))
    >>> scan.channels, scan.grid.spacing_mm
    (1, (1.0, 1.0, 3.0))
    """

    voxels: NDArray
    grid: Grid

    def __post_init__(self) -> None:
        if self.voxels.ndim != 4 or self.voxels.shape[1:] != self.grid.shape:
            raise BadShape(f"voxels {self.voxels.shape} do not fit (C, {self.grid.shape})", fix="pass channels first")

    @property
    def channels(self) -> int:
        return int(self.voxels.shape[0])


@dataclass(frozen=True, eq=False)
class LabelVolume:
    """A label: integer ``voxels`` (X, Y, Z) on a grid of the same shape.

    >>> import numpy as np
    >>> from delineate import Grid
    >>> label = LabelVolume(np.ones((8, 8, 4), np.uint8), Grid.of_spacing((8, 8, 4), spacing_mm=(1, 1, 5)))
    >>> print(f"{(label.voxels == 1).sum() * label.grid.voxel_ml:.2f} ml")
    1.28 ml
    """

    voxels: NDArray
    grid: Grid

    def __post_init__(self) -> None:
        if self.voxels.shape != self.grid.shape:
            raise BadShape(f"label voxels {self.voxels.shape} do not fit the grid {self.grid.shape}")
        if not np.issubdtype(self.voxels.dtype, np.integer):
            raise BadShape(f"label voxels are {self.voxels.dtype}", fix="convert them to integers first")
