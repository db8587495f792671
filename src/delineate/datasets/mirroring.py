"""Is a label mirrored relative to its image? Tested by whether its border follows edges in the image.

A label whose header was rewritten without its voxels (or the other way round) still fits its image
when flipped back: see :mod:`delineate.io.borders`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import AXES, Grid
from delineate.io.borders import Flip, contrast, flipped, sides

CLEAR = 1.0
"""Least contrast of a border in the right place, in standard deviations of the image on either side."""
TIMES = 2.0
"""A flip is believed if its contrast is this many times that of the label where its header places it."""


@dataclass(frozen=True)
class Suspicion:
    """The label fits the image better voxel by voxel, with its axes flipped by ``flip``, than where its header says.

    ``flipped`` and ``as_said`` are the two contrasts.
    """

    flip: Flip
    flipped: float
    as_said: float

    def __str__(self) -> str:
        axes = ", ".join(axis for axis, reverse in zip(AXES, self.flip, strict=True) if reverse)
        how = f"where its voxels are flipped along {axes}" if axes else "voxel by voxel"
        return (
            f"the label's border follows the image {how} (contrast {self.flipped:.2f}), "
            f"not where its header places it ({self.as_said:.2f})"
        )


def suspicion(channels: Sequence[NDArray], image: Grid, mask: NDArray[np.bool_], label: Grid) -> Suspicion | None:
    """Whether the header of ``mask`` (X, Y, Z) misplaces it on the channels (X, Y, Z) of a scan.

    ``flip`` makes its voxels match the image's one by one. None where there is no evidence for that, or
    where the shapes differ.
    """
    if mask.shape != image.shape or not mask.any():
        return None
    inside, outside = sides(mask)

    def score(place: Callable[[NDArray[np.intp]], NDArray[np.intp]]) -> float:
        a, b = place(inside), place(outside)
        if 2 * a.shape[1] < inside.shape[1]:  # most of it lies outside the scan
            return 0.0
        return max(contrast(channel[tuple(a)], channel[tuple(b)]) for channel in channels)

    as_said = score(lambda index: _by_header(index, label, image))
    flips: list[Flip] = [(x, y, z) for x, y, z in product((False, True), repeat=3)]
    scores = {flip: score(lambda index, flip=flip: flipped(index, mask.shape, flip)) for flip in flips}  # type: ignore[misc]
    best = max(scores, key=lambda flip: scores[flip])
    if scores[best] < CLEAR or scores[best] < TIMES * as_said:
        return None
    return Suspicion(best, scores[best], as_said)


def _by_header(index: NDArray[np.intp], label: Grid, image: Grid) -> NDArray[np.intp]:
    """Indices (3, n) of the image's voxels nearest to the label's, where those lie inside it."""
    world = label.world(index.T.astype(np.float64))
    back = np.linalg.inv(image.affine)
    found = np.rint(world @ back[:3, :3].T + back[:3, 3]).astype(np.intp).T
    shape = np.array(image.shape)[:, None]
    return found[:, ((found >= 0) & (found < shape)).all(axis=0)]
