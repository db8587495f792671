"""What a server adds to inference, by stage: ``python benchmarks/serving.py [--quick]``.

A scan of 512×512×100 int16 goes to a server on this machine and comes back segmented, encrypted all the way, in turns
with the same bundle in this process, and with the paper's way: zip the scan, fit it to the network's grid by splines
and back, and write VTK as text.
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import os
import signal
import statistics
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zmq
from run import saved_bundle
from scipy.ndimage import gaussian_filter, zoom

from delineate.bundle import Bundle
from delineate.compute import plan_compute, torch_threads
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.inference.batch import find_subjects, predict_subjects
from delineate.inference.outputs import Outputs
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_label, read_volume, write_volume
from delineate.sampling.tiles import TileGeometry
from delineate.serving.client import Client
from delineate.serving.keys import read_key
from delineate.serving.server import Server
from delineate.serving.settings import Settings, read_address

INFERENCE = ("preprocess", "infer", "undo", "postprocess")


def serve(settings: Settings) -> None:
    """A server in a process of its own."""
    Server(settings).run()


def scan_of(shape: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Volume:
    """Organs of different brightness, and noise: it packs as a CT does."""
    rng = np.random.default_rng(0)
    small = gaussian_filter(rng.standard_normal([max(2, n // 4) for n in shape]).astype(np.float32), 4)
    organs = np.repeat(np.repeat(np.repeat(small, 4, 0), 4, 1), 4, 2)[: shape[0], : shape[1], : shape[2]]
    voxels = 2000 * organs / np.abs(organs).max() + 12 * rng.standard_normal(shape, dtype=np.float32)
    return Volume(np.asfortranarray(voxels.astype(np.int16))[None], Grid.of_spacing(shape, spacing_mm))


def paper_way(scan: Volume, factors: tuple[float, float, float], label: LabelVolume) -> dict[str, float]:
    """Seconds of everything besides the network, as a server of zips, splines and VTK in text would take."""
    seconds: dict[str, float] = {}
    last = time.perf_counter()

    def lap(what: str) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[what] = seconds.get(what, 0.0) + now - last
        last = now

    packed = zipped(scan.voxels.tobytes())
    lap("zip the scan")
    packed = sent(packed)
    lap("send")
    voxels = np.frombuffer(unzipped(packed), np.int16).reshape(scan.voxels.shape[1:])
    lap("unzip")
    small = zoom(voxels.astype(np.float32), factors, order=3)
    lap("splines to the network's grid")
    back = zoom(
        np.zeros(small.shape, np.float32), [n / m for n, m in zip(voxels.shape, small.shape, strict=True)], order=3
    )
    lap("splines back")
    assert back.shape == voxels.shape
    spacing = " ".join(map(str, scan.grid.spacing_mm))
    sides = " ".join(map(str, back.shape))
    header = f"# vtk DataFile Version 3.0\nlabel\nASCII\nDATASET STRUCTURED_POINTS\nDIMENSIONS {sides}\n"
    header += (
        f"SPACING {spacing}\nORIGIN 0 0 0\nPOINT_DATA {back.size}\nSCALARS label unsigned_char\nLOOKUP_TABLE default\n"
    )
    text = io.BytesIO()
    text.write(header.encode())
    np.savetxt(text, label.voxels.ravel(order="F")[None], fmt="%d")
    lap("VTK as text")
    packed = zipped(text.getvalue())
    lap("zip the label")
    unzipped(sent(packed))
    lap("send and unzip the label")
    return seconds


def zipped(content: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
        archive.writestr("scan", content)
    return file.getvalue()


def unzipped(content: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return archive.read("scan")


def sent(content: bytes) -> bytes:
    """Through a socket on this machine, in one message."""
    context = zmq.Context()
    with context.socket(zmq.PAIR) as one, context.socket(zmq.PAIR) as other:
        other.connect(f"tcp://127.0.0.1:{one.bind_to_random_port('tcp://127.0.0.1')}")
        one.send(content)
        received = other.recv()
    context.term()
    return received


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny, to see that it works")
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    shape, spacing = ((64, 64, 24), (0.8, 0.8, 2.5)) if options.quick else ((512, 512, 100), (0.8, 0.8, 2.5))
    side = (32, 32, 16) if options.quick else (128, 128, 64)
    values = {
        "preprocessing": [
            {"kind": "reorient"},
            {"kind": "resample", "spacing_mm": [1.6, 1.6, 2.5]},
            {"kind": "clip_percentiles"},
            {"kind": "normalise"},
        ],
        "tiles": {"kind": "patches", "shape": list(side)},
        "network": {"kind": "unet", "dimensions": 3, "widths": [8, 16, 32]},
        "inference": {"overlap": 0.25},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        bundle = saved_bundle(root / "bundle", values, ("CT",), TileGeometry(side))
        scan = scan_of(shape, spacing)
        for suffix in (".nii", ".nii.gz"):
            write_volume(root / f"scan{suffix}", scan)
        settings = Settings(root / "state", {"ct": root / "bundle"}, bind="tcp://127.0.0.1:*")
        server = multiprocessing.get_context("spawn").Process(target=serve, args=(settings,))
        server.start()
        try:
            rows = measured(root, settings, bundle, scan, options.repetitions)
        finally:
            os.kill(server.pid or 0, signal.SIGTERM)
            server.join(90)
    for name, seconds in rows:
        print(f"{name:60} {seconds:8.2f} s")


def measured(root: Path, settings: Settings, bundle: Bundle, scan: Volume, repetitions: int) -> list[tuple[str, float]]:
    """All figures, the cases in turns."""
    plan = plan_compute(compile="off")
    predictor = Predictor([bundle], plan)
    deadline = time.monotonic() + 60
    while not settings.address.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    own = read_key(settings.state / "me.key")
    stages: dict[str, list[float]] = {}
    totals: dict[str, list[float]] = {}

    def note(case: str, seconds: dict[str, float]) -> None:
        for stage, value in seconds.items():
            stages.setdefault(f"{case}: {stage}", []).append(value)

    outputs = Outputs(root / "offline", bundles=[bundle])  # label and measurements, as the server's and `predict`'s

    def offline(suffix: str) -> None:
        subjects = find_subjects([root / f"scan{suffix}"], ("CT",))
        [outcome] = predict_subjects(predictor, subjects, outputs.folder, outputs=outputs)
        note(f"in process, {suffix}", outcome.seconds)

    with Client(own, read_address(settings.state).zmq) as client, torch_threads(plan.threads):

        def served(suffix: str) -> None:
            result = client.segment(root / f"scan{suffix}", root / "served.nii.gz", overwrite=True)
            note(f"served, {suffix}", result.seconds)

        cases: dict[str, Callable[[], None]] = {}
        for suffix in (".nii.gz", ".nii"):
            cases[f"in process, {suffix}"] = lambda suffix=suffix: offline(suffix)
            cases[f"served, {suffix}"] = lambda suffix=suffix: served(suffix)
        for run in cases.values():
            run()
        stages.clear()
        for _ in range(repetitions):
            for name, run in cases.items():
                start = time.perf_counter()
                run()
                totals.setdefault(name, []).append(time.perf_counter() - start)
    same = np.array_equal(read_label(root / "served.nii.gz").voxels, read_label(root / "offline/scan.nii.gz").voxels)
    assert same, "the server's label is not that of predict"
    label = read_label(root / "served.nii.gz")
    paper = paper_way(read_volume(root / "scan.nii"), (0.5, 0.5, 1.0), label)
    rows = [(name, statistics.median(values)) for name, values in totals.items()]
    for suffix in (".nii.gz", ".nii"):
        there, here = (statistics.median(totals[f"{how}, {suffix}"]) for how in ("served", "in process"))
        network = sum(statistics.median(stages.get(f"served, {suffix}: {stage}", [0.0])) for stage in INFERENCE)
        rows.append((f"served / in process, {suffix} (ratio, not s)", there / here))
        rows.append((f"served, {suffix}, besides inference", there - network))
    rows += [(name, statistics.median(values)) for name, values in stages.items()]
    rows += [(f"the paper's way: {what}", seconds) for what, seconds in paper.items()]
    rows.append(("the paper's way, besides inference", sum(paper.values())))
    return rows


if __name__ == "__main__":
    main()
