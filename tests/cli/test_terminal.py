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


def test_time_left_is_said_as_it_was_told(monkeypatch, capsys) -> None:
    monkeypatch.setattr(terminal, "SECONDS_BETWEEN_LINES", 0.0)
    with Terminal() as shown:
        shown.progress("scan: segmenting", 40, 100, 75.4)
        shown.progress("scan: number 3 in the queue", 0, 100, 3700.0)
    lines = ["scan: segmenting: 40 %, 0:01:15 left", "scan: number 3 in the queue: 0 %, 1:01:40 left"]
    assert capsys.readouterr().err.splitlines() == lines


def test_a_terminal_shows_the_time_left_as_it_was_told(monkeypatch, capsys) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    with Terminal() as shown:
        assert shown.console.is_terminal
        shown.progress("scan: segmenting", 40, 100, 75.4)
        assert shown._bar is not None
        shown._bar.refresh()
    assert "0:01:15" in capsys.readouterr().err
