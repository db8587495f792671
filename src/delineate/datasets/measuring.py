"""Numbers that describe a scan or label: intensities, where it shows something, and a hash of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from delineate.core.components import connected_components, sizes_and_boxes
from delineate.core.grid import Shape3
from delineate.core.targets import Targets
from delineate.io.files import content_hash
from delineate.io.formats import parts_of

Planes = tuple[NDArray[np.bool_], NDArray[np.bool_], NDArray[np.bool_]]

_SAMPLED = 2**20  # voxels from which percentiles, mean and deviation are taken
_COARSE = 64  # voxels along an axis of the mask that labels are compared with


@dataclass(frozen=True)
class Intensity:
    """One channel's values. ``nonzero`` is the fraction of voxels that are not 0.

    Extremes and ``nonzero`` take in all voxels. For a scan of more than 10⁶ voxels, percentiles, mean and
    standard deviation come from every k-th, a million evenly spread: within 0.1 % of the exact rank.
    """

    min: float
    p0_5: float
    p50: float
    p99_5: float
    max: float
    mean: float
    std: float
    nonzero: float

    @property
    def constant(self) -> bool:
        return self.min == self.max


def measure_intensity(voxels: NDArray) -> Intensity:
    """Intensities of finite ``voxels`` (X, Y, Z)."""
    flat = voxels.ravel(order="K")
    sample = flat[:: -(-flat.size // _SAMPLED)]
    low, middle, high = np.percentile(sample, (0.5, 50, 99.5))
    return Intensity(
        min=float(flat.min()),
        p0_5=float(low),
        p50=float(middle),
        p99_5=float(high),
        max=float(flat.max()),
        mean=float(sample.mean(dtype=np.float64)),
        std=float(sample.std(dtype=np.float64)),
        nonzero=float(np.count_nonzero(flat) / flat.size),
    )


def in_grey(voxels: NDArray, intensity: Intensity) -> NDArray[np.uint8]:
    """Voxels in 256 grey levels between the outer percentiles."""
    low, high = intensity.p0_5, intensity.p99_5
    scale = 255 / (high - low) if high > low else 0.0
    return np.clip((voxels.astype(np.float32) - low) * scale, 0, 255).astype(np.uint8)


@dataclass(frozen=True, eq=False)
class Foreground:
    """Where a scan shows something.

    ``occupied`` says for each axis which planes hold voxels above the background. ``coarse`` is a
    mask, of every ``stride``-th voxel, that is true where the scan is brighter than background noise.
    """

    occupied: Planes
    coarse: NDArray[np.bool_]
    stride: Shape3

    def __or__(self, other: Foreground) -> Foreground:
        """The foreground of two channels on the same grid: wherever either shows something."""
        x, y, z = (a | b for a, b in zip(self.occupied, other.occupied, strict=True))
        return Foreground((x, y, z), self.coarse | other.coarse, self.stride)

    @property
    def box_shape(self) -> Shape3:
        return _box(self.occupied)

    def share_of(self, mask: NDArray[np.bool_]) -> float:
        """Fraction of ``mask`` (X, Y, Z) that lies on the foreground, its holes filled; 1 for an empty mask."""
        marked = mask[tuple(slice(None, None, step) for step in self.stride)]
        count = np.count_nonzero(marked)
        if not count:
            return 1.0
        share = np.count_nonzero(self.coarse & marked) / count
        if share < 1:
            from scipy.ndimage import binary_fill_holes  # slow to import, seldom needed

            share = np.count_nonzero(binary_fill_holes(self.coarse) & marked) / count
        return float(share)


def find_foreground(voxels: NDArray, intensity: Intensity) -> Foreground:
    """Foreground of one channel (X, Y, Z).

    The background is the value in all eight corners, as after masking, otherwise the smallest value.
    A noisy background has no single value: for ``coarse``, a voxel counts as bright above a tenth of the
    percentile range, unless the corners were masked to a value within that range.
    """
    corners = voxels[:: max(voxels.shape[0] - 1, 1), :: max(voxels.shape[1] - 1, 1), :: max(voxels.shape[2] - 1, 1)]
    masked = bool((corners == corners.flat[0]).all())
    background = corners.flat[0] if masked else intensity.min
    step_x, step_y, step_z = (-(-n // _COARSE) for n in voxels.shape)
    sample = voxels[::step_x, ::step_y, ::step_z]
    if masked and background > intensity.min:
        coarse = sample != background
    else:
        coarse = sample > intensity.p0_5 + (intensity.p99_5 - intensity.p0_5) / 10
    return Foreground(_occupied(voxels != background), coarse, (step_x, step_y, step_z))


@dataclass(frozen=True)
class Piece:
    """A target's largest piece in a label: its share of the target's voxels, and the shape of the box around it."""

    share: float
    shape: Shape3


def largest_pieces(label: NDArray, targets: Targets) -> dict[str, Piece]:
    """The largest piece of each target that is in a label (X, Y, Z)."""
    largest: dict[str, Piece] = {}
    # Targets that may overlap one after another: together they would take a volume each.
    for values in [targets.values] if targets.exclusive else [{name: v} for name, v in targets.values.items()]:
        (plane,) = Targets(values).encode(label)
        pieces, count = connected_components(plane)
        sizes, boxes = sizes_and_boxes(pieces)
        target_of = np.zeros(count + 1, np.uint8)
        target_of[pieces] = plane
        for number, name in enumerate(values, start=1):
            own = np.flatnonzero(target_of == number)
            if own.size:
                first = own[sizes[own].argmax()]
                x, y, z = (box.stop - box.start for box in boxes[first])
                largest[name] = Piece(float(sizes[first] / sizes[own].sum()), (x, y, z))
    return largest


def count_values(label: NDArray) -> dict[int, int]:
    """Number of voxels by value in an integer label."""
    if label.dtype.kind == "u" and label.dtype.itemsize <= 2:
        counts = np.bincount(label.ravel(order="K"))
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(label, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def scan_hash(path: Path) -> str:
    """The file's content hash; if its header names files beside it, one hash of all their hashes."""
    hashes = [content_hash(file) for file in parts_of(path)]
    return hashes[0] if len(hashes) == 1 else hashlib.blake2b("".join(hashes).encode(), digest_size=16).hexdigest()


def label_hash(files: Mapping[str, Path]) -> str:
    """The hash of a label's file; of several, by target, one hash of their names and hashes."""
    if len(set(files.values())) == 1:
        return scan_hash(next(iter(files.values())))
    named = "".join(f"{name} {scan_hash(file)}\n" for name, file in files.items())
    return hashlib.blake2b(named.encode(), digest_size=16).hexdigest()


def _occupied(mask: NDArray[np.bool_]) -> Planes:
    plane = np.any(mask, axis=2)
    return np.any(plane, axis=1), np.any(plane, axis=0), np.any(mask, axis=(0, 1))


def _box(occupied: Planes) -> Shape3:
    extents = []
    for planes in occupied:
        where = np.flatnonzero(planes)
        extents.append(int(where[-1] - where[0]) + 1 if where.size else 0)
    x, y, z = extents
    return x, y, z
