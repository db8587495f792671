"""What ``delineate predict`` measures in new patients, without a reference: ml, boxes, channels and fat fraction."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from math import isnan
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner, Result

import delineate
from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.errors import DelineateError
from delineate.io.formats import read_label, read_volume, write_label, write_volume
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

GRID = Grid.of_spacing((12, 10, 8), (2, 2, 5))
NUMBERS = ("volume_ml", "measured_ml", "quantity_mean", "quantity_median", "quantity_sd", "above_threshold_percent")
BOX = ("low_x_ras_mm", "low_y_ras_mm", "low_z_ras_mm", "high_x_ras_mm", "high_y_ras_mm", "high_z_ras_mm")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained network of one channel and two targets that overlap; what it finds is as good as anything."""
    folder = tmp_path_factory.mktemp("bundle")
    recipe = recipe_from(
        {
            "name": "small",
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
        }
    )
    targets = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
    made = Bundle(recipe, recipe.pipeline, targets, ("water",), TileGeometry((8, 8, 4)), (2.0, 2.0, 5.0))
    torch.manual_seed(1)
    made.save(folder, made.network().state_dict(), {})
    return folder


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Water and fat fraction of two patients, a file each."""
    rng = np.random.default_rng(3)
    for name in ("a", "b"):
        water = rng.random((1, *GRID.shape), dtype=np.float32)
        fat = rng.uniform(0, 12, (1, *GRID.shape)).astype(np.float32)
        write_volume(tmp_path / f"patients/{name}_water.nii.gz", Volume(water, GRID))
        write_volume(tmp_path / f"patients/{name}_ff.nii.gz", Volume(fat, GRID))
        write_volume(tmp_path / f"maps/{name}_fat_fraction.nii.gz", Volume(fat, GRID))
    return tmp_path / "patients"


WATER = ("--images", "water=*_water.nii.gz")
BOTH = (*WATER, "--images", "fat_fraction=*_ff.nii.gz", "--quantity", "fat_fraction")


def predict(bundle: Path, *arguments: object, code: int = 0) -> Result:
    words = ["predict", str(bundle), *map(str, arguments), "--device", "cpu", "--compile", "off"]
    done = CliRunner().invoke(app, words)
    if isinstance(done.exception, DelineateError):
        assert code == 1, done.exception
    else:
        assert done.exit_code == code, done.output
    return done


def rows(out: Path, quantity: str = "fat_fraction") -> dict[tuple[str, str], dict[str, str]]:
    """The rows of a quantity by subject and target; all rows are the same for people and for programs."""
    with (out / "measurements.csv").open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    for_programs = json.loads((out / "measurements.json").read_text(encoding="utf-8"))
    for row, in_table in zip(for_programs["measurements"], found, strict=True):
        for name in row.keys() - {"subject", "target", "quantity", "unit", "made_from"}:
            assert row[name] == (float(in_table[name]) if in_table[name] else None)
        assert [*row] == [*for_programs["definitions"]]
        assert all(row[name] == in_table[name] for name in ("subject", "target", "quantity", "unit"))
    return {(row["subject"], row["target"]): row for row in found if row["quantity"] == quantity}


def expected(label: Path, values: list[int], fat: Path, threshold: float = 5.56) -> list[float]:
    mask = np.isin(read_label(label).voxels, values)
    read, ml = read_volume(fat).voxels[0][mask], mask.sum() * GRID.voxel_ml
    return [ml, ml, read.mean(), np.median(read), read.std(), 100 * (read >= threshold).mean()]


def test_each_target_s_volume_and_fat_fraction_are_written(bundle: Path, patients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = predict(bundle, patients, *BOTH, "-o", out)
    assert "fat fraction (channel fat_fraction, %), within the target; threshold 5.56 %" in done.output
    found = rows(out)
    assert list(found) == [(name, target) for name in "ab" for target in ("liver", "tumour")]
    for (name, target), row in found.items():
        numbers = expected(out / f"{name}.nii.gz", [1, 2] if target == "liver" else [2], patients / f"{name}_ff.nii.gz")
        assert [float(row[column]) for column in NUMBERS] == pytest.approx(numbers, abs=1e-4)
        assert (row["quantity"], row["unit"], row["threshold"], row["margin_mm"]) == (
            "fat_fraction",
            "%",
            "5.56",
            "0.0",
        )
    answer = json.loads(predict(bundle, patients, *BOTH, "-o", tmp_path / "json", "--json").stdout)
    first = next(iter(found.values()))
    fat = [row for row in answer["measurements"] if row["quantity"] == "fat_fraction"]
    assert fat[0]["quantity_mean"] == pytest.approx(float(first["quantity_mean"]), abs=1e-4)


def test_every_prediction_is_measured(bundle: Path, patients: Path, tmp_path: Path) -> None:
    """Without being asked: volume, box, and each channel, small values too."""
    for name in "ab":
        water = read_volume(patients / f"{name}_water.nii.gz")
        write_volume(patients / f"{name}_water.nii.gz", Volume(water.voxels * np.float32(1e-4), GRID))
    out = tmp_path / "out"
    answer = json.loads(predict(bundle, patients, *WATER, "-o", out, "--json").stdout)
    found = rows(out, "water")
    assert list(found) == [(name, target) for name in "ab" for target in ("liver", "tumour")]
    assert [(row["subject"], row["target"]) for row in answer["measurements"]] == list(found)
    for (name, target), row in found.items():
        values = [1, 2] if target == "liver" else [2]
        numbers = expected(out / f"{name}.nii.gz", values, patients / f"{name}_water.nii.gz")
        assert [float(row[column]) for column in NUMBERS[:-1]] == pytest.approx(numbers[:-1], rel=1e-3)
        index = np.argwhere(np.isin(read_label(out / f"{name}.nii.gz").voxels, values))
        borders = [*(index.min(axis=0) - 0.5) * (2, 2, 5), *(index.max(axis=0) + 0.5) * (2, 2, 5)]
        assert [float(row[column]) for column in BOX] == pytest.approx(borders)
        assert (row["unit"], row["threshold"], row["above_threshold_percent"]) == ("", "", "")


def test_asking_for_less_forgets_nothing(bundle: Path, patients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, patients, *BOTH, "-o", out)
    before = (out / "measurements.csv").read_bytes()
    predict(bundle, patients, *WATER, "-o", out)
    assert (out / "measurements.csv").read_bytes() == before


def test_a_channel_that_holds_fractions_has_no_unit(bundle: Path, patients: Path, tmp_path: Path) -> None:
    """Whoever does not ask for a fat fraction is not kept from predicting by a map in fractions of 1."""
    trained = Bundle.load(bundle)
    for name, most in (("shares", 1), ("percent", 100)):
        for patient in "ab":
            water = read_volume(patients / f"{patient}_water.nii.gz")
            write_volume(tmp_path / f"{name}/{patient}_pdff.nii.gz", Volume(water.voxels * np.float32(most), GRID))
        network = trained.network()
        torch.manual_seed(1)
        renamed = replace(trained, channels=("pdff",))
        renamed.save(tmp_path / f"{name}_bundle", network.state_dict(), {})
        words = ("--images", "pdff=*_pdff.nii.gz", "-o", tmp_path / f"{name}_out")
        predict(tmp_path / f"{name}_bundle", tmp_path / name, *words)
    told = {(row["unit"], row["threshold"]) for row in rows(tmp_path / "shares_out", "pdff").values()}
    assert told == {("", "")}
    told = {(row["unit"], row["threshold"]) for row in rows(tmp_path / "percent_out", "pdff").values()}
    assert told == {("%", "5.56")}


def test_labels_that_are_there_are_measured_as_they_are(bundle: Path, patients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, patients, *WATER, "-o", out)
    b_before = rows(out, "water")["b", "liver"]
    corrected = np.zeros(GRID.shape, np.uint8)
    corrected[2:8, 2:8, 2:6] = 1  # and no tumour
    write_label(out / "a.nii.gz", LabelVolume(corrected, GRID))
    before = (out / "a.nii.gz").read_bytes()
    answer = json.loads(predict(bundle, patients, *WATER, "-o", out, "--json").stdout)
    assert [(row["subject"], row["target"]) for row in answer["measurements"]] == [("a", "liver"), ("a", "tumour")]
    assert float(rows(out, "water")["a", "liver"]["volume_ml"]) == pytest.approx(6 * 6 * 4 * 0.02)
    assert rows(out, "water")["b", "liver"] == b_before
    answer = json.loads(predict(bundle, patients, *BOTH, "--margin-mm", 2, "-o", out, "--json").stdout)
    assert (answer["skipped"], answer["predictions"]) == (["a", "b"], [])
    found = rows(out)
    assert (out / "a.nii.gz").read_bytes() == before
    inner = read_volume(patients / "a_ff.nii.gz").voxels[0][3:7, 3:7, 2:6]
    liver = found["a", "liver"]
    assert float(liver["volume_ml"]) == pytest.approx(6 * 6 * 4 * 0.02)
    assert float(liver["measured_ml"]) == pytest.approx(inner.size * 0.02)
    assert float(liver["quantity_mean"]) == pytest.approx(inner.mean(), abs=1e-4)
    tumour = found["a", "tumour"]
    assert [tumour[name] for name in NUMBERS] == ["0.0", "0.0", "", "", "", ""], "an empty target is no error"
    assert (
        json.loads(predict(bundle, patients, *BOTH, "--margin-mm", 2, "-o", out, "--json").stdout)["measurements"] == []
    )


def test_the_same_command_completes_what_is_missing(bundle: Path, patients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, patients, *BOTH, "-o", out)
    whole = rows(out)
    head, *lines = (out / "measurements.csv").read_text(encoding="utf-8").splitlines()
    kept = [f"{line},by Ann" for line in lines if line.startswith("a,")]
    (out / "measurements.csv").write_text("\n".join([f"{head},checked", *kept]) + "\n", encoding="utf-8")
    answer = json.loads(predict(bundle, patients, *BOTH, "-o", out, "--json").stdout)
    assert {row["subject"] for row in answer["measurements"]} == {"b"}
    again = rows(out)
    assert {row.pop("checked") for key, row in again.items() if key[0] == "a"} == {"by Ann"}
    assert {row.pop("checked") for key, row in again.items() if key[0] == "b"} == {""}
    assert again == whole
    answer = json.loads(predict(bundle, patients, *BOTH, "--threshold", 8, "-o", out, "--json").stdout)
    assert {row["threshold"] for row in answer["measurements"]} == {8.0, None}
    assert {row["threshold"] for row in rows(out).values()} == {"8.0"}


def test_maps_may_lie_beside_the_scans(bundle: Path, patients: Path, tmp_path: Path) -> None:
    predict(bundle, patients, *BOTH, "-o", tmp_path / "channels")
    maps = tmp_path / "maps"
    beside = (*WATER, "--quantity", f"fat_fraction={maps}")
    predict(bundle, patients, *beside, "-o", tmp_path / "beside")
    one = ("--quantity", f"fat_fraction={maps}/a_fat_fraction.nii.gz")
    predict(bundle, patients / "a_water.nii.gz", *one, "-o", tmp_path / "one")
    for key, row in rows(tmp_path / "channels").items():
        assert all(rows(tmp_path / "beside")[key][name] == row[name] for name in NUMBERS)
        if key[0] == "a":
            assert all(rows(tmp_path / "one")["a_water", key[1]][name] == row[name] for name in NUMBERS)
    refused = predict(bundle, patients, *WATER, *one, "-o", tmp_path / "two", code=1)
    assert "one map of fat_fraction, for 2 subjects" in str(refused.exception)
    refused = predict(bundle, patients, *WATER, "--quantity", f"water={maps}", "-o", tmp_path / "two", code=1)
    assert "the bundle itself uses water" in str(refused.exception), "the network would see the map"
    (maps / "b_fat_fraction.nii.gz").unlink()
    answer = json.loads(predict(bundle, patients, *beside, "-o", tmp_path / "lacking", "--json", code=1).stdout)
    assert [(row["subject"], row["code"]) for row in answer["failed"]] == [("b", "E_MISSING")]
    assert {name for name, _ in rows(tmp_path / "lacking")} == {"a"}
    assert str(
        predict(bundle, patients, *WATER, "--quantity", "fat=nowhere", "-o", tmp_path / "x", code=1).exception
    ).startswith("E_MISSING")


def test_shares_of_one_are_not_taken_for_percent(bundle: Path, patients: Path, tmp_path: Path) -> None:
    fat = read_volume(patients / "a_ff.nii.gz")
    write_volume(patients / "a_ff.nii.gz", Volume(fat.voxels / 12, GRID))
    answer = json.loads(predict(bundle, patients, *BOTH, "-o", tmp_path / "out", "--json", code=1).stdout)
    [failure] = answer["failed"]
    assert failure["subject"] == "a"
    assert "fractions of 1" in failure["error"]


def test_a_map_on_another_grid_is_refused(bundle: Path, patients: Path, tmp_path: Path) -> None:
    fat = read_volume(patients / "a_ff.nii.gz")
    write_volume(patients / "a_ff.nii.gz", Volume(fat.voxels, GRID.crop((3, 0, 0), GRID.shape)))
    answer = json.loads(predict(bundle, patients, *BOTH, "-o", tmp_path / "out", "--json", code=1).stdout)
    assert [(row["subject"], row["code"]) for row in answer["failed"]] == [("a", "E_GRID_MISMATCH")]
    assert not (tmp_path / "out/a.nii.gz").exists()


def test_from_python_it_is_the_same(bundle: Path, patients: Path, tmp_path: Path) -> None:
    scans = [
        Subject(n, {"water": patients / f"{n}_water.nii.gz", "fat_fraction": patients / f"{n}_ff.nii.gz"}) for n in "ab"
    ]
    dataset = Dataset("patients", patients, "cases", tuple(scans))
    asked = {"quantity": "fat_fraction", "margin_mm": 2.0, "device": "cpu"}
    found = delineate.predict(bundle, dataset, tmp_path / "out", **asked)
    prediction = delineate.load(bundle, device="cpu").predict(scans[0])
    measured = prediction.measure("fat_fraction", patients / "a_ff.nii.gz", margin_mm=2)
    assert measured == {target: by_channel["fat_fraction"] for target, by_channel in found.measured["a"].items()}
    assert [*found.measured["a"]["liver"]] == ["water", "fat_fraction"]
    assert float(rows(tmp_path / "out")["a", "liver"]["quantity_mean"]) == pytest.approx(
        measured["liver"].mean, abs=1e-4
    )
    assert prediction.measure("water")["liver"].volume_ml == prediction.volume_ml["liver"]
    assert isnan(prediction.measure("water", threshold=None)["liver"].above_threshold_percent)
    again = delineate.predict(bundle, dataset, tmp_path / "out", **asked)
    assert (again.kept, dict(again.made), dict(again.measured)) == (("a", "b"), {}, {})
    fat = read_volume(patients / "a_ff.nii.gz")
    holed = np.where(np.arange(GRID.shape[2]) > 0, fat.voxels, np.nan)
    with pytest.raises(DelineateError, match="the map of fat_fraction has voxels that are not finite"):
        prediction.measure("fat_fraction", Volume(holed, fat.grid))
    with pytest.raises(DelineateError, match="lacks fat"):
        prediction.measure("fat")
    with pytest.raises(DelineateError, match=r"call its \.measure"):
        delineate.predict(bundle, scans[0], quantity="fat_fraction")
    with pytest.raises(DelineateError, match="none is named"):
        delineate.predict(bundle, dataset, tmp_path / "out", margin_mm=2)


def test_a_label_that_cannot_be_read_back_is_measured_when_it_is_made(
    bundle: Path, patients: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    predict(bundle, patients, *WATER, "--format", "vtk", "-o", out)
    answer = json.loads(predict(bundle, patients, *BOTH, "--format", "vtk", "-o", out, "--json", code=1).stdout)
    assert {(row["subject"], row["code"]) for row in answer["failed"]} == {("a", "E_FORMAT"), ("b", "E_FORMAT")}
    assert "--overwrite" in answer["failed"][0]["error"]
    predict(bundle, patients, *BOTH, "--format", "vtk", "-o", out, "--overwrite")
    assert len(rows(out)) == 4
