"""The threat model names a test for each threat, and every test that it names exists."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_test_that_the_page_names_exists() -> None:
    assert len(NAMED) > 30
    assert PAGE.count("::") == len(NAMED)
    for path in {path for path, _ in NAMED}:
        found = {getattr(node, "name", "") for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body}
        assert {name for place, name in NAMED if place == path} <= found, path


def test_every_threat_has_a_defence_and_a_test() -> None:
    threats = PAGE.partition("## Threats")[2].partition("## What is not defended")[0]
    rows = [line.strip("|").split(" | ") for line in threats.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0].strip() != "threat"]
    assert len(rows) > 20
    assert all(len(row) == 3 and "::" in row[2] for row in rows)


def test_every_test_of_the_front_door_is_named() -> None:
    """A test that holds no threat of the page is one that the page has forgotten, or one of what cannot be attacked."""
    here = {
        (f"tests/serving/door/{path.name}", node.name)
        for path in Path(__file__).parent.glob("test_*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    elsewhere = {
        "test_ipv6_works",
        "test_keys_added_while_the_server_runs_work_at_once",
        "test_names_of_keys",
        "test_a_token_belongs_to_one_key",
        "test_what_is_valid_is_decoded_as_it_was",
        "test_a_spool_that_is_gone_is_told",
    }
    unnamed = {name for path, name in here - set(NAMED) if path != f"tests/serving/door/{Path(__file__).name}"}
    assert unnamed == elsewhere
