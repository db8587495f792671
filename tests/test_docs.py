"""The documentation keeps its word: links resolve, commands and options exist, every code is explained."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
import typer

from delineate import errors
from delineate.cli.app import app
from delineate.recipe import packaged_recipes

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "benchmarks/README.md"]
COMMANDS = typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page) -> None:
    for line in re.findall(r"^(?:    |`{0,3})?delineate ([^`\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = line.split("  ")[0].split()
        command = COMMANDS
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        of_all = bool(words) and words[0].startswith("-")  # an option of the program itself
        assert of_all or not hasattr(command, "commands"), f"no such command: delineate {line}"
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= known, line
        if command.name == "train":
            assert words[0] in {"auto", "RECIPE", *packaged_recipes()} or words[0].endswith(".yaml"), line


def test_every_code_is_explained() -> None:
    explained = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    leaves = [e for e in vars(errors).values() if isinstance(e, type) and not e.__subclasses__()]
    assert leaves
    assert all(f"`{error.code}`" in explained for error in leaves)
    assert all(f"{error.__name__} " in (errors.__doc__ or "") for error in leaves)


def test_every_packaged_recipe_group_is_explained() -> None:
    from delineate.recipe import Recipe

    explained = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in explained for name in Recipe.model_fields if name not in ("name", "description"))


def test_the_python_page_runs_as_it_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 10
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)


def test_the_extending_page_runs_as_it_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELINEATE_PLUGINS", "")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    session = types.ModuleType("documented_session")
    monkeypatch.setitem(sys.modules, session.__name__, session)
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), session.__dict__)
