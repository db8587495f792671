"""Models that nnU-Net 2.8.1 trained, with what it predicted; ``benchmarks/peers/nnunet_models.py`` made them."""

from __future__ import annotations

import builtins
import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.compute import plan_compute
from delineate.datasets.dataset import load_scan
from delineate.errors import CannotImport, OutputError, WeightsError
from delineate.importing.nnunet import import_model
from delineate.inference.batch import find_subjects
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_label

PLAN = plan_compute(device="cpu", precision="fp32", compile="off")
MODELS = Path(__file__).parents[1] / "data" / "nnunet"
KINDS = ("sagittal_residual_folds", "regions_2d", "ct_lowres_ignore")


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("nnunet")
    for kind in KINDS:
        with tarfile.open(MODELS / f"{kind}.tar.xz") as archive:
            archive.extractall(folder / kind, filter="data")
    return folder


@pytest.fixture
def model(unpacked, tmp_path) -> Path:
    """A copy of a model that a test may change."""
    return Path(shutil.copytree(unpacked / "ct_lowres_ignore" / "model", tmp_path / "model"))


def change(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


def change_checkpoint(model: Path, edit: Callable[[Any], object]) -> None:
    file = model / "fold_0/checkpoint_final.pth"
    content = torch.load(file, weights_only=False)
    edit(content)
    torch.save(content, file)


@pytest.mark.parametrize("kind", KINDS)
def test_an_imported_model_predicts_what_nnunet_predicts(kind, unpacked, tmp_path) -> None:
    import_model(unpacked / kind / "model", tmp_path / "bundle")
    bundle = Bundle.load(tmp_path / "bundle")
    [subject] = find_subjects([unpacked / kind / "scans"], bundle.channels)
    chosen = subject.with_channels(bundle.channels)
    found = Predictor([bundle], PLAN).predict(load_scan(chosen, bundle.channels)).label
    expected = read_label(unpacked / kind / "expected" / f"{subject.id}.nii.gz")
    assert found.grid.matches(expected.grid)
    assert np.mean(found.voxels == expected.voxels) >= 0.999
    theirs = bundle.targets.masks(expected.voxels)
    assert all(mask.sum() > 20 for mask in theirs.values()), "both structures are there to disagree about"
    for name, mask in bundle.targets.masks(found.voxels).items():
        # A single voxel of 300 is .998.
        assert 2 * (mask & theirs[name]).sum() / (mask.sum() + theirs[name].sum()) >= 0.995, name


def test_its_settings_are_those_of_the_plans(unpacked, tmp_path) -> None:
    residual = import_model(unpacked / "sagittal_residual_folds/model", tmp_path / "a")
    regions = import_model(unpacked / "regions_2d/model", tmp_path / "b").bundle
    ct = import_model(unpacked / "ct_lowres_ignore/model", tmp_path / "c").bundle
    assert residual.folds == ("0", "1")
    assert residual.bundle.recipe.network.members == 2
    assert residual.bundle.recipe.inference.flips == ("x", "y", "z")
    transpose, crop, normalise, resample = residual.bundle.recipe.preprocessing
    assert transpose.order == ("x", "z", "y"), "nnU-Net moves the axis across thick slices to the front"
    assert (crop.kind, normalise.within, resample.order, resample.across) == (
        "crop_background", "all", "cubic", "nearest"
    )  # fmt: skip
    assert regions.targets.as_dict() == {
        "values": {"whole": [1, 2], "core": [2]}, "mode": "overlapping", "ignore": []
    }  # fmt: skip
    assert (regions.channels, regions.recipe.inference.flips) == (("T1", "FLAIR"), ("y", "z"))
    assert (regions.geometry.slice_axis, regions.recipe.preprocessing[2].within) == (0, "filled")
    assert (ct.targets.ignore, ct.recipe.inference.flips) == ((3,), ())
    _, _, clip, scale, _ = ct.recipe.preprocessing
    assert (clip.kind, clip.scope, scale.scope) == ("clip_percentiles", "cohort", "cohort")


def test_a_fold_can_be_chosen(unpacked, tmp_path) -> None:
    folder = unpacked / "sagittal_residual_folds/model"
    both = import_model(folder, tmp_path / "both").bundle.trained_network().state_dict()
    one = import_model(folder, tmp_path / "one", ["1"]).bundle.trained_network().state_dict()
    assert all(torch.equal(tensor, both[f"members.1.{name}"]) for name, tensor in one.items())
    with pytest.raises(CannotImport, match=r"no fold_4/checkpoint_final\.pth .* which has 0, 1"):
        import_model(folder, tmp_path / "none", ["4"])


def same_weights(bundle: Bundle, other: Bundle) -> bool:
    mine, theirs = bundle.trained_network().state_dict(), other.trained_network().state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


class Runs:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("where", ["logging", "network_weights", "trainer_name"])
@pytest.mark.parametrize(
    ("function", "name"), [(os.mkdir, "mkdir"), (builtins.eval, "eval"), (builtins.__import__, "__import__")]
)
def test_no_code_of_a_checkpoint_runs(function, name, where, model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    argument = "__import__('os').mkdir('ran')" if function is builtins.eval else "ran"
    (tmp_path / "ran.py").write_text("import os; os.mkdir('ran')", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    change_checkpoint(model, lambda content: content.update({where: Runs(function, argument)}))
    with pytest.raises(WeightsError, match=rf"would run .*{name}, which no weights need"):
        import_model(model, tmp_path / "bundle")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "bundle").exists()


def test_what_only_a_log_needs_is_left_out(model, tmp_path) -> None:
    """Numbers of numpy's, as nnU-Net writes them since 2.0."""
    numbers = {"mean_fg_dice": [np.float64(0.5), np.float32(0.5), np.int64(3)], "all": np.arange(4)}
    before = import_model(model, tmp_path / "a").bundle
    change_checkpoint(model, lambda content: content["logging"].update(numbers))
    assert same_weights(import_model(model, tmp_path / "b").bundle, before)


def cascade(plans: Any) -> None:
    plans["configurations"]["3d_lowres"]["previous_stage"] = "3d_lower"


def primus(plans: Any) -> None:
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "nets.primus.Primus"


def architecture(**changes: object) -> Callable[[Any], None]:
    def edit(plans: Any) -> None:
        plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"].update(changes)

    return edit


def configuration(**changes: object) -> Callable[[Any], None]:
    return lambda plans: plans["configurations"]["3d_lowres"].update(changes)


def resampling(**changes: object) -> Callable[[Any], None]:
    return lambda plans: plans["configurations"]["3d_fullres"]["resampling_fn_data_kwargs"].update(changes)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (cascade, "second stage of a cascade, which starts from the labels of '3d_lower'"),
        (primus, "network 'Primus' is not known"),
        (architecture(nonlin="torch.nn.ReLU"), r"a PlainConvUNet with activation torch\.nn\.ReLU is not known"),
        (architecture(nonlin_first=True), "activations before normalisation"),
        (architecture(norm_op="torch.nn.GroupNorm"), r"normalisation 'torch\.nn\.GroupNorm' is not known"),
        (architecture(features_per_stage=[4, 4, 8]), r"does not fit the network of the plans: \d+ tensors differ"),
        (architecture(n_conv_per_stage=[1, 1, 1]), "holds 12 tensors that the network of the plans has not"),
        (architecture(n_conv_per_stage=[1, 2, 2]), r"\[1, 2\] convolutions at different levels"),
        (architecture(strides=[[2, 2, 2]] * 3), "a stride at full resolution"),
        (configuration(preprocessor_name="Mine"), "preprocessor 'Mine' is not nnU-Net's own"),
        (configuration(normalization_schemes=["Mine"]), "normalisation 'Mine' is not nnU-Net's own"),
        (configuration(normalization_schemes=[]), "normalization_schemes"),
        (configuration(resampling_fn_data="mine"), "resampling by mine"),
        (configuration(patch_size=[9, 12, 12]), "multiples of"),
        (configuration(patch_size=[10**9] * 3), "patch_size"),
        (lambda plans: plans.update(image_reader_writer="Tiff3DIO"), "read by 'Tiff3DIO'"),
        (lambda plans: plans.pop("transpose_forward"), "transpose_forward"),
        (lambda plans: plans.update(transpose_forward=[0, 0, 1]), "transpose_forward"),
        (lambda plans: plans.pop("configurations"), "configurations"),
        (lambda plans: plans["configurations"].pop("3d_fullres"), "does not define the configuration '3d_fullres'"),
        (configuration(inherits_from="3d_lowres"), "does not define the configuration '3d_lowres'"),
        (configuration(inherits_from=["3d_fullres"]), r"does not define the configuration '\['3d_fullres'\]'"),
        *((architecture(**{name: []}), name) for name in ("strides", "features_per_stage", "kernel_sizes")),
        (architecture(strides=[[]] * 3), "strides"),
        *(
            (resampling(**{name: odd}), name)
            for name, odd in (("force_separate_z", []), ("order", [3]), ("is_seg", {}))
        ),
    ],
)
def test_what_a_bundle_cannot_hold_is_refused_by_name(edit, said, model, tmp_path) -> None:
    change(model / "plans.json", edit)
    with pytest.raises(CannotImport, match=said) as refused:
        import_model(model, tmp_path / "bundle")
    assert refused.value.fix
    assert not (tmp_path / "bundle").exists()


def test_another_trainer_is_refused_unless_it_changed_only_the_training(model, tmp_path) -> None:
    change_checkpoint(model, lambda content: content.update(trainer_name="nnUNetTrainerUMambaBot"))
    with pytest.raises(CannotImport, match="'nnUNetTrainerUMambaBot' is not one of nnU-Net's own"):
        import_model(model, tmp_path / "bundle")
    assert import_model(model, tmp_path / "bundle", any_trainer=True).trainer == "nnUNetTrainerUMambaBot"


def test_plans_of_the_first_version_2_make_the_same_bundle(model, tmp_path) -> None:
    before = import_model(model, tmp_path / "before").bundle

    def older(plans: Any) -> None:
        full = plans["configurations"]["3d_fullres"]
        build = full.pop("architecture")["arch_kwargs"]
        full.update(
            UNet_class_name="PlainConvUNet",
            UNet_base_num_features=4,
            unet_max_num_features=8,
            n_conv_per_stage_encoder=build["n_conv_per_stage"],
            n_conv_per_stage_decoder=build["n_conv_per_stage_decoder"],
            pool_op_kernel_sizes=build["strides"],
            conv_kernel_sizes=build["kernel_sizes"],
        )
        known = plans.pop("foreground_intensity_properties_per_channel")
        plans["foreground_intensity_properties_by_modality"] = known

    change(model / "plans.json", older)
    after = import_model(model, tmp_path / "after").bundle
    assert after.recipe == before.recipe
    assert same_weights(after, before)


@pytest.mark.parametrize(
    ("labels", "order", "said"),
    [
        ({"background": 0, "a": 1, "b": 3}, None, r"labels \[1, 3\] are not 1 to 2"),
        ({"a": 1, "b": 2}, None, "no label 'background'"),
        ({"background": 0, "a": [1, 2], "b": [2]}, [1], "1 values for 2 regions"),
        ({"background": 0, "a": [1, 2], "b": [2]}, [2, 1], "writes 2 for region 'a'"),
        ({"background": 0, "a": [0, 1], "b": [2]}, [1, 2], "cannot be targets"),
    ],
)
def test_labels_that_would_read_back_as_others_are_refused(labels, order, said, model, tmp_path) -> None:
    change(model / "dataset.json", lambda about: about.update(labels=labels, regions_class_order=order))
    with pytest.raises(CannotImport, match=said):
        import_model(model, tmp_path / "bundle")


def test_a_region_is_written_as_nnunet_writes_it(unpacked, tmp_path) -> None:
    """BraTS: the whole tumour is written as oedema, the core within it as necrosis."""
    folder = Path(shutil.copytree(unpacked / "regions_2d/model", tmp_path / "model"))
    labels = {"background": 0, "whole": [1, 2, 3], "core": [1, 3]}
    change(folder / "dataset.json", lambda about: about.update(labels=labels, regions_class_order=[2, 3]))
    targets = import_model(folder, tmp_path / "bundle").bundle.targets
    assert [targets.written_value(name) for name in targets.names] == [2, 3]


def test_no_text_of_the_folder_but_names_becomes_part_of_the_bundle(model, tmp_path) -> None:
    change(model / "plans.json", lambda plans: plans.update(dataset_name="Dataset666_Schmidt", plans_name="/home/anna"))
    change(model / "dataset.json", lambda about: about.update(description="Schmidt", training=["/home/anna/1.nii"]))
    change_checkpoint(model, lambda content: content["init_args"].update(path="/home/anna"))
    import_model(model, tmp_path / "bundle")
    files = [file for file in (tmp_path / "bundle").iterdir() if file.is_file()]
    assert len(files) == 4
    assert not any(word in file.read_bytes() for file in files for word in (b"Schmidt", b"/home/anna"))


def test_the_command_says_what_it_made_and_overwrites_only_when_asked(unpacked, tmp_path) -> None:
    def run(*more: str):
        model, out = unpacked / "sagittal_residual_folds/model", tmp_path / "bundle"
        return CliRunner().invoke(app, ["import", "nnunet", str(model), "-o", str(out), *more])

    said = run("--json")
    assert said.exit_code == 0, said.output
    made = json.loads(said.stdout)
    assert (made["folds"], made["targets"], made["channels"]) == (["0", "1"], ["organ", "lesion"], ["MRI"])
    assert made["weights_sha256"] == Bundle.load(tmp_path / "bundle").weights_sha256
    assert isinstance(run().exception, OutputError)
    (tmp_path / "bundle/card.md").write_text("Of the earlier model.", encoding="utf-8")
    again = run("--overwrite", "--fold", "1")
    assert "3d_fullres of nnUNetTrainer_5epochs, fold 1" in again.stdout
    assert not (tmp_path / "bundle/card.md").exists()


def test_axes_that_are_named_twice_are_mirrored_once(model, tmp_path) -> None:
    change_checkpoint(model, lambda content: content.update(inference_allowed_mirroring_axes=(2, 0, 2)))
    assert import_model(model, tmp_path / "bundle").bundle.recipe.inference.flips == ("x", "z")


def test_a_folder_of_version_1_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "plans.pkl").write_bytes(b"")
    with pytest.raises(CannotImport, match="nnU-Net version 1"):
        import_model(tmp_path, tmp_path / "bundle")
