"""What is said of a study: pooled subjects, curves, gains and claims, of tables made by hand."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import Split
from delineate.evaluation.table import Evaluation
from delineate.io.formats import write_label, write_volume
from delineate.io.tables import write_table
from delineate.losses.overlap import DiceSpec
from delineate.metrics.quantities import QuantityMap
from delineate.recipe import load_recipe
from delineate.studies.designs import PlannedRun
from delineate.studies.measures import measure_run, read_curves
from delineate.studies.reporting import draw_pictures, write_study_report
from delineate.studies.results import StudyResults, collect, pooled
from delineate.studies.running import RunStatus, StudyFolder
from delineate.studies.specification import Study
from delineate.training.events import Trained, append_event

RECIPE = load_recipe("hippocampus")
NAMES = [f"s{i:02}" for i in range(20)]


def run(arm: str = "base", seed: int = 0, fold: int = 0, count: int | None = None) -> PlannedRun:
    split = Split((tuple(NAMES[:10]), tuple(NAMES[10:])))
    return PlannedRun(f"{arm}-{fold}-{seed}-{count}", arm, seed, fold, count, recipe=RECIPE, split=split)


def table(subjects: list[str], dice: float) -> Evaluation:
    rows = [
        {"subject": name, "site": "", "patient": name, "target": "organ", "dice": dice + i / 1000, "case": "both"}
        for i, name in enumerate(subjects)
    ]
    return Evaluation(pd.DataFrame(rows))


def study(**more: object) -> Study:
    values = {
        "name": "s", "question": "What?", "recipe": "hippocampus", "sizes": {"quick": {}},
        "design": {"kind": "learning_curve", "counts": [5, 10]}, **more,
    }  # fmt: skip
    return Study.model_validate(values)


def results(what: Study, **groups: tuple[PlannedRun, Evaluation]) -> StudyResults:
    runs = tuple(planned for planned, _ in groups.values())
    statuses = {planned.name: RunStatus(state="done", seconds=60, attempts=1) for planned in runs}
    return StudyResults(what, runs, statuses, {planned.group: found for planned, found in groups.values()})


def test_folds_are_pooled_into_one_table() -> None:
    both = pooled([(run(fold=0), table(NAMES[:10], 0.8)), (run(fold=1), table(NAMES[10:], 0.9))])
    assert sorted(both.subjects) == NAMES
    assert both.overall()["dice"].patients == 20


def test_the_quantity_that_was_measured_is_kept() -> None:
    fat = QuantityMap("fat_fraction")
    one, other = (replace(table(names, 0.8), quantity=fat) for names in (NAMES[:10], NAMES[10:]))
    assert pooled([(run(fold=0), one), (run(fold=1), other)]).quantity == fat


def test_seeds_of_one_patient_are_one_patient() -> None:
    both = pooled([(run(seed=0), table(NAMES, 0.8)), (run(seed=1), table(NAMES, 0.9))])
    assert len(both.subjects) == 40
    estimate = both.overall()["dice"]
    assert estimate.patients == 20
    assert estimate.mean == pytest.approx(0.85 + 9.5 / 1000)


def test_subjects_that_the_networks_of_several_folds_are_tested_on_are_compared_once_each() -> None:
    what = study(arms={"own": {}, "elsewhere": {}}, design={"kind": "cross_validation"})
    folds = [(run("elsewhere", fold=k), table(NAMES, 0.6 + k / 10)) for k in (0, 1)]
    found = results(what, own=(run("own"), table(NAMES, 0.9)), elsewhere=(run("elsewhere"), pooled(folds)))
    [difference] = found.differences()
    assert (difference.subjects, difference.difference.n) == (20, 20)
    assert difference.difference.mean == pytest.approx(0.25)


def test_the_background_is_measured_beside_the_targets() -> None:
    """An all-background prediction of scans with 2 % of organ: precision .98, recall 1, whatever the seed."""
    pairs = [("background", "background", 980), ("background", "organ", 0)]
    pairs += [("organ", "background", 20), ("organ", "organ", 0)]
    confusion = pd.DataFrame(
        [{"subject": name, "reference": r, "prediction": p, "voxels": n} for name in NAMES for r, p, n in pairs]
    )
    one = replace(table(NAMES, 0.0), confusion=confusion)
    assert table(NAMES, 0.0).background == {}
    what = study(arms={"a": {}}, design={"kind": "recipe_split"})
    runs = (run("a"), run("a", seed=1))
    both = pooled([(planned, one) for planned in runs])
    found = StudyResults(what, runs, {planned.name: RunStatus(state="done") for planned in runs}, {"a": both})
    for metric, value in {"precision": 0.98, "recall": 1.0, "dice": 2 * 0.98 / 1.98}.items():
        estimate = found.estimate("a", f"{metric}@background")
        assert estimate is not None
        assert estimate.mean == pytest.approx(value)
        assert (estimate.n, estimate.patients) == (40, 20)
    assert found.estimate("a", "hd95_mm@background") is None
    assert found.pooled["a"].pooled.set_index("class").loc["background", "precision"] == pytest.approx(0.98)


@pytest.mark.parametrize(("gpu_gb", "peak_gb"), [(None, 2.0), (7.5, 7.5)])
def test_peak_memory_is_the_gpu_s_where_a_run_trained_on_one(
    gpu_gb: float | None, peak_gb: float, tmp_path: Path
) -> None:
    append_event(tmp_path / "logs", Trained(step=4, minutes=1, gpu_gb=gpu_gb))
    assert measure_run(tmp_path, read_curves(tmp_path), peak_gb=2.0)["peak_gb"] == peak_gb


def test_an_arm_does_not_score_by_what_it_misses() -> None:
    """Far off in every scan, close in the one that it did not miss, all missed, and nothing to measure."""
    hd95 = {"far": [20.0] * 10, "one": [1.0] + [inf] * 9, "none": [inf] * 10, "undefined": [nan] * 10}
    arms = {
        name: (run(name), Evaluation(table(NAMES[10:], 0.5).table.assign(hd95_mm=values)))
        for name, values in hd95.items()
    }
    scores = results(study(arms={name: {} for name in hd95}, metric="hd95_mm"), **arms).scores(())
    assert scores["undefined"] is None
    assert scores["far"] == 20 < scores["one"] < scores["none"] < inf


def test_what_more_subjects_bring_is_paired_by_patient() -> None:
    found = results(study(), few=(run(count=5), table(NAMES, 0.7)), more=(run(count=10), table(NAMES, 0.8)))
    assert [(point.count, round(point.estimate.mean, 4)) for point in found.points()] == [(5, 0.7095), (10, 0.8095)]
    [gain] = found.gains()
    assert gain.difference.mean == pytest.approx(0.1)
    assert "from 5 to 10 subjects" in str(gain)
    assert "n = 20 patients" in str(gain)


def test_curves_of_stages_stay_apart_though_their_arms_are_called_alike() -> None:
    stages = [{"name": name, "design": {"kind": "learning_curve", "counts": [5, 10]}} for name in ("one", "two")]
    dice = {("one", 5): 0.5, ("one", 10): 0.7, ("two", 5): 0.8, ("two", 10): 0.9}
    made = {
        f"{stage}{count}": (replace(run(count=count), name=f"{stage}-{count}", stage=stage), table(NAMES, value))
        for (stage, count), value in dice.items()
    }
    found = results(study(design=None, stages=stages), **made)
    gains = {gain.curve: round(gain.difference.mean, 6) for gain in found.gains()}
    assert gains == {"one/base": 0.2, "two/base": 0.1}
    for (stage, _), [sentence] in found.findings.items():
        assert sentence.startswith(f"{stage}/base: from 5 to 10 subjects")


def test_orders_of_moved_subjects_are_compared_at_the_same_count_and_begin_at_the_same_point() -> None:
    def moved(count: int, order: str = "") -> PlannedRun:
        return replace(run(count=count), name=f"{order}{count}", direction="A-to-B", order=order)

    what = study(
        design={"kind": "moved_subjects", "order": ["random", "distance"]},
        claims=[{"text": "?", "better": "base A-to-B distance 3", "worse": "base A-to-B 3"}],
    )
    found = results(
        what,
        none=(moved(0), table(NAMES, 0.6)),
        random=(moved(3), table(NAMES, 0.7)),
        distance=(moved(3, "distance"), table(NAMES, 0.8)),
    )
    assert [(point.curve, point.count) for point in found.points()] == [
        ("base A-to-B", 0), ("base A-to-B", 3), ("base A-to-B distance", 0), ("base A-to-B distance", 3)
    ]  # fmt: skip
    assert [round(gain.difference.mean, 6) for gain in found.gains()] == [0.1, 0.2]
    [gain] = found.order_gains()
    assert gain.difference.mean == pytest.approx(0.1)
    assert str(gain).startswith("base A-to-B: distance instead of random order at 3 subjects changed Dice by ")
    assert [judged.ruling for judged in found.claims()] == ["held"]


@pytest.mark.parametrize(
    ("better", "subjects", "ruling"),
    [(0.9, 20, "held"), (0.7, 20, "did not hold"), (0.8, 20, "too few to tell"), (0.9, 4, "too few to tell")],
)
def test_a_claim_holds_only_where_the_arms_are_told_apart(better: float, subjects: int, ruling: str) -> None:
    what = study(
        arms={"a": {}, "b": {"set": ["training.seed=1"]}},
        design={"kind": "cross_validation"},
        claims=[{"text": "a is better", "better": "a", "worse": "b"}],
    )
    names = NAMES[:subjects]
    found = results(what, a=(run("a"), table(names, better)), b=(run("b"), table(names, 0.8)))
    assert [judged.ruling for judged in found.claims()] == [ruling]
    alone = results(what, a=(run("a"), table(names, better)))
    assert [judged.ruling for judged in alone.claims()] == ["too few to tell"]


def test_a_claim_and_a_published_row_can_be_about_a_point_of_a_curve() -> None:
    table_of_report = {
        "source": "Table 2", "columns": ["labelled", "Dice"], "rows": [["5", ".7"]], "measures": ["dice"],
        "arms": {"5": "base 5"},
    }  # fmt: skip
    what = study(claims=[{"text": "more", "better": "base 10", "worse": "base 5"}], published=[table_of_report])
    found = results(what, few=(run(count=5), table(NAMES, 0.7)), more=(run(count=10), table(NAMES, 0.8)))
    assert [judged.ruling for judged in found.claims()] == ["held"]
    estimate = found.estimate(what.published[0].arms["5"], "dice")
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.7095)


def test_the_effect_of_a_factor_is_averaged_over_the_combinations_of_the_others() -> None:
    what = study(design={"kind": "cross_validation"}, factors={"E": ["training.seed=1"], "V": ["training.seed=2"]})
    dice = {"base": 0.5, "E": 0.6, "V": 0.7, "E+V": 0.9}
    every = {f"of_{i}": (run(arm), table(NAMES, value)) for i, (arm, value) in enumerate(dice.items())}
    found = results(what, **every)
    effects = {(effect.level, effect.other): effect.difference for effect in found.effects(what.parts[0])}
    assert {name: round(d.mean, 6) for name, d in effects.items()} == {("E", "base"): 0.15, ("V", "base"): 0.25}
    assert all(d.n == 20 for d in effects.values()), "a patient counts once"
    [sentences] = found.findings.values()
    assert "E instead of base changed Dice by 0.150 on average" in sentences[0]
    every.pop("of_3")
    assert results(what, **every).effects(what.parts[0]) == [], "not before every combination is done"


def test_the_page_says_what_is_missing_and_where_scans_are_simulated(tmp_path: Path) -> None:
    found = results(study(), few=(run(count=5), table(NAMES, 0.7)), more=(run(count=10), table(NAMES, 0.8)))
    simulated = Evaluation(found.pooled["base 5"].table, simulated=True)
    statuses = {**found.statuses, "lost": RunStatus(state="failed", failure="no <memory> was left")}
    part = StudyResults(found.study, found.runs, statuses, {**found.pooled, "base 5": simulated})
    page = write_study_report(part, tmp_path, size="quick", data_sets={"scans": "hearts"}).read_text(encoding="utf-8")
    for text in (
        "Data set hearts, size quick: 2 of 2 runs are done",
        "1 run failed",
        "no &lt;memory&gt; was left",
        "Simulated scans",
        "labelled",
    ):
        assert text in page, text
    rows = (tmp_path / "results.csv").read_text(encoding="utf-8")
    assert "base 10,organ,dice,0.8095" in rows


@pytest.mark.parametrize(("steps", "unequal"), [((150, 150), False), ((150, 160), False), ((32, 165), True)])
def test_a_page_says_where_runs_trained_unequally(steps: tuple[int, int], unequal: bool, tmp_path: Path) -> None:
    found = results(study(), few=(run(count=5), table(NAMES, 0.7)), more=(run(count=10), table(NAMES, 0.8)))
    measured = {name: {"steps": float(n)} for name, n in zip(found.statuses, steps, strict=True)}
    counted = replace(found, measured=measured)
    page = write_study_report(counted, tmp_path, size="quick", data_sets={"scans": "hearts"}).read_text(
        encoding="utf-8"
    )
    assert ("between 32 and 165 steps" in page) == unequal
    assert ("may be due to that alone" in page) == unequal


def test_a_picture_shows_the_channel_that_the_recipe_reads_and_one_that_cannot_be_drawn_costs_no_page(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The data set's first channel has thicker slices than the one that is read and was labelled."""
    grid, thick = Grid.of_spacing((8, 8, 8)), Grid.of_spacing((8, 8, 4), (1, 1, 2))
    scans = {name: tmp_path / f"{name}.nii.gz" for name in ("thick", "read")}
    for path, of in zip(scans.values(), (thick, grid), strict=True):
        write_volume(path, Volume(rng.random((1, *of.shape), np.float32), of))
    label = LabelVolume(np.pad(np.ones((4, 4, 4), np.uint8), 2), grid)
    folder, planned = StudyFolder(tmp_path / "out"), run("a")
    for path in (tmp_path / "label.nii.gz", folder.run(planned.name) / "predictions" / "s00.nii.gz"):
        write_label(path, label)
    subject = Subject("s00", scans, tmp_path / "label.nii.gz")
    people = Dataset("d", tmp_path, "msd", (subject,), Targets({"organ": (1,)}))
    reads = load_recipe("hippocampus", ["data.channels=[read]"])
    said: list[str] = []
    found = results(study(arms={"a": {}}), a=(planned, table(NAMES[:10], 0.8)))
    found = replace(found, curves={planned.name: read_curves(tmp_path)})
    for recipe, errors in ((reads, 0), (RECIPE, 1)):
        of_recipe = replace(found, runs=(replace(planned, recipe=recipe),))
        draw_pictures(of_recipe, folder, {"scans": people}, said.append)
        assert len(said) == errors
        page = write_study_report(of_recipe, folder.path, size="quick", data_sets={"scans": "d"})
        assert ("s00 under every arm" in page.read_text(encoding="utf-8")) == (not errors)
    assert said[0].startswith("no picture of s00: E_GRID_MISMATCH")


def test_a_study_of_which_nothing_is_done_has_a_page(tmp_path: Path) -> None:
    planned = (run(count=5), run(count=10))
    found = collect(StudyFolder(tmp_path), study(), planned)
    assert (found.done, found.pooled, found.gains(), found.differences()) == (0, {}, [], [])
    page = write_study_report(found, tmp_path, size="quick", data_sets={"scans": "hearts"}).read_text(encoding="utf-8")
    assert "No run is done yet." in page


def test_arms_with_different_targets_are_compared_in_those_they_share() -> None:
    """A network that finds organ and lesion against one that finds organs alone."""
    what = study(
        arms={"a": {}, "b": {"set": ["training.seed=1"]}},
        design={"kind": "cross_validation"},
        claims=[{"text": "a is better", "better": "a", "worse": "b"}],
    )
    first = table(NAMES, 0.9)
    lesion = first.table.assign(target="lesion", dice=0.1)
    both = Evaluation(pd.concat([first.table, lesion], ignore_index=True))
    found = results(what, a=(run("a"), both), b=(run("b"), table(NAMES, 0.8)))
    assert [judged.ruling for judged in found.claims()] == ["held"]
    [difference] = found.differences()
    assert difference.difference.mean == pytest.approx(0.1)


def test_steps_to_a_loss_are_counted_among_runs_with_the_same_loss_stage_and_data(tmp_path: Path) -> None:
    """A slow run and a quick one meet at .5; another loss that never falls below 9 does not move that."""
    other = RECIPE.model_copy(update={"loss": DiceSpec()})
    runs = (run("quick"), run("slow"), replace(run("other"), recipe=other), replace(run("elsewhere"), data="more"))
    losses = {
        "quick": [0.9, 0.4, 0.4, 0.4],
        "slow": [0.9, 0.8, 0.7, 0.5],
        "other": [9.0, 9.0, 9.0, 9.0],
        "elsewhere": [8.0, 7.0, 6.0, 5.0],
    }
    folder = StudyFolder(tmp_path)
    for planned in runs:
        rows = [{"step": str(i + 1), "loss": str(loss)} for i, loss in enumerate(losses[planned.arm])]
        write_table(folder.run(planned.name) / "logs" / "training.csv", ("step", "loss"), rows)
        table(NAMES, 0.8).write(folder.run(planned.name) / "evaluation")
        RunStatus(state="done").write(folder.status_file(planned.name))
    measured = collect(folder, study(), runs).measured
    steps = {planned.arm: measured[planned.name]["steps_to_loss"] for planned in runs}
    assert steps == {"quick": 2, "slow": 4, "other": 1, "elsewhere": 4}
