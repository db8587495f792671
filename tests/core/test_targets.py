from __future__ import annotations

import numpy as np
import pytest

from delineate.core.targets import IGNORED, SharedTargets, Targets
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


def test_labels_with_other_values_are_matched_by_their_targets_names() -> None:
    """The shared numbering says of every voxel which shared targets it belongs to, as each side's own values do."""
    sides = (
        Targets({"liver": (1, 2), "tumour": (2,), "spleen": (5,)}, "overlapping"),
        Targets({"tumour": (1,), "liver": (3, 1), "kidney": (4,)}, "overlapping", ignore=(-7,)),
        Targets({"tumour": (3,), "liver": (1,)}, ignore=(300,)),
        Targets({"liver": (4,)}),
    )
    for predictions in sides:
        for references in sides:
            shared = SharedTargets.of(predictions, references)
            assert shared.targets.names == tuple(n for n in references.names if n in predictions.names)
            assert shared.relabels == (predictions != references)
            for own, relabelled in ((predictions, shared.prediction), (references, shared.reference)):
                label = np.array(sorted(own.known_values)).reshape(-1, 1, 1)
                before, now = own.masks(label), shared.targets.masks(relabelled(label, "a"))
                assert all(np.array_equal(now[name], before[name]) for name in shared.targets.names)
                assert np.array_equal(shared.targets.known(relabelled(label, "a")), own.known(label))
                with pytest.raises(BadLabelValue):
                    relabelled(label + 1000, "a")
    chosen = SharedTargets.of(sides[0], sides[0], ["tumour"])
    assert chosen.targets.names == ("tumour",)
    assert chosen.relabels
    with pytest.raises(RecipeError, match="no target in common"):
        SharedTargets.of(sides[3], Targets({"spleen": (4,)}))


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.uint16, np.int64])
@pytest.mark.parametrize("count", [0, 1, 2, 8, 9, 40])
def test_masks_hold_the_voxels_with_a_target_s_values(kind: type, count: int) -> None:
    """However many values there are, also those that the label's type cannot hold."""
    rng = np.random.default_rng(count)
    label = rng.integers(0, 50, (5, 6, 7)).astype(kind)
    values = tuple(int(value) for value in rng.permutation(np.r_[1:60, 300, 65535])[:count])
    ignore = values[: count // 2]
    inside = np.isin(label, values)
    if values:
        targets = Targets({"one": values})
        np.testing.assert_array_equal(targets.masks(label)["one"], inside)
        np.testing.assert_array_equal(targets.foreground(label), inside)
    others = Targets({"other": (70,)}, ignore=ignore)
    np.testing.assert_array_equal(others.known(label), ~np.isin(label, ignore))
