"""``delineate predict --quantity``: ml and fat fraction of new patients, without a reference."""

from __future__ import annotations

import csv
import json
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


def rows(out: Path) -> dict[tuple[str, str], dict[str, str]]:
    with (out / "measurements.csv").open(newline="", encoding="utf-8") as file:
        found = {(row["subject"], row["target"]): row for row in csv.DictReader(file)}
    for_programs = json.loads((out / "measurements.json").read_text(encoding="utf-8"))
    assert [(row["subject"], row["target"]) for row in for_programs["measurements"]] == list(found)
    for row in for_programs["measurements"]:
        in_table = found[row["subject"], row["target"]]
        assert {name: float(in_table[name]) if in_table[name] else None for name in NUMBERS} == {
            name: row[name] for name in NUMBERS
        }
        assert set(row) == set(for_programs["definitions"])
    return found


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
    assert answer["measurements"][0]["quantity_mean"] == pytest.approx(float(first["quantity_mean"]), abs=1e-4)


def test_labels_that_are_there_are_measured_as_they_are(bundle: Path, patients: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict(bundle, patients, *WATER, "-o", out)
    assert not (out / "measurements.csv").exists()
    corrected = np.zeros(GRID.shape, np.uint8)
    corrected[2:8, 2:8, 2:6] = 1  # and no tumour
    write_label(out / "a.nii.gz", LabelVolume(corrected, GRID))
    before = (out / "a.nii.gz").read_bytes()
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
    assert {row["threshold"] for row in answer["measurements"]} == {8.0}
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
    assert measured == found.measured["a"]
    assert float(rows(tmp_path / "out")["a", "liver"]["quantity_mean"]) == pytest.approx(
        measured["liver"].mean, abs=1e-4
    )
    assert prediction.measure("water")["liver"].volume_ml == prediction.volume_ml["liver"]
    assert isnan(prediction.measure("water", threshold=None)["liver"].above_threshold_percent)
    again = delineate.predict(bundle, dataset, tmp_path / "out", **asked)
    assert (again.kept, dict(again.made), dict(again.measured)) == (("a", "b"), {}, {})
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
