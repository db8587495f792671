"""A study of several stages is carried out to its end, by a launcher that makes results up."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import pytest

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import load_split
from delineate.errors import StudyError
from delineate.evaluation.table import Evaluation
from delineate.studies.conducting import conduct
from delineate.studies.running import FINAL, Ended, FinalTest, StudyFolder
from delineate.studies.specification import Study

STUDY = {
    "name": "s", "question": "?", "recipe": "hippocampus", "sizes": {"quick": {}},
    "data": {"scans": {"locked": 0.25}},
    "stages": [
        {"name": "first", "factors": {"W": ["network.widths=[8, 16]"]},
         "design": {"kind": "cross_validation", "folds": 2}},
        {"name": "final", "best_of": "first", "arms": {"best": {}}, "design": {"kind": "locked_test"}},
        {"name": "final-base", "arms": {"base": {}}, "design": {"kind": "locked_test"}},
    ],
}  # fmt: skip


class MadeUp:
    """Dice .9 for narrow networks and .8 for others; the names of the runs, in order. Those in ``failing`` fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.failing: set[str] = set()

    def __call__(self, command: Sequence[str], log: Path) -> Ended:
        value = {name: command[command.index(name) + 1] for name in ("--out", "--split", "--fold")}
        if Path(value["--out"]).name in self.failing:
            return Ended(1)
        held_out = load_split(Path(value["--split"])).held_out(int(value["--fold"]))
        narrow = "- 8\n" in Path(command[1]).read_text(encoding="utf-8")
        rows = [
            {
                "subject": name,
                "site": "",
                "patient": name,
                "target": "x",
                "dice": 0.9 if narrow else 0.8,
                "case": "both",
            }
            for name in held_out
        ]
        Evaluation(pd.DataFrame(rows)).write(Path(value["--out"]) / "evaluation")
        self.ran.append(Path(value["--out"]).name)
        return Ended(0)

    def stop(self) -> None:
        raise AssertionError("nobody stops it")


@pytest.fixture
def people() -> Dataset:
    return Dataset("d", Path(), "msd", tuple(Subject(f"s{i}", {"MR": Path("x")}, Path("y")) for i in range(12)))


def test_the_locked_subjects_are_tested_once_by_the_best_and_the_base_when_all_else_is_done(
    people: Dataset, tmp_path: Path
) -> None:
    what, folder, launcher = Study.model_validate(STUDY), StudyFolder(tmp_path / "out"), MadeUp()

    def run() -> bool:
        return conduct(what, "quick", {"scans": people}, {"scans": tmp_path}, folder, launcher, final=True)[1]

    assert run()
    last = ["final-best-seed0", "final-base-base-seed0"]
    assert launcher.ran[-2:] == last
    assert len(launcher.ran) == 2 * 2 + 2
    assert FinalTest.read(folder.path / FINAL).runs == tuple(last)
    _, runs = folder.open()
    widths = {run.label: run.recipe.network.widths for run in runs}  # type: ignore[union-attr]
    assert widths["final/best"] == (8, 16) != widths["final-base/base"]
    with pytest.raises(StudyError, match="second look"):
        run()


def test_what_failed_before_in_another_part_of_a_job_array_settles_nothing(people: Dataset, tmp_path: Path) -> None:
    """Each part has one of the four runs of the first stage; the second had failed before all parts were run again."""
    what, folder, launcher = Study.model_validate(STUDY), StudyFolder(tmp_path / "out"), MadeUp()

    def run(part: int) -> None:
        only = f"{part}/4"
        conduct(what, "quick", {"scans": people}, {"scans": tmp_path}, folder, launcher, final=True, only=only)

    launcher.failing = {"first-W-fold0-seed0"}
    run(2)
    launcher.failing = set()
    for part in (1, 3, 4):
        run(part)
    assert {one.stage for one in folder.open()[1]} == {"first"}
    run(2)
    [best] = [one for one in folder.open()[1] if one.stage == "final"]
    assert best.recipe.network.widths == (8, 16)  # type: ignore[union-attr]
