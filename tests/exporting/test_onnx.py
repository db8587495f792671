"""ONNX files: what Delineate writes, run by programs that do not know it."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner, Result

from delineate import plugins
from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import CannotExport, OutputError
from delineate.exporting.description import Description, describe
from delineate.exporting.onnx import LEAST_AGREEMENT, Agreement, _check, check_installed, export_onnx, read_description
from delineate.io.formats import read_label, write_volume
from delineate.preprocessing.intensity import ClipPercentiles
from delineate.recipe import recipe_from
from delineate.sampling.tiles import geometry_for
from delineate.specification import from_json, to_json

SCRIPT = Path(__file__).parents[2] / "examples/onnx/predict_onnx.py"
SPACING = (1.5, 1.5, 3.0)
NESTED = Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping")
INNER_FIRST = Targets({"tumour": (2,), "liver": (1, 2)}, "overlapping")
APART = Targets({"liver": (1,), "spleen": (5,)})
runner = CliRunner()

UNET_3D: dict[str, Any] = {
    "name": "patches",
    "preprocessing": [
        {"kind": "reorient"},
        {"kind": "resample", "spacing_mm": [1.5, 1.5, None]},
        {"kind": "clip_percentiles", "lower": 2, "upper": 98},
        {"kind": "normalise"},
    ],
    "tiles": {"kind": "patches", "shape": [16, 48, 8]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
    "inference": {"flips": ["x", "z"]},
}
UNET_25D: dict[str, Any] = {
    "name": "slices",
    "preprocessing": [
        {"kind": "reorient"},
        {"kind": "clip_percentiles", "within": "nonzero"},
        {"kind": "normalise", "within": "nonzero"},
    ],
    "tiles": {
        "kind": "slices", "axis": "y", "shape": [24, 16], "neighbours": 1, "standardise": "together", "outside": "zero",
    },
    "network": {"kind": "unet", "dimensions": 2, "widths": [4, 8], "norm": "batch"},
    "inference": {"flips": ["x", "y"], "average": "logits", "advance": "fractional", "overlap": 0.3},
}  # fmt: skip
WHOLE_SLICES: dict[str, Any] = {
    **UNET_25D,
    "tiles": {"kind": "slices", "axis": "z"},
    "network": {"kind": "unet", "dimensions": 2, "widths": [4, 6]},
}


def save_bundle(
    folder: Path,
    settings: dict[str, Any],
    targets: Targets = APART,
    channels: int = 1,
    seed: int = 0,
    scale: float = 20,
) -> Bundle:
    """A random network that is as sure of itself as a trained one, so that few voxels lie between two targets."""
    recipe = recipe_from(settings)
    geometry = geometry_for(recipe.tiles, (24, 24, 8), SPACING, recipe.network)
    names = tuple(f"MR{i}" for i in range(channels))
    bundle = Bundle(recipe, recipe.pipeline, targets, names, geometry, SPACING)
    torch.manual_seed(seed)
    weights = bundle.network().state_dict()
    weights["head.weight"] *= scale
    bundle.save(folder, weights, {})
    return Bundle.load(folder)


def oblique_scan(folder: Path, channels: int) -> list[Path]:
    """A scan tilted and turned against the body's axes, of 0.9 × 1.2 × 3 mm; a quarter of it is 0."""
    affine = np.eye(4)
    turned = Rotation.from_euler("xyz", (12, -17, 9), degrees=True).as_matrix() @ [[0, -1, 0], [0, 0, 1], [-1, 0, 0]]
    affine[:3] = np.column_stack([turned @ np.diag([0.9, 3.0, 1.2]), (3, -7, 20)])
    rng, files = np.random.default_rng(3), []
    for i in range(channels):
        voxels = (gaussian_filter(rng.standard_normal((40, 14, 33)), 2) * 3000 + 500).astype(np.int16)
        voxels[:10] = 0
        files.append(folder / f"case_{i:04}.nii.gz")
        write_volume(files[-1], Volume(voxels[None], Grid(voxels.shape, affine.astype(np.float32))))
    return files


def delineate(*arguments: object) -> Result:
    done = runner.invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, (done.output, done.exception)
    return done


@pytest.mark.parametrize(
    ("settings", "targets", "channels", "seed"), [(UNET_3D, APART, 1, 5), (UNET_25D, NESTED, 2, 10)], ids=["3D", "2.5D"]
)
def test_a_script_without_delineate_predicts_what_predict_does(settings, targets, channels, seed, tmp_path) -> None:
    save_bundle(tmp_path / "run/bundle", settings, targets, channels, seed)  # a seed with some of each target
    scans = oblique_scan(tmp_path / "scans", channels)
    said = json.loads(delineate("export", tmp_path / "run", "--onnx", "-o", tmp_path / "m.onnx", "--json").stdout)
    assert said["same_labels"] >= LEAST_AGREEMENT
    assert said["input"][:2] == ["batch", channels]
    script = [sys.executable, "-I", SCRIPT, tmp_path / "m.onnx", tmp_path / "label.nii.gz", *scans]
    subprocess.run(list(map(str, script)), check=True, timeout=300)
    patterns = [part for i in range(channels) for part in ("--images", f"MR{i}=*_{i:04}.nii.gz")]
    delineate("predict", tmp_path / "run", tmp_path / "scans", *patterns, "-o", tmp_path / "out", "--precision", "fp32")
    found, expected = read_label(tmp_path / "label.nii.gz"), read_label(tmp_path / "out/case.nii.gz")
    assert found.grid.matches(expected.grid, tolerance_mm=1e-4)
    values, counts = np.unique(expected.voxels, return_counts=True)
    assert len(values) == 3
    assert counts.min() > 1000
    assert np.mean(found.voxels == expected.voxels) >= LEAST_AGREEMENT


def test_the_script_has_forty_lines_and_needs_three_packages() -> None:
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {alias.name if isinstance(node, ast.Import) else node.module for node in imports for alias in node.names}
    assert {str(name).partition(".")[0] for name in names} - sys.stdlib_module_names == {
        "nibabel", "numpy", "onnxruntime"
    }  # fmt: skip
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    code = lines[imports[-1].lineno :]  # without the docstring, and what is imported
    assert sum(bool(line.strip()) for line in code) <= 40


def test_its_percentiles_are_those_of_large_scans(rng) -> None:
    """Which are not taken over all of more than a million voxels."""
    tree = ast.parse(SCRIPT.read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    names: dict[str, Any] = {"np": np}
    exec(compile(ast.Module(functions, []), str(SCRIPT), "exec"), names)
    voxels = rng.standard_normal((2, 130, 90, 101)).astype(np.float32)
    step = ClipPercentiles(lower=1, upper=98)
    expected = step.apply(Volume(voxels, Grid.of_spacing(voxels.shape[1:])))[0].voxels
    np.testing.assert_array_equal(voxels.clip(*names["percentiles"](voxels, [1, 98])), expected)


def test_what_the_script_cannot_do_it_refuses(tmp_path) -> None:
    steps = [{"kind": "reorient"}, {"kind": "normalise", "method": "minmax"}]
    save_bundle(tmp_path / "b", {**UNET_25D, "preprocessing": steps})
    export_onnx([tmp_path / "b"], tmp_path / "m.onnx")
    script = [sys.executable, SCRIPT, tmp_path / "m.onnx", tmp_path / "label.nii.gz", *oblique_scan(tmp_path, 1)]
    done = subprocess.run(list(map(str, script)), capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 1
    assert "cannot do {'kind': 'normalise', 'method': 'minmax'" in done.stderr
    assert not (tmp_path / "label.nii.gz").exists()
    # The same file is looked at from all sides, since making one takes seconds.
    contents = (tmp_path / "m.onnx").read_bytes()
    assert not [name for name in (str(tmp_path), "site-packages", "delineate/networks") if name.encode() in contents]
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)
    again = runner.invoke(app, ["export", str(tmp_path / "b"), "--onnx", "-o", str(tmp_path / "m.onnx")])
    assert isinstance(again.exception, OutputError)
    assert (tmp_path / "m.onnx").read_bytes() == contents


def test_whole_slices_have_any_size_and_bundles_are_averaged(tmp_path, rng) -> None:
    """A target that bundles list before the one that it lies within is an output after that one."""
    bundles = [save_bundle(tmp_path / f"b{seed}", WHOLE_SLICES, INNER_FIRST, seed=seed) for seed in (1, 2)]
    said = delineate("export", tmp_path / "b1", "--also", tmp_path / "b2", "--onnx", "-o", tmp_path / "m.onnx").stdout
    assert "the mean of 2 bundles" in said
    assert str(bundles[0].geometry.shape[2]) in said
    described = read_description(tmp_path / "m.onnx")
    assert described.weights_sha256 == tuple(bundle.weights_sha256 for bundle in bundles)
    assert described.tiles.shape == (None, None, 1)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch, x, y in ((1, 4, 20), (5, 36, 8)):
        tile = rng.standard_normal((batch, 1, x, y, 1)).astype(np.float32)
        with torch.inference_mode():
            each = [bundle.trained_network()(torch.from_numpy(tile[..., 0])).numpy() for bundle in bundles]
        found = session.run(None, {"tile": tile})[0][..., 0]
        np.testing.assert_allclose(found, np.mean(each, 0)[:, ::-1], rtol=1e-3, atol=1e-3)


def test_the_description_says_how_tiles_and_targets_are_meant(tmp_path) -> None:
    settings = {
        **UNET_25D,
        "data": {"colours": {"tumour": "#102030"}},
        "postprocessing": {"within": {"tumour": "liver"}},
    }
    bundle = save_bundle(tmp_path / "b", settings, NESTED, 2)
    described = describe([bundle], {"delineate": "1"})
    assert from_json(Description, to_json(described, indent=None)) == described
    assert [(target.name, target.value, target.colour) for target in described.targets] == [
        ("liver", 1, "#56b4e9"), ("tumour", 2, "#102030")
    ]  # fmt: skip
    assert (described.threshold, described.average, described.outputs) == (0.0, "logits", ("liver", "tumour"))
    inner_first = describe([replace(bundle, targets=INNER_FIRST)], {"delineate": "1"})
    assert (inner_first.outputs, inner_first.targets) == (described.outputs, described.targets)
    assert described.flips == ((), (2,))  # y is across the slices
    assert described.preprocessing == bundle.pipeline.steps
    assert described.postprocessing.within == {"tumour": "liver"}
    tiles, geometry = described.tiles, bundle.geometry
    product = np.einsum("x,y,z->xyz", *tiles.weights)
    np.testing.assert_array_equal(product.astype(np.float32), geometry.weights("gaussian"))
    assert (tiles.shape, tiles.margin, tiles.divisor) == ((24, 1, 16), (0, 1, 0), (2, 1, 2))
    starts = sorted({tile.start[0] for tile in geometry.tiles((70, 1, 16), 0.3, "fractional")})
    assert max(np.diff(starts)) <= tiles.step[0] == pytest.approx(24 * 0.7)


def test_bundles_that_read_tiles_differently_are_refused(tmp_path) -> None:
    save_bundle(tmp_path / "a", UNET_25D)
    save_bundle(tmp_path / "b", {**UNET_25D, "inference": {"flips": []}})
    with pytest.raises(CannotExport, match=r"differs from .* in tiles, flips"):
        export_onnx([tmp_path / "a", tmp_path / "b"], tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("setting", [{"average": "tile_logits"}, {"advance": "fixed"}, {"weights": "monai"}], ids=str)
def test_tiles_that_the_description_does_not_have_are_refused(setting, tmp_path) -> None:
    save_bundle(tmp_path / "b", {**UNET_25D, "inference": setting})
    with pytest.raises(CannotExport, match="as MONAI's"):
        export_onnx([tmp_path / "b"], tmp_path / "m.onnx")


def test_a_file_that_answers_otherwise_is_refused_and_removed(tmp_path) -> None:
    save_bundle(tmp_path / "b", UNET_25D, scale=1e38)  # finite weights, whose logits are not
    with pytest.raises(CannotExport, match="the limits"):
        export_onnx([tmp_path / "b"], tmp_path / "out/m.onnx")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("same", "difference"), [(0.9998, 0.0), (1.0, 2e-3), (nan, 0.0), (1.0, nan)])
def test_how_far_engines_may_differ(same, difference) -> None:
    _check(Agreement(0.99995, 9e-4))
    with pytest.raises(CannotExport):
        _check(Agreement(same, difference))


def test_a_missing_package_is_named_before_anything_is_read(tmp_path, monkeypatch) -> None:
    check_installed()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    refused = runner.invoke(app, ["export", str(tmp_path / "nowhere"), "--onnx", "-o", str(tmp_path / "m.onnx")])
    assert isinstance(refused.exception, CannotExport)
    assert "onnxruntime" in refused.exception.message
    assert "delineate[onnx]" in refused.exception.fix


def test_a_step_of_another_package_is_refused(tmp_path, monkeypatch) -> None:
    """A file cannot carry its code."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "contracts")
    monkeypatch.setenv(plugins.VARIABLE, "own_parts")
    save_bundle(tmp_path / "b", {**UNET_25D, "preprocessing": [{"kind": "square"}]})
    with pytest.raises(CannotExport, match="'square' is code of own_parts"):
        export_onnx([tmp_path / "b"], tmp_path / "m.onnx")
