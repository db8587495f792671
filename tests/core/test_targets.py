from __future__ import annotations

from collections.abc import Collection
from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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
    encoded = targets.encode(label)
    again = targets.decode(encoded)
    np.testing.assert_array_equal(targets.encode(again), encoded)
    for index, name in enumerate(targets.names):
        mask = targets.masks(label)[name]
        np.testing.assert_array_equal(mask, targets.masks(again)[name])
        np.testing.assert_array_equal(mask, targets.mask(encoded, index))


NESTED = {"body": (1, 2, 3, 4, 5), "left": (1, 2), "right": (3, 4), "cyst": (2,), "bone": (6,)}
AROUND = [("body", "left"), ("body", "right"), ("body", "cyst"), ("left", "cyst")]


def test_targets_within_others_are_written_over_them_however_they_are_listed() -> None:
    label = np.arange(7).reshape(-1, 1, 1)
    for order in permutations(NESTED):
        targets = Targets({name: NESTED[name] for name in order}, "overlapping")
        encoded = targets.encode(label)
        np.testing.assert_array_equal(targets.encode(targets.decode(encoded)), encoded)
        if all(order.index(outer) < order.index(inner) for outer, inner in AROUND):
            assert targets.outer_first == order, "where neither lies within the other, the later one is on top"


EVERY = {frozenset(one) for n in range(1, 5) for one in combinations("abcd", n)}
"""Every way in which four masks may lie in one another."""


def masks_in(kinds: Collection[frozenset[str]]) -> tuple[tuple[int, int, int], list[tuple[str, np.ndarray]]]:
    """A row of voxels: one in no mask, then one for each combination."""
    voxels = [frozenset(), *kinds]
    found = [(name, np.array([name in kind for kind in voxels]).reshape(-1, 1, 1)) for name in "abcd"]
    return (len(voxels), 1, 1), found


@given(st.sets(st.sampled_from(sorted(EVERY, key=sorted)), min_size=1), st.permutations("abcd"))
def test_a_label_made_of_masks_has_those_masks_again(kinds: set[frozenset[str]], order: list[str]) -> None:
    """Whatever the masks' order; and the targets that an error proposes are such that the masks fit."""
    plain = Targets({name: (number,) for number, name in enumerate("abcd", start=1)})
    shape, masks = masks_in(kinds)
    targets = plain.meant(kinds)
    label = targets.label(sorted(masks, key=lambda one: order.index(one[0])), shape, "case 7")
    for name, mask in targets.masks(label).items():
        np.testing.assert_array_equal(mask, dict(masks)[name])
    if any(len(kind) > 1 for kind in kinds):
        with pytest.raises(BadLabelValue, match="'case 7'"):
            plain.label(masks, shape, "case 7")


def test_masks_mean_what_the_targets_say() -> None:
    nested = Targets({"liver": (1, 2), "tumour": (2,)}, mode="overlapping")
    liver, tumour = (np.array(row, bool).reshape(-1, 1, 1) for row in ([0, 1, 1, 1], [0, 0, 1, 1]))
    assert nested.label([("liver", liver), ("tumour", tumour)], liver.shape, "a").ravel().tolist() == [0, 1, 2, 2]
    with pytest.raises(BadLabelValue, match=r"'a'.*tumour alone \(2 voxels\)"):
        nested.label([("liver", liver & ~tumour), ("tumour", tumour)], liver.shape, "a")
    beside = Targets({"liver": (1,), "tumour": (2,)})
    assert beside.label([("tumour", tumour), ("liver", liver & ~tumour)], liver.shape, "a").max() == 2
    with pytest.raises(BadLabelValue, match=r"liver and tumour \(2 voxels\)") as refused:
        beside.label([("liver", liver), ("tumour", tumour)], liver.shape, "a")
    assert "--targets 'liver=1+2,tumour=2'" in refused.value.fix


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
