"""Tiny models of each kind, trained for a few steps with nnU-Net, and nnU-Net's own predictions of two more scans.

Runs in the environment that `environments.py` makes, which has no Delineate:

    ENV/nnunet/bin/python benchmarks/peers/nnunet_models.py OUT [KIND …]

    OUT/KIND/model/      what nnU-Net leaves: plans.json, dataset.json, fold_*/checkpoint_final.pth
    OUT/KIND/scans/      two scans that the model has not seen
    OUT/KIND/expected/   what nnUNetv2_predict says of them, with its own settings
    OUT/KIND.tar.xz      all three, for the kinds in FIXTURES, which are those of `tests/data/nnunet`
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import SimpleITK as sitk  # noqa: N813 (its own name for itself)
from scipy.ndimage import gaussian_filter


@dataclass(frozen=True)
class Scans:
    """How simulated scans look. ``spacing`` and ``shape`` are (x, y, z); each scan varies both a little."""

    channels: tuple[str, ...] = ("MRI",)
    shape: tuple[int, int, int] = (44, 40, 36)
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.2)
    labels: dict[str, object] = field(default_factory=lambda: {"background": 0, "organ": 1, "lesion": 2})
    regions_class_order: tuple[int, ...] | None = None
    bare: bool = False  # outside the body all is 0, as after skull stripping


@dataclass(frozen=True)
class Model:
    scans: Scans
    configuration: str
    planner: str = "ExperimentPlanner"
    trainer: str = "nnUNetTrainer_5epochs"
    folds: tuple[int, ...] = (0,)
    plans: dict[str, object] = field(default_factory=dict)
    configurations: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    widths: tuple[int, int, int] = (8, 12, 16)
    scans_to_predict: int = 2


MR = Scans()
CT = Scans(("CT",), spacing=(0.8, 0.8, 1.5))
BRAIN = Scans(
    ("T1", "FLAIR"),
    labels={"background": 0, "whole": [1, 2], "core": 2},
    regions_class_order=(1, 2),
    bare=True,
)
THICK = Scans(shape=(48, 44, 14), spacing=(0.7, 0.7, 4.0))
SAGITTAL = Scans(shape=(12, 44, 48), spacing=(4.4, 0.9, 0.8))
PARTLY = Scans(("CT", "PET"), labels={"background": 0, "organ": 1, "lesion": 2, "ignore": 3})
LOWRES = {
    "3d_lowres": {
        "inherits_from": "3d_fullres",
        "data_identifier": "nnUNetPlans_3d_lowres",
        "spacing": [2.1, 1.3, 1.3],
        "patch_size": [16, 24, 24],
    }
}
TORCH = {
    f"resampling_fn_{what}{part}": value
    for what in ("data", "seg", "probabilities")
    for part, value in (
        ("", "resample_torch_fornnunet"),
        ("_kwargs", {"is_seg": what == "seg", "force_separate_z": None, "memefficient_seg_resampling": False}),
    )
}
ODD = {
    "patch_size": [7, 40, 40],
    "architecture": {"strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2]], "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]]},
}

MODELS = {
    "plain 3D": Model(MR, "3d_fullres"),
    "plain 2D": Model(MR, "2d"),
    "residual 3D": Model(MR, "3d_fullres", planner="nnUNetPlannerResEncM"),
    "residual 2D": Model(MR, "2d", planner="nnUNetPlannerResEncM"),
    "CT, low resolution": Model(CT, "3d_lowres", configurations=LOWRES),
    "CT, no mirroring": Model(CT, "3d_fullres", trainer="nnUNetTrainerNoMirroring"),
    "regions, masked": Model(BRAIN, "3d_fullres"),
    "thick slices, two folds": Model(THICK, "3d_fullres", folds=(0, 1)),
    "thick slices, odd patches": Model(THICK, "3d_fullres", configurations={"3d_fullres": ODD}),
    "thick slices 2D": Model(THICK, "2d"),
    "thick slices, torch": Model(THICK, "3d_fullres", configurations={"3d_fullres": TORCH}),
    "sagittal": Model(SAGITTAL, "3d_fullres"),
    "sagittal 2D": Model(SAGITTAL, "2d"),
    "two modalities, ignore label": Model(PARTLY, "3d_fullres"),
    "BatchNorm": Model(MR, "3d_fullres", trainer="nnUNetTrainerBN"),
}
FIXTURES = {
    "sagittal_residual_folds": Model(
        Scans(shape=(9, 24, 26), spacing=(4.4, 0.9, 0.8)),
        "3d_fullres",
        planner="nnUNetPlannerResEncM",
        folds=(0, 1),
        widths=(4, 4, 6),
        scans_to_predict=1,
    ),
    "regions_2d": Model(Scans(**{**vars(BRAIN), "shape": (26, 24, 12)}), "2d", widths=(4, 6, 8), scans_to_predict=1),
    "ct_lowres_ignore": Model(
        Scans(("CT",), (26, 24, 20), (0.8, 0.8, 1.5), PARTLY.labels),
        "3d_lowres",
        trainer="nnUNetTrainerNoMirroring",
        configurations={"3d_lowres": {**LOWRES["3d_lowres"], "patch_size": [8, 12, 12]}},
        widths=(4, 8, 8),
        scans_to_predict=1,
    ),
}
SUFFIX = ".nii.gz"


def main(out: Path, kinds: list[str]) -> None:
    work = out / "nnunet"
    for name in ("raw", "preprocessed", "results"):
        os.environ[f"nnUNet_{name}"] = str(work / name)
    os.environ.update(nnUNet_def_n_proc="1", nnUNet_compile="f")
    known = {**MODELS, **FIXTURES}
    for kind in kinds or known:
        name = kind.replace(",", "").replace(" ", "_")
        make(known[kind], 1 + list(known).index(kind), out / name, work)
        if kind in FIXTURES:
            for file in (out / name).rglob("*.pth"):
                without_optimiser(file)
            with tarfile.open(out / f"{kind}.tar.xz", "w:xz") as archive:
                for part in ("model", "scans", "expected"):
                    archive.add(out / name / part, part, filter=plain)


def without_optimiser(file: Path) -> None:
    """Make a checkpoint half as large: what prediction does not need goes."""
    import torch

    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, "optimizer_state": {}}, file)


def plain(file: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """A file without its owner and time; none that only a run's log is for."""
    file.uid = file.gid = file.mtime = 0
    file.uname = file.gname = ""
    return None if file.name.endswith(("_args.json", "expected/plans.json", "expected/dataset.json")) else file


def make(model: Model, number: int, out: Path, work: Path) -> None:
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(number)
    rng = np.random.default_rng(number)
    shutil.rmtree(out, ignore_errors=True)
    dataset = f"Dataset{number:03}_Simulated"
    raw = work / "raw" / dataset
    shutil.rmtree(raw, ignore_errors=True)
    for i in range(6):
        write_scan(model.scans, rng, raw / "imagesTr", f"scan_{i:03}", raw / "labelsTr")
    for i in range(model.scans_to_predict):
        write_scan(model.scans, rng, out / "scans", f"scan_{100 + i}", None)
    describe(model.scans, raw)
    os.environ.update(nnUNet_n_proc_DA="1")  # the planner measures with as many threads
    plans = planned(model, number, dataset, work)
    os.environ.update(nnUNet_n_proc_DA="0")  # augments in this process
    train(model, plans, dataset, work)
    trained = next((work / "results" / dataset).glob(f"*__{model.configuration}"))
    for file in [*trained.glob("*.json"), *trained.glob("fold_*/checkpoint_final.pth")]:
        to = out / "model" / file.relative_to(trained)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, to)
    command = [
        *(Path(sys.executable).parent / "nnUNetv2_predict_from_modelfolder", "-i", out / "scans", "-o"),
        *(out / "expected", "-m", out / "model", "-f", *map(str, model.folds)),
        *("-device", "cpu", "-npp", "1", "-nps", "1"),
    ]
    subprocess.run([*map(str, command), "--disable_progress_bar"], check=True)


def write_scan(scans: Scans, rng: np.random.Generator, images: Path, name: str, labels: Path | None) -> None:
    """Ellipsoids in a body: an organ, and within it lesions that are brighter still."""
    spacing = np.array(scans.spacing) * rng.uniform(0.85, 1.2, 3)
    shape = np.maximum(8, (np.array(scans.shape) * rng.uniform(0.9, 1.1, 3)).astype(int))
    place = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1) / shape  # 0 to 1

    def ellipsoid(centre: np.ndarray, radius: np.ndarray) -> np.ndarray:
        return (((place - centre) / radius) ** 2).sum(-1) < 1

    body = ellipsoid(np.full(3, 0.5), rng.uniform(0.42, 0.47, 3))
    organ = ellipsoid(rng.uniform(0.4, 0.6, 3), rng.uniform(0.26, 0.34, 3)) & body
    lesion = ellipsoid(rng.uniform(0.4, 0.6, 3), rng.uniform(0.18, 0.24, 3)) & organ
    label = organ.astype(np.uint8) + lesion
    if labels is not None and "ignore" in scans.labels:
        label[place[..., 2] > rng.uniform(0.8, 0.9)] = scans.labels["ignore"]
    for i, channel in enumerate(scans.channels):
        image = gaussian_filter(100.0 * body + 120 * organ + (130 - 60 * i) * lesion, 0.6)
        image += gaussian_filter(rng.normal(0, 60, shape), 0.8)
        if channel == "CT":
            image = image * 2 - 300
        if scans.bare:
            image = np.where(body, np.maximum(image, 1), 0)
        save(image.astype(np.int16), spacing, images / f"{name}_{i:04}{SUFFIX}")
    if labels is not None:
        save(label, spacing, labels / f"{name}{SUFFIX}")


def save(voxels: np.ndarray, spacing: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(voxels.T)
    image.SetSpacing(spacing.tolist())
    image.SetOrigin((-20.0, 10.0, 5.0))
    sitk.WriteImage(image, str(path), True)


def describe(scans: Scans, raw: Path) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    generate_dataset_json(
        str(raw),
        {str(i): name for i, name in enumerate(scans.channels)},
        scans.labels,
        6,
        SUFFIX,
        regions_class_order=scans.regions_class_order,
    )


def planned(model: Model, number: int, dataset: str, work: Path) -> dict:
    """nnU-Net's own plans, with few and narrow levels, and what the model changes in them."""
    from batchgenerators.utilities.file_and_folder_operations import load_json, save_json
    from nnunetv2.experiment_planning.plan_and_preprocess_api import (
        extract_fingerprints,
        plan_experiments,
        preprocess,
    )

    shutil.rmtree(work / "preprocessed" / dataset, ignore_errors=True)
    shutil.rmtree(work / "results" / dataset, ignore_errors=True)
    extract_fingerprints([number], num_processes=1, check_dataset_integrity=False)
    name = plan_experiments([number], model.planner)
    file = work / "preprocessed" / dataset / f"{name}.json"
    plans = load_json(str(file))
    for key in ("2d", "3d_fullres"):
        configuration = plans["configurations"][key]
        build, levels = configuration["architecture"]["arch_kwargs"], 3
        configuration["patch_size"] = [min(n, 32) for n in configuration["patch_size"]]
        configuration["batch_size"] = 2
        build["n_stages"] = levels
        for part, value in list(build.items()):
            if isinstance(value, list):
                build[part] = value[: levels - (part == "n_conv_per_stage_decoder")]
        build["features_per_stage"] = list(model.widths)
        if "n_blocks_per_stage" in build:
            build["n_blocks_per_stage"] = [1, 2, 2]
    plans.update(model.plans)
    for key, changes in model.configurations.items():
        configuration = plans["configurations"].setdefault(key, {})
        for part, value in changes.items():
            if part == "architecture":
                configuration[part]["arch_kwargs"].update(value)
            else:
                configuration[part] = value
    save_json(plans, str(file), sort_keys=False)
    preprocess([number], name, (model.configuration,), (1,))
    return load_json(str(file))


def train(model: Model, plans: dict, dataset: str, work: Path) -> None:
    import torch
    from batchgenerators.utilities.file_and_folder_operations import load_json
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    described = load_json(str(work / "preprocessed" / dataset / "dataset.json"))
    for fold in model.folds:
        trainer = recursive_find_trainer_class_by_name(model.trainer)(
            plans={**plans, "continue_training": False},
            configuration=model.configuration,
            fold=fold,
            dataset_json=described,
            device=torch.device("cpu"),
        )
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 6, 50, 1
        trainer.run_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
