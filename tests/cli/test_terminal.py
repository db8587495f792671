"""What a person sees of a run's progress where there is no terminal to redraw."""

from __future__ import annotations

import pytest

from delineate.cli import terminal
from delineate.cli.terminal import Terminal


def test_what_is_said_of_a_stage_belongs_to_no_other(monkeypatch, capsys) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with Terminal() as shown:
        shown.status("loss 0.5")
        shown.progress("training", 1, 4)
        shown.progress("a scan: of a name with a colon", 1, 2)
    assert capsys.readouterr().err.splitlines() == ["training: loss 0.5: 25 %", "a scan: of a name with a colon: 50 %"]


@pytest.mark.parametrize("text", ["\x1b[2J", "two\nlines"])
def test_what_is_said_steers_no_terminal(text: str, monkeypatch, capsys) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with Terminal() as shown:
        shown.status(text)
        shown.progress("training", 1, 4)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.isprintable()
