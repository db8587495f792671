"""``delineate send``, to a front door without workers: what it waits for, and what it says of a missing result."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace
from typer.testing import CliRunner

from delineate.cli.app import app
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
