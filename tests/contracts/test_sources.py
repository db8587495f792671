"""What holds of every source file, and no linter says."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

ROOT = Path(__file__).parents[2]


def test_there_is_no_cycle_between_modules() -> None:
    """Each module can be read and tested from below. Imports within functions and for type checking count."""
    graph = grimp.build_graph("delineate")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the modules
    assert set(order) == set(imports)


def test_text_is_utf8_whatever_the_locale() -> None:
    """The linter says it of `open`; a path's own methods it cannot tell."""
    sources = [path for folder in ("src", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    assert len(sources) > 200
    bare = [
        f"{path.relative_to(ROOT)}:{call.lineno}"
        for path in sources
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and call.func.attr in ("read_text", "write_text")
        and "encoding" not in {keyword.arg for keyword in call.keywords}
    ]
    assert bare == []
