"""Preprocessing steps in order: fitted on training subjects, applied to any, undone as one."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from delineate.core.volume import Volume
from delineate.preprocessing.intensity import ClipPercentiles, Denoise, Normalise
from delineate.preprocessing.spatial import (
    CropBackground,
    CropComposite,
    CropOrPad,
    Reorient,
    Resample,
    Resize,
    Transpose,
)
from delineate.preprocessing.step import Composed, Step, Undo, as_float
from delineate.specification import Kinds, Specification

STEPS: Kinds[Step] = Kinds(
    "steps",
    "preprocessing step",
    Step,
    (
        *(Reorient, Transpose, Resample, Resize, CropBackground, CropComposite, CropOrPad),
        *(ClipPercentiles, Denoise, Normalise),
    ),
)
StepSpec = Annotated[Step, STEPS]


class Pipeline(Specification):
    """``steps`` in order; immutable: fitting returns another pipeline."""

    steps: Annotated[tuple[StepSpec, ...], Field(max_length=64)] = ()

    @property
    def needs_fit(self) -> bool:
        """Whether training subjects must be seen before the pipeline can be applied."""
        return any(step.needs_fit for step in self.steps)

    def fit(self, scans: Callable[[], Iterable[Volume]]) -> Self:
        """The pipeline with every step fitted on scans as the steps before it leave them.

        ``scans()`` yields the training scans, best lazily: one is held at a time. It is called once
        for each step that needs fitting, and never if none does.
        """
        fitted: tuple[StepSpec, ...] = ()
        for step in self.steps:
            if step.needs_fit:
                earlier = Pipeline(steps=fitted)
                step = step.fit(earlier.apply(scan)[0] for scan in scans())
            fitted = (*fitted, step)
        return self.model_copy(update={"steps": fitted})

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        """The prepared volume, float32, and the way back to the grid of ``volume``.

        The prepared voxels may be a view of the volume's if no step changed any.
        Raises :class:`~delineate.errors.RecipeError` if a step still needs fitting.
        """
        prepared = Volume(as_float(volume), volume.grid)
        undos: list[Undo] = []
        for step in self.steps:
            prepared, undo = step.apply(prepared)
            undos.append(undo)
        return prepared, Composed(volume.grid, prepared.grid, tuple(undos))

    def apply_with_label(self, volume: Volume, encoded: NDArray[np.uint8]) -> tuple[Volume, NDArray[np.uint8], Undo]:
        """:meth:`apply`, with an encoded label (T, X, Y, Z) on the same grid moved the same way."""
        prepared, undo = self.apply(volume)
        return prepared, undo.forward_label(encoded), undo
