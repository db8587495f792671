"""Every field of a recipe is bounded on both sides, and YAML is only plain values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from delineate.errors import RecipeError
from delineate.io.settings import parse_yaml
from delineate.recipe import Recipe, apply_changes, load_recipe, packaged_recipes, recipe_from, to_yaml

PLAIN = {"name": "x", "tiles": {"kind": "whole"}, "network": {"kind": "unet", "dimensions": 3}}


def unbounded(schema: Any, where: str) -> Iterator[str]:
    """Where a JSON schema leaves a number, a list or a mapping without a bound."""
    if isinstance(schema, list):
        for i, part in enumerate(schema):
            yield from unbounded(part, f"{where}.{i}")
    if not isinstance(schema, dict):
        return
    if schema.get("type") in ("number", "integer") and not {"const", "enum"} & set(schema):
        if not {"minimum", "exclusiveMinimum"} & set(schema):
            yield f"{where} has no least value"
        if not {"maximum", "exclusiveMaximum"} & set(schema):
            yield f"{where} has no largest value"
    if schema.get("type") == "array" and "maxItems" not in schema:
        yield f"{where} has no greatest length"
    if schema.get("type") == "object" and "properties" not in schema and "maxProperties" not in schema:
        yield f"{where} has no greatest number of entries"
    for key, part in schema.items():
        if key not in ("default", "examples", "required", "const", "enum"):
            yield from unbounded(part, f"{where}.{key}")


def test_every_number_list_and_mapping_of_a_recipe_has_bounds() -> None:
    fields = ("kind", "name")  # of an object without fields of its own, such as the whole volume as a tile
    found = [place for place in unbounded(Recipe.model_json_schema(), "") if not place.endswith(fields)]
    assert found == []


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e999"])
@pytest.mark.parametrize(
    "field",
    ["training.optimiser.learning_rate", "training.minutes", "augmentation.spatial.elastic_mm", "network.dropout"],
)
def test_no_field_takes_what_is_not_finite(field: str, number: str) -> None:
    with pytest.raises(RecipeError, match=field.rpartition(".")[2]):
        recipe_from(apply_changes(PLAIN, [f"{field}={number}"]))


def test_every_packaged_recipe_is_within_the_bounds_and_survives_yaml() -> None:
    for name in packaged_recipes():
        recipe = load_recipe(name)
        assert recipe_from(parse_yaml(to_yaml(recipe.as_dict()), name, RecipeError)) == recipe


@pytest.mark.parametrize(
    "name",
    [
        "a: b", "# no comment", "- x", "two\nlines", "\x1b[2J", "'", '"', "null", "1", "yes", "\u202eright", "{", "=",
        "\ud800", "😀", "",
    ],
)  # fmt: skip
def test_names_survive_yaml_as_keys_and_as_values(name: str) -> None:
    values = {"group": {name: name, "list": [name]}, name: {name: 1}}
    assert yaml.safe_load(to_yaml(values)) == values
    assert all(line.isprintable() for line in to_yaml(values).splitlines())


def test_a_date_is_text() -> None:
    assert recipe_from(apply_changes(PLAIN, ["name=2026-13-45"])).name == "2026-13-45"
    with pytest.raises(RecipeError, match=r"training\.steps"):
        recipe_from(apply_changes(PLAIN, ["training.steps=2026-01-02"]))


@pytest.mark.parametrize(
    "text", ["!!python/name:os.system", "!!set {a}", "!!binary aGk=", "!own x", "{a: 1, a: 2}", "&a [*a]"]
)
def test_yaml_that_is_not_plain_is_refused_by_the_field_s_name(text: str) -> None:
    with pytest.raises(RecipeError, match="name="):
        apply_changes(PLAIN, [f"name={text}"])


@pytest.mark.parametrize(
    "network",
    [
        {"kind": "unet", "dimensions": 3, "widths": [2**14] * 4},
        {"kind": "unet", "dimensions": 3, "widths": [30, 30], "norm": "group"},
        {"kind": "vnet", "first_filters": 2**14},
        {"kind": "dense_unet", "pools": 10, "first_filters": 2**14},
        {"kind": "monai", "dimensions": 3, "name": "UNet", "arguments": {"channels": [1, 2], "strides": "x"}},
    ],
    ids=lambda network: network["kind"],
)
def test_what_cannot_be_built_is_refused_before_anything_is_allocated(network: dict[str, Any]) -> None:
    spec = recipe_from({**PLAIN, "network": network}).network
    with pytest.raises(RecipeError, match=r"network|MONAI"):
        spec.build(1, 2)
