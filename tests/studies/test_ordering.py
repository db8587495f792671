"""In which order candidates are annotated: cases by hand, and a study that is carried out with made-up results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.calibration import Confidence
from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.volume import Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import load_split
from delineate.errors import StudyError
from delineate.evaluation.table import Evaluation
from delineate.inference.review import review, write_queue
from delineate.io.formats import write_volume
from delineate.recipe import DataSpec
from delineate.studies.conducting import conduct
from delineate.studies.ordering import ScanComparison, by_distance, by_uncertainty, farthest_first
from delineate.studies.planning import plan_runs
from delineate.studies.running import Ended, StudyFolder
from delineate.studies.specification import Study


def test_the_farthest_from_all_before_comes_next() -> None:
    known, others = np.array([[0.0], [1.0]]), np.array([[2.0], [9.0], [10.0], [5.0]])
    assert farthest_first(known, others) == [2, 3, 0, 1], "9 is like 10, which has been taken"


def dataset(folder: Path, rng: np.random.Generator) -> Dataset:
    """Six scans of site A, all alike, and eight of B with thicker slices, the last of them the thickest."""
    people = []
    for i in range(14):
        grid = Grid.of_spacing((4, 4, 4), (1, 1, 1.0 if i < 6 else 1.0 + i / 10))
        path = folder / f"s{i:02}.nii.gz"
        write_volume(path, Volume(rng.random((1, *grid.shape), np.float32), grid))
        people.append(Subject(path.stem[:3], {"MR": path}, path, site="A" if i < 6 else "B"))
    return Dataset("d", folder, "msd", tuple(people))


def test_a_scan_unlike_all_that_are_trained_on_comes_first_whatever_its_label(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    people = dataset(tmp_path, rng)
    names = [one.id for one in people.subjects]
    comparison = ScanComparison("x", "scans", DataSpec(), tuple(names[:6]), ("s06", "s13", "s07"))
    assert by_distance(comparison, people)[0] == "s13"
    renamed = replace(comparison, reading=DataSpec(channels=("T2",)))
    assert by_distance(renamed, people) == by_distance(comparison, people), "a single channel may have any name"
    alike = ScanComparison("x", "scans", DataSpec(), ("s00", "s13"), ("s12", "s06", "s13"))
    assert by_distance(alike, people)[-1] == "s13", "the same scan is trained on already"


def write_review(run: Path, expected: dict[str, tuple[float, ...]]) -> None:
    (run / "predictions").mkdir(parents=True)
    found = [
        review(name, {f"t{k}": Confidence(1.0, dice) for k, dice in enumerate(values)}, (), None)
        for name, values in expected.items()
    ]
    write_queue(run / "predictions" / "review.csv", found)


def test_the_least_certain_comes_first_and_a_scan_without_prediction_last(tmp_path: Path) -> None:
    write_review(tmp_path / "run", {"a": (0.9, 0.9), "b": (0.9, 0.5), "c": (0.99, nan), "other": (0.1,)})
    assert by_uncertainty(tmp_path / "run", ("a", "b", "c", "d")) == ("c", "b", "a", "d")
    with pytest.raises(StudyError, match="no predictions"):
        by_uncertainty(tmp_path / "nothing", ("a",))


class MadeUp:
    """Results of every run; the network is the less certain, the thicker the slices, but for one scan."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        value = {name: command[command.index(name) + 1] for name in ("--out", "--split", "--fold")}
        held_out = load_split(Path(value["--split"])).held_out(int(value["--fold"]))
        out = Path(value["--out"])
        rows = [
            {"subject": name, "site": "", "patient": name, "target": "x", "dice": 0.8, "case": "both"}
            for name in held_out
        ]
        Evaluation(pd.DataFrame(rows)).write(out / "evaluation")
        if command[0] == "test":
            write_review(out, {name: (0.5 if i == 1 else 0.9 - i / 100,) for i, name in enumerate(held_out)})
        self.ran.append(out.name)
        return Ended(0)

    def stop(self) -> None:
        raise AssertionError("nobody stops it")


def test_a_study_of_orders_ends_and_a_resumed_one_makes_the_same_choice(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    people = dataset(tmp_path, rng)
    what = Study.model_validate(
        {"name": "s", "question": "?", "recipe": "hippocampus", "sizes": {"quick": {}},
         "design": {"kind": "moved_subjects", "source": "A", "target": "B", "counts": [0, 1],
                    "order": ["random", "distance", "uncertainty"]}}
    )  # fmt: skip
    folder, launcher = StudyFolder(tmp_path / "out"), MadeUp()

    def run() -> bool:
        return conduct(what, "quick", {"scans": people}, {"scans": tmp_path}, folder, launcher)[1]

    assert run()
    assert launcher.ran[-2:] == ["base-A-to-B-candidates-draw0", "base-A-to-B-uncertainty-1-draw0"]
    assert set(launcher.ran[:-2]) == {f"base-A-to-B-{name}-draw0" for name in ("0", "1", "distance-1")}
    plan, runs = folder.open()
    moved = {run.order: run.split.always_train for run in runs if run.count}
    candidates = next(run.split.held_out(0) for run in runs if run.ranks)
    assert moved["uncertainty"] == (candidates[1],)
    assert moved["distance"] == plan.rankings["scans A-to-B"][:1]
    for path in tmp_path.glob("*.nii.gz"):
        path.unlink()  # whatever the scans are now
    folder.status_file("base-A-to-B-uncertainty-1-draw0").unlink()
    assert run()
    assert launcher.ran[-2:] == ["base-A-to-B-uncertainty-1-draw0"] * 2
    assert folder.open() == (plan, runs)
    again = plan_runs(what, what.sizes["quick"], {"scans": people}, rankings=plan.rankings).runs
    assert {run.name: run for run in again} == {run.name: run for run in runs}
