"""What ``import delineate`` offers, what it costs, and that its documentation is true."""

from __future__ import annotations

import ast
import doctest
import importlib
import json
import pkgutil
import subprocess
import sys
import types
from pathlib import Path

import pytest

import delineate

PROMISED = {
    "open_dataset", "inspect", "read", "write", "train", "auto", "load", "predict", "evaluate", "compare",
    "Subject", "Volume", "LabelVolume", "Grid", "Targets", "Recipe", "Bundle",
}  # fmt: skip


def in_a_new_process(code: str) -> object:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_importing_delineate_imports_nothing_else() -> None:
    code = "import json, sys; old = set(sys.modules); import delineate; print(json.dumps([*set(sys.modules) - old]))"
    loaded = in_a_new_process(code)
    assert isinstance(loaded, list)
    assert {name.split(".")[0] for name in loaded} - sys.stdlib_module_names == {"delineate"}
    assert [name for name in loaded if name.startswith("delineate")] == ["delineate"]


def test_volumes_and_grids_come_without_torch() -> None:
    code = (
        "import json, sys, delineate; delineate.Volume, delineate.Grid, delineate.Targets, delineate.read, "
        "delineate.interop; print(json.dumps([*sys.modules]))"
    )
    loaded = in_a_new_process(code)
    assert isinstance(loaded, list)
    assert not {"torch", "nibabel", "SimpleITK", "pandas", "matplotlib", "lightning"} & set(loaded)


def test_the_names_are_the_public_ones() -> None:
    assert set(delineate.__all__) >= PROMISED
    assert set(delineate.__all__) - PROMISED == {"__version__", "adapt", "errors", "interop", "simulate", "tiles"}
    assert dir(delineate) == sorted(delineate.__all__)
    for name in delineate.__all__:
        assert getattr(delineate, name) is getattr(delineate, name)
    with pytest.raises(AttributeError, match="it offers Bundle, Grid"):
        delineate.nonsense  # type: ignore[attr-defined]  # noqa: B018


def test_a_type_checker_finds_every_name_where_it_is_imported_from() -> None:
    tree = ast.parse(Path(delineate.__file__).read_text(encoding="utf-8"))
    checked = next(node for node in tree.body if isinstance(node, ast.If))
    assert ast.unparse(checked.test) == "TYPE_CHECKING"
    read = {
        alias.name: imported.module
        for imported in checked.body
        if isinstance(imported, ast.ImportFrom)
        for alias in imported.names
    }
    modules = {name for name, home in read.items() if home == "delineate"}
    assert set(read) == set(delineate.__all__) - {"__version__"}
    for name, home in read.items():
        found = importlib.import_module(f"{home}.{name}" if name in modules else str(home))
        assert getattr(delineate, name) is (found if name in modules else getattr(found, name))
    assert (Path(delineate.__file__).parent / "py.typed").exists()


def test_no_module_bears_a_public_name() -> None:
    """Importing a module puts it into its package under its name, over whatever stood there."""
    modules = {module.name for module in pkgutil.iter_modules(delineate.__path__)}
    assert modules & set(delineate.__all__) == {"errors", "interop"}
    for module in modules - {"__main__"}:
        importlib.import_module(f"delineate.{module}")
    public = [getattr(delineate, name) for name in set(delineate.__all__) - {"errors", "interop"}]
    assert not any(isinstance(value, types.ModuleType) for value in public)


@pytest.mark.parametrize("name", sorted(set(delineate.__all__) - {"__version__"}))
def test_every_public_name_has_an_example_that_is_true(name, here) -> None:
    value = getattr(delineate, name)
    home = dict(vars(value)) if isinstance(value, types.ModuleType) else {name: value}
    examples = [test for test in doctest.DocTestFinder().find(value, name, globs=home) if test.examples]
    assert examples, f"{name} has no example"
    said: list[str] = []
    for example in examples:
        doctest.DocTestRunner().run(example, out=said.append)
    assert not said, "".join(said)
