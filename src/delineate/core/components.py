"""What hangs together in a mask or a label."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray


def connected_components(mask: NDArray[np.bool_ | np.unsignedinteger]) -> tuple[NDArray[Any], int]:
    """Number a mask's pieces from 1, voxels that share a face, an edge or a corner being of one piece.

    The pieces of a label have one value each. Returns the numbers, of the mask's shape (I, J, K) and 0 outside it, and
    how many pieces there are.
    """
    import cc3d  # slow to import

    # In a single slice, cc3d reserves too little room for many pieces and raises an error: it gets an empty second one.
    thick = np.pad(mask, [(0, int(extent == 1)) for extent in mask.shape]) if 1 in mask.shape else mask
    labels, count = cc3d.connected_components(thick, connectivity=26, return_N=True)
    return labels[tuple(map(slice, mask.shape))], int(count)


def sizes_and_boxes(pieces: NDArray[Any]) -> tuple[NDArray[Any], list[tuple[slice, slice, slice]]]:
    """The voxels of each piece that :func:`connected_components` numbers, and the box around it; 0 is the rest."""
    import cc3d  # slow to import

    found = cc3d.statistics(pieces)
    return found["voxel_counts"], found["bounding_boxes"]
