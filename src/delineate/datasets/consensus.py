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
    chosen = np.zeros(first.grid.shape, dtype=np.min_scalar_type(max(values, default=0)))
    best: NDArray = _votes(labels, 0) if method == "majority" else np.full(first.grid.shape, 0.5)
    for value in values:  # one at a time: labels may have hundreds
        score = _votes(labels, value) if method == "majority" else _staple([one.voxels == value for one in labels])
        better = score > best
        chosen[better] = value
        best[better] = score[better]
    return LabelVolume(chosen, first.grid)


def _votes(labels: Sequence[LabelVolume], value: int) -> NDArray[np.unsignedinteger]:
    """How many annotators gave each voxel this value."""
    votes = np.zeros_like(labels[0].voxels, np.min_scalar_type(len(labels)))
    for label in labels:
        votes += label.voxels == value
    return votes


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
