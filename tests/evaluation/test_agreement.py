"""Agreement of an evaluation's volumes and quantities with the references', and what is written of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from delineate.evaluation.agreement import agreements, crossing_sentences, crossings
from delineate.evaluation.table import LESION_COLUMNS, Evaluation
from delineate.metrics.agreement import agreement
from delineate.metrics.catalogue import QUANTITIES
from delineate.metrics.quantities import QuantityMap
from delineate.reporting.figures import agreement_chart

SUBJECTS = list("abcdef")
TRUE = np.array([10.0, 20.0, 30.0, 40.0, 50.0, 0.0])
SAID = np.array([11.0, 21.0, 31.0, 41.0, 51.0, 7.0])


def table(**columns: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"subject": SUBJECTS, "site": "", "target": "liver", **columns})


def test_volumes_agree_in_millilitres_and_in_percent_of_those_that_have_the_target() -> None:
    volumes = table(volume_ml=SAID, reference_volume_ml=TRUE)
    [agreeing] = agreements(volumes)
    assert agreeing.absolute.bias == pytest.approx((5 * 1 + 7) / 6), "7 ml of nothing are an error"
    assert agreeing.relative.bias == pytest.approx(100 * np.mean(1 / TRUE[:5])), "no share of nothing"
    assert [(row["unit"], row["n"], row["left_out"]) for row in agreeing.rows()] == [("ml", 6, 0), ("%", 5, 1)]
    assert agreeing.described()[1]["n"] == "5; 1 left out, not in the reference"
    [fewer] = agreements(volumes[1:])
    assert [row["unit"] for row in fewer.rows()] == ["ml"], "limits of four subjects say nothing"
    assert list(agreements(volumes[2:])) == []


def test_sizes_of_errors_are_those_of_the_subjects_that_have_the_target() -> None:
    [agreeing] = agreements(table(volume_ml=SAID, reference_volume_ml=TRUE))
    assert agreeing.error_sizes() == {
        "target": "liver",
        "of": "volume, %",
        "mean": f"{100 * np.mean(1 / TRUE[:5]):.2f}",
        "median": f"{100 / 30:.2f}",
        "largest": "10.00 (a)",
        "within 5 %": "4 of 5",
    }
    off = {"quantity_mean": TRUE + 1, "reference_quantity_mean": TRUE}
    [mean] = agreements(table(**off), QuantityMap("fat_fraction"))
    assert (mean.error_sizes()["of"], mean.error_sizes()["mean"]) == ("mean fat fraction, percentage points", "1.00")
    assert mean.error_sizes()["within 5 %"] == ""


def test_healthy_subjects_that_are_given_volume_count() -> None:
    """Six right to the millilitre, four healthy ones given 30 ml: the bias is 12 ml, not 0."""
    true = np.array([50.0] * 6 + [0.0] * 4)
    said = np.where(true > 0, true, 30.0)
    rows = {"subject": [*"abcdefghij"], "site": "", "target": "liver", "volume_ml": said, "reference_volume_ml": true}
    [agreeing] = agreements(pd.DataFrame(rows))
    assert agreeing.absolute.bias == pytest.approx(12)
    assert (agreeing.relative.bias, agreeing.relative.left_out) == (0, 4)
    assert "4 left out, not in the reference" in agreement_chart(agreeing).svg
    none = pd.DataFrame(rows).assign(reference_volume_ml=0.0)
    [all_healthy] = agreements(none)
    assert [row["unit"] for row in all_healthy.rows()] == ["ml"]
    assert f"bias {said.mean():.2f} ml" in agreement_chart(all_healthy).svg
    assert list(agreements(none.assign(volume_ml=0.0))) == [], "nothing in any: nothing to agree on"


def test_scans_of_one_patient_count_as_one() -> None:
    rng = np.random.default_rng(0)
    true = np.repeat(rng.uniform(20, 80, 6), 3)
    rows = pd.DataFrame(
        {
            "subject": [f"s{i}" for i in range(18)],
            "patient": np.repeat([*"abcdef"], 3),
            "site": "",
            "target": "liver",
            "volume_ml": true + np.repeat(rng.normal(0, 5, 6), 3) + rng.normal(0, 1, 18),
            "reference_volume_ml": true,
        }
    )
    [agreeing] = agreements(rows)
    assert [(row["n"], row["patients"]) for row in agreeing.rows()] == [(18, 6), (18, 6)]
    assert agreeing.described()[0]["n"] == "18 of 6 patients"
    width = np.ptp(agreeing.absolute.bias_ci95)
    assert width > 1.5 * np.ptp(agreement(rows["volume_ml"], true).bias_ci95)
    assert agreeing.concordance.patients == 6
    assert list(agreements(rows[:12])) == [], "four patients"


def test_quantities_agree_in_their_unit_and_undefined_ones_are_left_out() -> None:
    said = np.array([5.0, 6.0, np.nan, 4.0, 5.5, 7.0])
    mean, median = agreements(
        table(quantity_mean=said, reference_quantity_mean=said - 0.5,
              quantity_median=said, reference_quantity_median=said)
    )  # fmt: skip
    assert mean.subjects == ("a", "b", "d", "e", "f")
    [row] = mean.rows()
    assert row["bias"] == pytest.approx(0.5)
    assert median.concordance.value == pytest.approx(1)


def test_who_lies_beyond_the_limits_is_named() -> None:
    subjects = [f"s{i}" for i in range(20)]
    said = np.full(20, 100.0) + np.tile([1, -1], 10)
    said[3] = 150
    rows = pd.DataFrame(
        {
            "subject": subjects,
            "site": "",
            "target": "liver",
            "volume_ml": said,
            "reference_volume_ml": np.full(20, 100.0),
        }
    )
    [agreeing] = agreements(rows)
    assert [row["beyond"] for row in agreeing.rows()] == [["s3"], ["s3"]]
    assert {row["beyond"] for row in agreeing.described()} == {"s3"}


def test_sides_of_a_threshold() -> None:
    fat = table(quantity_mean=np.array([5, 6, 5, 6, 9, 1.0]), reference_quantity_mean=np.array([6, 5, 5, 6, np.nan, 1]))
    assert crossings(fat, 5.56) == {
        "liver": {"n": 5, "right": 3, "above": 1, "below": 2, "over": ["b"], "under": ["a"]}
    }
    assert crossing_sentences(fat, QuantityMap("fat_fraction")) == [
        "liver: mean fat fraction on the right side of 5.56 % in 3 of 5; at or above it only in the prediction: b; "
        "below it only in the prediction: a"
    ]
    assert crossing_sentences(fat, QuantityMap("T1")) == [], "no threshold"


def test_a_quantity_is_called_by_its_name_and_unit() -> None:
    columns = {f"{of}quantity_{s}": SAID for of in ("", "reference_") for s in ("mean", "median")}
    evaluation = Evaluation(table(**columns, quantity_error=SAID), quantity=QuantityMap("fat_fraction", 5))
    assert [evaluation.described_metric(name).title for name in QUANTITIES] == [
        "Fat fraction, mean, %", "Reference fat fraction, mean, %", "Fat fraction error, percentage points",
        "Fat fraction, median, %", "Reference fat fraction, median, %",
    ]  # fmt: skip
    assert [(found.compared.name, found.rows()[0]["unit"]) for found in evaluation.agreements] == [
        ("mean fat fraction", "percentage points"), ("median fat fraction", "percentage points"),
    ]  # fmt: skip


def lesion(of: str, volume_ml: float, matched: bool) -> dict[str, object]:
    row = ("a", "", "lesion", of, volume_ml, 0.0, matched)
    return dict(zip(LESION_COLUMNS, row, strict=True))


def test_lesions_are_counted_by_size() -> None:
    lesions = [
        lesion("reference", 0.02, False), lesion("reference", 0.03, True), lesion("reference", 0.05, False),
        lesion("prediction", 0.03, True), lesion("prediction", 0.004, False), lesion("reference", 250.0, True),
    ]  # fmt: skip
    sizes = Evaluation(table(dice=SAID), lesions=pd.DataFrame(lesions)).lesions_by_size.to_dict("list")
    assert sizes["from_ml"] == [0, 0.01, 0.03, 100]
    assert sizes["to_ml"] == [0.01, 0.03, 0.1, np.inf]
    assert sizes["reference"] == [0, 1, 2, 1]
    assert sizes["found"] == [0, 0, 1, 1]
    assert sizes["predicted"] == [1, 0, 1, 0]
    assert sizes["real"] == [0, 0, 1, 0]


def test_all_of_it_is_written_and_read(tmp_path: Path) -> None:
    columns = {"volume_ml": SAID, "reference_volume_ml": TRUE, "quantity_mean": SAID, "reference_quantity_mean": TRUE}
    lesions = pd.DataFrame([lesion("reference", 0.02, False), lesion("prediction", 200.0, True)])
    evaluation = Evaluation(table(**columns), lesions=lesions, quantity=QuantityMap("fat", 5, 30.5))
    evaluation.write(tmp_path)
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert [(row["of"], row["unit"]) for row in summary["agreement"]] == [
        ("volume", "ml"), ("volume", "%"), ("mean fat", ""),
    ]  # fmt: skip
    assert summary["agreement"][0]["bias"] == pytest.approx(2)
    assert summary["agreement"][1]["left_out"] == 1
    assert summary["lesions_by_size"][1]["to_ml"] == "inf"
    liver = summary["crossings"]["liver"]
    assert {key: liver[key] for key in ("n", "right", "over", "under")} == {
        "n": 6, "right": 5, "over": ["c"], "under": [],
    }  # fmt: skip
    assert liver["above"] + liver["below"] == 5
    back = Evaluation.read(tmp_path)
    assert back.quantity == evaluation.quantity
    pd.testing.assert_frame_equal(back.lesions_by_size, evaluation.lesions_by_size)
