"""Bundles with networks of MONAI's, which MONAI itself reads and predicts with."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
import yaml
from numpy.typing import NDArray
from scipy import ndimage
from typer.testing import CliRunner

from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.errors import CannotImport, OutputError, WeightsError
from delineate.importing.monai import import_model
from delineate.inference.predictor import Predictor
from delineate.io.formats import read_volume

PLAN = plan_compute(device="cpu", precision="fp32", compile="off")

SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
SIGMOID = {"_target_": "Activationsd", "keys": "pred", "sigmoid": True}
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
THRESHOLD = {"_target_": "AsDiscreted", "keys": "pred", "threshold": 0.5}
INVERT = {
    "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image", "nearest_interp": False
}  # fmt: skip


def on_image(name: str, **arguments: object) -> dict[str, object]:
    return {"_target_": name, "keys": "image", **arguments}


LOAD = (on_image("LoadImaged"), on_image("EnsureChannelFirstd"))
SPACING = on_image("Spacingd", pixdim="@spacing", mode="bilinear")


def bundle_of(
    network: dict[str, Any], preprocessing: list[Any], inferer: dict[str, Any], postprocessing: list[Any]
) -> dict[str, Any]:
    """A configuration in the form of the model zoo's, with its expressions and references."""
    return {
        "imports": ["$import os"],
        "bundle_root": ".",
        "spacing": [1.5, 1.2, 2.5],
        "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
        "network_def": network,
        "network": "$@network_def.to(@device)",
        "preprocessing": {"_target_": "Compose", "transforms": preprocessing},
        "inferer": inferer,
        "postprocessing": {"_target_": "Compose", "transforms": postprocessing},
        "evaluator": {"_target_": "SupervisedEvaluator", "device": "@device", "network": "@network"},
        "run": ["$@evaluator.run()"],
    }


def network(name: str, **arguments: object) -> dict[str, object]:
    return {"_target_": name, "spatial_dims": 3, "in_channels": 1, "out_channels": 3, **arguments}


def sliding(*sides: int, **arguments: object) -> dict[str, object]:
    return {"_target_": "SlidingWindowInferer", "roi_size": [*sides], "sw_batch_size": 2, **arguments}


BUNDLES = {
    "residual U-Net, probabilities interpolated": bundle_of(
        network("UNet", channels=[4, 8, 8], strides=[2, 2], num_res_units=2, norm="batch"),
        [
            *LOAD,
            on_image("Orientationd", axcodes="RAS"),
            SPACING,
            on_image("ScaleIntensityRanged", a_min=-57, a_max=164, b_min=0, b_max=1, clip=True),
            on_image("EnsureTyped", device="@device"),
        ],
        sliding(16, 20, 8, overlap=0.5),
        [SOFTMAX, INVERT, ARGMAX],
    ),
    "SegResNet, labels returned by nearest neighbours": bundle_of(
        network("SegResNet", init_filters=8, blocks_down=[1, 1, 2], blocks_up=[1, 1], dropout_prob=0.2),
        [
            *LOAD,
            on_image("Orientationd", axcodes="PLI"),
            SPACING,
            on_image("NormalizeIntensityd"),
            on_image("ScaleIntensityd", minv=-1.0, maxv=1.0),
        ],
        sliding(12, 16, 12, overlap=0.3, mode="gaussian", padding_mode="replicate"),
        [SOFTMAX, ARGMAX, {**INVERT, "nearest_interp": True}],
    ),
    "anisotropic U-Net without sums, padded and cropped, logits interpolated": bundle_of(
        network(
            "monai.networks.nets.UNet",
            channels=[4, 6, 8],
            strides=[[2, 2, 1], [2, 2, 2]],
            kernel_size=[3, 3, 1],
            up_kernel_size=[3, 3, 1],
            num_res_units=0,
            norm=["instance", {"affine": True}],
            act=["leakyrelu", {"negative_slope": 0.01}],
            dropout=0.1,
        ),
        [
            *LOAD,
            on_image("ScaleIntensityRangePercentilesd", lower=10, upper=99, b_min=0, b_max=2, clip=True),
            on_image("CropForegroundd", source_key="image"),
            on_image("Spacingd", pixdim=[1.6, -1, 2.2], mode=["bilinear"]),
            on_image("SpatialPadd", spatial_size=[-1, 44, 8]),
            on_image("DivisiblePadd", k=4),
        ],
        {"_target_": "SimpleInferer"},
        [INVERT, SOFTMAX, ARGMAX],
    ),
    "DynUNet in a tile larger than the scan": bundle_of(
        network(
            "DynUNet",
            kernel_size=[3, [3, 3, 3], 3],
            strides=[1, 2, [2, 2, 1]],
            upsample_kernel_size=[2, [2, 2, 1]],
            filters=[4, 6, 8],
            norm_name="instance",
            deep_supervision=True,
        ),
        [*LOAD, on_image("NormalizeIntensityd", subtrahend=20, divisor=60)],
        sliding(48, 32, 24, mode="gaussian"),
        [ARGMAX],
    ),
    "2D U-Net, slice by slice": bundle_of(
        {**network("UNet", channels=[4, 8], strides=[2], num_res_units=1, bias=False), "spatial_dims": 2},
        [*LOAD, on_image("ScaleIntensityd")],
        {"_target_": "SliceInferer", "roi_size": [16, 24], "spatial_dim": 1, "overlap": 0.25},
        [SOFTMAX, INVERT, ARGMAX],
    ),
    "SegResNet with slopes that are learnt": bundle_of(
        network("SegResNet", init_filters=8, blocks_down=[1, 1], blocks_up=[1], act="prelu"),
        [*LOAD, on_image("NormalizeIntensityd")],
        sliding(16, 16, 8),
        [ARGMAX],
    ),
}
OVERLAPPING = bundle_of(
    network("UNet", in_channels=2, channels=[4, 8], strides=[2], num_res_units=2),
    [*LOAD, on_image("NormalizeIntensityd", nonzero=True, channel_wise=True)],
    sliding(16, 16, 16),
    [SIGMOID, INVERT, THRESHOLD, {"_target_": "Lambdad", "keys": "pred", "func": "$lambda x: x"}],
)


def write(folder: Path, config: dict[str, Any], *, names: tuple[str, ...] = ("background", "organ", "lesion")) -> Path:
    """The folder of a bundle with random weights."""
    from monai.networks import nets

    about = dict(config["network_def"])
    torch.manual_seed(0)
    made = getattr(nets, about.pop("_target_").rpartition(".")[2])(**about)
    for name, tensor in made.state_dict().items():
        if "running_" in name or tensor.ndim == 1:  # statistics and scales, too, are as after a training
            tensor.uniform_(0.5, 1.5) if "var" in name or "weight" in name else tensor.uniform_(-0.3, 0.3)
    last = [parameter for parameter in made.parameters() if parameter.ndim > 1][-1]
    if "DynUNet" in config["network_def"]["_target_"]:
        last = made.output_block.conv.conv.weight
    with torch.no_grad():
        last *= 8  # decisions of a trained network are seldom close
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    torch.save(made.state_dict(), folder / "models/model.pt")
    (folder / "configs/inference.json").write_text(json.dumps(config), encoding="utf-8")
    inputs = {"0": "first", "1": "second"} if about["in_channels"] == 2 else {"0": "CT"}
    formats = {
        "inputs": {"image": {"num_channels": len(inputs), "channel_def": inputs}},
        "outputs": {"pred": {"channel_def": {str(i): name for i, name in enumerate(names)}}},
    }
    metadata = {"network_data_format": formats, "authors": "Schmidt", "version": "1.0"}
    (folder / "configs/metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return folder


def scan(file: Path, channels: int = 1) -> Path:
    """A scan with structure at each scale, on an oblique grid of thick slices, with air around."""
    noise = np.random.default_rng(3).normal(size=(channels, 33, 40, 15))
    smooth = sum(ndimage.gaussian_filter(noise, (0, s, s, s / 2)) * s**1.2 for s in (1, 2, 4))
    voxels = (100 + 80 * smooth / smooth.std()).clip(0).astype(np.float32)
    voxels[:, :4] = voxels[:, :, -3:] = 0
    affine = np.array([[0, 1.1, 0.1, -30], [-1.3, 0, 0, 20], [0.02, 0.1, 3.1, 5], [0, 0, 0, 1]])
    affine[:3, :3] = np.linalg.qr(affine[:3, :3])[0] * (1.3, 1.1, 3.1)
    nib.save(nib.Nifti1Image(np.moveaxis(voxels, 0, -1).squeeze(), affine), file)
    return file


def predicted_by_monai(folder: Path, file: Path) -> NDArray:
    """What MONAI makes of a scan: (1, X, Y, Z), or (outputs, X, Y, Z) where they may overlap."""
    from monai.bundle import ConfigParser

    parser = ConfigParser(json.loads((folder / "configs/inference.json").read_text(encoding="utf-8")))
    made = parser.get_parsed_content("network_def")
    made.load_state_dict(torch.load(folder / "models/model.pt", weights_only=True))
    made.eval()
    data = parser.get_parsed_content("preprocessing")({"image": str(file)})
    with torch.no_grad():
        logits = parser.get_parsed_content("inferer")(data["image"][None], made)
    decided = parser.get_parsed_content("postprocessing")({**data, "pred": logits[0]})["pred"]
    return decided.numpy().astype(np.uint8)


def predicted_here(bundle: Bundle, file: Path) -> NDArray:
    return Predictor([bundle], PLAN).predict(read_volume(file)).label.voxels


def same_weights(one: Bundle, other: Bundle) -> bool:
    mine, theirs = one.trained_network().state_dict(), other.trained_network().state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())


def dice(one: NDArray, other: NDArray) -> float:
    return 2 * float((one & other).sum()) / float(one.sum() + other.sum())


def changed(file: Path, edit: Callable[[Any], object]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    edit(content)
    file.write_text(json.dumps(content), encoding="utf-8")


@pytest.fixture
def model(tmp_path) -> Path:
    """A bundle of MONAI's that a test may change."""
    return write(tmp_path / "model", BUNDLES["residual U-Net, probabilities interpolated"])


# What MONAI says of its own changes, and of decoders that it has not.
@pytest.mark.filterwarnings("ignore::FutureWarning:monai", "ignore::UserWarning:monai")
@pytest.mark.parametrize("kind", BUNDLES)
def test_an_imported_bundle_predicts_what_monai_predicts(kind, tmp_path) -> None:
    folder, file = write(tmp_path / "model", BUNDLES[kind]), scan(tmp_path / "scan.nii.gz")
    bundle = import_model(folder, tmp_path / "bundle").bundle
    found, expected = predicted_here(bundle, file), predicted_by_monai(folder, file)[0]
    assert found.shape == expected.shape
    assert np.mean(found == expected) >= 0.999
    for value in np.unique(expected):
        assert dice(found == value, expected == value) >= 0.999
    assert np.mean(expected > 0) > 0.1, "there is something to disagree about"


@pytest.mark.filterwarnings("ignore::FutureWarning:monai", "ignore::UserWarning:monai")
@pytest.mark.parametrize("kind", list(BUNDLES)[:2])
def test_it_does_so_on_a_real_scan(kind, real_data, tmp_path) -> None:
    """One with a voxel a millimetre: resampled, many voxels lie half way between two."""
    file = real_data / "hippocampus/imagesTr/hippocampus_101.nii.gz"
    folder = write(tmp_path / "model", BUNDLES[kind])
    if kind.startswith("residual"):
        changed(folder / "configs/inference.json", transform(4, a_min=0, a_max=2000))
    bundle = import_model(folder, tmp_path / "bundle").bundle
    found, expected = predicted_here(bundle, file), predicted_by_monai(folder, file)[0]
    assert np.mean(found == expected) >= 0.999
    assert all(dice(found == value, expected == value) >= 0.999 for value in np.unique(expected))


@pytest.mark.filterwarnings("ignore::FutureWarning:monai", "ignore::UserWarning:monai")
def test_structures_that_overlap_are_written_in_the_order_given(tmp_path) -> None:
    """MONAI's outputs are core, whole and enhancing, as in its bundle for BraTS; here the largest comes first."""
    folder = write(tmp_path / "model", OVERLAPPING, names=("core", "whole", "enhancing"))
    file = scan(tmp_path / "scan.nii.gz", channels=2)
    with pytest.raises(CannotImport, match="with Lambdad") as refused:
        import_model(folder, tmp_path / "bundle")
    assert "--targets" in str(refused.value.fix)
    with pytest.raises(CannotImport, match="core, whole, enhancing may overlap"):
        import_model(folder, tmp_path / "bundle", ["postprocessing::transforms::3::_disabled_=true"])
    targets = Targets({"whole": (2, 1, 4), "core": (1, 4), "enhancing": (4,)}, "overlapping")
    bundle = import_model(folder, tmp_path / "bundle", targets=targets).bundle
    core, whole, enhancing = predicted_by_monai(folder, file) > 0
    joined = np.select([enhancing, core, whole], [4, 1, 2])
    found = predicted_here(bundle, file)
    assert np.mean(found == joined) >= 0.999
    assert all(dice(found == value, joined == value) >= 0.999 for value in np.unique(joined))
    assert bundle.channels == ("first", "second")


@pytest.mark.parametrize("kind", BUNDLES)
def test_no_tensor_is_lost(kind, tmp_path) -> None:
    """Both networks have the same parameters, but for biases that a normalisation subtracts and scales of one."""
    folder = write(tmp_path / "model", BUNDLES[kind])
    ours = import_model(folder, tmp_path / "bundle").bundle.trained_network().state_dict()
    theirs = torch.load(folder / "models/model.pt", weights_only=True)
    there = {tensor.double().sum().item() for tensor in ours.values()}
    left = [name for name, tensor in theirs.items() if tensor.double().sum().item() not in there]
    allowed = (".conv.bias", "running_mean")
    assert all(name.endswith(allowed) or re.search(r"deep_supervision|super_head", name) for name in left), left


def test_its_settings_are_those_of_the_configuration(tmp_path) -> None:
    kinds = list(BUNDLES)
    first = import_model(write(tmp_path / "1", BUNDLES[kinds[0]]), tmp_path / "a").bundle
    second = import_model(write(tmp_path / "2", BUNDLES[kinds[1]]), tmp_path / "b").bundle
    third = import_model(write(tmp_path / "3", BUNDLES[kinds[2]]), tmp_path / "c").bundle
    slices = import_model(write(tmp_path / "5", BUNDLES[kinds[4]]), tmp_path / "e").bundle
    assert (first.channels, first.targets.values) == (("CT",), {"organ": (1,), "lesion": (2,)})
    assert [step.kind for step in first.recipe.preprocessing] == [
        "reorient", "resample", "clip_percentiles", "normalise"
    ]  # fmt: skip
    assert (first.spacing_mm, first.geometry.shape) == ((1.5, 1.2, 2.5), (16, 20, 8))
    assert (first.recipe.inference.overlap, first.recipe.inference.weights) == (0.5, "uniform")
    assert (second.recipe.preprocessing[1].back, second.geometry.outside) == ("nearest", "edge")
    assert (second.recipe.inference.weights, second.recipe.network.dropout) == ("monai", 0.2)
    assert (third.recipe.inference.average, third.recipe.tiles.kind) == ("logits", "whole")
    assert (slices.geometry.slice_axis, slices.geometry.shape) == (1, (16, 1, 24))


def inline(entries: Any) -> None:
    """The transforms where the data set is, as MONAI's bundles may have them."""
    entries["dataset"] = {"_target_": "Dataset", "data": "$@datalist", "transform": entries.pop("preprocessing")}
    entries["postprocessing"]["transforms"][1] = {**INVERT, "transform": "@dataset::transform"}


def test_transforms_may_be_part_of_the_data_set(model, tmp_path) -> None:
    """They were left out without a word."""
    file = model / "configs/inference.json"
    before = import_model(model, tmp_path / "a").bundle
    changed(file, inline)
    assert import_model(model, tmp_path / "b").bundle.recipe == before.recipe
    for same in ("@dataset::transform", "@dataset#transform"):
        changed(file, lambda entries, same=same: entries.update(preprocessing=same))
        assert import_model(model, tmp_path / "b").bundle.recipe == before.recipe


def test_a_configuration_in_yaml_is_the_same(model, tmp_path) -> None:
    before = import_model(model, tmp_path / "a").bundle
    file = model / "configs/inference.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    (model / "configs/inference.yaml").write_text(yaml.safe_dump(entries), encoding="utf-8")
    file.unlink()
    after = import_model(model, tmp_path / "b").bundle
    assert after.recipe == before.recipe
    assert same_weights(after, before)


def transform(number: int, **arguments: object) -> Callable[[Any], None]:
    return lambda entries: entries["preprocessing"]["transforms"][number].update(arguments)


def instead(number: int, name: str, **arguments: object) -> Callable[[Any], None]:
    def edit(entries: Any) -> None:
        entries["preprocessing"]["transforms"][number] = on_image(name, **arguments)

    return edit


def in_network(**arguments: object) -> Callable[[Any], None]:
    return lambda entries: entries["network_def"].update(arguments)


def tiled(**arguments: object) -> Callable[[Any], None]:
    return lambda entries: entries["inferer"].update(arguments)


def after(*transforms: object) -> Callable[[Any], None]:
    return lambda entries: entries["postprocessing"].update(transforms=[*transforms])


def without(name: str) -> Callable[[Any], None]:
    return lambda entries: entries.pop(name)


BOMB = {"spacing": ["@a"] * 30, **{a: [f"@{b}"] * 30 for a, b in ("ab", "bc", "cd")}, "d": 1}
LARGEST = {"_target_": "KeepLargestConnectedComponentd", "keys": "pred"}


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (in_network(_target_="SwinUNETR"), "network 'SwinUNETR' is not known"),
        (in_network(_target_="scripts.nets.UNet"), r"scripts\.nets\.UNet, which is not MONAI's own"),
        (in_network(norm="layer"), "a UNet with normalisation layer is not known"),
        (in_network(norm=["instance", {"eps": 0.1}]), "normalisation instance"),
        (lambda entries: entries.update(network_def=network("SegResNet", norm="")), "SegResNet with no normalisation"),
        (in_network(act="swish"), "a UNet with activation swish is not known"),
        (in_network(act=["leakyrelu", {"negative_slope": 0.1}]), "activation leakyrelu"),
        (in_network(adn_ordering="ADN"), "adn_ordering"),
        (in_network(kernel_size=2), "kernel is"),
        (in_network(channels=[4, 8, 16]), "does not fit the UNet of the configuration"),
        (in_network(num_res_units=1), "does not fit the UNet of the configuration"),
        (in_network(act="relu"), "does not fit the UNet of the configuration"),
        (in_network(out_channels=4), "names 3 channels of pred, but the network has 4"),
        (without("network_def"), r"'network' is an expression, '\$@network_def\.to\(@device\)'"),
        (transform(3, pixdim="$[1] * 3"), r"'preprocessing::transforms::3::pixdim' is an expression, '\$\[1\] \* 3'"),
        (transform(3, pixdim="@device"), r"'device' is an expression, '\$torch\.device"),
        (transform(3, pixdim="@absent"), "refers to 'absent', which is not there"),
        (transform(3, pixdim="%other.json"), "is a macro"),
        (lambda entries: entries.update(spacing="@spacing"), "'spacing' refers to itself"),
        (lambda entries: entries.update(BOMB), "too many values"),
        (transform(3, mode="nearest"), "mode"),
        (transform(3, pixdim=[1, 2, 1e9], diagonal=True), "diagonal"),
        (transform(3, pixdim=[1, 2, 1e9]), r"Spacingd .* cannot be a step"),
        (transform(2, axcodes="RAX"), r"Orientationd .* cannot be a step"),
        (transform(4, a_max=-60), "a_min"),
        (instead(4, "GaussianSmoothd", sigma=1), r"preprocessing with GaussianSmoothd"),
        (instead(4, "CropForegroundd", source_key="image", select_fn="$lambda x: x > 1"), "is an expression"),
        (instead(4, "CropForegroundd", source_key="image", margin=3), "margin without allow_smaller"),
        (instead(4, "ScaleIntensityRangePercentilesd", lower=1, upper=99, b_min=0, b_max=1), "clip: false"),
        (instead(0, "Orientationd", axcodes="RAS"), "begins with Orientationd"),
        (instead(4, "CastToTyped", dtype="$torch.uint8"), r"CastToTyped .* rounds voxels to uint8"),
        (transform(4, dtype="$np.int16"), r"rounds voxels to int16"),
        (transform(0, dtype="int"), r"LoadImaged .* rounds voxels to int"),
        (without("preprocessing"), "neither preprocessing nor dataset::transform"),
        (
            lambda entries: entries["preprocessing"].update(transforms=[]),
            "neither preprocessing nor dataset::transform",
        ),
        (lambda entries: entries.update(dataset={"transform": [*LOAD]}), "not the same as preprocessing"),
        (tiled(_target_="SlidingWindowHoVerNetInferer"), "inferer 'SlidingWindowHoVerNetInferer' of a 3D network"),
        (tiled(sigma_scale=0.2), "sigma_scale"),
        (tiled(overlap=[0.5, 0.5, 0.25]), "overlap"),
        (tiled(roi_size=[16, 18, 8]), "multiples of"),
        (tiled(roi_size=[16, 16, -1]), "follows the scan along some axes only"),
        (after(SOFTMAX, ARGMAX), "no Invertd brings labels back"),
        (after(ARGMAX, INVERT), "interpolates between the numbers of labels"),
        (after(SOFTMAX, INVERT), "decides neither"),
        (after(SOFTMAX, INVERT, THRESHOLD), "decides neither"),
        (after(SOFTMAX, SIGMOID, INVERT, ARGMAX), "other than one softmax or sigmoid"),
        (after(SOFTMAX, {**INVERT, "transform": "@other"}, ARGMAX), "anything but @preprocessing"),
        (after(SOFTMAX, INVERT, ARGMAX, {**LARGEST, "applied_labels": [3]}), "applied_labels"),
        (after(SOFTMAX, INVERT, ARGMAX, {**LARGEST, "independent": False}), "independent"),
        (after(SOFTMAX, INVERT, ARGMAX, {"_target_": "Lambdad", "keys": "pred", "func": "$x"}), "with Lambdad"),
        (after({"_target_": "VoteEnsembled", "keys": "pred"}), "with VoteEnsembled"),
    ],
)
def test_what_a_bundle_cannot_hold_is_refused_by_name(edit, said, model, tmp_path) -> None:
    changed(model / "configs/inference.json", edit)
    with pytest.raises(CannotImport, match=said) as refused:
        import_model(model, tmp_path / "bundle")
    assert refused.value.fix
    assert not (tmp_path / "bundle").exists()


def test_only_the_type_of_the_scans_voxels_matters(model, tmp_path) -> None:
    """A label beside the scan may be of whole numbers."""

    def cast(entries: dict[str, Any]) -> None:
        types = {"keys": ["image", "label"], "dtype": ["$torch.float32", "$torch.uint8"]}
        entries["preprocessing"]["transforms"].append({"_target_": "CastToTyped", **types})

    changed(model / "configs/inference.json", cast)
    import_model(model, tmp_path / "bundle")
    assert Bundle.load(tmp_path / "bundle").channels


def test_an_entry_that_only_an_expression_gives_can_be_set(model, tmp_path) -> None:
    changed(model / "configs/inference.json", lambda entries: entries.update(spacing="$[1.5] * 3"))
    with pytest.raises(CannotImport, match="'spacing' is an expression") as refused:
        import_model(model, tmp_path / "bundle")
    assert "--entry 'spacing=…'" in str(refused.value.fix)
    changes = ["spacing=[1, 1, 2]", "inferer::overlap=0.25", "postprocessing#transforms#1#_disabled_=false"]
    recipe = import_model(model, tmp_path / "bundle", changes).bundle.recipe
    assert recipe.preprocessing[1].spacing_mm == (1, 1, 2)
    assert recipe.inference.overlap == 0.25
    for wrong in ("spacing", "preprocessing::transform=1::2=3", "nothing::there=1", "spacing::9=1"):
        with pytest.raises(CannotImport):
            import_model(model, tmp_path / "other", [wrong])


def test_components_that_are_kept_are_those_of_the_configuration(model, tmp_path) -> None:
    changed(model / "configs/inference.json", after(SOFTMAX, INVERT, ARGMAX, {**LARGEST, "applied_labels": [2]}))
    assert import_model(model, tmp_path / "a").bundle.recipe.postprocessing.largest_component == ("lesion",)
    changed(model / "configs/inference.json", after(SOFTMAX, INVERT, ARGMAX, LARGEST))
    assert import_model(model, tmp_path / "b").bundle.recipe.postprocessing.largest_component == ("organ", "lesion")


class Runs:
    """Makes a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("where", ["beside", "instead"])
def test_no_code_of_the_weights_runs(where, model, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    tensors = torch.load(model / "models/model.pt", weights_only=True)
    torch.save({**tensors, "more": Runs()} if where == "beside" else Runs(), model / "models/model.pt")
    with pytest.raises(WeightsError, match=r"would run .*mkdir, which no weights need"):
        import_model(model, tmp_path / "bundle")
    assert not (tmp_path / "ran").exists()


def test_weights_may_be_an_entry_of_a_checkpoint(model, tmp_path) -> None:
    before = import_model(model, tmp_path / "a").bundle
    tensors = torch.load(model / "models/model.pt", weights_only=True)
    torch.save({"model": {f"module.{name}": tensor for name, tensor in tensors.items()}}, model / "models/best.pt")
    after = import_model(model, tmp_path / "b", checkpoint="best.pt").bundle
    assert same_weights(after, before)


def test_a_torchscript_program_is_refused_and_its_weights_asked_for(model, tmp_path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Conv3d(1, 1, 1)), model / "models/model.ts")
    with pytest.raises(CannotImport, match=r"TorchScript program \(model\.ts\)"):
        import_model(model, tmp_path / "bundle", checkpoint="model.ts")
    (model / "models/model.pt").unlink()
    with pytest.raises(CannotImport, match="TorchScript"):
        import_model(model, tmp_path / "bundle")
    (model / "models/model.ts").unlink()
    with pytest.raises(CannotImport, match="there is no"):
        import_model(model, tmp_path / "bundle")


def test_no_text_of_the_folder_but_names_becomes_part_of_the_bundle(model, tmp_path) -> None:
    changed(model / "configs/inference.json", lambda entries: entries.update(dataset_dir="/home/anna"))
    import_model(model, tmp_path / "bundle")
    files = [file for file in (tmp_path / "bundle").iterdir() if file.is_file()]
    assert len(files) == 4
    assert not any(word in file.read_bytes() for file in files for word in (b"Schmidt", b"/home/anna"))


def test_the_command_says_what_it_made_and_overwrites_only_when_asked(tmp_path) -> None:
    folder = write(tmp_path / "model", OVERLAPPING, names=("core", "whole", "enhancing"))

    def run(*more: str):
        given = ["import", "monai", str(folder), "-o", str(tmp_path / "bundle"), *more]
        return CliRunner().invoke(app, [*given, "--targets", "whole=2+1+4,core=1+4,enhancing=4"])

    said = run("--json")
    assert said.exit_code == 0, said.output
    made = json.loads(said.stdout)
    assert (made["network"], made["targets"]) == ("UNet", ["whole", "core", "enhancing"])
    assert made["weights_sha256"] == Bundle.load(tmp_path / "bundle").weights_sha256
    assert isinstance(run().exception, OutputError)
    (tmp_path / "bundle/card.md").write_text("Of the earlier model.", encoding="utf-8")
    assert "UNet in 3D" in run("--overwrite", "--entry", "inferer::overlap=0").stdout
    assert not (tmp_path / "bundle/card.md").exists()
