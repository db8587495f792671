"""What a prediction says of itself without a truth."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from math import isnan, log, nan
from pathlib import Path

import numpy as np
import pytest
import torch

from delineate.bundle import Bundle
from delineate.calibration import (
    Calibration,
    Case,
    Confidence,
    check_intervals,
    expected_dice,
    mutual_dice,
    rank_correlation,
)
from delineate.compute import plan_compute
from delineate.core.grid import Grid, permute_axes
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.inspection import inspect
from delineate.datasets.phantoms.writing import write_phantoms
from delineate.errors import BundleError, OutputError
from delineate.fingerprint import Fingerprint, Oddity, fingerprint_of, merged, oddities
from delineate.inference.predictor import Predictor
from delineate.inference.review import Review, queue, read_confidences, review, write_queue
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry


def test_probabilities_that_mean_what_they_say_promise_the_dice_that_comes(rng: np.random.Generator) -> None:
    p = rng.beta(0.4, 1.2, size=200_000)
    mask, truth = p > 0.5, rng.random(p.size) < p
    dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert expected_dice(p.sum(), p[mask].sum(), mask.sum()) == pytest.approx(dice, abs=0.01)
    assert expected_dice(5.0, 5.0, 5) == 1
    assert isnan(expected_dice(0.3, 0.0, 0))


def test_agreement_is_the_mean_dice_of_every_two() -> None:
    a, b, c = (np.array(m, bool) for m in ([1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0]))
    assert mutual_dice([a, b, c]) == pytest.approx((1 + 0.5 + 0.5) / 3)
    assert isnan(mutual_dice([a]))


def calibration(n: int = 40) -> Calibration:
    """True Dice .05 to .15 below what is expected; true volumes 10 % off on either side."""
    steps = np.linspace(0, 1, n)
    return Calibration.of([*cases(steps), Case("cyst", "A", "p", Confidence(0.0, nan), 0.0, 3.0)])


def cases(steps: np.ndarray, site: str = "A", worse: float = 0.0) -> list[Case]:
    return [
        Case("liver", site, f"{site}{i}", Confidence(100.0, 0.9), 0.85 - worse - 0.1 * s, 100 * 1.1 ** (2 * s - 1))
        for i, s in enumerate(steps)
    ]


def test_intervals_are_where_the_errors_were() -> None:
    made = calibration()
    low, high = made.dice_interval("liver", Confidence(50.0, 0.8))
    assert 0.64 < low < 0.66
    assert 0.74 < high < 0.76
    small, large = made.volume_interval("liver", Confidence(50.0, 0.8))
    assert (small / 50, large / 50) == (pytest.approx(1 / 1.1, rel=0.01), pytest.approx(1.1, rel=0.01))
    assert made.dice_interval("liver", Confidence(50.0, 0.05))[0] == 0, "no Dice is below 0"


def test_intervals_are_checked_on_the_sites_that_they_were_not_made_of() -> None:
    steps = np.linspace(0, 1, 40)
    alike = check_intervals(cases(steps) + cases(steps, "B"))
    assert [(row.site, row.n, row.patients) for row in alike] == [("", 80, 80), ("A", 40, 40), ("B", 40, 40)]
    assert all(row.dice_held > 0.85 and row.volume_held > 0.85 for row in alike[1:])
    assert alike[0].dice_held is None, "of one kind it is the level by construction"
    other = check_intervals(cases(steps) + cases(steps, "B", worse=0.3))
    assert [row.dice_held for row in other[1:]] == [0, 0]
    assert other[0].dice_width > alike[0].dice_width
    assert check_intervals(cases(steps[:10])) == (), "too few for the level"
    of_few = [replace(case, patient=f"p{i % 10}") for i, case in enumerate(cases(steps))]
    assert check_intervals(of_few) == (), "forty scans of ten patients are ten"


def test_found_where_there_is_nothing_is_an_error_like_others() -> None:
    """Of forty scans in which something was found, eight have nothing: the volume may be 0."""
    known = [replace(case, reference_ml=0.0, dice=0.0) if i < 8 else case for i, case in enumerate(cases(np.ones(40)))]
    made = Calibration.of(known)
    low, high = made.volume_interval("liver", Confidence(50.0, 0.8))
    assert (low, high) == (0, pytest.approx(50 * 1.1))
    assert made.dice_interval("liver", Confidence(50.0, 0.8))[0] == 0


def test_the_order_of_expected_dice_is_judged_by_ranks() -> None:
    expected, true = [0.9, 0.8, 0.7, nan], [0.5, 0.4, 0.1, 0.9]
    assert rank_correlation(expected, true) == pytest.approx(1)
    assert rank_correlation(expected, [-t for t in true]) == pytest.approx(-1)
    assert isnan(rank_correlation([0.9, 0.9, 0.9], [0.1, 0.2, 0.3]))
    assert isnan(rank_correlation(expected[:2], true[:2]))


@pytest.mark.parametrize("target", ["cyst", "spleen"])
def test_too_few_known_subjects_give_no_interval(target: str) -> None:
    for interval in (calibration().dice_interval, calibration().volume_interval):
        assert all(isnan(end) for end in interval(target, Confidence(5.0, 0.9)))


def test_nothing_found_has_no_interval() -> None:
    made = calibration()
    assert all(isnan(v) for v in made.dice_interval("liver", Confidence(0.0, nan)))
    assert all(isnan(v) for v in made.volume_interval("liver", Confidence(0.0, nan)))


def test_a_calibration_lies_in_its_bundle(tmp_path: Path) -> None:
    saved(tmp_path, [], Targets({"liver": (1,)}))
    assert Calibration.load(tmp_path) is None
    calibration().save(tmp_path)
    assert Calibration.load(tmp_path) == calibration()
    Bundle.load(tmp_path)
    several = [replace(case, patient="p") for case in cases(np.linspace(0, 1, 4))] + cases(np.zeros(1))
    several.append(replace(several[0], reference_ml=0.0))
    Calibration.of(several).save(tmp_path)
    assert Calibration.load(tmp_path) == Calibration.of(several)
    assert '"p"' not in (tmp_path / "calibration.json").read_text(encoding="utf-8"), "errors, no names"
    (tmp_path / "calibration.json").write_text(
        '{"dice_errors": {"a": [0.1, 0.2]}, "log_volume_errors": {"a": []}}', encoding="utf-8"
    )
    earlier = Calibration.load(tmp_path)
    assert earlier is not None
    assert earlier.dice["a"].errors == ((0.1,), (0.2,)), "each scan is a patient's"
    (tmp_path / "calibration.json").write_text("{", encoding="utf-8")
    for load in (Calibration.load, Bundle.load):
        with pytest.raises(BundleError, match="copy the bundle again"):
            load(tmp_path)


@pytest.fixture(scope="module")
def trained_on(tmp_path_factory: pytest.TempPathFactory):
    dataset = write_phantoms(tmp_path_factory.mktemp("scans"), 4)
    return dataset, fingerprint_of(inspect(dataset).rows)


def test_scans_like_those_trained_on_are_not_unusual_however_they_are_stored(trained_on) -> None:
    from delineate.datasets.dataset import load_scan

    dataset, fingerprint = trained_on
    for subject in dataset.subjects:
        scan = load_scan(subject)
        assert oddities(fingerprint, scan, ["MRI"]) == []
        how = scan.grid.axes_to("SAR")
        turned = np.stack([permute_axes(channel, *how) for channel in scan.voxels])
        assert oddities(fingerprint, Volume(turned * 7.0 + 100, scan.grid.permute(*how)), ["MRI"]) == []


def test_two_groups_together_have_the_ranges_of_all_their_scans(trained_on) -> None:
    dataset, whole = trained_on
    rows = inspect(dataset).rows
    both = merged(fingerprint_of(rows[:1]), fingerprint_of(rows[1:]))
    assert both.subjects == whole.subjects == 4
    ends = [{(r.quantity, r.of): (r.min, r.max) for r in one.ranges} for one in (both, whole)]
    assert ends[0] == ends[1]
    assert merged(whole, Fingerprint()) == merged(Fingerprint(), whole) == whole


def test_what_is_unusual_is_named_with_what_was_usual(trained_on) -> None:
    from delineate.datasets.dataset import load_scan

    dataset, fingerprint = trained_on
    scan = load_scan(dataset.subjects[0])
    thick = Volume(scan.voxels[..., :6], Grid.of_spacing((*scan.grid.shape[:2], 6), (3.6, 3.6, 28.0)))
    first, *_ = oddities(fingerprint, thick, ["MRI"])
    assert first.text == "spacing from feet to head 28 mm (trained on 7 to 8.5 mm)"
    assert first.distance == pytest.approx(log(28 / 8.5))
    bright = scan.voxels.astype(float)
    bright[:, 50:54] *= 40
    assert any("contrast of MRI" in o.text for o in oddities(fingerprint, Volume(bright, scan.grid), ["MRI"]))


def test_the_queue_begins_with_what_needs_a_look(tmp_path: Path) -> None:
    reviews = [
        review("good", {"liver": Confidence(100, 0.95)}, [], calibration()),
        review("doubtful", {"liver": Confidence(100, 0.6)}, [], calibration()),
        review("odd", {"liver": Confidence(100, 0.95)}, [Oddity("spacing 9 mm", 1.2)], calibration()),
        review("nothing", {"liver": Confidence(0, nan)}, [], calibration()),
    ]
    assert [one.subject for one in queue(reviews)] == ["odd", "nothing", "doubtful", "good"]
    write_queue(tmp_path / "review.csv", reviews)
    with (tmp_path / "review.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows[0]["unusual"] == "spacing 9 mm"
    assert rows[1]["expected_dice"] == ""
    assert float(rows[2]["dice_low"]) < 0.6 < float(rows[2]["expected_dice"]) + 0.01


def test_a_figure_that_was_edited_is_named_where_it_is_none(tmp_path: Path) -> None:
    path = tmp_path / "review.csv"
    write_queue(path, [review("a", {"liver": Confidence(100, 0.95)}, [], None)])
    assert read_confidences(path)["a"]["liver"].expected_dice == 0.95
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("0.95", "good"), encoding="utf-8")
    with pytest.raises(OutputError, match=r"expected_dice 'good' for 'a'.*leave it empty"):
        read_confidences(path)
    path.write_text(text.replace("0.95", ""), encoding="utf-8")
    assert isnan(read_confidences(path)["a"]["liver"].expected_dice)


MADE = {
    "usual": review("usual", {"liver": Confidence(100, 0.9)}, [], calibration()),
    "unusual": review("unusual", {"liver": Confidence(100, 0.9)}, [Oddity("spacing 9 mm", 0.1)], calibration()),
    "nothing found": review("nothing", {"liver": Confidence(0, nan)}, [], calibration()),
    "too few known": review("few", {"cyst": Confidence(5.0, 0.9)}, [], calibration()),
    "no calibration": review("none", {"liver": Confidence(100, 0.9)}, [], None),
}


@pytest.mark.parametrize("one", MADE.values(), ids=MADE)
def test_an_interval_is_given_or_it_is_said_why_there_is_none(one: Review, tmp_path: Path) -> None:
    write_queue(tmp_path / "review.csv", [one])
    with (tmp_path / "review.csv").open(encoding="utf-8") as file:
        [row] = csv.DictReader(file)
    intervals = [row[name] for name in ("dice_low", "dice_high", "volume_low_ml", "volume_high_ml")]
    assert all(intervals) == (one is MADE["usual"])
    assert any(intervals) == (one is MADE["usual"])
    assert bool(row["no_interval"]) != all(intervals)
    for name in ("volume_ml", "expected_dice"):
        assert row[name] == "" or float(row[name]) >= 0, "what is measured stands alone"


def test_an_unusual_scan_is_no_less_in_need_of_a_look_for_having_no_interval() -> None:
    assert MADE["unusual"].need == pytest.approx(MADE["usual"].need + 0.1)


def test_what_is_measured_and_what_is_calibrated_stand_in_columns_of_their_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    from delineate.cli.predict import _print_queue

    _print_queue([MADE["usual"], MADE["unusual"]])
    title, head, unusual, usual = capsys.readouterr().out.splitlines()[:4]
    assert title.strip() == "to look at first"
    assert head.index("expected Dice") < head.index("volume, 90% interval")
    cells = [[part.strip() for part in re.split(r"\s{2,}", line.strip())] for line in (unusual, usual)]
    assert cells[0] == ["unusual", "liver", "100.00", "0.900", "–", "–", "–", "unlike the scans it is meant for", "yes"]
    assert cells[1][:5] == ["usual", "liver", "100.00", "0.900", "–"]
    assert re.fullmatch(r"\d+\.\d\d – \d+\.\d\d", cells[1][5])
    assert re.fullmatch(r"0\.\d{3} – 0\.\d{3}", cells[1][6])


def saved(folder: Path, mirror: list[str], targets: Targets, *, sliced: bool = False) -> Bundle:
    tiles = {"kind": "slices", "shape": [8, 8]} if sliced else {"kind": "patches", "shape": [8, 8, 4]}
    geometry = TileGeometry((8, 8, 1), slice_axis=2) if sliced else TileGeometry((8, 8, 4))
    recipe = recipe_from(
        {
            "name": "small",
            "preprocessing": [{"kind": "normalise"}],
            "tiles": tiles,
            "network": {"kind": "unet", "dimensions": 2 if sliced else 3, "widths": [4, 8]},
            "augmentation": {"spatial": {"mirror": mirror}},
        }
    )
    bundle = Bundle(recipe, recipe.pipeline, targets, ("MR",), geometry, (1.0, 1.0, 3.0))
    torch.manual_seed(len(mirror))
    bundle.save(folder, bundle.network().state_dict(), {})
    return Bundle.load(folder)


PLAN = plan_compute(device="cpu", precision="fp32", compile="off")
SCAN = Volume(
    np.random.default_rng(4).random((1, 12, 10, 8), dtype=np.float32), Grid.of_spacing((12, 10, 8), (1, 1, 3))
)
EXCLUSIVE = Targets({"a": (1,), "b": (2,)})
OVERLAPPING = Targets({"a": (1, 2), "b": (2,)}, "overlapping")


@pytest.mark.parametrize("targets", [EXCLUSIVE, OVERLAPPING], ids=["exclusive", "overlapping"])
def test_probabilities_decide_the_label(targets: Targets, tmp_path: Path) -> None:
    predictor = Predictor([saved(tmp_path, ["x"], targets)], PLAN, probabilities=True)
    found = predictor.predict(SCAN)
    assert found.probabilities is not None
    p, masks = found.probabilities.astype(float), targets.masks(found.label.voxels)
    for t, name in enumerate(targets.names):
        rival = np.maximum(1 - p.sum(axis=0), p[1 - t]) if targets.exclusive else 0.5
        clear = abs(p[t] - rival) > 0.01
        if targets.exclusive or name == "b":  # what is b is a, too
            np.testing.assert_array_equal(masks[name][clear], (p[t] > rival)[clear])
        confidence = found.confidence[name]
        assert confidence.volume_ml == pytest.approx(masks[name].sum() * 0.003)
        assert isnan(confidence.mutual_dice)
    if targets.exclusive:
        inside = masks["a"]
        promised = 2 * p[0][inside].sum() / (p[0].sum() + inside.sum()) if inside.any() else nan
        assert found.confidence["a"].expected_dice == pytest.approx(promised, abs=2e-3, nan_ok=True)


@pytest.mark.parametrize(
    ("mirror", "sliced", "asked"),
    [([], False, False), (["x"], False, True), (["z"], False, True), (["z"], True, False), (["y", "z"], True, True)],
)
def test_the_mirror_image_is_asked_only_where_training_had_mirrors(
    mirror: list[str], sliced: bool, asked: bool, tmp_path: Path
) -> None:
    """Slices had none across themselves, whatever the recipe says."""
    bundle = saved(tmp_path, mirror, EXCLUSIVE, sliced=sliced)
    found = Predictor([bundle], PLAN, networks=[OfItsTile()], mirrored=True).predict(SCAN)
    assert isnan(found.confidence["a"].mutual_dice) != asked


def test_mirroring_a_scan_mirrors_its_prediction_where_both_are_asked(tmp_path: Path) -> None:
    predictor = Predictor([saved(tmp_path, ["x"], EXCLUSIVE)], PLAN, mirrored=True, probabilities=True)
    flipped = Volume(np.ascontiguousarray(SCAN.voxels[:, ::-1]), SCAN.grid)
    one, other = (predictor.predict(scan).probabilities for scan in (SCAN, flipped))
    assert one is not None
    assert other is not None
    np.testing.assert_allclose(one, other[:, ::-1], atol=2e-3)


def test_an_ensemble_of_equals_agrees(tmp_path: Path) -> None:
    bundle = saved(tmp_path, [], EXCLUSIVE)
    found = Predictor([bundle, bundle], PLAN).predict(SCAN)
    assert all(c.mutual_dice == 1 for c in found.confidence.values())


class OfItsTile(torch.nn.Module):
    """Brighter than its tile is target: neighbouring tiles disagree where they meet."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bright = 4 * (x - x.mean(tuple(range(1, x.ndim)), keepdim=True))
        return torch.cat([-bright, bright, bright], dim=1)


def test_seams_are_told_where_tiles_meet_and_overlap_lessens_them(tmp_path: Path) -> None:
    bundle = saved(tmp_path, [], EXCLUSIVE)
    ramp = np.add.outer(np.add.outer(np.linspace(0, 3, 32), np.linspace(0, 2, 24)), np.linspace(0, 1, 12))
    scan = Volume(ramp[None].astype(np.float32), Grid.of_spacing(ramp.shape, (1, 1, 3)))
    seams = {
        overlap: Predictor([bundle], PLAN, networks=[OfItsTile()], overlap=overlap).predict(scan).confidence["a"].seam
        for overlap in (0.0, 0.5)
    }
    assert seams[0.5] < 1.5 < 2 < seams[0.0]
    one_tile = Volume(scan.voxels[:, :8, :8, :4], Grid.of_spacing((8, 8, 4), (1, 1, 3)))
    assert isnan(Predictor([bundle], PLAN, networks=[OfItsTile()]).predict(one_tile).confidence["a"].seam)
