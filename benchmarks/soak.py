"""A server under load, and for long: ``python benchmarks/soak.py [--clients 50] [--scans 4] [--jobs 1000]``.

First, all clients at once, each with several scans, while another client sends PINGs. Then, job after job, with the
memory and the open files of every process of the server at a tenth of them and at the end. Every result is compared
with that of ``predict``, byte for byte.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
from measuring import Row
from msgspec.structs import replace
from run import saved_bundle

from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.inference.batch import find_subjects, predict_subjects
from delineate.inference.predictor import Predictor
from delineate.io.formats import write_volume
from delineate.sampling.tiles import TileGeometry
from delineate.serving.client import Client
from delineate.serving.keys import KeyFile, read_key
from delineate.serving.settings import Settings, read_address
from serving import serve

RECIPE = {
    "preprocessing": [{"kind": "reorient"}, {"kind": "normalise"}],
    "tiles": {"kind": "patches", "shape": [32, 32, 16]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
}
SIZES = ((40, 48, 24), (64, 64, 32), (24, 24, 16), (96, 80, 40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=50)
    parser.add_argument("--scans", type=int, default=4, help="of each client")
    parser.add_argument("--jobs", type=int, default=1000, help="in the long run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = saved_bundle(root / "bundle", RECIPE, ("MR",), TileGeometry((32, 32, 16)))
        rng = np.random.default_rng(0)
        for number, shape in enumerate(SIZES):
            voxels = rng.integers(0, 800, (1, *shape), dtype=np.int16)
            write_volume(root / f"scans/s{number}.nii.gz", Volume(voxels, Grid.of_spacing(shape, (1.0, 1.0, 1.5))))
        plan = plan_compute(compile="off")
        subjects = find_subjects([root / "scans"], ("MR",))
        list(predict_subjects(Predictor([bundle], plan), subjects, root / "predicted"))
        settings = Settings(root / "state", {"mr": root / "bundle"}, bind="tcp://127.0.0.1:*")
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(settings,))
        server.start()
        try:
            rows = measured(root, settings, server.pid or 0, options)
        finally:
            os.kill(server.pid or 0, signal.SIGTERM)
            server.join(90)
    for row in rows:
        print("  ".join(f"{name}: {value}" for name, value in row.items()))


def measured(root: Path, settings: Settings, pid: int, options: argparse.Namespace) -> list[Row]:
    """The load, then the long run."""
    deadline = time.monotonic() + 60
    while not settings.address.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    own = replace(read_key(settings.state / "me.key"), address=read_address(settings.state).zmq)
    expected = [(root / f"predicted/s{number}.nii.gz").read_bytes() for number in range(len(SIZES))]
    done = [0, 0]

    def one(client: Client, number: int, out: Path) -> None:
        scan = number % len(SIZES)
        client.segment(root / f"scans/s{scan}.nii.gz", out, overwrite=True)
        done[0] += 1
        done[1] += out.read_bytes() == expected[scan]

    def several(who: int) -> None:
        with Client(own) as client:
            for number in range(options.scans):
                one(client, who + number, root / f"load/{who}.nii.gz")

    rows: list[Row] = []
    pings, door_gb, stop = [], [], threading.Event()
    pinging = threading.Thread(target=ping, args=(own, pid, pings, door_gb, stop))
    pinging.start()
    began = time.perf_counter()
    with ThreadPoolExecutor(options.clients) as pool:
        for result in [pool.submit(several, who) for who in range(options.clients)]:
            result.result()
    seconds = time.perf_counter() - began
    stop.set()
    pinging.join()
    cut = statistics.quantiles(pings, n=20)[-1]
    rows.append(
        {
            "load": f"{options.clients} clients × {options.scans} scans",
            "results": done[0],
            "as predict": done[1],
            "s": round(seconds, 1),
            "PING p95, ms": round(1000 * cut, 1),
            "PING max, ms": round(1000 * max(pings), 1),
            "PINGs": len(pings),
            "front door at its largest, MB": round(1000 * max(door_gb)),
        }
    )
    done[:] = [0, 0]
    before: dict[str, tuple[float, int]] = {}
    began = time.perf_counter()
    with Client(own) as client:
        for number in range(options.jobs):
            one(client, number, root / "soak.nii.gz")
            if number == options.jobs // 10:
                before = held(pid)
    after = held(pid)
    rows.append(
        {
            "soak": f"{options.jobs} jobs",
            "results": done[0],
            "as predict": done[1],
            "s": round(time.perf_counter() - began, 1),
        }
    )
    for name, (gb, files) in after.items():
        was, were = before.get(name, (float("nan"), 0))
        rows.append(
            {
                "process": name,
                "MB at a tenth": round(1000 * was, 1),
                "MB at the end": round(1000 * gb, 1),
                "%": round(100 * (gb / was - 1), 2),
                "open files": f"{were} → {files}",
            }
        )
    return rows


def ping(own: KeyFile, pid: int, pings: list[float], door_gb: list[float], stop: threading.Event) -> None:
    """Measure how long a PING takes, and how large the front door is, until told to stop."""
    with Client(own) as client:
        while not stop.is_set():
            pings.append(client.ping())
            if len(pings) % 50 == 1:
                door_gb.append(held(pid)["front door"][0])
            stop.wait(0.02)


def held(pid: int) -> dict[str, tuple[float, int]]:
    """Memory of its own in GB, and open files, of each process of a server by what it does."""
    found = {}
    for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
        try:
            found[role(process, pid)] = process.memory_full_info().uss / 1e9, process.num_fds()
        except psutil.NoSuchProcess:
            continue
    return found


def role(process: psutil.Process, server: int) -> str:
    """What a process of a server does: multiprocessing names none, so by its parent and its open files."""
    if process.pid == server:
        return "the one that looks after the others"
    if "resource_tracker" in " ".join(process.cmdline()):
        return "resource tracker"
    if process.ppid() != server:
        return f"helper {process.pid}"
    names = {Path(file.path).name for file in process.open_files()}
    return "front door" if "jobs.sqlite" in names else "worker"


if __name__ == "__main__":
    main()
