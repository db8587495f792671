"""One part of each kind, as a user's own module has them; nothing in Delineate knows of it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.folder import Folder, Layout, subjects_of
from delineate.io.formats import Format
from delineate.losses.base import Loss, LossSpecification, judged
from delineate.metrics.catalogue import Metric
from delineate.networks.base import Architecture
from delineate.preprocessing.cache import PreparedSubject
from delineate.preprocessing.step import Step, Undo, Unmoved, as_float
from delineate.sampling.samplers import SamplerSpecification
from delineate.sampling.tiles import Tile, TileGeometry


class TwoLayers(Architecture):
    """Two convolutions."""

    kind: Literal["two_layers"] = "two_layers"
    dimensions: Literal[3] = 3
    filters: int = 4

    @property
    def divisor(self) -> tuple[int, ...]:
        return (1, 1, 1)

    def body(self, inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv3d(inputs, self.filters, 3, padding=1), nn.ReLU(), nn.Conv3d(self.filters, outputs, 1)
        )


class AbsoluteError(LossSpecification):
    """The mean of |probability − reference| over the voxels that count."""

    kind: Literal["absolute_error"] = "absolute_error"

    def build(self, targets: Targets) -> Loss:
        def loss(logits: Tensor, target: Tensor, image: Tensor) -> Tensor:
            probability, reference, known = judged(logits, target, targets, None)
            wrong = ((probability - reference).abs() * known).sum()
            return wrong / torch.clamp(known.expand_as(probability).sum(), min=1)

        return loss


class Square(Step):
    """Every intensity times its size."""

    kind: Literal["square"] = "square"

    def apply(self, volume: Volume) -> tuple[Volume, Undo]:
        voxels = as_float(volume)
        return Volume(voxels * np.abs(voxels), volume.grid), Unmoved.on(volume.grid)


class Corners(SamplerSpecification):
    """The first corner of every subject."""

    kind: Literal["corners"] = "corners"

    def draw(self, subject: PreparedSubject, geometry: TileGeometry, rng: np.random.Generator) -> Tile:
        return Tile((0, 0, 0), geometry.shape)


MISSED_ML = Metric(
    "missed_ml", "Missed", "volume of the reference that was not found", lambda c: c.overlap.fn * c.voxel_ml,
    unit="ml", better="lower",
)  # fmt: skip


def read_pairs(folder: Folder) -> Dataset | None:
    """SUBJECT/anatomy with SUBJECT/drawing."""
    found = {path.parent.name: path for path in folder.scans if path.name.startswith("anatomy.")}
    drawn = {path.parent.name: path for path in folder.scans if path.name.startswith("drawing.")}
    if not found or not drawn:
        return None
    subjects = subjects_of(folder.root, {(name, "MR"): path for name, path in found.items()}, drawn, ("MR",))
    return Dataset(folder.name, folder.root, "drawings", subjects, Targets({"ball": (1,)}), reason="anatomy, drawing")


DRAWINGS = Layout("drawings", "SUBJECT/anatomy.nii.gz\nSUBJECT/drawing.nii.gz", read_pairs)


def read_npz(path: Path) -> Volume:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
        return Volume(stored["voxels"], Grid(stored["voxels"].shape[1:], stored["affine"]))


def write_npz(path: Path, volume: Volume) -> None:
    with path.open("wb") as file:
        np.savez(file, voxels=volume.voxels, affine=volume.grid.affine)


NPZ = Format(".scan.npz", read_npz, write_npz)
