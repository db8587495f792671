"""An error's parts are fields: its code, what is wrong, and what to do."""

from __future__ import annotations

import ast
import inspect
import pickle
from pathlib import Path

import pytest

from delineate import errors
from delineate.errors import BadShape, DelineateError, Truncated

SOURCE = Path(errors.__file__).parent
KINDS = {kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, DelineateError)}


def test_an_error_is_its_code_message_and_fix() -> None:
    error = BadShape("four axes; three are known", fix="export it again; then convert it")
    assert (error.code, error.message, error.fix) == (
        "E_SHAPE", "four axes; three are known", "export it again; then convert it"
    )  # fmt: skip
    assert str(error) == "E_SHAPE: four axes; three are known; export it again; then convert it"


def test_without_a_fix_the_message_says_it_all() -> None:
    assert str(Truncated("cut short")) == "E_TRUNCATED: cut short"


@pytest.mark.parametrize("kind", sorted(KINDS, key=lambda kind: kind.__name__))
def test_an_error_crosses_processes_whole(kind: type[DelineateError]) -> None:
    again = pickle.loads(pickle.dumps(kind("what", fix="do")))
    assert (type(again), again.code, again.message, again.fix) == (kind, kind.code, "what", "do")


def _raised() -> list[tuple[str, ast.Call]]:
    """Each place in the source where one of our errors is made from a literal message."""
    names = {kind.__name__ for kind in KINDS}
    return [
        (f"{file.relative_to(SOURCE)}:{node.lineno}", node)
        for file in sorted(SOURCE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names and node.args
    ]


def test_what_to_do_is_a_field_wherever_an_error_is_raised() -> None:
    """A message that ends in "; do this" would have to be taken apart again where the two are shown apart."""
    raised = _raised()
    assert len(raised) > 200
    hidden = [where for where, call in raised if not call.keywords and "; " in _literal(call.args[0])]
    assert hidden == []


def _literal(node: ast.expr) -> str:
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(part.value for part in parts if isinstance(part, ast.Constant) and isinstance(part.value, str))
