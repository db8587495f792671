"""Preparation, training, prediction and evaluation as MONAI's users write them, from its tutorials.

Runs in MONAI's environment:

    python monai_side.py prepare RAW PLANS --cache FOLDER
    python monai_side.py train RAW PLANS --weights FILE --split FILE [--steps N | --until UNIX_TIME] [--network dynunet]
    python monai_side.py try RAW PLANS [--network dynunet]
    python monai_side.py predict RAW PLANS SCANS --out FOLDER --precision fp32|bf16 [--weights FILE]
        [--network dynunet] [--mirror]
    python monai_side.py evaluate PREDICTIONS REFERENCES --labels N --out FILE

Spacing and patches are those of nnU-Net's plans (PLANS), as in MONAI's tutorial of DynUNet. ``--network dynunet`` is
the network of the plans; the default is the U-Net of MONAI's tutorial of spleen segmentation, which a CPU can train.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import json
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader, Dataset, PersistentDataset, decollate_batch
from monai.inferers import sliding_window_inference
from monai.losses import DeepSupervisionLoss, DiceCELoss
from monai.metrics import compute_dice, compute_hausdorff_distance
from monai.networks import one_hot
from monai.networks.layers import Norm
from monai.networks.nets import DynUNet, UNet
from monai.transforms import (
    AsDiscreted,
    Compose,
    EnsureChannelFirstd,
    EnsureTyped,
    Invertd,
    LoadImage,
    LoadImaged,
    NormalizeIntensityd,
    Orientationd,
    RandAffined,
    RandCropByPosNegLabeld,
    RandFlipd,
    RandGaussianNoised,
    RandScaleIntensityd,
    RandShiftIntensityd,
    SaveImaged,
    Spacingd,
    SpatialPadd,
)
from monai.utils import set_determinism

BOTH = ["image", "label"]


class Task:
    """A data set in nnU-Net's raw layout, with the plans' spacing, patch and network, all as (x, y, z)."""

    def __init__(self, raw: Path, plans: Path) -> None:
        self.raw = raw
        self.about = json.loads((raw / "dataset.json").read_text(encoding="utf-8"))
        self.channels, self.classes = len(self.about["channel_names"]), len(self.about["labels"])
        planned = json.loads(plans.read_text(encoding="utf-8"))
        configuration = planned["configurations"]["3d_fullres"]
        self.axes = planned["transpose_forward"]
        self.spacing = self.to_xyz(configuration["spacing"])
        self.patch = self.to_xyz(configuration["patch_size"])
        self.batch = configuration["batch_size"]
        self.architecture = configuration["architecture"]["arch_kwargs"]

    def to_xyz(self, values: list) -> list:
        """Values along the axes of nnU-Net's arrays, which are (z, y, x) in the order of the plans."""
        zyx: list = [None] * 3
        for place, axis in enumerate(self.axes):
            zyx[axis] = values[place]
        return zyx[::-1]

    def items(self, names: list[str] | None = None) -> list[dict]:
        found = sorted(file.name.removesuffix(".nii.gz") for file in (self.raw / "labelsTr").glob("*.nii.gz"))
        labels = self.raw / "labelsTr"
        chosen = found if names is None else names
        return [{**self.scan(self.raw / "imagesTr", n), "label": str(labels / f"{n}.nii.gz")} for n in chosen]

    def scan(self, folder: Path, name: str) -> dict:
        return {"image": [str(folder / f"{name}_{channel:04}.nii.gz") for channel in range(self.channels)]}

    def prepared(self, keys: list[str]) -> list:
        modes = ["bilinear", "nearest"][: len(keys)]
        return [
            LoadImaged(keys),
            EnsureChannelFirstd(keys),
            Orientationd(keys, axcodes="RAS", labels=None),
            Spacingd(keys, pixdim=self.spacing, mode=modes),
            NormalizeIntensityd(["image"], nonzero=True, channel_wise=True),
            EnsureTyped(keys),
        ]

    def varied(self) -> list:
        return [
            SpatialPadd(BOTH, spatial_size=self.patch),
            RandCropByPosNegLabeld(BOTH, label_key="label", spatial_size=self.patch, pos=1, neg=1, num_samples=1),
            RandAffined(
                BOTH,
                prob=0.5,
                rotate_range=[0.26] * 3,
                scale_range=[0.2] * 3,
                mode=["bilinear", "nearest"],
                padding_mode="border",
            ),
            RandFlipd(BOTH, prob=0.5, spatial_axis=0),
            RandScaleIntensityd(["image"], factors=0.1, prob=0.5),
            RandShiftIntensityd(["image"], offsets=0.1, prob=0.5),
            RandGaussianNoised(["image"], prob=0.15, std=0.1),
        ]

    def network(self, name: str) -> torch.nn.Module:
        if name == "dynunet":
            kernels = [self.to_xyz(kernel) for kernel in self.architecture["kernel_sizes"]]
            strides = [self.to_xyz(stride) for stride in self.architecture["strides"]]
            return DynUNet(
                spatial_dims=3,
                in_channels=self.channels,
                out_channels=self.classes,
                kernel_size=kernels,
                strides=strides,
                upsample_kernel_size=strides[1:],
                filters=self.architecture["features_per_stage"],
                norm_name=("INSTANCE", {"affine": True}),
                act_name=("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
                deep_supervision=True,
                deep_supr_num=len(strides) - 2,
            )
        levels = next(n for n in (4, 3, 2, 1) if all(side % 2**n == 0 for side in self.patch))
        return UNet(
            spatial_dims=3,
            in_channels=self.channels,
            out_channels=self.classes,
            channels=[16 * 2**level for level in range(levels + 1)],
            strides=[2] * levels,
            num_res_units=2,
            norm=Norm.BATCH,
        )


def autocast(faster: bool) -> Any:
    return torch.autocast("cpu", dtype=torch.bfloat16) if faster else nullcontext()


def bf16_is_faster(network: torch.nn.Module, x: torch.Tensor) -> bool:
    """Two passes each, after one to warm up: some CPUs emulate bfloat16, others double their rate with it."""
    took = {}
    with torch.no_grad():
        for faster in (False, True):
            for _ in range(3):
                started = time.perf_counter()
                with autocast(faster):
                    network(x)
                took[faster] = time.perf_counter() - started
    print(f"a pass takes {took[False]:.3f} s in float32, {took[True]:.3f} s in bfloat16", flush=True)
    return took[True] < took[False]


def prepare(options: argparse.Namespace) -> None:
    task = Task(options.raw, options.plans)
    dataset = PersistentDataset(task.items(), Compose(task.prepared(BOTH)), cache_dir=options.cache)
    for _ in DataLoader(dataset, batch_size=1, num_workers=2, collate_fn=len):
        pass
    print("measured:", json.dumps({"subjects": len(dataset)}))


def endless(loader: DataLoader) -> Any:
    while True:
        yield from loader


def train(options: argparse.Namespace) -> None:
    started = time.time()
    task = Task(options.raw, options.plans)
    names = json.loads(options.split.read_text(encoding="utf-8"))["training"]
    transforms = Compose([*task.prepared(BOTH), *task.varied()])
    # Only what is not random is cached.
    dataset = CacheDataset(task.items(names), transforms, cache_rate=1.0, num_workers=2, progress=False)
    batch = options.batch or task.batch
    loader = DataLoader(
        dataset,
        batch_size=min(batch, len(dataset)),
        shuffle=True,
        drop_last=True,
        num_workers=2,
        persistent_workers=True,
    )
    network = task.network(options.network)
    loss = DiceCELoss(to_onehot_y=True, softmax=True)
    if options.network == "dynunet":
        loss = DeepSupervisionLoss(loss)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-5)
    faster, ended = None, []

    def progress() -> float:
        if options.steps is not None:
            return len(ended) / options.steps
        now = time.time()
        return 1.0 if now >= options.until else (now - started) / (options.until - started)

    network.train()
    for data in endless(loader):
        if progress() >= 1:
            break
        image, label = data["image"].as_tensor(), data["label"].as_tensor()
        if faster is None:
            faster = bf16_is_faster(network, image)
        for group in optimiser.param_groups:
            group["lr"] = 1e-3 * (1 - min(progress(), 0.999)) ** 0.9
        optimiser.zero_grad()
        with autocast(faster):
            logits = network(image)
        if options.network == "dynunet":
            # The heads are stacked at full resolution: (N, heads, K, X, Y, Z).
            value = loss([head.float() for head in torch.unbind(logits, dim=1)], label)
        else:
            value = loss(logits.float(), label)
        value.backward()
        optimiser.step()
        ended.append(time.time())
    torch.save({"network": network.state_dict(), "bf16": faster}, options.weights)
    print("measured:", json.dumps({"ended": ended, "bf16": faster}), flush=True)


def try_precision(options: argparse.Namespace) -> None:
    task = Task(options.raw, options.plans)
    network = task.network(options.network).eval()
    faster = bf16_is_faster(network, torch.zeros(1, task.channels, *task.patch))
    print("measured:", json.dumps({"bf16": faster}))


def predict(options: argparse.Namespace) -> None:
    task = Task(options.raw, options.plans)
    before = Compose([*task.prepared(["image"])])
    torch.manual_seed(0)
    network = task.network(options.network).eval()
    if options.weights is not None:
        network.load_state_dict(torch.load(options.weights)["network"])
    after = Compose(
        [
            Invertd(["label"], before, orig_keys="image", nearest_interp=False, to_tensor=True),
            AsDiscreted(["label"], argmax=True),
            SaveImaged(
                ["label"],
                output_dir=options.out,
                output_postfix="",
                separate_folder=False,
                output_dtype=np.uint8,
                resample=False,
                print_log=False,
            ),
        ]
    )
    names = sorted({file.name[: -len("_0000.nii.gz")] for file in options.scans.glob("*_0000.nii.gz")})
    dataset = Dataset([task.scan(options.scans, name) for name in names], before)
    faster = options.precision == "bf16"
    axes = [axes for count in range(4) for axes in itertools.combinations((2, 3, 4), count)]
    settings: dict[str, Any] = {"overlap": 0.5, "mode": "gaussian"} if options.equal else {}
    with torch.no_grad():
        for data in DataLoader(dataset, batch_size=1, num_workers=1):
            image = data["image"]

            def logits(x: torch.Tensor) -> torch.Tensor:
                with autocast(faster):
                    return sliding_window_inference(x, task.patch, 4, network, **settings).float()

            if options.mirror:
                mirrored = (
                    torch.flip(logits(torch.flip(image, flip)), flip) if flip else logits(image) for flip in axes
                )
                data["label"] = sum(mirrored) / len(axes)
            else:
                data["label"] = logits(image)
            for one in decollate_batch(data):
                after(one)
    print("measured:", json.dumps({"bf16": faster, "subjects": len(names)}))


def evaluate(options: argparse.Namespace) -> None:
    read = LoadImage(ensure_channel_first=True)
    rows = []
    for file in sorted(options.predictions.glob("*.nii.gz")):
        predicted, reference = read(file), read(options.references / file.name)
        spacing = [float(side) for side in reference.pixdim]
        masks = [one_hot(image.as_tensor()[None], options.labels + 1) for image in (predicted, reference)]
        dice = compute_dice(*masks, include_background=False)[0]
        hd95 = compute_hausdorff_distance(*masks, include_background=False, percentile=95, spacing=spacing)[0]
        for number, (one, other) in enumerate(zip(dice.tolist(), hd95.tolist(), strict=True), start=1):
            rows.append([file.name, number, one, other])
    with options.out.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["file", "label", "dice", "hd95_mm"], *rows])
    means = [sum(v for v in column if math.isfinite(v)) / len(rows) for column in list(zip(*rows, strict=True))[2:]]
    print("measured:", json.dumps({"dice": means[0], "hd95_mm": means[1]}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", choices=("prepare", "train", "try", "predict", "evaluate"))
    parser.add_argument("inputs", type=Path, nargs="+")
    parser.add_argument("--cache", type=Path)
    parser.add_argument("--split", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--network", choices=("unet", "dynunet"), default="unet")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of predictions; see 'try'")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--until", type=float)
    parser.add_argument("--labels", type=int)
    parser.add_argument("--equal", action="store_true", help="overlap by half and weigh by a Gaussian, as nnU-Net does")
    parser.add_argument("--mirror", action="store_true", help="average over the mirror images along all axes")
    options = parser.parse_args()
    set_determinism(0)
    if options.work == "evaluate":
        options.predictions, options.references = options.inputs
    else:
        options.raw, options.plans, *scans = options.inputs
        options.scans = scans[0] if scans else None
    works = {"prepare": prepare, "train": train, "try": try_precision, "predict": predict, "evaluate": evaluate}
    works[options.work](options)


if __name__ == "__main__":
    main()
