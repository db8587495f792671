from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from delineate.bundle import Bundle, Provenance, bundle_folder, hidden, is_whole, save_weights
from delineate.compute import plan_compute
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import BundleError, RecipeError, UnknownKey
from delineate.fingerprint import Fingerprint, Range
from delineate.inference.predictor import Predictor
from delineate.inference.review import review
from delineate.io.pseudonyms import key_id
from delineate.io.sealed import replace_file
from delineate.recipe import load_recipe, packaged_recipes, recipe_from
from delineate.sampling.tiles import TileGeometry, geometry_for

PLAN = plan_compute(device="cpu", precision="fp32", compile="off")


def small_bundle(**recipe) -> Bundle:
    values = {
        "name": "small",
        "preprocessing": [
            {"kind": "reorient", "to": "RAS"},
            {"kind": "resample", "spacing_mm": [1.5, 1.5, None]},
            {"kind": "normalise", "method": "zscore"},
        ],
        "tiles": {"kind": "patches", "shape": [8, 8, 4]},
        "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
    }
    made = recipe_from(values | recipe)
    return Bundle(
        recipe=made,
        pipeline=made.pipeline,
        targets=Targets({"liver": (1,), "tumour": (2,)}),
        channels=("T1",),
        geometry=TileGeometry((8, 8, 4)),
        spacing_mm=(1.5, 1.5, 5.0),
        fingerprint=Fingerprint(3, (Range("contrast", "T1", 1.5, 2.25, 3.0),)),
        provenance=Provenance(layout="cases", fold=1, versions={"python": "3.11"}),
    )


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    bundle = small_bundle()
    bundle.save(tmp_path / "bundle", bundle.network().state_dict(), {"step": 7})
    return tmp_path / "bundle"


@pytest.fixture
def scan(rng) -> Volume:
    """Oblique, left-posterior-superior, anisotropic."""
    affine = np.array([[-1.1, 0.1, 0, 20], [0.1, -1.0, 0.2, 30], [0, 0.1, 5, -40], [0, 0, 0, 1]])
    return Volume(rng.standard_normal((1, 17, 13, 7)).astype(np.float32), Grid((17, 13, 7), affine))


def test_a_bundle_reads_back_as_it_was_saved(saved) -> None:
    loaded = Bundle.load(saved)
    assert (loaded.recipe, loaded.targets, loaded.geometry) == (
        small_bundle().recipe,
        small_bundle().targets,
        TileGeometry((8, 8, 4)),
    )
    assert loaded.metadata == {"step": "7"}
    assert loaded.channels == ("T1",)


def test_several_threads_may_load_bundles(saved) -> None:
    with ThreadPoolExecutor(4) as pool:
        loaded = list(pool.map(Bundle.load, [saved] * 40))
    assert {bundle.weights_sha256 for bundle in loaded} == {Bundle.load(saved).weights_sha256}


def test_whoever_may_read_one_of_its_files_may_read_all(saved) -> None:
    modes = {path.name: path.stat().st_mode for path in saved.iterdir()}
    assert len(set(modes.values())) == 1, modes


def test_there_is_no_pickle_in_it(saved) -> None:
    assert {p.suffix for p in saved.iterdir()} == {".yaml", ".json", ".safetensors"}


def test_predictions_lie_on_the_scan_s_own_grid(saved, scan) -> None:
    label = Predictor([Bundle.load(saved)], PLAN).predict(scan).label
    assert label.grid is scan.grid
    assert label.voxels.shape == scan.grid.shape
    assert set(np.unique(label.voxels)) <= {0, 1, 2}


def test_an_ensemble_of_one_bundle_twice_is_that_bundle(saved, scan) -> None:
    bundle = Bundle.load(saved)
    once, twice = (Predictor([bundle] * n, PLAN).predict(scan).label.voxels for n in (1, 2))
    assert once.any()
    assert (once == twice).mean() > 0.999  # a mean of halves may round a tie


def test_an_ensemble_averages_probabilities(saved, scan, tmp_path) -> None:
    """A member that is sure of background everywhere wins over one that is not sure of anything."""
    weights = small_bundle().network().state_dict()
    weights["head.weight"] *= 0
    weights["head.bias"] = torch.tensor([30.0, 0, 0])
    sure = tmp_path / "sure"
    small_bundle().save(sure, weights, {})
    label = Predictor([Bundle.load(saved), Bundle.load(sure)], PLAN).predict(scan).label
    assert not label.voxels.any()


@pytest.mark.parametrize("mode", ["exclusive", "overlapping"])
def test_averaged_logits_become_probabilities_on_the_scan_s_grid(mode, scan) -> None:
    """Networks of one voxel's reach, so that tiles leave no trace: the mean of their logits, interpolated."""
    bundle = replace(small_bundle(inference={"average": "logits"}), targets=Targets({"a": (1,), "b": (2,)}, mode))
    outputs = bundle.targets.outputs
    torch.manual_seed(0)
    networks = [torch.nn.Conv3d(1, outputs, 1), torch.nn.Conv3d(1, outputs, 1)]
    predictor = Predictor([bundle] * 2, PLAN, networks=networks, probabilities=True)
    found = predictor.predict(scan)
    prepared, undo = bundle.pipeline.apply(scan)
    with torch.no_grad():
        image = torch.from_numpy(np.ascontiguousarray(prepared.voxels))[None]
        logits = torch.from_numpy(undo((sum(network(image) for network in networks) / 2)[0].numpy()))
    expected = torch.softmax(logits, 0)[1:] if mode == "exclusive" else torch.sigmoid(logits)
    assert found.probabilities is not None
    np.testing.assert_allclose(found.probabilities, expected, atol=5e-3)
    best = logits.argmax(0).numpy() if mode == "exclusive" else bundle.targets.decode((expected > 0.5).numpy())
    assert (found.label.voxels == best).mean() > 0.995  # halves may round a tie
    assert all(0 <= one.expected_dice <= 1 for one in found.confidence.values())


@pytest.mark.parametrize("mode", ["exclusive", "overlapping"])
@pytest.mark.parametrize("budget_bytes", [0, 2**20])
def test_logits_beyond_float16_still_decide(mode, budget_bytes, scan) -> None:
    bundle = replace(small_bundle(inference={"average": "logits"}), targets=Targets({"a": (1,), "b": (2,)}, mode))
    network = torch.nn.Conv3d(1, bundle.targets.outputs, 1)
    torch.nn.init.zeros_(network.weight)
    network.bias.data = torch.tensor([-1e5, 1e5, -1e5][-bundle.targets.outputs :])
    predictor = Predictor([bundle], PLAN, networks=[network], budget_bytes=budget_bytes, probabilities=True)
    found = predictor.predict(scan)
    np.testing.assert_array_equal(found.label.voxels, 1)
    np.testing.assert_array_equal(found.probabilities[:, 8, 6, 3], [1, 0])


def test_what_a_crop_cut_off_is_background_where_logits_are_averaged(scan) -> None:
    recipe = {"preprocessing": [{"kind": "crop_or_pad", "shape": [8, 8, 4]}], "inference": {"average": "logits"}}
    bundle = small_bundle(**recipe)
    network = torch.nn.Conv3d(1, 3, 1)
    torch.nn.init.zeros_(network.weight)
    network.bias.data = torch.tensor([0.0, 5.0, 0.0])
    label = Predictor([bundle], PLAN, networks=[network]).predict(scan).label.voxels
    assert (label == 1).sum() == 8 * 8 * 4
    assert (label == 2).sum() == 0


def test_bundles_that_average_differently_are_no_ensemble(saved) -> None:
    bundle = Bundle.load(saved)
    with pytest.raises(BundleError, match="some bundles average logits and others probabilities"):
        Predictor([bundle, bundle.with_settings(["inference.average=logits"])], PLAN)


def test_bundles_that_differ_in_targets_are_no_ensemble(saved) -> None:
    bundle = Bundle.load(saved)
    with pytest.raises(BundleError, match="same targets"):
        Predictor([bundle, replace(bundle, targets=Targets({"spleen": (1,)}))], PLAN)


def test_a_scan_with_other_channels_is_refused(saved, scan) -> None:
    two = Volume(np.concatenate([scan.voxels] * 2), scan.grid)
    with pytest.raises(BundleError, match="has 2 channels, but the bundle needs 1: T1"):
        Predictor([Bundle.load(saved)], PLAN).predict(two)


def test_other_settings_of_prediction_leave_the_network_as_it_is(saved, scan) -> None:
    bundle = Bundle.load(saved)
    changed = bundle.with_settings(["inference.overlap=0", "postprocessing.drop_end_slices=0.45"])
    assert changed.differing_settings(bundle) == {
        "inference.overlap": (0.0, 0.5),
        "postprocessing.drop_end_slices": (0.45, 0.0),
    }
    assert changed.weights_sha256 == bundle.weights_sha256
    assert bundle.with_settings(["inference.overlap=0.5"]) == bundle
    before, now = (Predictor([one], PLAN, probabilities=True).predict(scan) for one in (bundle, changed))
    assert before.label.voxels.any()
    assert not np.array_equal(before.probabilities, now.probabilities)
    assert now.label.voxels[..., [0, 1, 2, 4, 5, 6]].max() == 0
    for change in ("training.steps=1", "inference_more=1", "=1", "name=x"):
        with pytest.raises(RecipeError, match="another network"):
            bundle.with_settings([change])
    with pytest.raises(RecipeError, match="unknown targets"):
        bundle.with_settings(["postprocessing.minimum_ml.spleen=1"])


def test_a_target_that_postprocessing_has_removed_was_not_found(saved, scan) -> None:
    bundle = Bundle.load(saved)
    cleaned = bundle.with_settings(["postprocessing.minimum_ml={liver: 100000}"])
    before, after = (Predictor([one] * 2, PLAN).predict(scan).confidence["liver"] for one in (bundle, cleaned))
    assert before.volume_ml > 0
    assert 0 < before.expected_dice < before.mutual_dice
    assert after.volume_ml == 0
    assert np.isnan([after.expected_dice, after.mutual_dice]).all()
    assert review("scan", {"liver": after}, [], None).need == 1


def test_a_copy_keeps_the_text_of_its_own_author_and_of_no_other(saved, tmp_path) -> None:
    copy, card = tmp_path / "copy", tmp_path / "copy/card.md"
    torch.manual_seed(1)
    small_bundle().save(copy, small_bundle().network().state_dict(), {})
    card.write_text("Of another network.", encoding="utf-8")
    Bundle.load(saved).save_copy(copy)
    assert not card.exists()
    card.write_text("Of this one.", encoding="utf-8")
    Bundle.load(saved).save_copy(copy)
    assert card.exists()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"flips": "xq"}, "'q' is not one of x, y, z"),
        ({"flips": "xx"}, "x, x names an axis twice"),
        ({"overlap": 1}, "0.95"),
    ],
)
def test_settings_that_no_prediction_can_have_are_refused(saved, settings, said) -> None:
    """Unknown axes were left out without a word."""
    with pytest.raises(RecipeError, match=said):
        Predictor([Bundle.load(saved)], PLAN, **settings)


@pytest.mark.parametrize("change", ["inference.flips=[x, x]", "augmentation.spatial.mirror=[y, x, y]"])
def test_no_axis_is_mirrored_twice(change) -> None:
    with pytest.raises(RecipeError, match="names an axis twice"):
        load_recipe("generic_3d", [change])


def test_new_weights_leave_the_rest_as_it_is(saved) -> None:
    before = {p.name: p.read_bytes() for p in saved.iterdir()}
    save_weights(saved, small_bundle().network().state_dict(), {"step": 9})
    after = {p.name: p.read_bytes() for p in saved.iterdir()}
    assert {name for name in after if after[name] != before[name]} == {"weights.safetensors", "bundle.json"}
    assert Bundle.load(saved).metadata == {"step": "9"}


def test_a_calibration_lasts_as_long_as_its_weights(saved) -> None:
    """It stayed beside new weights, whose predictions then had the intervals of the old ones."""
    replace_file(saved, "calibration.json", write_empty)
    save_weights(saved, Bundle.load(saved).trained_network().state_dict(), {"step": 7})
    assert (saved / "calibration.json").exists()
    save_weights(saved, other_weights(), {"step": 8})
    assert not (saved / "calibration.json").exists()
    assert Bundle.load(saved).metadata == {"step": "8"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("bundle.json", "{", "not readable JSON"),
        ("bundle.json", json.dumps({"format": 99}), "format 99"),
        ("recipe.yaml", None, "recipe.yaml' is missing"),
    ],
)
def test_a_damaged_bundle_says_so(saved, name, content, message) -> None:
    if content is None:
        (saved / name).unlink()
    else:
        (saved / name).write_text(content, encoding="utf-8")
    with pytest.raises(BundleError, match=message):
        Bundle.load(saved)


def test_a_folder_that_cannot_be_looked_for_is_refused_with_what_to_do(tmp_path) -> None:
    """Its name is too long; no permission does the same to all users but root."""
    folder = bundle_folder(tmp_path / ("x" * 300))
    with pytest.raises(BundleError, match=r"too long.*check its name and permissions"):
        Bundle.load(folder)
    assert not is_whole(folder)


def test_weights_that_do_not_fit_are_refused_before_there_is_a_network(saved) -> None:
    weights = small_bundle().network().state_dict()
    bias = weights["head.bias"]
    wrong = {
        "more tensors than the file's 1": {"head.bias": bias},
        "head.bias is missing, not 3 of F32": {k: v for k, v in weights.items() if k != "head.bias"} | {"b": bias},
        "head.bias is 2 of F32, not 3 of F32": {**weights, "head.bias": bias[:2]},
        "head.bias is 3 of F64, not 3 of F32": {**weights, "head.bias": bias.double()},
        "extra is 3 of F32, not missing": {**weights, "extra": bias.clone()},
    }
    for message, tensors in wrong.items():
        save_weights(saved, tensors, {})
        with pytest.raises(BundleError, match=f"do not fit .*{message}"):
            Bundle.load(saved)
    (saved / "weights.safetensors").write_bytes(b"\x80\x04.")  # a pickle
    with pytest.raises(BundleError, match="not what was saved"):
        Bundle.load(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_written_nor_read(saved, value) -> None:
    weights = small_bundle().network().state_dict()
    sound = {name: tensor.clone() for name, tensor in weights.items()}
    weights["head.weight"].view(-1)[5] = value
    with pytest.raises(BundleError, match=r"'head.weight' is not finite.*learning rate"):
        save_weights(saved, weights, {})
    assert Bundle.load(saved).metadata == {"step": "7"}
    # Put there by another program, with its digest.
    sound["head.weight"] = weights["head.weight"]
    from safetensors.torch import save_file

    replace_file(saved, "weights.safetensors", lambda path: save_file(sound, path))
    with pytest.raises(BundleError, match=r"'head.weight' is not finite"):
        Bundle.load(saved)


def test_an_answer_that_is_not_finite_is_refused(saved, scan) -> None:
    """Weights may be finite and what they make of a scan not."""
    weights = small_bundle().network().state_dict()
    weights["head.weight"].fill_(3e38)
    save_weights(saved, weights, {})
    with pytest.raises(BundleError, match="output is not finite"):
        Predictor([Bundle.load(saved)], PLAN).predict(scan)


def test_weights_that_were_replaced_meanwhile_are_not_mixed_up(saved) -> None:
    bundle = Bundle.load(saved)
    save_weights(saved, small_bundle().network().state_dict(), {})
    with pytest.raises(BundleError, match="open it again"):
        bundle.trained_network()


def test_a_bundle_without_weights_says_that_there_are_none_yet(tmp_path) -> None:
    small_bundle().begin(tmp_path)
    with pytest.raises(BundleError, match=r"no weights yet.*train"):
        Bundle.load(tmp_path).trained_network()


def test_whole_slices_take_each_volume_s_size() -> None:
    bundle = small_bundle(
        tiles={"kind": "slices", "axis": "z"}, network={"kind": "unet", "dimensions": 2, "widths": [4, 8]}
    )
    assert bundle.geometry_of((31, 20, 9)).shape == (32, 20, 1)
    assert small_bundle().geometry_of((31, 20, 9)).shape == (8, 8, 4)


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_loaded_bundle_is_what_was_trained(name, narrow, tmp_path, rng) -> None:
    """Field by field, and bit for bit in what it makes of a scan."""
    values = load_recipe(name).as_dict()
    values["network"] = narrow(values["network"])
    values["postprocessing"]["largest_component"] = []
    for sized in (values["tiles"], *values["preprocessing"]):
        if sized.get("shape"):
            sized["shape"] = [n and min(n, 32) for n in sized["shape"]]
    recipe = recipe_from(values)
    volume = Volume(
        rng.gamma(2.0, 100.0, (1, 30, 28, 6)).astype(np.float32), Grid.of_spacing((30, 28, 6), (1.0, 1.0, 2.5))
    )
    pipeline = recipe.pipeline.fit(lambda: [volume])
    grid = pipeline.apply(volume)[0].grid
    geometry = geometry_for(recipe.tiles, grid.shape, grid.spacing_mm, recipe.network)
    bundle = Bundle(recipe, pipeline, Targets({"lesion": (1,)}), ("c0",), geometry, grid.spacing_mm)
    torch.manual_seed(0)
    network = bundle.network().eval()
    bundle.save(tmp_path, network.state_dict(), {})
    loaded = Bundle.load(tmp_path)
    for name in {field.name for field in fields(Bundle)} - {"folder", "weights"}:
        assert getattr(loaded, name) == getattr(bundle, name)
    trained, read = (
        Predictor([one], PLAN, networks=networks, probabilities=True, overlap=0.0).predict(volume).probabilities
        for one, networks in ((bundle, [network]), (loaded, None))
    )
    np.testing.assert_array_equal(read, trained)
    if geometry.standardise:
        # What the network reads: an untrained one may answer .5 whatever it is.
        reads: list[torch.Tensor] = []
        network.register_forward_pre_hook(lambda module, read: reads.append(read[0].clone()))
        for standardise in (geometry.standardise, False):
            one = replace(bundle, geometry=replace(geometry, standardise=standardise))
            Predictor([one], PLAN, networks=[network], overlap=0.0).predict(volume)
        assert not torch.equal(reads[0], reads[len(reads) // 2])


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)


@given(names=st.lists(names, min_size=1, max_size=3, unique=True), name=names, contrast=st.floats(0, 1e6))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_things_are_called_they_read_back_the_same(names, name, contrast, tmp_path) -> None:
    targets = Targets({target: (k,) for k, target in enumerate(names, start=1)})
    recipe = {"name": name, "description": f"{name}\\n\\n {name}", "data": {"targets": targets.as_dict()}}
    ranges = (Range("contrast", name, 0.0, contrast / 3, contrast),)
    bundle = replace(
        small_bundle(**recipe), targets=targets, channels=(name,), fingerprint=Fingerprint(1, ranges), folder=tmp_path
    )
    bundle.save(tmp_path, bundle.network().state_dict(), {})
    assert Bundle.load(tmp_path) == bundle


def test_a_bundle_of_format_1_knows_from_its_recipe_what_it_had_forgotten(tmp_path, scan) -> None:
    folder = Path(__file__).parent / "data/bundle_format_1"
    assert "standardise" not in json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["tiles"]
    bundle = Bundle.load(folder)
    assert bundle.geometry == TileGeometry((8, 8, 4), standardise=True)
    assert bundle.fingerprint.range("contrast", "T1") == Range("contrast", "T1", 2.0, 2.5, 3.0)
    assert [(r.quantity, r.of) for r in bundle.fingerprint.ranges] == [
        ("spacing", "RL"),
        ("field_of_view", "SI"),
        ("contrast", "T1"),
    ]
    assert [name for name in ("anna", "carl", "dora") if bundle.seen(name)] == ["anna", "carl"]
    assert Predictor([bundle], PLAN).predict(scan).label.grid is scan.grid
    # A run that is resumed brings it to this format, names left out.
    shutil.copytree(folder, tmp_path / "bundle")
    bundle.begin(tmp_path / "bundle")
    now = Bundle.load(tmp_path / "bundle")
    assert replace(now, folder=folder) == bundle
    assert now.weights == bundle.weights
    text = (tmp_path / "bundle/bundle.json").read_text(encoding="utf-8")
    assert not [name for name in ("anna", "bert", "carl", "dora", "Smith") if name in text]


def test_a_bundle_of_format_1_whose_recipe_does_not_fit_says_what_to_do(tmp_path) -> None:
    shutil.copytree(Path(__file__).parent / "data/bundle_format_1", tmp_path / "bundle")
    path = tmp_path / "bundle/bundle.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"slice_axis": null', '"slice_axis": 2'), encoding="utf-8")
    with pytest.raises(BundleError, match=r"but the recipe makes them.*copy the bundle again"):
        Bundle.load(tmp_path / "bundle")


def test_an_edited_recipe_is_refused_with_what_to_do(saved) -> None:
    path = saved / "recipe.yaml"
    path.write_text(path.read_text(encoding="utf-8").replace("overlap: 0.5", "overlap: 0.25"), encoding="utf-8")
    with pytest.raises(BundleError, match=r"not what was saved.*cannot be edited"):
        Bundle.load(saved)


WRITES = ("os.rename", "os.remove", "os.mkdir", "os.link", "open")


def killed_before_write(number: int, write: Callable[[], object]) -> bool:
    """Whether a process that does ``write`` was killed before its change number ``number`` to any file."""
    child = os.fork()
    if child == 0:
        seen = 0

        def count(event: str, arguments: tuple) -> None:
            nonlocal seen
            if event in WRITES:
                seen += 1
                if seen > number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count)
        write()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def other_weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return small_bundle().network().state_dict()


def write_empty(path: Path) -> None:
    path.write_text("{}", encoding="utf-8")


REPLACED = {
    "weights": lambda folder: save_weights(folder, other_weights(), {"step": 8}),
    "calibration": lambda folder: replace_file(folder, "calibration.json", write_empty),
    "all": lambda folder: small_bundle(name="other").save(folder, other_weights(), {"step": 8}),
    "description": lambda folder: small_bundle().begin(folder),
}


@pytest.mark.parametrize("what", REPLACED)
def test_a_kill_at_any_moment_leaves_a_whole_bundle_or_one_that_says_what_to_do(what, tmp_path) -> None:
    """Steps 7 and 8 are the whole ones before and after; a calibration of step 7 is never beside step 8."""
    torch.manual_seed(0)
    number, answers = 0, []
    while True:
        folder = tmp_path / f"{number}"
        if what != "description":
            small_bundle().save(folder, small_bundle().network().state_dict(), {"step": 7})
        for name in ("calibration.json", "card.json") if what in ("weights", "all") else ():
            replace_file(folder, name, write_empty)
        killed = killed_before_write(number, lambda folder=folder: REPLACED[what](folder))
        try:
            bundle = Bundle.load(folder)
            answers.append(bundle.trained_network() and bundle.metadata["step"] + bundle.recipe.name)
            assert bundle.metadata["step"] == "7" or not (folder / "calibration.json").exists()
        except BundleError as error:
            answers.append(
                next(s for s in ("no weights yet", "is missing", "run the command again") if s in str(error))
            )
        if not killed:
            break
        REPLACED[what](folder)  # the same command again
        whole = Bundle.load(folder)
        assert what == "description" or whole.metadata["step"] == ("7" if what == "calibration" else "8")
        number += 1
    ways = list(dict.fromkeys(answers))
    assert (
        ways
        == {
            "weights": ["7small", "8small"],
            "calibration": ["7small"],
            "all": ["7small", "run the command again", "8other"],
            "description": ["is missing", "run the command again", "no weights yet"],
        }[what]
    )
    assert number > 5


def test_with_another_key_who_was_seen_is_not_guessed(saved, tmp_path, monkeypatch) -> None:
    known = Provenance(key=key_id(), training=hidden(["anna"]), validation=hidden(["bert"]))
    bundle = replace(small_bundle(), provenance=known)
    assert [bundle.seen(name) for name in ("anna", "bert", "carl")] == [True, True, False]
    with pytest.raises(BundleError, match="does not say which subjects"):
        small_bundle().seen("anna")
    monkeypatch.setenv("DELINEATE_KEY", str(tmp_path / "other"))
    with pytest.raises(UnknownKey, match="set DELINEATE_KEY to the key of whoever trained it"):
        bundle.seen("carl")
