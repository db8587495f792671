"""The client for asyncio says the same as the other; here is what only it promises."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from delineate import errors
from delineate.serving import AsyncClient, Client
from delineate.serving import protocol as p


@pytest.fixture
def scan(tmp_path: Path) -> Path:
    path = tmp_path / "scan.nii.gz"
    path.write_bytes(os.urandom(12 * 2**20 + 12345))
    return path


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_both_clients_offer_the_same() -> None:
    names = {name for name in vars(Client) if not name.startswith("_")}
    assert names == {name for name in vars(AsyncClient) if not name.startswith("_")}
    for name in names:
        assert inspect.signature(getattr(AsyncClient, name)) == inspect.signature(getattr(Client, name))
        assert inspect.iscoroutinefunction(getattr(AsyncClient, name))


def test_a_scan_comes_back(door, working, scan: Path, tmp_path: Path) -> None:
    async def segment() -> list[Path]:
        async with AsyncClient(address=door.address) as client:
            return (await client.segment(scan, tmp_path / "seg.nii.gz")).files

    with working(door, {"label.nii.gz": b"nifti", "label.json": b"{}"}):
        files = asyncio.run(segment())
    assert [file.read_bytes() for file in files] == [b"nifti", b"{}"]


def test_several_scans_go_at_once(door, tmp_path: Path) -> None:
    """Each by a client of its own, or one after the other by the same."""
    scans = [tmp_path / f"{number}.nii.gz" for number in range(6)]
    for scan in scans:
        scan.write_bytes(os.urandom(3 * 2**20))

    async def submit() -> list[str]:
        async with (
            AsyncClient(address=door.address) as first,
            AsyncClient(address=door.address) as second,
            AsyncClient(address=door.address) as third,
        ):
            return await asyncio.gather(
                *(client.submit(scan) for client, scan in zip([first, second, third] * 2, scans, strict=True))
            )

    jobs = asyncio.run(submit())
    assert [digest(door.part(job)) for job in jobs] == [digest(scan) for scan in scans]


class Threads(ThreadPoolExecutor):
    """Counts what it is given to do."""

    given = 0

    def submit(self, *call, **arguments):  # type: ignore[no-untyped-def]
        self.given += 1
        return super().submit(*call, **arguments)


def test_files_are_read_and_hashed_in_threads_a_piece_at_a_time(door, scan: Path) -> None:
    """Of a scan that the server has already, everything is read once more, for its digest."""

    async def submit_twice() -> tuple[int, int]:
        asyncio.get_running_loop().set_default_executor(threads := Threads())
        async with AsyncClient(address=door.address) as client:
            job = await client.submit(scan)
            first = threads.given
            await client.submit(scan, job=job)
        return first, threads.given - first

    scan.write_bytes(bytes(24 * 2**20))
    first, again = asyncio.run(submit_twice())
    assert first >= 24
    assert 3 <= again < first


@pytest.mark.parametrize("own", [True, False])
def test_a_cancelled_task_leaves_the_client_usable(door, scan: Path, tmp_path: Path, own: bool) -> None:
    async def interrupt() -> p.Progress:
        async with AsyncClient(address=door.address) as client:
            job = None if own else "8f14e45f-0000-4000-8000-00000000000a"

            def cancel(progress: p.Progress) -> None:
                if progress.fraction > 0.3:
                    task.cancel()

            task = asyncio.create_task(client.segment(scan, tmp_path / "seg.nii.gz", job=job, on_progress=cancel))
            with pytest.raises(asyncio.CancelledError):
                await task
            [latest] = await client.jobs(1)
            if not own:
                await client.submit(scan, job=latest.job)
            return latest

    latest = asyncio.run(interrupt())
    assert latest.state == ("cancelled" if own else "receiving")
    if not own:
        assert digest(door.part(latest.job)) == digest(scan)
    assert list(tmp_path.iterdir()) == [scan]


def test_waiting_can_be_cancelled_and_ends_at_the_deadline(door, scan: Path) -> None:
    async def wait() -> None:
        async with AsyncClient(address=door.address) as client:
            job = await client.submit(scan)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.fetch(job)
            with pytest.raises(errors.DeadlinePassed):
                await client.fetch(job, timeout_s=0.2)
            assert (await client.cancel(job)).state == "cancelled"
            with pytest.raises(errors.Cancelled):
                await client.fetch(job)

    asyncio.run(wait())


def test_an_upload_resumes_after_the_front_door_was_killed(new_door, scan: Path) -> None:
    door, fractions = new_door(), [0.0]

    def kill_once(progress: p.Progress) -> None:
        if progress.fraction > 0.3 > max(fractions):
            door.kill()
            door.start()
        fractions.append(progress.fraction)

    async def submit() -> str:
        async with AsyncClient(address=door.address) as client:
            return await client.submit(scan, on_progress=kill_once)

    job = asyncio.run(submit())
    assert fractions == sorted(fractions)
    assert digest(door.part(job)) == digest(scan)


def test_one_client_serves_several_loops(door) -> None:
    client = AsyncClient(address=door.address)
    assert asyncio.run(client.ping()) < 5
    assert asyncio.run(client.ping()) < 5
    client.close()


def test_a_client_that_is_never_used_leaves_nothing_open(door) -> None:
    AsyncClient(address=door.address)
    Client(address=door.address)
