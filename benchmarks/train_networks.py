"""Train every packaged network for a few hundred steps on suitable scans: does it learn, or collapse to background?

    python benchmarks/train_networks.py DATA --out RUNS [--steps 300] [--minutes 3] [--only NAME …]

DATA holds the folders hippocampus, prostate, brats and wmh; livers are simulated. All are trained in the same way
(Dice + cross entropy, AdamW, class-balanced tiles, no published weights), since the question is not which
is best. Finished runs are not repeated; a row is printed for each network.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from delineate.datasets.phantoms.writing import write_phantoms
from delineate.networks.configurations import CONFIGURATIONS

FULL = [None, None]


@dataclass(frozen=True)
class Job:
    """A network on a data set: the recipe to extend, and tiles small enough for two cores."""

    network: dict[str, Any]
    data: str
    recipe: str
    tiles: dict[str, Any]
    batch: int = 2
    options: tuple[str, ...] = ()


def slices(neighbours: int = 0, shape: list[int] | None = None, axis: str = "z") -> dict[str, Any]:
    return {"kind": "slices", "axis": axis, "neighbours": neighbours, "shape": shape or FULL}


def patches(*shape: int) -> dict[str, Any]:
    return {"kind": "patches", "shape": list(shape)}


def jobs() -> dict[str, Job]:
    packaged = {name: c.spec.model_dump(mode="json") for name, c in CONFIGURATIONS.items()}
    whole = ("--targets", "whole=1+2+3+4")
    dense = packaged["wmh-dense"] | {"vgg_input": None}  # sees neighbouring slices here, which are standardised
    found = {
        "prostate-unet-3d": Job(packaged["prostate-unet-3d"], "prostate", "generic_3d", patches(64, 64, 16)),
        "prostate-deeplab": Job(packaged["prostate-deeplab"], "prostate", "generic_3d", slices(6, [64, 64]), batch=6),
        "brain-2d": Job(packaged["brain-2d"], "brats", "brats", slices(0, [160, 192]), batch=4, options=whole),
        "brain-3d": Job(packaged["brain-3d"], "brats", "brats", patches(40, 40, 40), 1, whole),
        "brain-3d-context": Job(packaged["brain-3d-context"], "brats", "brats", patches(40, 40, 40), 1, whole),
        "brain-3d-small": Job(packaged["brain-3d-small"], "brats", "brats", patches(64, 64, 64), 2, whole),
        "brain-3d-padded": Job(packaged["brain-3d-padded"], "brats", "brats", patches(64, 64, 64), 2, whole),
        "wmh-dense": Job(dense, "wmh", "wmh", slices(1, [192, 224]), batch=2),
        "vnet": Job(packaged["vnet"], "hippocampus", "hippocampus", patches(48, 64, 48), batch=1),
        "recurrent-unet": Job(packaged["recurrent-unet"], "hippocampus", "hippocampus", slices(0, [48, 64]), batch=8),
        "unet, deeply supervised": Job(
            {"kind": "unet", "dimensions": 3, "widths": [16, 32, 64, 128], "deep_supervision": 2},
            "hippocampus",
            "hippocampus",
            patches(40, 56, 40),
        ),
        "monai SegResNet": Job(
            {
                "kind": "monai",
                "name": "SegResNet",
                "dimensions": 3,
                "sides_divide_by": [8, 8, 8],
                "arguments": {"init_filters": 8},
            },
            "hippocampus",
            "hippocampus",
            patches(40, 56, 40),
        ),
    }
    for name, network in packaged.items():
        if name.startswith("prostate-tiramisu"):
            found[name] = Job(network, "prostate", "generic_3d", patches(32, 32, 16), batch=1)
        if name.startswith("liver-unet"):
            if network["kind"] == "vgg_unet":
                network = {**network, "weights": "random"}
            neighbours = {"liver-unet-v1": 1, "liver-unet-v4": 4}.get(name, 0)
            found[name] = Job(network, "livers", "demo", slices(neighbours, [112, 96]), batch=4)
        if name.startswith("liver-tumour"):
            options = ("--targets", "liver=1+2") if name.endswith("1") else ()
            found[name] = Job(network, "livers", "demo", slices(0, [112, 96]), 4, options)
    return {name: found[name] for name in (*CONFIGURATIONS, *found)}


def train(name: str, job: Job, folder: Path, data: Path, steps: int, minutes: float) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    recipe = {
        "extends": job.recipe,
        "name": name,
        "tiles": job.tiles,
        "sampler": {"kind": "class_balanced", "foreground_fraction": 0.5},
        "network": job.network,
        "training": {
            "batch_size": job.batch,
            "minutes": None,
            "optimiser": {"kind": "adamw", "learning_rate": 0.001},
            "ema": 0.98,
            "validation": {"subjects": 0},
        },
    }
    (folder / "asked.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = ["train", str(folder / "asked.yaml"), "--data", str(data), "--fold", "0", "--steps", str(steps)]
    command += ["--minutes", str(minutes)]
    command += ["--out", str(folder / "run"), "--cache", str(folder.parent / "cache"), *job.options]
    with (folder / "log.txt").open("w", encoding="utf-8") as log:
        subprocess.run([sys.executable, "-m", "delineate", *command], stdout=log, stderr=log, check=False)


def row(name: str, job: Job, folder: Path) -> list[str]:
    summary = folder / "run" / "evaluation" / "summary.json"
    if not summary.exists():
        return [
            name,
            job.data,
            "failed: " + (folder / "log.txt").read_text(encoding="utf-8").strip().splitlines()[-1][:100],
        ]
    found = json.loads(summary.read_text(encoding="utf-8"))["summary"]
    estimate = found.get("mean of targets", next(iter(found.values())))["dice"]
    each = ", ".join(f"{target} {v['dice']['mean']:.3f}" for target, v in found.items() if target != "mean of targets")
    shape = "×".join("all" if n is None else str(n) for n in job.tiles["shape"])
    with (folder / "run" / "logs" / "training.csv").open(encoding="utf-8") as log:
        steps = int(log.readlines()[-1].split(",")[0]) + 1
    return [name, job.data, f"{job.batch} of {shape}", str(steps), each, f"{estimate['mean']:.3f}", str(estimate["n"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--only", nargs="*", default=[])
    arguments = parser.parse_args()
    livers = arguments.out / "livers"
    if not (livers / "dataset.json").exists():
        write_phantoms(livers, 20)
    chosen = {name: job for name, job in jobs().items() if not arguments.only or name in arguments.only}
    for name, job in chosen.items():
        folder = arguments.out / name.replace(" ", "-").replace(",", "")
        data = livers if job.data == "livers" else arguments.data / job.data
        if not (folder / "run" / "evaluation" / "summary.json").exists():
            train(name, job, folder, data, arguments.steps, arguments.minutes)
        print("| " + " | ".join(row(name, job, folder)) + " |", flush=True)


if __name__ == "__main__":
    main()
