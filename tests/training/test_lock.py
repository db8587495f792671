"""A run folder holds one training at a time, however the last one ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from delineate.errors import OutputError, RunInUse
from delineate.training.lock import holding, launching, stop_file
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

HOLD = """
import sys
from pathlib import Path
from delineate.training.lock import holding
with holding(Path(sys.argv[1])) as first:
    print(first, flush=True)
    sys.stdin.read()
"""


def start(folder: Path, **environment: str) -> subprocess.Popen[str]:
    """A process that holds ``folder`` until its input ends, once it does."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder],
        env=os.environ | environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.first = process.stdout.readline().strip()
    return process


def in_another_thread(function) -> BaseException | None:
    raised: list[BaseException | None] = [None]

    def call() -> None:
        try:
            function()
        except BaseException as error:
            raised[0] = error

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    return raised[0]


def test_a_second_process_is_told_who_holds_the_folder_and_a_killed_one_holds_it_no_more(tmp_path) -> None:
    folder = tmp_path / "run"
    process = start(folder)
    assert process.first == "True"
    with pytest.raises(RunInUse, match=rf"process {process.pid} on .*, since \d{{4}}-.*another --out"), holding(folder):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert (folder / ".lock").exists()
    with holding(folder) as first:
        assert first
        assert start(folder).communicate()[1].count("E_IN_USE") == 1
    assert not list(folder.iterdir())


def test_a_training_into_a_folder_in_use_touches_nothing(recipe, balls, tmp_path) -> None:
    options = RunOptions(cache=tmp_path / "cache", device="cpu")
    with holding(tmp_path / "run"):
        before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
        error = in_another_thread(lambda: train(recipe, balls, tmp_path / "run", options, Reporter()))
        assert isinstance(error, RunInUse)
        assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_the_same_thread_holds_once_and_others_may_follow(tmp_path) -> None:
    with holding(tmp_path / "run"):
        with holding(tmp_path / "run") as first:
            assert first
        assert (tmp_path / "run/.lock").exists()
    assert in_another_thread(lambda: holding(tmp_path / "run").__enter__()) is None


def test_only_processes_that_the_holder_starts_for_several_devices_are_its_helpers(tmp_path) -> None:
    folder = tmp_path / "run"
    leftovers = {"LOCAL_RANK": "1", "RANK": "1", "DELINEATE_GROUP": "of another run"}
    with holding(folder):
        for devices, environment in [(1, {}), (2, leftovers)]:
            with launching(folder, devices):
                process = start(folder, **environment)
                assert process.first == ""
                assert "E_IN_USE" in process.communicate()[1]
        with launching(folder, 2):
            process = start(folder, LOCAL_RANK="1")
            assert process.first == "False"
            process.communicate()
        assert (folder / ".lock").exists()
    # Without a holder the word means nothing.
    process = start(folder, DELINEATE_GROUP="of another run", LOCAL_RANK="1", SLURM_PROCID="1")
    assert process.first == "True"
    process.communicate()


def test_starting_processes_forgets_other_launchers_and_restores_them(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setenv("MASTER_ADDR", "elsewhere")
    with holding(tmp_path), launching(tmp_path, 2):
        assert not {"LOCAL_RANK", "MASTER_ADDR"} & set(os.environ)
        os.environ["LOCAL_RANK"] = "0"  # as Lightning does
    assert os.environ["LOCAL_RANK"] == "3"
    assert os.environ["MASTER_ADDR"] == "elsewhere"
    assert "DELINEATE_GROUP" not in os.environ


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}', json.dumps(dict.fromkeys(["pid", "host"], "x"))])
def test_what_a_crash_left_in_the_lock_means_nothing(text, tmp_path) -> None:
    (tmp_path / ".lock").write_text(text, encoding="utf-8")
    with holding(tmp_path) as first:
        assert first
        error = in_another_thread(lambda: holding(tmp_path).__enter__())
        assert str(os.getpid()) in str(error)


def test_a_stop_file_of_an_earlier_run_is_forgotten_and_a_later_one_is_kept(tmp_path) -> None:
    stop_file(tmp_path).touch()
    with holding(tmp_path):
        assert not stop_file(tmp_path).exists()
        stop_file(tmp_path).touch()
        with holding(tmp_path):
            assert stop_file(tmp_path).exists()
    assert not stop_file(tmp_path).exists()


def test_a_folder_that_cannot_be_made_is_said(tmp_path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"run folder.*choose another --out"), holding(tmp_path / "file" / "run"):
        pass
