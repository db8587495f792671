"""What a challenge's set measures, whatever a data set calls its targets."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume
from delineate.errors import RecipeError
from delineate.evaluation.measure import Measuring, measure_prediction
from delineate.metrics.catalogue import SETS, targets_of

# The parts that labels are drawn in, with their names elsewhere; the challenge's regions; its label values.
PARTS = {
    "wmh2017": {"lesion": ("lesion", "WMH"), "other": ("other", "Other pathology")},
    "promise12": {"prostate": ("prostate", "whole-gland")},
    "lits": {"liver": ("liver", "healthy liver"), "tumour": ("tumour", "Tumor", "lesions", "cancer")},
    "brats": {
        "necrosis": ("necrosis", "necrotic_core", "NCR"),
        "non_enhancing": ("non_enhancing", "non-enhancing tumor"),
        "edema": ("edema", "ED", "peritumoral_edema"),
        "enhancing": ("enhancing", "enhancing tumour", "ET"),
    },
}
REGIONS = {
    "wmh2017": {"lesion": ("lesion",)},
    "promise12": {"prostate": ("prostate",)},
    "lits": {"liver": ("liver", "tumour"), "tumour": ("tumour",)},
    "brats": {
        "whole": ("necrosis", "non_enhancing", "edema", "enhancing"),
        "core": ("necrosis", "non_enhancing", "enhancing"),
        "enhancing": ("enhancing",),
    },
}
REGION_NAMES = {"liver": ("liver", "Liver"), "whole": ("whole tumor", "WT"), "core": ("tumor core", "TC")}
VALUES = {
    "wmh2017": {"lesion": 1, "other": 2},
    "promise12": {"prostate": 1},
    "lits": {"liver": 1, "tumour": 2},
    "brats": {"necrosis": 1, "edema": 2, "non_enhancing": 3, "enhancing": 4},
}
STRANGE = ("a", "b", "c", "d", "kidney", "Läsion", "=cmd|x")


@st.composite
def namings(draw: st.DrawFn) -> tuple[str, dict[str, int], Targets]:
    """A challenge, which value each part has in a data set's labels, and the data set's targets."""
    challenge = draw(st.sampled_from(sorted(PARTS)))
    parts = list(PARTS[challenge])
    own = draw(st.booleans())
    numbers = draw(st.permutations([1, 2, 3, 4, 5]))
    values = VALUES[challenge] if own else dict(zip(parts, numbers, strict=False))
    targets: dict[str, tuple[int, ...]] = {}

    def name(of: tuple[str, ...], known: tuple[str, ...]) -> None:
        # Names that nobody knows may stand for what they like where the label values are the challenge's.
        chosen = draw(st.sampled_from(known + STRANGE if own else known))
        targets.setdefault(chosen, tuple(values[part] for part in of))

    kind = draw(st.sampled_from(["parts", "regions", "some parts", "merged", "parts and regions"]))
    if kind in ("parts", "parts and regions"):
        for part in draw(st.permutations(parts)):
            name((part,), PARTS[challenge][part])
    if kind in ("regions", "parts and regions"):
        for region, of in draw(st.permutations(list(REGIONS[challenge].items()))):
            name(of, REGION_NAMES.get(region) or PARTS[challenge][region])
    if kind == "some parts":
        for part in draw(st.permutations(parts))[1:] or parts:
            name((part,), PARTS[challenge][part])
    if kind == "merged":
        merged = tuple(draw(st.permutations(parts))[:2])
        name(merged, ("everything", "mixed"))
        for part in set(parts) - set(merged):
            name((part,), PARTS[challenge][part])
    used = [v for numbers in targets.values() for v in numbers]
    return challenge, values, Targets(targets, "overlapping" if len(set(used)) < len(used) else "exclusive")


@given(namings())
def test_the_challenges_regions_are_measured_or_it_is_refused(case: tuple[str, dict[str, int], Targets]) -> None:
    challenge, values, named = case
    # A value that no target has is refused where a label holds it.
    defined = [{values[part] for part in parts} & named.known_values for parts in REGIONS[challenge].values()]
    try:
        measured = targets_of(challenge, named)
    except RecipeError:
        return
    assert measured is not None
    assert sorted((set(v) for v in measured.values.values()), key=len, reverse=True) == defined
    if challenge == "wmh2017":
        assert measured.ignore == (values["other"],) or values["other"] not in measured.known_values
    assert targets_of(challenge, measured) == measured, "regions are their own"


@pytest.mark.parametrize("challenge", sorted(PARTS))
@pytest.mark.parametrize("shift", [0, 3])
def test_parts_with_known_names_are_never_refused(challenge: str, shift: int) -> None:
    for order in permutations(PARTS[challenge].items()):
        named = Targets({names[-1]: (VALUES[challenge][part] + shift,) for part, names in order})
        measured = targets_of(f"standard,{challenge}", named)
        assert measured is not None
        assert {name: set(v) for name, v in measured.values.items()} == {
            region if len(order) > 1 else order[0][1][-1]: {VALUES[challenge][part] + shift for part in parts}
            for region, parts in REGIONS[challenge].items()
        }


@pytest.mark.parametrize(
    ("challenge", "values"),
    [
        ("lits", {"liver": (1,)}),
        ("lits", {"liver": (1,), "tumour": (2,), "vessel": (3,)}),
        ("lits", {"organ": (1,), "lesion": (2,)}),
        ("lits", {"tumour": (1, 2), "liver": (2,)}),
        ("lits", {"a": (1, 2), "b": (1,)}),
        ("brats", {"edema": (2,), "enhancing": (4,)}),
        ("brats", {"tumour": (1, 2, 3, 4)}),
        ("promise12", {"prostate": (1,), "tumour": (2,)}),
        ("wmh2017", {"lesion": (1, 2)}),
        ("wmh2017", {"other": (1,)}),
    ],
)
def test_what_does_not_tell_the_regions_is_refused(challenge: str, values: dict[str, tuple[int, ...]]) -> None:
    used = [v for numbers in values.values() for v in numbers]
    mode = "overlapping" if len(set(used)) < len(used) else "exclusive"
    with pytest.raises(
        RecipeError, match=f"'{challenge}' measures .* --targets '.*take the metrics without the set: dice"
    ):
        targets_of(challenge, Targets(values, mode))


def test_targets_that_are_the_regions_keep_their_names() -> None:
    named = Targets({"Tumor": (2,), "Leber": (1, 2)}, "overlapping")
    with pytest.raises(RecipeError):
        targets_of("lits", named)
    for values in ({"b": (2,), "a": (1, 2)}, {"liver": (5, 7), "cancer": (7,)}):
        assert targets_of("lits", Targets(values, "overlapping")) == Targets(values, "overlapping")
    assert targets_of("promise12", Targets({"target": (1,)})) == Targets({"target": (1,)})


def test_zones_make_up_the_prostate() -> None:
    assert targets_of("promise12", Targets({"PZ": (1,), "TZ": (2,)})) == Targets({"prostate": (1, 2)})


def test_labels_without_names_hold_the_challenges_own_values() -> None:
    assert targets_of("lits", None) == Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    assert targets_of("wmh2017", None) == Targets({"lesion": (1,)}, ignore=(2,))
    assert targets_of("standard", None) is None
    with pytest.raises(RecipeError, match="no targets are named"):
        targets_of("brats", None)  # 4 or 3 is the enhancing part, by the year


def test_two_challenges_at_once_are_refused() -> None:
    with pytest.raises(RecipeError, match="wmh2017 and lits measure different regions"):
        targets_of("wmh2017,lits", None)


@pytest.mark.parametrize("named", [{"liver": (1,), "tumour": (2,)}, {"cancer": (2,), "liver": (1,)}])
def test_a_liver_is_measured_with_its_tumour(named: dict[str, tuple[int, ...]]) -> None:
    reference = np.zeros((10, 10, 10), np.uint8)
    reference[2:8, 2:8, 2:8] = 1
    reference[4:6, 4:6, 4:6] = 2
    all_liver = np.minimum(reference, 1)
    grid = Grid.of_spacing(reference.shape)
    probabilities = np.stack([reference == value for value in (v for (v,) in named.values())]).astype(np.float32)
    found = measure_prediction(
        LabelVolume(all_liver, grid),
        LabelVolume(reference, grid),
        Targets(named),
        Measuring(f"dice,volume_ml,{','.join(SETS['lits'].metrics)}"),
    )
    assert {row["target"]: row["dice"] for row in found.targets}["liver"] < 1, "without the set, targets are as named"
    rows = measure_prediction(
        LabelVolume(all_liver, grid),
        LabelVolume(reference, grid),
        Targets(named),
        Measuring("lits,volume_ml,probability_mae"),
        probabilities=probabilities,
    ).targets
    liver, tumour = rows
    assert (liver["target"], liver["dice"], liver["volume_ml"]) == ("liver", 1, pytest.approx(0.216))
    assert (tumour["target"], tumour["case"]) == ("tumour", "prediction empty")
    assert liver["probability_mae"] == tumour["probability_mae"] == 0, "of the region, from those of its parts"
