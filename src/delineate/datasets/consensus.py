"""One label from several annotators, by majority or by STAPLE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import box_around
from delineate.core.volume import LabelVolume
from delineate.datasets.dataset import check_grids
from delineate.errors import DatasetError

Method = Literal["majority", "staple"]


def consensus(labels: Sequence[LabelVolume], method: Method = "majority", *, subject: str = "") -> LabelVolume:
    """What several annotators agree on, on the first one's grid; background (0) wins a tie.

    ``majority``: the value that most of them gave a voxel; a tie between targets goes to the
    smaller value. ``staple``: the value whose probability of being true exceeds one half, estimated
    together with each annotator's sensitivity and specificity (Warfield et al. 2004, SimpleITK's
    implementation); where two values do, the likelier.

    Raises :class:`GridMismatch` where labels lie on different grids, :class:`DatasetError` for fewer
    than two.
    """
    if len(labels) < 2:
        whose = f"'{subject}'" if subject else "the scan"
        raise DatasetError(f"labels of {whose} by annotator: {len(labels)}", fix="give at least two for a consensus")
    first = labels[0]
    for number, other in enumerate(labels[1:], start=2):
        check_grids(subject, f"label of annotator {number}", other.grid, "that of the first", first.grid)
    values = sorted({int(v) for label in labels for v in np.unique(label.voxels)} - {0})
    votes = {value: [label.voxels == value for label in labels] for value in values}
    chosen = np.zeros(first.grid.shape, dtype=np.min_scalar_type(max(values, default=0)))
    if method == "majority":
        best = np.sum([label.voxels == 0 for label in labels], axis=0)
        scores = {value: np.sum(masks, axis=0) for value, masks in votes.items()}
    else:
        best = np.full(first.grid.shape, 0.5)
        scores = {value: _staple(masks) for value, masks in votes.items()}
    for value, score in scores.items():
        better = score > best
        chosen[better] = value
        best = np.where(better, score, best)
    return LabelVolume(chosen, first.grid)


def _staple(masks: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """Probability of being true, voxel by voxel, given each annotator's mask."""
    import SimpleITK  # slow to import

    # Far from any mark all annotators agree; including that background would push specificity to 1.
    union = np.logical_or.reduce(masks)
    box = box_around(union, margin=2)
    assert box is not None  # each value was marked by somebody
    images = [SimpleITK.GetImageFromArray(mask[box].astype(np.uint8)) for mask in masks]
    probability = np.zeros(union.shape)
    probability[box] = SimpleITK.GetArrayFromImage(SimpleITK.STAPLE(images, 1.0))  # type: ignore[no-untyped-call]
    return probability
