"""No module imports, in however many steps, one that imports it: each can be read and tested from below."""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp


def test_there_is_no_cycle_between_modules() -> None:
    """Imports within functions and for type checking count."""
    graph = grimp.build_graph("delineate")
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 100
    order = list(TopologicalSorter(imports).static_order())  # raises CycleError, which names the modules
    assert set(order) == set(imports)
