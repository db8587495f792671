from __future__ import annotations

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.preprocessing.cache import PreparedSubject


def prepared_subject(name: str, shape: tuple[int, int, int], seed: int) -> PreparedSubject:
    """A cube of target 1 and a single voxel of target 2 in noise; each voxel of the image is distinct."""
    rng = np.random.default_rng(seed)
    target = np.zeros((1, *shape), dtype=np.uint8)
    target[0, 2:4, 2:4, 2:4] = 1
    target[0, -1, -1, -1] = 2
    image = rng.standard_normal((1, *shape)).astype(np.float16)
    points = {c: np.argwhere(target[0] == c) for c in (1, 2)}
    counts = {c: int((target == c).sum()) for c in (0, 1, 2)}
    return PreparedSubject(name, image, target, points, Grid.of_spacing(shape, (1, 1, 2)), counts)


@pytest.fixture
def subjects() -> list[PreparedSubject]:
    return [prepared_subject(f"s{i}", (12 + i, 14, 10), seed=i) for i in range(5)]
