"""``kill -9`` of a process that serves, at any time: whatever it had promised is there when the next one starts."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import random
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

from delineate.serving.engine import Engine, Limits
from delineate.serving.jobs import Job
from delineate.serving.spool import Spool, job_key
from delineate.serving.store import Store

DOOMED = Path(__file__).with_name("doomed.py")
KILLS = 200 if "DELINEATE_THOROUGH" in os.environ else 5

_spec = importlib.util.spec_from_file_location("doomed", DOOMED)
doomed = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(doomed)


def lived(folder: Path, seed: int, seconds: float) -> list[list[str]]:
    """What a process promised that was killed so long after its first promise."""
    process = subprocess.Popen([sys.executable, str(DOOMED), str(folder), str(seed)], stdout=subprocess.PIPE, text=True)
    timer = threading.Timer(60, process.kill)
    timer.start()
    try:
        lines = [process.stdout.readline()]
        end = time.monotonic() + seconds
        while time.monotonic() < end:  # until the very moment, as fast as it goes
            lines.append(process.stdout.readline())
        process.kill()
        lines += process.stdout.readlines()
    finally:
        timer.cancel()
        process.kill()
        process.stdout.close()
        assert process.wait() == -signal.SIGKILL
    return [line.split() for line in lines if line.endswith("\n")]


def test_nothing_that_was_acknowledged_is_lost_and_no_job_has_two_results(tmp_path) -> None:
    rng = random.Random(7)
    promised: dict[str, list[list[str]]] = {}
    for seed in range(KILLS):
        for what, id, *more in lived(tmp_path, seed, rng.uniform(0, 0.15)):
            promised.setdefault(id, []).append([what, *more])
    assert len(promised) > KILLS
    with closing(Store(tmp_path / "jobs.sqlite")) as store, closing(Spool(tmp_path / "spool")) as spool:
        Engine(store, spool, Limits(), now=time.time())
        for id, told in promised.items():
            job = store.get(job_key("A", id))
            assert job is not None
            leases = {more[0] for what, *more in told if what == "done"}
            assert len(leases) <= 1
            if leases:
                assert (job.state, {job.taken}) == ("done", leases)
            check(spool, job, *(["acknowledged"] in told, ["fetched"] in told))
        folders = {path.name for path in (tmp_path / "spool").iterdir()}
        assert folders <= store.keys()


def check(spool: Spool, job: Job, acknowledged: bool, fetched: bool) -> None:
    """A job's files are those it should have, with the bytes they should have."""
    digest = hashlib.sha256(doomed.scan_of(job.id)).hexdigest()
    assert job.sha256 == (digest,)
    assert job.fetched or not fetched
    if job.state == "done":
        if not acknowledged:
            assert spool.output(job.key, job.taken, "label.json").read_bytes() == digest.encode()
    elif job.state == "failed":  # it was killed together with its worker, twice
        assert (job.losses, job.problem.code) == (2, "E_QUARANTINED")
    else:
        assert job.state in ("queued", "running")
        assert hashlib.sha256(spool.part(job.key, 0).read_bytes()).hexdigest() == digest
