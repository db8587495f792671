"""What the label values of another data set stand for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from delineate.bundle import Bundle, Provenance, hidden
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.datasets.dataset import Dataset
from delineate.evaluation.held_out import targets_of_labels
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

LITS = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
PARTS = Targets({"liver": (1,), "tumour": (2,)})
WMH = Targets({"lesion": (1,)}, "overlapping", (2,))
SUBJECTS = [Subject("a", {"CT": Path("a.nii.gz")}, Path("label.nii.gz"))]


def read(own: Targets, named: Targets | None, held_out: tuple[str, ...] = ()) -> Targets:
    recipe = recipe_from(
        {
            "name": "small",
            "tiles": {"kind": "patches", "shape": [8, 8, 8]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
        }
    )
    bundle = Bundle(recipe, recipe.pipeline, own, ("CT",), TileGeometry((8, 8, 8)), (1.0, 1.0, 1.0))
    bundle = replace(bundle, provenance=Provenance(held_out=hidden(held_out)))
    return targets_of_labels(bundle, Dataset("d", Path("d"), "msd", tuple(SUBJECTS), named), SUBJECTS)


@pytest.mark.parametrize(
    ("own", "named", "expected"),
    [
        pytest.param(LITS, None, LITS, id="nothing is named"),
        pytest.param(LITS, LITS, LITS, id="the same"),
        pytest.param(LITS, PARTS, LITS, id="tumour is part of the liver, whatever the data set calls it"),
        pytest.param(PARTS, Targets({"tumour": (1,), "liver": (2,)}), None, id="values are exchanged"),
        pytest.param(PARTS, Targets({"liver": (1,), "spleen": (2,)}), None, id="a value is another organ's"),
        pytest.param(Targets({"liver": (1, 2)}), PARTS, None, id="the tumour may or may not count as liver"),
        pytest.param(PARTS, LITS, PARTS, id="and so it is if the data set says it"),
        pytest.param(
            Targets({"enhancing": (4,), "edema": (2,)}),
            Targets({"enhancing": (3,), "edema": (2,)}),
            None,
            id="another year's values",
        ),
        pytest.param(Targets({"liver": (1, 2)}), Targets({"liver": (1,)}, ignore=(2,)), None, id="a value is ignored"),
        pytest.param(WMH, Targets({"lesion": (1,)}, ignore=(2,)), WMH, id="one sigmoid"),
        pytest.param(WMH, Targets({"lesion": (1,), "other": (2,)}), WMH, id="other pathology is ignored"),
        pytest.param(
            PARTS,
            Targets({"liver": (1,), "tumour": (2,), "spleen": (9,)}),
            Targets({"liver": (1,), "tumour": (2,), "spleen": (9,)}),
            id="other organs are background",
        ),
        pytest.param(PARTS, Targets({"liver": (1,)}, ignore=(7,)), Targets({"liver": (1,)}, ignore=(7,)), id="fewer"),
        pytest.param(PARTS, Targets({"liver": (1,)}, ignore=(2,)), None, id="another value is ignored"),
    ],
)
def test_the_data_sets_names_decide_unless_they_agree(
    own: Targets, named: Targets | None, expected: Targets | None
) -> None:
    assert read(own, named) == (expected or named)


def test_labels_of_subjects_held_out_in_training_are_read_as_in_training() -> None:
    whole = Targets({"hippocampus": (1, 2)})
    halves = Targets({"anterior": (1,), "posterior": (2,)})
    assert read(whole, halves, ("a", "b")) == whole
    assert read(whole, halves, ("b",)) == halves
