from __future__ import annotations

import pytest
import yaml

from delineate.errors import RecipeError
from delineate.recipe import ScheduleSpec, apply_changes, load_recipe, packaged_recipes, recipe_from, to_yaml


def test_the_packaged_recipes_are_all_found() -> None:
    assert set(packaged_recipes()) == {
        "brats", "demo", "generic_2.5d", "generic_2d", "generic_3d", "hippocampus", "prostate", "sarcoma", "wmh"
    }  # fmt: skip


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_recipe_written_out_reads_back_as_itself(name) -> None:
    recipe = load_recipe(name)
    assert recipe_from(yaml.safe_load(to_yaml(recipe.as_dict()))) == recipe


def test_reasons_stand_beside_their_fields() -> None:
    text = to_yaml({"a": {"b": [1, 2]}, "c": [{"kind": "x", "n": None}]}, {"a.b": "because", "c.0.kind": "why not"})
    assert text == "a:\n  b: [1, 2]  # because\nc:\n  - kind: x  # why not\n    n: null\n"
    assert yaml.safe_load(text) == {"a": {"b": [1, 2]}, "c": [{"kind": "x", "n": None}]}


def test_changes_reach_fields_groups_and_list_items() -> None:
    recipe = load_recipe("hippocampus", ["training.batch_size=4", "tiles.shape.0=48", "loss={kind: dice, smooth: 0.1}"])
    assert recipe.training.batch_size == 4
    assert recipe.tiles.shape == (48, 56, 40)
    assert recipe.loss.smooth == 0.1


def test_a_change_leaves_the_values_it_was_given() -> None:
    values = {"training": {"batch_size": 2}}
    apply_changes(values, ["training.batch_size=9"])
    assert values == {"training": {"batch_size": 2}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.batchsize=4", r"training\.batchsize: no such field; did you mean 'batch_size'"),
        ("network.kind=unett", r"unett"),
        ("loss.kind=dise", r"'dise' is not one of .*did you mean 'dice'"),
        ("training.batch_size=many", r"training\.batch_size: .*got 'many'"),
        ("training", "path.to.field=value"),
        ("tiles.shape.7=3", "list of 3"),
        ("name.first=x", "single value"),
    ],
)
def test_what_is_misspelt_is_named_with_the_nearest(change, message) -> None:
    with pytest.raises(RecipeError, match=message):
        load_recipe("hippocampus", [change])


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'hippocampus'"):
        load_recipe("hipocampus")


@pytest.mark.parametrize("kind", ["polynomial", "cosine", "constant"])
def test_schedules_warm_up_then_fall(kind) -> None:
    schedule = ScheduleSpec(kind=kind, warmup=0.1)
    factors = [schedule.factor(p / 100) for p in range(101)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == factors[10] == 1
    assert factors[0] > 0
    assert factors[-1] == (1 if kind == "constant" else pytest.approx(0, abs=1e-9))
