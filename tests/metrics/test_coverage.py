"""Every interval holds the truth as often as it says, with several scans of a patient."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from math import sqrt
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "delineate"

_specification = importlib.util.spec_from_file_location("benchmark_coverage", ROOT / "benchmarks" / "coverage.py")
assert _specification is not None
assert _specification.loader is not None
coverage = importlib.util.module_from_spec(_specification)
sys.modules[_specification.name] = coverage  # dataclasses look their module up
_specification.loader.exec_module(coverage)

NOT_MADE = ("cli/", "networks/", "reporting/", "evaluation/card_facts.py")
"""What makes no interval of a measurement: it shows or keeps some, or bounds indices."""


REPETITIONS = {"Difference.ci95": 100, "check_intervals": 100, "Conformal.interval": 2000}
"""Where they take long, or little."""


def made() -> set[str]:
    """Fields and functions of the product that are called intervals, as ``Class.name`` or ``name``."""
    found = set()
    for path in SOURCE.rglob("*.py"):
        if path.relative_to(SOURCE).as_posix().startswith(NOT_MADE):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            inside = node.body if isinstance(node, ast.ClassDef) else [node]
            prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
            for one in inside:
                if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name):
                    name = one.target.id
                elif isinstance(one, ast.FunctionDef):
                    name = one.name
                else:
                    continue
                if re.search(r"ci\d*$|(?<!no_)interval", name):
                    found.add(prefix + name)
    return found


def test_every_interval_of_the_product_is_simulated() -> None:
    assert made() == set(coverage.INTERVALS)


@pytest.mark.parametrize("scans", [(4,), (1, 2, 4, 9)], ids=["4 scans each", "1 to 9 scans, more of the worse"])
@pytest.mark.parametrize("name", coverage.INTERVALS)
def test_an_interval_holds_the_truth_as_often_as_it_says(name: str, scans: tuple[int, ...]) -> None:
    simulate, level = coverage.INTERVALS[name]
    repetitions = REPETITIONS.get(name, 400)
    design = coverage.Design(15 if level == 0.95 else 30, scans, 0.0 if len(scans) == 1 else 0.6)
    share = simulate(np.random.default_rng(3), design, repetitions)
    assert share >= level - 3 * sqrt(level * (1 - level) / repetitions)
    assert share < 0.998, "so wide an interval would say nothing"
