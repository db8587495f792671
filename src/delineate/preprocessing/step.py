"""What every preprocessing step promises: a prepared volume, and the way back as a value."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

from delineate.core.grid import Grid, Shape3
from delineate.core.volume import Volume
from delineate.errors import CannotUndo, RecipeError
from delineate.specification import Specification


class Step(Specification, ABC):
    """One preprocessing step: settings, and what it learnt from training subjects.

    A step never changes the volume it is given. It may return a view of its voxels.
    """

    if TYPE_CHECKING:
        kind: str  # every step has its own

    @property
    def needs_fit(self) -> bool:
        """Whether the step must see training subjects before it can be applied."""
        return False

    def fit(self, scans: Iterable[Volume]) -> Self:
        """A copy fitted on the training ``scans``, which are read once, one at a time."""
        return self

    @abstractmethod
    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        """The prepared volume, float32, and the way back.

        Raises :class:`~delineate.errors.RecipeError` where the step needs fitting first.
        """


@dataclass(frozen=True, eq=False)
class Undo(ABC):
    """What a step did to a scan's grid, so that labels can follow and scores can return.

    ``before`` is the grid of the volume given, ``after`` that of the prepared one.
    """

    before: Grid
    after: Grid

    @property
    def interpolates(self) -> bool:
        """Whether values are interpolated on the way; if not, the way back is exact."""
        return False

    def __call__(self, array: NDArray, outside: float | Sequence[float] = 0.0) -> NDArray:
        """``array`` (K, X', Y', Z') on the prepared grid, moved to (K, X, Y, Z) on the grid before.

        ``outside`` fills whatever the preparation cut off: one number, or one for each of the K
        (scores: 1 for background, 0 for targets).
        """
        fills = np.broadcast_to(np.asarray(outside, dtype=np.float64), len(array))
        result = empty_channels(len(array), self.before.shape, np.float32 if self.interpolates else array.dtype)
        for plane, fill, out in zip(array, fills, result, strict=True):
            out[...] = self.scores(plane, float(fill))
        return result

    def scores(self, plane: NDArray, outside: float = 0.0) -> NDArray:
        """One class's scores (X', Y', Z'), moved to (X, Y, Z): one class at a time, to bound memory.

        Raises :class:`~delineate.errors.CannotUndo` if ``plane`` does not lie on the prepared grid.
        """
        if plane.shape != self.after.shape:
            raise CannotUndo(
                f"array {plane.shape} does not lie on the prepared grid {self.after.shape}",
                fix="remove the tiling's padding before undoing the preprocessing",
            )
        return self._back(plane, outside)

    def forward_label(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """An encoded label (T, X, Y, Z) on the grid before, moved as the scan was: (T, X', Y', Z').

        Padding is background (0). No value appears that was not there.
        Raises :class:`~delineate.errors.CannotUndo` if it does not lie on the grid before.
        """
        if encoded.shape[1:] != self.before.shape:
            raise CannotUndo(
                f"label {encoded.shape[1:]} does not lie on the scan's grid {self.before.shape}",
                fix="load it with the scan's grid, which checks that they match",
            )
        return self._forward(encoded)

    @abstractmethod
    def _back(self, plane: NDArray, outside: float) -> NDArray: ...

    @abstractmethod
    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]: ...


class Unmoved(Undo):
    """The way back from a step that leaves every voxel where it is."""

    @classmethod
    def on(cls, grid: Grid) -> Self:
        return cls(grid, grid)

    def _back(self, plane: NDArray, outside: float) -> NDArray:
        return plane

    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        return encoded


@dataclass(frozen=True, eq=False)
class Composed(Undo):
    """The way back through several steps, last first."""

    undos: tuple[Undo, ...] = ()

    @property
    def interpolates(self) -> bool:
        return any(undo.interpolates for undo in self.undos)

    def _back(self, plane: NDArray, outside: float) -> NDArray:
        for undo in reversed(self.undos):
            plane = undo.scores(plane, outside)
        return plane

    def _forward(self, encoded: NDArray[np.uint8]) -> NDArray[np.uint8]:
        for undo in self.undos:
            encoded = undo.forward_label(encoded)
        return encoded


def as_float(volume: Volume) -> NDArray[np.float32]:
    """The voxels as float32, copied only if they are something else."""
    return volume.voxels.astype(np.float32, order="K", copy=False)


def empty_channels(channels: int, shape: Shape3, dtype: DTypeLike = np.float32) -> NDArray[Any]:
    """An array (C, X, Y, Z) in which each channel is one Fortran-ordered block, as scans are read."""
    return np.empty((channels, *shape[::-1]), dtype=dtype).transpose(0, 3, 2, 1)


MOST_VOXELS = 2**31


def check_voxels(shape: Shape3) -> Shape3:
    """``shape``, once a step may allocate it. Raises :class:`RecipeError` beyond :data:`MOST_VOXELS`."""
    if math.prod(shape) > MOST_VOXELS:
        sides = " × ".join(map(str, shape))
        raise RecipeError(
            f"preprocessing would make {sides} voxels of a scan", fix="choose a coarser spacing or a smaller shape"
        )
    return shape
