"""Every setting and option that an error or a page names is there: whoever follows the advice gets no second error."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import typer
from pydantic import BaseModel

import delineate
from delineate.cli.app import app
from delineate.derivation import AUTO, AutoSpec
from delineate.errors import RecipeError
from delineate.recipe import Recipe, apply_changes, load_recipe, packaged_recipes, recipe_from
from delineate.specification import Kinds

SOURCE = Path(delineate.__file__).parent
ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

CHANGE = re.compile(r"--set\s+(?:'([^']+)'|\"([^\"]+)\"|([^\s`'\")]+))")
OPTION = re.compile(r"(?<![\w-])--[a-z][a-z0-9-]+")

GAP = "\0"
"""Where a message has something filled in."""

FILES = (".csv", ".json", ".md", ".yaml", ".txt", ".safetensors", ".py", ".npy", ".pkl")
OF_EXAMPLES = {("extending.md", "network.filters")}
"""Fields of parts that a page defines itself."""
OF_OTHERS = {
    "--array", "--ntasks", "--time", "--gres", "--signal", "--logdir", "--c", "--disable", "--verify",
    "--ml", "--roi", "--statistics", "--preview", "--fast",
    "--head", "--address", "--disable-usage-stats", "--generate", "--ray-client-server-port",
    "--rm", "--network", "--user", "--memory", "--build-arg", "--cpuset-cpus", "--cpus", "--gpus",
    "--cap-drop", "--name", "--read-only", "--restart", "--security-opt", "--stop-timeout", "--tmpfs",
    "--home-dir", "--now", "--shell", "--system", "--force-reinstall", "--no-deps", "--config",
}  # fmt: skip
"""Options of SLURM, TensorBoard, nnU-Net, TotalSegmentator, ray, Docker, systemd, useradd, pip and Caddy."""


def literals(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    within = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(p.value) if isinstance(p, ast.Constant) else GAP for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in within:
            yield node.value


@cache
def texts() -> list[tuple[str, str]]:
    """Every string of the package and every page, with where it is."""
    ours = [(str(file.relative_to(SOURCE)), text) for file in sorted(SOURCE.rglob("*.py")) for text in literals(file)]
    return ours + [(page.name, page.read_text(encoding="utf-8")) for page in PAGES]


def models(annotation: Any) -> set[type[BaseModel]]:
    """The specifications that a field may hold, in a list, a mapping or a union."""
    if isinstance(annotation, Kinds):
        return set(annotation.packaged.values())
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {annotation}
    return {model for part in get_args(annotation) for model in models(part)}


def exists(path: str) -> bool:
    """Whether some recipe has a field at ``path``; keys of mappings and numbers of lists are anything."""
    keys = path.split(".")
    if keys[0] == AUTO:
        return ".".join(keys[1:]) in AutoSpec.model_fields
    here: set[type[BaseModel]] = {Recipe}
    for i, key in enumerate(keys):
        if key.isdecimal() and i:
            continue
        fields = [model.model_fields[key] for model in here if key in model.model_fields]
        if not fields:
            return False
        if any("dict" in str(field.annotation) for field in fields):
            return True
        here = {model for field in fields for part in (field.annotation, *field.metadata) for model in models(part)}
    return True


GROUPS = "|".join([AUTO, *(name for name, field in Recipe.model_fields.items() if models(field.annotation))])
SETTING = re.compile(rf"(?<![\w./-])(?:{GROUPS})(?:\.\w+)+")


def test_settings_that_are_named_exist() -> None:
    named = {
        (where, found.group().rstrip("."))
        for where, text in texts()
        for found in SETTING.finditer(text)
        if (where, found.group()) not in OF_EXAMPLES
        and not found.group().endswith(FILES)
        and text[found.end() : found.end() + 1] not in ("(", GAP)
    }
    assert len(named) > 30
    assert sorted((where, path) for where, path in named if not exists(path)) == []


def changes() -> list[str]:
    """What follows ``--set``, wherever nothing is filled in, and as often as it differs."""
    found = (next(filter(None, match.groups())) for _, text in texts() for match in CHANGE.finditer(text))
    return sorted({change for change in found if "=" in change and GAP not in change and "…" not in change})


@pytest.mark.parametrize("change", changes())
def test_some_packaged_recipe_takes_each_change_that_is_named(change: str) -> None:
    refused = None
    for name in packaged_recipes():
        try:
            recipe_from(apply_changes(load_recipe(name).as_dict(), AutoSpec.of_changes([change])[1]))
            return
        except RecipeError as error:
            refused = error
    raise AssertionError(f"no recipe takes {change}: {refused}")


def options(command: Any) -> Iterator[str]:
    """Of a command and, where it is a group, of all below it."""
    for parameter in command.params:
        yield from (*parameter.opts, *parameter.secondary_opts)
    for part in getattr(command, "commands", {}).values():
        yield from options(part)


def test_options_that_are_named_exist() -> None:
    scripts = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "benchmarks").rglob("*.py"))
    ours = re.findall(r"add_argument\(\s*\"(--[a-z-]+)\"", scripts)
    known = {*options(typer.main.get_command(app)), "--help", *ours, *OF_OTHERS}
    named = {(where, found.group()) for where, text in texts() for found in OPTION.finditer(text)}
    assert len({option for _, option in named}) > 20
    assert sorted((where, option) for where, option in named if option not in known) == []
