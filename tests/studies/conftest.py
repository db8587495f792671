"""Runs of studies without processes of their own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from io import BytesIO, TextIOWrapper
from pathlib import Path

import pytest

from delineate.cli import main
from delineate.studies import running
from delineate.studies.processes import Ended


class InThisProcess:
    """Runs the command in this process, for one run at a time: a process of its own imports everything again."""

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        printed = TextIOWrapper(BytesIO(), encoding="utf-8")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["delineate", *command])
            patch.setattr(sys, "stdout", printed)
            patch.setattr(sys, "stderr", printed)
            with pytest.raises(SystemExit) as end:
                main()
        printed.flush()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as file:
            file.write(printed.buffer.getvalue())
        return Ended(int(end.value.code or 0))

    def stop(self) -> None:
        raise AssertionError("nobody stops it")


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> InThisProcess:
    """Runs on this machine are run in this process; only for studies of one run at a time."""
    launcher = InThisProcess()
    monkeypatch.setattr(running, "LocalProcesses", lambda: launcher)
    return launcher
