"""What ranks predictions that have no reference: expected Dice, or agreement with predictions of perturbed scans?

``python benchmarks/review_order.py DATA RUN [RUN …]`` predicts each run's held-out subjects as they are and
perturbed, and prints the rank correlation of each signal with the Dice that was measured, all runs together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from delineate.bundle import Bundle
from delineate.calibration import mutual_dice, rank_correlation
from delineate.compute import plan_compute
from delineate.core.volume import Volume
from delineate.datasets.dataset import load_scan
from delineate.datasets.layouts import open_dataset
from delineate.evaluation.table import Evaluation
from delineate.inference.batch import with_channels
from delineate.inference.predictor import Predictor
from delineate.training.subjects import RunSubjects

Change = Callable[[NDArray], NDArray]


def noisy(voxels: NDArray) -> NDArray:
    """Noise of a tenth of each channel's deviation."""
    sd = 0.1 * voxels.std(axis=(1, 2, 3), keepdims=True)
    return voxels + sd * np.random.default_rng(0).standard_normal(voxels.shape)


def bent(gamma: float) -> Change:
    """Each channel's range bent by an exponent."""

    def change(voxels: NDArray) -> NDArray:
        low, high = (f(voxels, axis=(1, 2, 3), keepdims=True) for f in (np.min, np.max))
        return low + (high - low) * ((voxels - low) / np.maximum(high - low, 1e-6)) ** gamma

    return change


def moved(by: tuple[int, int, int]) -> Change:
    """Shifted by voxels along the last three axes."""
    return lambda voxels: np.roll(voxels, by, axis=(-3, -2, -1))


def mirrored(axis: int) -> Change:
    """One of the last three axes turned round."""
    return lambda voxels: np.flip(voxels, axis - 3)


def same(voxels: NDArray) -> NDArray:
    """Nothing to undo."""
    return voxels


PERTURBED: dict[str, tuple[Change, Change]] = {
    "noise": (noisy, same),
    "gamma 0.7": (bent(0.7), same),
    "gamma 1.4": (bent(1.4), same),
    "shift": (moved((2, 2, 1)), moved((-2, -2, -1))),
    "other shift": (moved((-3, 2, 0)), moved((3, -2, 0))),
    "mirror x": (mirrored(0), mirrored(0)),
    "mirror y": (mirrored(1), mirrored(1)),
}
"""What is done to the scan, and what undoes it in the label."""


def signals(run: Path, data: Path) -> pd.DataFrame:
    """A row for each held-out subject and target: the Dice that was measured, and what might have told it."""
    bundle = Bundle.load(run / "bundle")
    predictor = Predictor([bundle], plan_compute(compile="off"))
    measured = Evaluation.read(run / "evaluation").table.set_index(["subject", "target"])["dice"]
    subjects = {subject.id: subject for subject in open_dataset(data).subjects}
    rows = []
    known = RunSubjects.load(run)
    assert known is not None
    for name in known.held_out:
        scan = load_scan(with_channels(subjects[name], bundle.channels))
        plain = predictor.predict(scan)
        masks = bundle.targets.masks(plain.label.voxels)
        found = {target: {"expected Dice": c.expected_dice} for target, c in plain.confidence.items()}
        for what, (change, undo) in PERTURBED.items():
            voxels = np.ascontiguousarray(change(scan.voxels.astype(np.float32)), dtype=np.float32)
            label = undo(predictor.predict(Volume(voxels, scan.grid)).label.voxels)
            for target, mask in bundle.targets.masks(label).items():
                found[target][f"agreement with {what}"] = mutual_dice([masks[target], mask])
        rows += [
            {"run": run.name, "subject": name, "target": target, "dice": measured[name, target], **values}
            for target, values in found.items()
        ]
    return pd.DataFrame(rows)


def main(data: Path, runs: list[Path]) -> None:
    """Print the table."""
    table = pd.concat([signals(run, data) for run in runs], ignore_index=True)
    told = [c for c in table if c == "expected Dice" or c.startswith("agreement")]
    table["agreement with all, mean"] = table[told[1:]].mean(axis=1)
    print(f"{table['subject'].nunique()} subjects of {len(runs)} runs; rank correlation with Dice")
    for signal in [*told, "agreement with all, mean"]:
        by_target = {t: rank_correlation(rows[signal], rows["dice"]) for t, rows in table.groupby("target")}
        print(f"{signal:28}", ", ".join(f"{target} {value:+.2f}" for target, value in by_target.items()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), [Path(run) for run in sys.argv[2:]])
