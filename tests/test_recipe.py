from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from functools import partial

import pytest
import yaml
from pydicom.sr._concepts_dict import concepts
from pydicom.sr.codedict import codes

from delineate.cli.parsing import data_changes
from delineate.core.legend import Code, Coding
from delineate.errors import RecipeError
from delineate.recipe import (
    DataSpec,
    ScheduleSpec,
    apply_changes,
    change_of,
    load_recipe,
    packaged_recipes,
    recipe_from,
    to_yaml,
)


def test_the_packaged_recipes_are_all_found() -> None:
    assert set(packaged_recipes()) == {
        "brats", "demo", "generic_2.5d", "generic_2d", "generic_3d", "hippocampus", "sarcoma", "wmh",
        "liver_tumour_a", "liver_tumour_b", "liver_tumour_c", "liver_tumour_lits", "liver_volume",
        "liver_fat_fraction", "prostate_deeplab",
        "prostate_tiramisu", "prostate_tiramisu_p3b", "prostate_tiramisu_p4a", "prostate_unet", "wmh_dice",
        "wmh_gdl", "wmh_siamese", "wmh_siamese_trained", "wmh_tversky",
        *(
            f"brain_{network}{loss}"
            for network in ("2d", "3d", "3d_context", "3d_small")
            for loss in ("", "_cross_entropy", "_focal_tversky")
        ),
    }  # fmt: skip


def test_every_recipe_carries_its_own_name() -> None:
    assert all(load_recipe(name).name == name for name in packaged_recipes())


def test_a_recipe_extends_another_field_by_field() -> None:
    """The three arms of the transfer study differ in what they say, and in nothing else."""
    a, b, c = (load_recipe(f"liver_tumour_{arm}").as_dict() for arm in "abc")
    assert b["start"]["weights"] == "runs/liver_tumour_lits"
    assert c["training"]["frozen"] == ["encoder.0.*"]
    for values in (a, b, c):
        for key in ("name", "description", "deviates", "start"):
            del values[key]
        values["training"]["frozen"] = []
    assert a == b == c
    assert a["training"]["batch_size"] == 18
    assert a["training"]["optimiser"]["kind"] == "adam"  # from the recipe below


def test_every_recipe_of_a_report_says_what_it_does_not_do_as_the_report_did(tmp_path) -> None:
    """Even where that is nothing; a recipe that extends another takes the sentences over, or gives its own."""
    reports = [path for path in packaged_recipes().values() if path.parent.name == "reports"]
    assert len(reports) >= 13
    for path in reports:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
        while "deviates" not in said:
            said = yaml.safe_load(packaged_recipes()[said["extends"]].read_text(encoding="utf-8"))
        assert isinstance(said["deviates"], list), path.name
        assert all(text.endswith(".") for text in load_recipe(path.stem).deviates), path.name
        assert any("16 bits" in text for text in load_recipe(path.stem).deviates), "which the machine decides"
    assert not any(load_recipe(name).deviates for name, path in packaged_recipes().items() if path not in reports)
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: liver_tumour_a\n", encoding="utf-8")
    assert load_recipe(mine).deviates == load_recipe("liver_tumour_a").deviates
    mine.write_text("extends: liver_tumour_a\ndeviates: [Another field.]\n", encoding="utf-8")
    assert load_recipe(mine).deviates == ("Another field.",)


def test_sentences_stand_on_lines_of_their_own() -> None:
    values = {"deviates": ["Long enough that a line for each is read more easily: yes.", "- 'Quoted' # not a comment."]}
    text = to_yaml(values)
    assert text.count("\n") == 3
    assert yaml.safe_load(text) == values


def test_a_group_of_another_kind_takes_nothing_over(tmp_path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("extends: hippocampus\nnetwork: {kind: vnet}\n", encoding="utf-8")
    assert load_recipe(path).network.kind == "vnet"


def test_recipes_beside_each_other_extend_each_other_but_not_in_circles(tmp_path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\ntraining: {seed: 3}\n", encoding="utf-8")
    (tmp_path / "b.yaml").write_text("extends: demo\n", encoding="utf-8")
    assert load_recipe(tmp_path / "a.yaml").training.seed == 3
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="extends itself"):
        load_recipe(tmp_path / "a.yaml")


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


def test_the_item_one_beyond_a_list_s_end_is_added() -> None:
    step = {"kind": "denoise", "width": 3}
    assert apply_changes({"steps": [{"kind": "reorient"}]}, ["steps.1={kind: denoise, width: 3}"])["steps"][1] == step
    with pytest.raises(RecipeError, match="list of 1"):
        apply_changes({"steps": [{"kind": "reorient"}]}, ["steps.2={kind: denoise}"])


@pytest.mark.parametrize(
    "value",
    [
        "\U0001f9e0 liver", "\U0001f468\u200d\U0001f469", "\u3000a\xa0", "\x7f\x85\u2028", "a: b, [c] # d\n", "wait...",
        "", "null", "1e3", "2026-01-01", None, True, 3, 1e-5, [1, "\x1b"], {"T1": "*t1*", "FLAIR": "*\U0001f9e0*"},
    ],
    ids=ascii,
)  # fmt: skip
def test_a_change_gives_just_the_value_that_it_was_written_for(value) -> None:
    """In any script, in the same order, and of the same type."""
    found = apply_changes({}, [change_of("some.field", value)])
    assert json.dumps(found) == json.dumps({"some": {"field": value}})


def test_patterns_and_targets_of_the_command_line_may_have_any_script() -> None:
    spec = DataSpec.of_changes(data_changes("auto", "*\U0001f9e0*.nii", "\U0001f9e0.nii", "\U0001f9e0=1"))
    assert spec.targets is not None
    assert (spec.images, spec.labels, [*spec.targets.values]) == ("*\U0001f9e0*.nii", "\U0001f9e0.nii", ["\U0001f9e0"])


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
    factors = [schedule.multiple(p / 100) for p in range(101)]
    assert factors[:11] == sorted(factors[:11])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert max(factors) == factors[10] == 1
    assert factors[0] > 0
    assert factors[-1] == (1 if kind == "constant" else pytest.approx(0, abs=1e-9))


def test_a_rate_changes_by_steps_or_by_epochs_not_by_both() -> None:
    with pytest.raises(RecipeError, match="every_steps or every_epochs; got both"):
        load_recipe("demo", ["training.schedule={kind: step, every_steps: 9, every_epochs: 1}"])


@pytest.mark.parametrize("change", ["training.keep=best", "training.validation.patience=3"])
def test_held_out_subjects_choose_nothing(change) -> None:
    assert load_recipe("demo", ["training.keep=last", "training.validation.held_out=true"]).training.validation.held_out
    with pytest.raises(RecipeError, match="on the held-out subjects"):
        load_recipe("demo", ["training.keep=last", "training.validation.held_out=true", change])


def test_a_network_says_how_many_tiles_a_step_takes_at_least() -> None:
    with pytest.raises(RecipeError, match="'deeplab' trains on batches of 2 or more"):
        load_recipe("prostate_deeplab", ["training.batch_size=1"])


def test_an_unknown_metric_is_refused_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match=r"no metric 'dicee'; did you mean 'dice'\?; sets are standard"):
        load_recipe("demo", ["metrics=[dicee]"])


def codings() -> Iterator[tuple[str, Coding]]:
    for name in packaged_recipes():
        for target, coding in load_recipe(name).data.legend.codes.items():
            yield f"{name}: {target}", coding


def test_packaged_recipes_codes_are_the_dictionarys() -> None:
    """Value and meaning by pydicom's copy of the standard, and categories from its list of categories."""
    known: dict[tuple[str, str], set[str]] = defaultdict(set)
    for scheme, keywords in concepts.items():
        for entry in keywords.values():
            for value, (meaning, _) in entry.items():
                known[scheme, value].add(meaning)
    found = dict(codings())
    assert len(found) >= 10
    categories = {code.value for code in map(partial(getattr, codes.cid7150), codes.cid7150.dir())}
    for where, coding in found.items():
        assert coding.category.value in categories, where
        for code in (coding.category, coding.type):
            assert code.meaning in known[code.scheme, code.value], where


def test_codes_travel_in_the_recipe() -> None:
    recipe = load_recipe("prostate_unet")
    assert recipe_from(yaml.safe_load(to_yaml(recipe.as_dict()))).data.legend.codes == recipe.data.legend.codes
    assert recipe.data.legend.codes["prostate"].type == Code("41216001", "SCT", "Prostate")
    with pytest.raises(RecipeError, match="codes"):
        load_recipe("prostate_unet", ["data.codes={prostate: {category: {value: 1}, type: {meaning: x}}}"])
