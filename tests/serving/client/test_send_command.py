"""``delineate send``, to a front door without workers: what it waits for, and what it says of a missing result."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.serving.client import new_job
from delineate.serving.keys import KeyFile, write_key

STAYS = "its result stays on the server; fetch it: delineate jobs --fetch"


def send(own: KeyFile, address: str, folder: Path, *words: str) -> str:
    """What the command says of a scan whose segmentation it does not get."""
    (folder / "scan.nii.gz").write_bytes(b"a scan")
    write_key(folder / "anna.key", replace(own, address=address))
    typed = ["send", folder / "scan.nii.gz", "-o", folder / "out.nii.gz", "--key", folder / "anna.key", *words]
    done = CliRunner().invoke(app, list(map(str, typed)))
    assert done.exit_code == 1
    return f"{done.stderr}{done.exception}"


@pytest.mark.parametrize("words", [[], ["--model", "liver"]], ids=["the only one", "by name"])
def test_a_server_that_still_reads_its_models_is_waited_for(words: list[str], new_door, keys, tmp_path: Path) -> None:
    known, own = keys
    door = new_door(known)
    door.kill()
    (door.state / "starting").touch()
    door.start()
    assert "scan: E_BUSY: " in send(own, door.address, tmp_path, "--timeout", "1", *words)


def test_a_result_that_is_not_waited_for_any_longer_stays_on_the_server(new_door, keys, tmp_path: Path) -> None:
    known, own = keys
    said = send(own, new_door(known).address, tmp_path, "--timeout", "1")
    assert "scan: E_DEADLINE: " in said
    assert STAYS in said


def test_of_a_job_that_failed_no_result_is_said_to_stay(new_door, keys, tmp_path: Path) -> None:
    """It fails by a code that the command itself has, too."""
    known, own = keys
    said = send(own, new_door(known, keep_s=2).address, tmp_path)
    assert "scan: E_DEADLINE: no worker took the job" in said
    assert STAYS not in said


def test_of_a_scan_that_was_never_sent_no_result_is_said_to_stay(new_door, keys, tmp_path: Path) -> None:
    known, own = keys
    door, job = new_door(known), new_job()
    door.part(job, owner="anna").parent.touch()  # where the server's folder for it should be
    said = send(own, door.address, tmp_path, "--job", job, "--timeout", "1")
    assert "scan: E_OUTPUT: " in said
    assert STAYS not in said
