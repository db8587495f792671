"""Cost against size: ``python benchmarks/growth.py OUT [PART …] [--quick]``, then ``--write docs/growth.md``.

=========  ==========================================================================================================
volume     predicting one scan, from 64³ to 512×512×600 voxels
subjects   from a folder of 10 to 10,000 scans to the third training step, the first time and once all are prepared
classes    predicting a scan, and a training step, with 2 to 100 classes
processes  training steps of 1 to 8 processes on one prepared cache
disk       training steps with all subjects prepared, and with room for a part of them and scans read slowly
=========  ==========================================================================================================

Every point is measured in a process of its own, for its peak memory, and written to ``OUT/growth.json`` at once; the
same command again measures what is missing. ``--write`` writes tables into the page and draws ``growth.webp``.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from data_side import write_cohort
from measuring import process_of

from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.limits import usable_cores
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.layouts import open_dataset
from delineate.io.files import writing_beside
from delineate.io.formats import write_volume
from delineate.preprocessing import cache
from delineate.recipe import Recipe, recipe_from, to_yaml
from delineate.sampling import samplers
from delineate.sampling.tiles import TileGeometry
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

Point = dict[str, float]
SHAPES = ((64,) * 3, (128,) * 3, (256, 256, 128), (512, 512, 75), (512, 512, 150), (512, 512, 300), (512, 512, 600))
SUBJECTS = (10, 100, 1000, 10_000)
CLASSES = (2, 5, 10, 20, 50, 100)
PROCESSES = (1, 2, 4, 8)
RATES_MB_A_SECOND = (100, 10, 3)
"""How fast scans are read again, where the disk holds a third of the prepared subjects."""
FED_SIDE, FED_SHAPE = 48, (96, 96, 64)


def recipe_of(side: int, *, classes: int = 2, steps: int = 3, batch: int = 2, width: int = 8) -> Recipe:
    """A 3D U-Net of three stages on cubes."""
    targets = {f"part{i}": i for i in range(1, classes)}
    return recipe_from(
        {
            "name": "growth",
            "data": {"targets": {"values": targets}},
            "preprocessing": [{"kind": "normalise"}],
            "tiles": {"kind": "patches", "shape": [side] * 3},
            "network": {"kind": "unet", "dimensions": 3, "widths": [width, 2 * width, 4 * width]},
            "training": {
                "steps": steps,
                "batch_size": batch,
                "validation": {"subjects": 1, "times": 1, "loss_every": None},
            },
        }
    )


# ---- what is measured, each in a process of its own


def predict(shape: tuple[int, int, int], classes: int, side: int) -> None:
    """Read, predict and write one scan."""
    from delineate.inference.batch import find_subjects, predict_subjects
    from delineate.inference.predictor import Predictor

    recipe = recipe_of(side, classes=classes)
    targets = recipe.data.targets.targets() if recipe.data.targets is not None else Targets({})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        voxels = np.random.default_rng(0).integers(0, 800, (1, *shape), dtype=np.int16)
        write_volume(folder / "scans/one.nii.gz", Volume(voxels, Grid.of_spacing(shape, (1, 1, 1))))
        del voxels
        bundle = Bundle(recipe, recipe.pipeline, targets, ("MR",), TileGeometry((side,) * 3), (1.0, 1.0, 1.0))
        torch.manual_seed(0)
        bundle.save(folder / "bundle", bundle.network().state_dict(), {})
        predictor = Predictor([Bundle.load(folder / "bundle")], plan_compute(device="cpu", compile="off"))
        start = time.perf_counter()
        [outcome] = predict_subjects(predictor, find_subjects([folder / "scans"], ("MR",)), folder / "out")
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "network": outcome.seconds["network"]}))


def start_training(root: str, out: str) -> None:
    """From a folder of scans to the third step."""
    start = time.perf_counter()
    options = RunOptions(fold=None, cache=Path(root, "cache"), device="cpu", compile="off", evaluate=False)
    train(recipe_of(16, steps=3), open_dataset(Path(root, "scans")), Path(out), options, Reporter())
    print(json.dumps({"seconds": time.perf_counter() - start}))


def step(classes: int, side: int, steps: int) -> None:
    """Training steps of a batch of two cubes."""
    from delineate.losses.spec import DICE_AND_CROSS_ENTROPY

    recipe, plan = recipe_of(side, classes=classes), plan_compute(device="cpu", compile="off")
    assert recipe.data.targets is not None
    targets = recipe.data.targets.targets()
    network = plan.place(recipe.network.build(1, targets.outputs), 3)
    loss = DICE_AND_CROSS_ENTROPY.build(targets)
    image = torch.randn(2, 1, *[side] * 3).contiguous(memory_format=plan.memory_format(3))
    target = torch.randint(0, classes, (2, 1, *[side] * 3), dtype=torch.uint8)
    optimiser, taken = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True), []
    for _ in range(steps):
        start = time.perf_counter()
        with plan.autocast():
            value = loss(network(image), target, image)
        value.backward()
        optimiser.step()
        optimiser.zero_grad()
        taken.append(time.perf_counter() - start)
    print(json.dumps({"seconds": statistics.median(taken[1:])}))


class Slow:
    """Reads scans at so many MB/s, all threads together, as from a network folder."""

    def __init__(self, mb_a_second: float) -> None:
        self._rate, self._lock, self._read = 1e6 * mb_a_second, threading.Lock(), cache.load_scan

    def __call__(self, subject: Any, *arguments: Any, **named: Any) -> Volume:
        with self._lock:
            time.sleep(sum(path.stat().st_size for path in subject.scans.values()) / self._rate)
        return self._read(subject, *arguments, **named)


def feed(root: str, gigabytes: float | None, mb_a_second: float, rounds: int, steps: int, side: int) -> None:
    """Steps a second, after the first quarter, with room for so much on the disk and nothing kept in memory."""
    cache.budget_in_memory, samplers.ROUNDS = (lambda: 0), rounds
    ended: list[float] = []

    def progress(stage: str, done: int, total: int) -> None:
        if stage == "training":
            ended.append(time.perf_counter())
        elif stage == "preparing" and done == total and mb_a_second:
            cache.load_scan = Slow(mb_a_second)

    folder = Path(root, "cache") if gigabytes is None else Path(tempfile.mkdtemp(dir=root))
    options = RunOptions(fold=None, cache=folder, cache_gb=gigabytes, device="cpu", compile="off", evaluate=False)
    with tempfile.TemporaryDirectory(dir=root) as out:
        recipe = recipe_of(side, steps=steps, width=16)
        train(recipe, open_dataset(Path(root, "scans")), Path(out), options, Reporter(progress=progress))
    there = sum(file.stat().st_size for file in folder.glob("*/*.npy"))
    timed = ended[len(ended) // 4 :]
    print(json.dumps({"steps a second": (len(timed) - 1) / (timed[-1] - timed[0]), "GB": there / 1e9}))


def train_together(root: str, processes: int, steps: int) -> float:
    """Minutes of so many steps of so many processes, by the command."""
    place = Path(root)
    with tempfile.TemporaryDirectory(dir=root) as out:
        words = ["train", place / "recipe.yaml", "--data", place / "scans", "--fold", "all", "--out", Path(out, "run")]
        words += ["--cache", place / "cache", "--devices", processes, "--steps", steps, "--device", "cpu"]
        command = [sys.executable, "-m", "delineate", *map(str, words), "--compile", "off", "--no-evaluate"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr}")
        lines = Path(out, "run/logs/events.jsonl").read_text(encoding="utf-8").splitlines()
        [trained] = [event for event in map(json.loads, lines) if event["kind"] == "trained"]
        return float(trained["minutes"])


# ---- the points of each part: their names, and how each is measured; the part's known points are given


def apart(work: str) -> Point:
    """What a function of this file prints, in a process of its own, and that process's peak memory."""
    printed, peak_gb = process_of(f"import growth; growth.{work}")
    return {**json.loads(printed.splitlines()[-1]), "peak GB": peak_gb}


def volume_points(quick: bool, _: dict[str, Point]) -> Iterator[tuple[str, Callable[[], Point]]]:
    for shape in SHAPES[:1] if quick else SHAPES:
        work = f"predict({shape}, 2, {16 if quick else 64})"
        yield "×".join(map(str, shape)), lambda work=work, shape=shape: {"voxels": math.prod(shape), **apart(work)}


def subject_points(quick: bool, _: dict[str, Point]) -> Iterator[tuple[str, Callable[[], Point]]]:
    for count in SUBJECTS[:1] if quick else SUBJECTS:
        yield f"{count}", lambda count=count: _started(count)


def _started(count: int) -> Point:
    with tempfile.TemporaryDirectory() as root:
        write_cohort(Path(root, "scans"), count, (32, 32, 24))
        first, again = (apart(f"start_training({root!r}, {str(Path(root, name))!r})") for name in ("one", "two"))
    return {"subjects": count, "seconds": first["seconds"], "again": again["seconds"], "peak GB": first["peak GB"]}


def class_points(quick: bool, _: dict[str, Point]) -> Iterator[tuple[str, Callable[[], Point]]]:
    shape, side, steps = ((32,) * 3, 16, 3) if quick else ((256, 256, 128), 64, 6)
    for classes in CLASSES[:1] if quick else CLASSES:

        def point(classes: int = classes) -> Point:
            predicted, stepped = (
                apart(f"predict({shape}, {classes}, {side})"),
                apart(f"step({classes}, {side}, {steps})"),
            )
            return {
                "classes": classes,
                "predict s": predicted["seconds"],
                "predict GB": predicted["peak GB"],
                "step s": stepped["seconds"],
                "step GB": stepped["peak GB"],
            }

        yield f"{classes}", point


def process_points(quick: bool, _: dict[str, Point]) -> Iterator[tuple[str, Callable[[], Point]]]:
    counts, few, many = ((1,), 2, 4) if quick else (PROCESSES, 5, 25)
    with tempfile.TemporaryDirectory() as root:
        write_cohort(Path(root, "scans"), 16, FED_SHAPE)
        values = recipe_of(FED_SIDE, width=16).as_dict()
        Path(root, "recipe.yaml").write_text(to_yaml(values), encoding="utf-8")
        for count in counts:

            def point(count: int = count) -> Point:
                short, long = (train_together(root, count, steps) for steps in (few, many))
                return {"processes": count, "samples a second": 2 * count * (many - few) / (60 * (long - short))}

            yield f"{count}", point


def disk_points(quick: bool, known: dict[str, Point]) -> Iterator[tuple[str, Callable[[], Point]]]:
    subjects, steps, side = (24, 8, 16) if quick else (48, 240, FED_SIDE)
    with tempfile.TemporaryDirectory() as root:
        write_cohort(Path(root, "scans"), subjects, (32, 32, 32) if quick else FED_SHAPE)
        yield "all prepared", lambda: apart(f"feed({root!r}, None, 0, 8, {steps}, {side})")
        for rate in RATES_MB_A_SECOND[:1] if quick else RATES_MB_A_SECOND:
            for rounds in (8, 1):
                work = f"feed({root!r}, {known['all prepared']['GB'] / 3}, {rate}, {rounds}, {steps}, {side})"
                yield f"a third, {rate} MB/s, {rounds} at a time", lambda work=work: apart(work)


PARTS = {
    "volume": volume_points,
    "subjects": subject_points,
    "classes": class_points,
    "processes": process_points,
    "disk": disk_points,
}


# ---- the page

BEGIN, END = "<!-- measured: written by benchmarks/growth.py -->", "<!-- end of what is measured -->"


SIZES = ("voxels", "subjects", "classes", "processes")


def table(part: str, points: dict[str, Point]) -> str:
    """A part's points, a row each; numbers that are in a row's name are left out."""
    columns = [name for name in next(iter(points.values())) if name not in SIZES]
    rows = [[name, *(f"{point[column]:.3g}" for column in columns)] for name, point in points.items()]
    lines = [[part, *columns], ["---"] * (1 + len(columns)), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def write_page(page: Path, content: dict[str, Any]) -> None:
    """The tables of what is measured, between the page's marks."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    measured = [table(part, content["parts"][part]) for part in PARTS if content["parts"].get(part)]
    text = "\n\n".join([BEGIN, f"Measured on: {content['machine']}.", *measured, END])
    with writing_beside(page) as beside:
        beside.write_text(before + text + after, encoding="utf-8")


def draw(parts: dict[str, dict[str, Point]], path: Path) -> None:
    """Cost against size, both on logarithmic axes, next to what would be in proportion to the size."""
    from matplotlib.figure import Figure

    shown = {
        "volume": ("Predicting a scan", {"seconds": "seconds", "peak GB": "peak memory, GB"}),
        "subjects": ("To the third step", {"seconds": "s, first", "again": "s, prepared", "peak GB": "memory, GB"}),
        "classes": ("Classes", {"predict s": "predicting, s", "step s": "a step, s", "predict GB": "predicting, GB"}),
    }
    panels = {part: panel for part, panel in shown.items() if parts.get(part)}
    if not panels:
        return
    figure = Figure((11, 3.6), layout="constrained")
    panes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (part, (title, lines)) in zip(panes, panels.items(), strict=True):
        points = list(parts[part].values())
        along = next(name for name in SIZES if name in points[0])
        x = np.array([point[along] for point in points])
        for name, label in lines.items():
            axes.loglog(x, [point[name] for point in points], "o-", label=label, markersize=4)
        first = next(iter(lines))
        axes.loglog(x, points[-1][first] * x / x[-1], ":", color="grey", label="in proportion")
        axes.set(title=title, xlabel=along)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="measure here; what is there is kept")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--quick", action="store_true", help="the smallest size of each, only to check that it runs")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="write tables and pictures of what is there")
    options = parser.parse_args()
    if unknown := [name for name in options.parts if name not in PARTS]:
        parser.error(f"'{unknown[0]}' is none of {', '.join(PARTS)}")
    path = options.out / "growth.json"
    machine = f"{usable_cores()} cores, {plan_compute(device='cpu').choices[0].choice}"
    content: dict[str, Any] = {"machine": machine, "parts": {}}
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["machine"] != machine and options.write is None:
            parser.error(f"'{path}' was measured on {content['machine']}; give another folder")
    if options.write is not None:
        write_page(options.write, content)
        draw(content["parts"], options.write.parent / "images/growth.webp")
        return 0
    for part in options.parts or PARTS:
        points = content["parts"].setdefault(part, {})
        for name, measure in PARTS[part](options.quick, points):
            if name in points:
                continue
            points[name] = measure()
            print(
                f"{part}, {name}: " + ", ".join(f"{key} {value:.4g}" for key, value in points[name].items()), flush=True
            )
            path.parent.mkdir(parents=True, exist_ok=True)
            with writing_beside(path) as beside:
                beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
