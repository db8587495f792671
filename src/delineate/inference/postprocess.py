"""Clean up predicted masks: drop end slices, cut a target to another, keep its largest component, remove specks."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from delineate.core.components import connected_components
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.recipe import PostprocessingSpec


def postprocess(
    encoded: NDArray[np.uint8], targets: Targets, grid: Grid, spec: PostprocessingSpec
) -> NDArray[np.uint8]:
    """A label as :meth:`Targets.encode` gives it, without the slices that ``spec`` drops, and with each target's
    components chosen by it.

    Slices lie across ``grid.slice_axis``; components are 26-connected. Targets that are cut to another come last.
    Raises :class:`RecipeError` if the specification does not fit the targets.
    """
    spec.check(targets)
    if spec == PostprocessingSpec():
        return encoded
    named = {*spec.largest_component, *spec.minimum_ml}
    result = encoded.copy(order="K")
    slices = np.moveaxis(result, 1 + grid.slice_axis, 0)  # a view
    ends = int(spec.drop_end_slices * len(slices) + 1e-9)  # 0.29 of 100 is 28.999…
    slices[:ends] = slices[len(slices) - ends :] = False
    for name in sorted(targets.names, key=lambda name: name in spec.within):
        if name not in named and name not in spec.within:
            continue
        index = targets.names.index(name)
        mask = kept = targets.mask(result, index)
        if name in spec.within:
            kept = kept & targets.mask(result, targets.names.index(spec.within[name]))
        if name in named and kept.any():
            kept = _chosen_components(
                kept,
                largest=name in spec.largest_component,
                minimum_voxels=spec.minimum_ml.get(name, 0.0) / grid.voxel_ml,
            )
        np.copyto(result[0 if targets.exclusive else index], 0, where=mask & ~kept)
    return result


def _chosen_components(mask: NDArray[np.bool_], *, largest: bool, minimum_voxels: float) -> NDArray[np.bool_]:
    components, count = connected_components(mask)
    sizes = np.bincount(components.ravel(), minlength=count + 1)
    sizes[0] = 0
    kept = sizes >= max(minimum_voxels, 1)
    if largest:
        kept &= np.arange(count + 1) == sizes.argmax()
    return kept[components]
