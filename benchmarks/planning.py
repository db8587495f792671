"""How far ``delineate plan`` is off: memory and time that it predicts, against short trainings, as a table.

``python benchmarks/planning.py DATA -o table.md`` takes ten recipes on the data sets in DATA (hippocampus, prostate,
wmh, sarcoma); ``--quick`` a tiny one on simulated scans, only to check that it runs. Plans and trainings take
turns, so that other load meets both alike; medians over ``--repetitions``. Each training has folders of its own.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from measuring import process_of

from delineate.datasets.phantoms.writing import write_phantoms
from delineate.datasets.splits import Split, save_split
from delineate.io.files import writing_beside
from delineate.recipe import load_recipe
from delineate.studies.trials import Trial, try_recipe
from delineate.training.preparation import budget_changes, new_split

MEMORY_LIMIT, TIME_LIMIT = 0.15, 0.25
"""How far a prediction may be off, as a share of what was measured."""


@dataclass(frozen=True)
class Case:
    """A recipe with changes, on a data set's folder, for so many steps."""

    recipe: str
    data: str
    steps: int
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.recipe, f"({self.data})", *self.changes])


CASES = (
    Case("hippocampus", "hippocampus", 60),
    Case("hippocampus", "hippocampus", 60, ("training.batch_size=8", "training.accumulate=4")),
    Case("generic_3d", "hippocampus", 40, ("training.checkpoint_activations=true",)),
    Case("generic_2d", "hippocampus", 60),
    Case("prostate_unet", "prostate", 40, ("tiles.shape=[64, 64, 16]", "training.batch_size=2")),
    Case("generic_3d", "prostate", 40),
    Case("generic_2.5d", "prostate", 60),
    Case("wmh", "wmh/Tabriz", 60),
    Case("sarcoma", "sarcoma", 40),
    Case("sarcoma", "sarcoma", 40, ("training.batch_size=1",)),
)
QUICK = (Case("demo", "scans", 6, ("network.widths=[4, 8]", "tiles.shape=[32, 32]", "training.accumulate=2")),)


def predicted(case: Case, root: Path, split: Split, threads: int) -> Trial:
    recipe = load_recipe(case.recipe, [*budget_changes(None, case.steps), *case.changes])
    return try_recipe(recipe, root / case.data, split, 0, device="cpu", threads=threads)


def trained(case: Case, root: Path, split: Path, threads: int) -> tuple[float, float]:
    """Minutes from the start of a training's process to its report, and its peak memory in GB."""
    with tempfile.TemporaryDirectory() as name:
        arguments = ["train", case.recipe, "--data", root / case.data, "--out", Path(name) / "run"]
        arguments += ["--cache", Path(name) / "cache", "--split", split, "--steps", case.steps]
        arguments += ["--device", "cpu", "--threads", threads, "--json"]
        arguments += [word for change in case.changes for word in ("--set", change)]
        words = [str(word) for word in arguments]
        began = time.perf_counter()
        _, peak_gb = process_of(f"from delineate.cli.app import app; app({words!r}, standalone_mode=False)")
        return (time.perf_counter() - began) / 60, peak_gb


def row(case: Case, root: Path, threads: int, repetitions: int) -> str:
    """A line of the table: what was predicted and measured of a case, and how far the one is off."""
    recipe = load_recipe(case.recipe, case.changes)
    dataset = recipe.data.open(root / case.data)
    split, minutes, gigabytes = new_split(recipe.training, dataset, dataset), list[list[float]](), list[list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        save_split(Path(folder) / "split.json", split)
        for _ in range(repetitions):
            trial = predicted(case, root, split, threads)
            took, peak = trained(case, root, Path(folder) / "split.json", threads)
            minutes.append([trial.expected_minutes, took])
            gigabytes.append([trial.peak_gb, peak])
    cells = [case.name, str(case.steps)]
    for pairs, limit, unit in ((gigabytes, MEMORY_LIMIT, "GB"), (minutes, TIME_LIMIT, "min")):
        foretold, measured = (statistics.median(values) for values in zip(*pairs, strict=True))
        # Each prediction against the training beside it, which met the same load.
        off = statistics.median(a / b - 1 for a, b in pairs)
        mark = "" if abs(off) <= limit else " ✗"
        cells += [f"{foretold:.2f} {unit}", f"{measured:.2f} {unit}", f"{off:+.0%}{mark}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", help="the folder of the data sets")
    parser.add_argument("-o", "--out", type=Path, required=True, help="write the table to this file")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one tiny recipe, only to check that it runs")
    options = parser.parse_args()
    if options.data is None and not options.quick:
        parser.error("give the folder of the data sets, or --quick")
    lines = [
        "| recipe | steps | memory, planned | measured | error | time, planned | measured | error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        root = options.data
        if options.quick:
            root = write_phantoms(Path(scratch) / "scans", 5, coarse=3.0).root.parent
        for case in QUICK if options.quick else CASES:
            lines.append(row(case, root, options.threads, 1 if options.quick else options.repetitions))
            print(lines[-1], flush=True)
            with writing_beside(options.out) as path:
                path.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
