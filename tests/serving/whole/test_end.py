"""How servers end, and what happens when there is no room: nothing that was acknowledged is lost."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.errors import Busy, OutputError
from delineate.io.formats import write_volume


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path | None]:
    """A disk of 16 MB; None where nobody may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    try:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], capture_output=True)
        mounted = done.returncode == 0
    except FileNotFoundError:
        mounted = False
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def leave(disk: Path, free: int) -> None:
    """Fill a disk up to some bytes."""
    (disk / "filler").unlink(missing_ok=True)
    (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - free))


def test_a_server_that_is_stopped_or_killed_loses_nothing(drivers, bundles, large, small, tmp_path) -> None:
    running = drivers.serve(bundles.folders)
    second = drivers.serve(bundles.folders, state=running.state)
    assert second.about["code"] == "E_IN_USE"
    with running.client() as client:
        jobs = {client.submit(scan.path, model="one"): scan for scan in (large, large, small[0])}
        server_has = next(iter(jobs))
        running.until(server_has, "infer")
    assert running.end(signal.SIGTERM) == 0
    again = drivers.serve(bundles.folders, state=running.state)
    with again.client() as client:
        states = [client.status(job).state for job in jobs]
        assert states[0] == "done"  # it was running, and there was time
        for job, scan in jobs.items():
            client.fetch(job, tmp_path / f"{job}.nii.gz")
            assert (tmp_path / f"{job}.nii.gz").read_bytes() == scan.label
    children = psutil.Process(again.process.pid).children(recursive=True)
    again.end(signal.SIGKILL)
    assert psutil.wait_procs(children, timeout=20)[1] == []


def test_a_full_disk_is_said_so_and_jobs_go_on_when_there_is_room(drivers, bundles, small, disk, tmp_path) -> None:
    if disk is None:
        pytest.skip("only who may mount a file system can fill one")
    voxels = np.zeros((1, 128, 128, 64), np.int16)
    voxels[0, 40:80, 40:80, 20:40] = 100
    write_volume(tmp_path / "squeezed.nii.gz", Volume(voxels, Grid.of_spacing(voxels.shape[1:], (1, 1, 3))))
    running = drivers.serve(bundles.folders, state=disk / "s")
    with running.client() as client:
        leave(disk, 2**20)  # the scan as it is sent has room, unpacked it has not
        with pytest.raises(OutputError, match="the server's disk"):
            client.segment(tmp_path / "squeezed.nii.gz", model="one")
        leave(disk, 0)
        with pytest.raises(Busy, match="disk"):
            client.submit(small[0].path, model="one", timeout_s=2.0)
        (disk / "filler").unlink()
        client.segment(small[0].path, tmp_path / "out.nii.gz", model="one")
        assert (tmp_path / "out.nii.gz").read_bytes() == small[0].label
    spool = [path for path in (disk / "s/spool").rglob("*") if path.is_file()]
    assert spool == []
