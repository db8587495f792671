"""Bundles in use: one line from a scan to a label, whatever holds the scan, and stopped where it is asked."""

from __future__ import annotations

import pickle
import re
import threading
from base64 import b64decode
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchio
from numpy.typing import NDArray
from PIL import Image
from torch import nn

import delineate
from delineate import interop
from delineate.api.bundle import _as_volume
from delineate.api.prediction import Prediction
from delineate.core.grid import Grid, permute_axes
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.inspection import Inspection, Problem
from delineate.errors import (
    BadVoxels,
    BundleError,
    Cancelled,
    DatasetError,
    GridMismatch,
    MissingFile,
    OutputError,
    RecipeError,
)
from delineate.io.legends import ITK_SNAP, SLICER


def test_one_line_from_a_scan_to_its_label(here) -> None:
    written = delineate.load("run/bundle").predict("scan.nii.gz").save("one-line.nii.gz")
    label = delineate.read("one-line.nii.gz", label=True)
    assert written == [Path("one-line.nii.gz")]
    assert label.grid.matches(delineate.read("scan.nii.gz").grid, 0)


def test_a_run_s_folder_stands_for_its_bundle(here) -> None:
    a, b = delineate.load("run"), delineate.load("run/bundle")
    assert a.folders == b.folders == (Path("run/bundle"),)
    assert delineate.load(here / "run").channels == ("image",)


def test_threads_share_a_bundle_and_each_gets_what_it_asked_for(here) -> None:
    asked = [{"flips": flips, "overlap": overlap} for flips in ("", "xyz") for overlap in (0.0, 0.5)]
    bundle = delineate.load("run", engine="torch")

    def probabilities(settings: dict[str, Any]) -> NDArray | None:
        return bundle.predict("scan.nii.gz", probabilities=True, **settings).probabilities

    alone = [probabilities(settings) for settings in asked]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(probabilities, asked * 4))
    for found, wanted in zip(together, alone * 4, strict=True):
        np.testing.assert_array_equal(found, wanted)
    assert not np.array_equal(alone[0], alone[-1])


def test_a_bundle_may_be_sent_to_another_process(here) -> None:
    bundle = delineate.load("run")
    wanted = bundle.predict("scan.nii.gz").label.voxels
    sent = pickle.loads(pickle.dumps(bundle))
    np.testing.assert_array_equal(sent.predict("scan.nii.gz").label.voxels, wanted)


def test_whatever_holds_the_scan_the_label_is_the_same(here) -> None:
    bundle, scan = delineate.load("run"), delineate.read("scan.nii.gz")
    wanted = bundle.predict("scan.nii.gz").label
    subject = delineate.open_dataset("scans").subjects[0]
    tensor = torch.from_numpy(scan.voxels.copy())
    image = torchio.ScalarImage(tensor=tensor, affine=scan.grid.affine)
    label = torchio.LabelMap(tensor=tensor, affine=scan.grid.affine)
    for same in (
        Path("scan.nii.gz"),
        scan,
        subject,
        interop.to_nibabel(scan),
        interop.to_simpleitk(scan),
        image,
        torchio.ScalarImage("scan.nii.gz"),  # not read yet
        interop.from_numpy(scan.voxels[0], scan.grid.affine),
        {"image": "scan.nii.gz"},
        {"image": scan},
        torchio.Subject(t1=image, label=label),
    ):
        found = bundle.predict(same).label
        np.testing.assert_array_equal(found.voxels, wanted.voxels)
        assert found.grid.matches(wanted.grid, 1e-9)


def test_a_scan_in_another_orientation_gets_its_label_there(here) -> None:
    """Permuted and flipped, by way of SimpleITK: the label lies on that grid, and is that of the same voxels there."""
    bundle, scan = delineate.load("run"), delineate.read("scan.nii.gz")
    order, flip = (2, 0, 1), (True, False, True)
    turned = Volume(permute_axes(scan.voxels, order, flip), scan.grid.permute(order, flip))
    found = bundle.predict(interop.to_simpleitk(turned), probabilities=True)
    wanted = bundle.predict(turned, probabilities=True)
    assert found.label.grid.matches(turned.grid, 1e-9)
    np.testing.assert_array_equal(found.label.voxels, wanted.label.voxels)
    np.testing.assert_array_equal(found.probabilities, wanted.probabilities)


def test_channels_go_in_by_name_in_the_bundle_s_order(tmp_path, rng) -> None:
    grid = Grid.of_spacing((4, 5, 6), (1, 1, 2))
    t1, flair = (Volume(rng.random((1, *grid.shape), np.float32), grid) for _ in range(2))
    delineate.write(tmp_path / "flair.nii", flair)
    scan = {"FLAIR": tmp_path / "flair.nii", "T2": t1, "T1": interop.to_simpleitk(t1)}
    volume, _ = _as_volume(scan, ("T1", "FLAIR"), resample=False)
    np.testing.assert_array_equal(volume.voxels, np.concatenate([t1.voxels, flair.voxels]))
    with pytest.raises(MissingFile, match="PD"):
        _as_volume(scan, ("T1", "PD"), resample=False)
    with pytest.raises(GridMismatch, match="FLAIR"):
        _as_volume(
            {"T1": t1, "FLAIR": Volume(t1.voxels, grid.crop((1, 0, 0), grid.shape))}, ("T1", "FLAIR"), resample=False
        )


def test_channels_on_other_grids_are_resampled_in_memory_as_from_files(tmp_path, rng) -> None:
    grids = {"T1": Grid.of_spacing((4, 5, 6), (1, 1, 2)), "FLAIR": Grid.of_spacing((8, 5, 3), (0.5, 1, 4))}
    scans = {name: Volume(rng.random((1, *grid.shape), np.float32), grid) for name, grid in grids.items()}
    for name, volume in scans.items():
        delineate.write(tmp_path / f"{name}.nii", volume)
    files = {name: tmp_path / f"{name}.nii" for name in scans}
    wanted, _ = _as_volume(files, ("T1", "FLAIR"), resample=True)
    for scan in (scans, {**scans, "T1": files["T1"]}):
        found, _ = _as_volume(scan, ("T1", "FLAIR"), resample=True)
        assert found.grid.matches(grids["T1"], 1e-5)
        np.testing.assert_allclose(found.voxels, wanted.voxels, atol=1e-5)
    with pytest.raises(GridMismatch, match="FLAIR"):
        _as_volume(scans, ("T1", "FLAIR"), resample=False)


def test_a_data_set_is_predicted_as_its_folder_is(here, tmp_path) -> None:
    """A single channel may have any name; a data set none of whose scans can be predicted is refused."""
    dataset = delineate.open_dataset("scans")
    first = dataset.subjects[0]
    [file] = first.scans.values()
    lacking = replace(first, id="lacking", scans={"T1": file, "T2": file})
    some = replace(dataset, subjects=(first.with_channels(["T1"]), lacking))
    found = delineate.predict("run", some, tmp_path / "out")
    assert (set(found.made), set(found.failed)) == ({first.id}, {"lacking"})
    with pytest.raises(MissingFile, match="lacks"):
        delineate.predict("run", replace(dataset, subjects=(lacking,)), tmp_path / "none")


def test_what_is_no_scan_is_refused(here) -> None:
    bundle, scan = delineate.load("run"), delineate.read("scan.nii.gz")
    broken = scan.voxels.copy()
    broken[0, 3, 3, 3] = np.nan
    with pytest.raises(BadVoxels):
        bundle.predict(Volume(broken, scan.grid))
    with pytest.raises(MissingFile, match="lacks \\['image'\\]"):
        bundle.predict({"a": scan, "b": scan})
    with pytest.raises(DatasetError, match="4 scans"):
        bundle.predict("scans")
    with pytest.raises(DatasetError, match="out="):
        delineate.predict(bundle, delineate.open_dataset("scans"))  # type: ignore[call-overload]
    with pytest.raises(BundleError):
        delineate.load("scans")


@pytest.mark.parametrize(
    ("asked", "fix"),
    [
        ({"device": "cuda"}, "open it with device='cuda'"),
        ({"device": "cpu", "precision": "bf16", "engine": "torch"}, "open it with precision='bf16', engine='torch'"),
        ({"margin_mm": 2}, "call its .measure"),
        ({"threshold": 0.0}, "call its .measure"),
        ({"maps": "maps"}, "call its .measure"),
        ({"format": "dcm"}, "out="),
        ({"images": "*.nii.gz"}, "out="),
        ({"unseen": True}, "out="),
        ({"overwrite": True}, "out="),
    ],
    ids=str,
)
def test_what_would_not_be_heeded_is_refused(here, asked, fix) -> None:
    with pytest.raises(RecipeError) as refused:
        delineate.predict(delineate.load("run", device="cpu"), "scan.nii.gz", **asked)
    assert fix in refused.value.fix
    assert all(name in str(refused.value) for name in asked if fix == "out=")


def test_patterns_are_for_folders(here, tmp_path) -> None:
    with pytest.raises(RecipeError, match="open_dataset"):
        delineate.predict("run", delineate.open_dataset("scans"), tmp_path / "out", images="*.nii.gz")
    assert not (tmp_path / "out").exists()


def test_the_scan_is_never_written_over(here) -> None:
    before = Path("scan.nii.gz").read_bytes()
    with pytest.raises(OutputError, match="an input"):
        delineate.load("run").predict("scan.nii.gz").save("scan.nii.gz")
    assert Path("scan.nii.gz").read_bytes() == before


def test_the_network_is_plain_pytorch_and_predicting_does_not_depend_on_what_is_done_to_it(here) -> None:
    bundle = delineate.load("run")
    assert isinstance(bundle.network, nn.Module)
    assert bundle.network is bundle.network
    before = bundle.predict("scan.nii.gz").label.voxels
    with torch.no_grad():
        for parameter in bundle.network.parameters():
            parameter.fill_(float("nan"))
    for again in (bundle, delineate.load("run")):
        np.testing.assert_array_equal(again.predict("scan.nii.gz").label.voxels, before)
    np.testing.assert_array_equal(bundle.predict("scan.nii.gz", flips="x", overlap=0).label.grid.shape, before.shape)


def test_an_ensemble_of_one_network_twice_agrees_with_itself(here) -> None:
    both = delineate.load("run", "run")
    found = both.predict("scan.nii.gz")
    assert found.confidence["ball"].mutual_dice == 1 or found.volume_ml["ball"] == 0
    np.testing.assert_array_equal(found.label.voxels, delineate.load("run").predict("scan.nii.gz").label.voxels)
    with pytest.raises(BundleError, match="2 networks"):
        _ = both.network
    assert len(both.networks) == 2


def test_a_bundle_shows_its_card_and_an_ensemble_those_of_all(here) -> None:
    card = delineate.load("run").card
    assert card == Path("run/bundle/card.md").read_text(encoding="utf-8")
    assert "case" not in card, "no subject"
    assert delineate.load("run", "run").card.count("## Licence") == 2


def test_progress_is_told_and_a_token_stops_between_tiles(here) -> None:
    bundle, cancel = delineate.load("run"), threading.Event()
    seen: list[tuple[str, int, int]] = []
    rng = np.random.default_rng(0)
    scan = Volume(rng.random((1, 64, 64, 48), np.float32), Grid.of_spacing((64, 64, 48)))

    def told(*what: object) -> None:
        seen.append(what)  # type: ignore[arg-type]
        if len(seen) == 2:
            cancel.set()

    with pytest.raises(Cancelled) as raised:
        bundle.predict(scan, progress=told, cancel=cancel)
    assert raised.value.code == "E_CANCELLED"
    assert len(seen) == 2
    assert seen[0][0] == "tiles"
    assert seen[1][1] < seen[1][2], "tiles were left to do"
    with pytest.raises(Cancelled):
        bundle.predict(scan, cancel=cancel)
    assert bundle.predict("scan.nii.gz").label.voxels.shape == (16, 16, 12), "the bundle is as good as before"


def test_cancelled_in_the_midst_of_many_scans_whole_labels_stay_and_the_next_call_goes_on(here, tmp_path) -> None:
    cancel, told = threading.Event(), []

    def progress(what: str, done: int, total: int) -> None:
        told.append((what, done, total))
        cancel.set()

    with pytest.raises(Cancelled):
        delineate.predict("run", "scans", tmp_path / "out", progress=progress, cancel=cancel)
    there = sorted(path.name for path in (tmp_path / "out").iterdir())
    labels = [name for name in there if name.endswith(".nii.gz")]
    assert 0 < len(labels) < 4
    tables = {"review.csv", "measurements.csv", "measurements.json"}
    assert set(there) - set(labels) == {*tables, ITK_SNAP, SLICER}
    assert "E_CANCELLED" not in (tmp_path / "out" / "review.csv").read_text(encoding="utf-8"), "no scan has failed"
    for name in labels:
        delineate.read(tmp_path / "out" / name, label=True)
    after = delineate.predict("run", "scans", tmp_path / "out")
    assert len(after.made) + len(after.kept) == 4
    assert set(after.kept) == {name.removesuffix(".nii.gz") for name in labels}


def test_one_bad_scan_does_not_stop_the_rest(here, tmp_path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.nii.gz").write_bytes(Path("scan.nii.gz").read_bytes())
    (tmp_path / "a.nii.gz").write_bytes(Path("scan.nii.gz").read_bytes()[:999])
    found = delineate.predict("run", [tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], tmp_path / "out")
    assert set(found.failed) == {"a"}
    assert found.made == {"b": tmp_path / "out" / "b.nii.gz"}
    assert "failed" in found._repr_html_()


# What notebooks show ---------------------------------------------------------------------------------------------

HOSTILE = "_<script>alert(1)</script>&\x1b[2J$\\frac$肝"


def picture_in(html: str) -> Image.Image:
    found = re.search(r'src="data:image/png;base64,([^"]+)"', html)
    assert found
    return Image.open(BytesIO(b64decode(found[1])))


def is_harmless(html: str) -> bool:
    return "<script" not in html and "\x1b" not in html and "&lt;script&gt;" in html


def test_a_prediction_shows_three_views_ml_and_expected_dice(here) -> None:
    found = delineate.load("run").predict("scan.nii.gz")
    label = delineate.read("reference.nii.gz", label=True)
    shown = Prediction(**{**vars(found), "label": label, "unusual": (HOSTILE,)})
    html = shown._repr_html_()
    assert is_harmless(html)
    assert "expected Dice" in html
    assert f"{shown.volume_ml['ball']:.4g}" in html
    picture = picture_in(html)
    width, height = picture.size
    assert width > 1.5 * height > 100, "three views side by side"
    empty = Prediction(**{**vars(found), "label": LabelVolume(np.zeros_like(label.voxels), label.grid)})
    coloured = [np.ptp(np.asarray(picture_in(p._repr_html_()).convert("RGB")), axis=2).max() for p in (shown, empty)]
    assert coloured[0] > 50 > coloured[1], "the overlay is in colour, the scan alone is grey"


def test_hostile_targets_are_shown_as_text(here) -> None:
    found = delineate.load("run").predict("scan.nii.gz")
    targets = delineate.Targets({HOSTILE: (1,), "long" * 99: (2,)})
    shown = Prediction(**{**vars(found), "targets": targets, "confidence": {HOSTILE: found.confidence["ball"]}})
    assert is_harmless(shown._repr_html_())


def test_inspections_and_evaluations_are_tables_of_text(here) -> None:
    inspection = delineate.inspect("scans")
    assert inspection._repr_html_().count("<tr>") == 2 + 4 + len(inspection.problems)
    bad = replace(inspection, dataset=HOSTILE, problems=(Problem("E", "error", HOSTILE, HOSTILE, HOSTILE),))
    assert is_harmless(bad._repr_html_())
    assert isinstance(bad, Inspection)
    label = delineate.read("reference.nii.gz", label=True)
    evaluation = delineate.evaluate(label, label, targets=delineate.Targets({HOSTILE: (1,)}))
    html = evaluation._repr_html_()
    assert is_harmless(html)
    assert "95 % interval" in html


# Measuring -------------------------------------------------------------------------------------------------------


def test_measuring_one_label_gives_what_measuring_its_folder_gives(here, tmp_path) -> None:
    prediction, reference = tmp_path / "p", tmp_path / "r"
    found = delineate.load("run").predict("scan.nii.gz")
    moved = LabelVolume(np.roll(delineate.read("reference.nii.gz", label=True).voxels, 1, axis=0), found.scan.grid)
    delineate.write(prediction / "scan.nii.gz", moved)
    delineate.write(reference / "scan.nii.gz", delineate.read("reference.nii.gz", label=True))
    targets = delineate.Targets({"ball": (1,)})
    one = delineate.evaluate(moved, "reference.nii.gz", targets=targets, metrics=["dice", "hd95_mm"])
    folder = delineate.evaluate(prediction, reference, targets=targets, metrics="dice,hd95_mm")
    assert 0 < one.table["dice"][0] < 1
    for metric in ("dice", "hd95_mm"):
        assert one.table[metric].tolist() == folder.table[metric].tolist()
    assert delineate.evaluate(found, "reference.nii.gz").targets == ("ball",)


def test_methods_are_compared_by_name(here) -> None:
    both = delineate.compare({"U-Net": "run"}, V="run/evaluation")
    assert {(one.first, one.second) for one in both} == {("U-Net", "V")}
    with pytest.raises(DatasetError, match="at least two"):
        delineate.compare(a="run")
    with pytest.raises(MissingFile):
        delineate.compare(a="run", b="scans")
