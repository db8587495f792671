from __future__ import annotations

import numpy as np
import pytest

from delineate.core.targets import IGNORED, Targets
from delineate.errors import BadLabelValue, RecipeError

LABEL = np.array([0, 1, 2, 3, 4, 9]).reshape(6, 1, 1)


def test_exclusive_targets_become_class_indices() -> None:
    targets = Targets({"edema": (2,), "core": (1, 3, 4)}, ignore=(9,))
    assert targets.encode(LABEL).ravel().tolist() == [0, 2, 1, 2, 2, IGNORED]
    assert targets.outputs == 3


def test_overlapping_targets_become_planes() -> None:
    targets = Targets({"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}, mode="overlapping", ignore=(9,))
    planes = targets.encode(LABEL)[..., 0, 0]
    assert planes.tolist() == [
        [0, 1, 1, 1, 1, IGNORED],
        [0, 1, 0, 1, 1, IGNORED],
        [0, 0, 0, 0, 1, IGNORED],
    ]
    assert targets.outputs == 3


@pytest.mark.parametrize(
    "targets",
    [
        Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping"),
        Targets({"whole": (1, 2, 3, 4), "core": (1, 3, 4), "enhancing": (4,)}, mode="overlapping"),
        Targets({"anterior": (1,), "posterior": (2,)}),
        Targets({"far": (300,)}),
    ],
)
def test_written_labels_read_back_as_the_same_masks(targets: Targets) -> None:
    label = np.array([0, *sorted(targets.known_values - {0})]).reshape(-1, 1, 1)
    masks = np.stack(list(targets.masks(label).values()))
    again = targets.masks(targets.decode(masks))
    np.testing.assert_array_equal(masks, np.stack(list(again.values())))


def test_an_unknown_value_is_named_with_its_subject() -> None:
    with pytest.raises(BadLabelValue, match=r"'case 7'.*9 \(1 voxels\)"):
        Targets({"a": (1, 2, 3, 4)}).check(LABEL, "case 7")


def test_ambiguous_targets_are_refused() -> None:
    with pytest.raises(RecipeError, match="overlapping"):
        Targets({"liver": (1, 2), "tumour": (2,)})
    with pytest.raises(RecipeError, match="without 0"):
        Targets({"background": (0,)})
    with pytest.raises(RecipeError, match="both segmented and ignored"):
        Targets({"lesion": (1,)}, ignore=(1,))
