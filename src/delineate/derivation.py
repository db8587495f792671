"""A recipe derived from the data and the machine, with the reason beside each choice."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.datasets.inspection import SubjectRow
from delineate.networks.cost import step_cost
from delineate.recipe import Recipe, TargetsSpec, group_of, recipe_from
from delineate.specification import Specification

AUTO = "auto"
"""What stands for a recipe that is derived, and the group of :class:`AutoSpec`."""

THICK = 3.0
"""Ratio of slice spacing to in-plane spacing from which nothing is interpolated across slices."""

AIR = -500.0
"""The 0.5th percentile from which scans whose modality nobody states are CTs: MR scans have no such values."""

VERY_THICK = 5.0
"""Ratio from which neighbouring slices have too little in common for 3D convolutions."""

VOXELS_PER_TILE = {"cpu": 2**18, "mps": 2**20, "cuda": 2**21}
"""Approximate tile size at which a training step takes about a second."""

FIRST_WIDTHS = {"cpu": (16, 64), "mps": (32, 64), "cuda": (32, 64)}
"""Channels of the first two levels; on a CPU, the first level takes three quarters of the time (full resolution)."""

LARGEST_WIDTH = 320

LEAST_SIDE = 6
"""Fewest voxels that halving may leave along a side; below this there is nothing left to convolve."""

LEAST_ACROSS = 12
"""Voxels across the smallest target's largest piece that coarser voxels have to leave."""

MOST_TIMES_COARSER = 2.0
"""How much longer than in the scans voxels may be, so that a tile holds a target."""

SPECK = 0.01
"""Share of a target's voxels that may lie apart from its largest piece in a label of what is one piece."""

LEAST_LABELS = 8
"""Labels that have to agree before all but a target's largest piece is removed."""

LEAST_STEPS = 150
"""Steps that a budget of minutes should pay for: fewer teach even a good network little."""

SCALES = ((1.0, 1.0), (0.5, 1.0), (0.25, 1.0), (0.25, 0.5), (0.25, 0.25), (0.25, 0.125))
"""Shares of the usual widths and of a tile's usual voxels, to try in turn until the budget pays for enough steps."""

CONVOLVING_SHARE = 0.5
"""Share of a step's time in which it convolves as fast as the machine can, where networks are narrow."""

BYTES_PER_VOXEL_AND_WIDTH = 60
"""Memory of a training step per voxel of a tile and channel of the first level; 42 measured in bf16."""


_Multiple = Annotated[float, Field(ge=0.125, le=8)]


class AutoSpec(Specification):
    """Multiples of what would be derived.

    Of the network's ``widths``, of the ``voxels`` of a step's tiles, and of the voxels' ``spacing``, which thick slices
    keep.
    """

    widths: _Multiple = 1.0
    voxels: _Multiple = 1.0
    spacing: _Multiple = 1.0

    @classmethod
    def of_changes(cls, changes: Sequence[str]) -> tuple[AutoSpec, list[str]]:
        """What ``changes`` say of ``auto``, and those that are to the recipe itself."""
        return group_of(cls, AUTO, changes)


@dataclass(frozen=True)
class DataSummary:
    """What the choices are based on; axes are (x, y, z) in RAS orientation, arrays have one row per subject."""

    shapes: NDArray[np.float64]
    spacings_mm: NDArray[np.float64]
    foreground_share: float
    nonzero_share: float
    lowest: float
    far_maximum: float
    target_share: float
    modality: str
    subjects: int
    labels_in_one_piece: Mapping[str, int] = field(default_factory=dict)
    """Targets that are in one piece wherever they are labelled, and in how many labels."""
    extents_mm: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    """The extent of each target's largest piece, one row per label that has it."""


@dataclass
class _Choices:
    """Values by dotted path, and the reasons for them."""

    values: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)

    def set(self, path: str, value: Any, reason: str = "") -> None:
        *parents, last = path.split(".")
        node = self.values
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
        if reason:
            self.reasons[path] = reason


def summarise(rows: Sequence[SubjectRow], targets: Targets, modality: str = "") -> DataSummary:
    """Summarise what inspection measured of ``targets``."""
    shapes, spacings = [], []
    for row in rows:
        order = _ras_order(row.orientation)
        shapes.append([row.shape[axis] for axis in order])
        spacings.append([row.spacing_mm[axis] for axis in order])
    channels = [channel for row in rows for channel in row.intensities.values()]
    voxels = [float(np.prod(row.shape)) for row in rows]
    largest: dict[str, list[float]] = {}
    extents: dict[str, list[NDArray[np.float64]]] = {}
    for row, mm in zip(rows, spacings, strict=True):
        for name, piece in row.largest_pieces.items():
            largest.setdefault(name, []).append(piece.share)
            extents.setdefault(name, []).append(np.array(piece.shape)[_ras_order(row.orientation)] * mm)
    background = {0, *targets.ignore}
    labelled = [sum(n for value, n in row.label_voxels.items() if int(value) not in background) for row in rows]
    return DataSummary(
        shapes=np.array(shapes, dtype=float),
        spacings_mm=np.array(spacings, dtype=float),
        foreground_share=float(
            np.median([np.prod(row.foreground_shape) / n for row, n in zip(rows, voxels, strict=True)])
        ),
        nonzero_share=float(np.median([c.nonzero for c in channels])),
        lowest=float(np.median([c.p0_5 for c in channels])),
        far_maximum=float(max((c.max - c.p50) / max(c.p99_5 - c.p50, 1e-6) for c in channels)),
        target_share=float(np.mean([n / v for n, v in zip(labelled, voxels, strict=True)])),
        modality=modality,
        subjects=len(rows),
        labels_in_one_piece={n: len(shares) for n, shares in largest.items() if min(shares) > 1 - SPECK},
        extents_mm={name: np.array(those) for name, those in extents.items()},
    )


def derive_recipe(
    summary: DataSummary,
    targets: Targets,
    *,
    device: str,
    memory_bytes: int,
    minutes: float | None = None,
    steps: int | None = None,
    epochs: int | None = None,
    gflops: float | None = None,
    auto: AutoSpec | None = None,
) -> tuple[Recipe, dict[str, str]]:
    """The recipe and, by dotted path, the reason for each choice.

    ``device`` is cpu, cuda or mps; ``memory_bytes`` is how much of its memory training may use, ``gflops`` the rate of
    its convolutions. If the minutes would pay for few steps at that rate, the network is narrower or its tiles smaller.
    """
    auto = auto or AutoSpec()
    for widths, voxels in SCALES:
        size = _Size(device, memory_bytes, widths * auto.widths, voxels * auto.voxels, auto.spacing)
        recipe, reasons = _derived(summary, targets, size, minutes, steps, epochs)
        if gflops is None or minutes is None:
            break
        affordable = int(60 * minutes / step_seconds(recipe, targets, gflops))
        if affordable >= LEAST_STEPS:
            break
    if (widths, voxels) != SCALES[0]:
        reasons["network.widths"] += f"; small, so that {minutes:g} min pay for about {affordable} steps"
    return recipe, reasons


def step_seconds(recipe: Recipe, targets: Targets, gflops: float) -> float:
    """About how long a step takes where convolutions reach ``gflops``."""
    shape = [side or 1 for side in getattr(recipe.tiles, "shape", ())]
    slices = 1 + 2 * getattr(recipe.tiles, "neighbours", 0)
    cost = step_cost(recipe.network, slices, targets.outputs, shape, recipe.training.batch_size)
    return cost.gflop / (CONVOLVING_SHARE * gflops)


@dataclass(frozen=True)
class _Size:
    """How large networks, tiles and voxels may be: for a device and its memory, and in which shares of the usual."""

    device: str
    memory_bytes: int
    width_share: float
    voxel_share: float
    spacing_share: float

    @property
    def widths(self) -> tuple[int, int]:
        """Channels of the first two levels, in eights, which convolutions are fastest with."""
        first, second = (max(8, 8 * round(width * self.width_share / 8)) for width in FIRST_WIDTHS[self.device])
        return first, second

    @property
    def voxels(self) -> float:
        """The voxels of a step's tiles."""
        by_memory = 0.5 * self.memory_bytes / (BYTES_PER_VOXEL_AND_WIDTH * FIRST_WIDTHS[self.device][0])
        return self.voxel_share * float(min(VOXELS_PER_TILE[self.device], by_memory))


def _derived(
    summary: DataSummary,
    targets: Targets,
    size: _Size,
    minutes: float | None,
    steps: int | None,
    epochs: int | None,
) -> tuple[Recipe, dict[str, str]]:
    c = _Choices()
    c.set("name", "auto")
    c.set("description", f"Derived from {summary.subjects} inspected subjects.")
    c.set("data.targets", TargetsSpec.of(targets).model_dump(mode="json"))
    spacing, thick_axis, ratio = _spacing(summary)
    cropped = summary.foreground_share < 0.7
    shape = np.percentile(summary.shapes * summary.spacings_mm / spacing, 90, axis=0)
    if cropped:
        shape = shape * summary.foreground_share ** (1 / 3)
    free = (np.arange(3) != thick_axis) | (ratio < THICK)
    times = 1.0 if ratio >= VERY_THICK else _times_coarser(summary, shape, spacing, free, size)
    coarser = np.where(free, size.spacing_share * times, 1.0)
    spacing, shape = np.round(spacing * coarser, 3), shape / coarser
    _choose_preprocessing(c, summary, spacing, thick_axis, ratio, cropped)
    if times > 1:
        longer = f", {times:.1f} × as long, so that a tile holds nine in ten of the largest target's pieces"
        c.reasons["preprocessing.1.kind"] += longer
    if ratio >= VERY_THICK:
        side, network_reason = _choose_slices(c, shape, thick_axis, ratio, size)
        dims = [axis for axis in range(3) if axis != thick_axis]
    else:
        side, network_reason = _choose_patches(c, shape, spacing, ratio, size)
        dims = [0, 1, 2]
    _choose_network(c, [side[a] for a in dims], spacing[dims], size, network_reason)
    coverage = float(np.prod(np.minimum(np.array(side)[dims], shape[dims]) / shape[dims]))
    _choose_sampler(c, coverage, summary.target_share, sliced=len(dims) == 2)
    _choose_augmentation(c, thick_axis, ratio, float(spacing.min()))
    _choose_postprocessing(c, summary)
    rate = 3e-3 if len(dims) == 3 else 2e-3
    c.set("training.optimiser.learning_rate", rate, "high, since short budgets need large steps; it decays to zero")
    c.set("training.optimiser.weight_decay", 0.01)
    c.set("training.steps", steps)
    c.set("training.epochs", epochs)
    if minutes is None and steps is None and epochs is None:
        minutes = 60.0
        c.set("training.minutes", minutes, "no budget was given; more is better until validation levels off")
    else:
        c.set("training.minutes", minutes)
    return recipe_from(c.values), c.reasons


def _ras_order(orientation: str) -> list[int]:
    """The scan axis that runs along each of x, y and z, from three letters such as LPS."""
    along = {"R": 0, "L": 0, "A": 1, "P": 1, "S": 2, "I": 2}
    return [[along[letter] for letter in orientation].index(axis) for axis in range(3)]


def _spacing(summary: DataSummary) -> tuple[NDArray[np.float64], int, float]:
    """Median spacing (mm), the slice axis, and the ratio of slice spacing to in-plane spacing."""
    spacing = np.round(np.median(summary.spacings_mm, axis=0), 3)
    shape = [int(n) for n in np.median(summary.shapes, axis=0)]
    thick = Grid.of_spacing(shape, spacing.tolist()).slice_axis
    in_plane = [spacing[axis] for axis in range(3) if axis != thick]
    return spacing, thick, float(spacing[thick] / max(in_plane))


def _choose_preprocessing(
    c: _Choices, summary: DataSummary, spacing: NDArray[np.float64], thick: int, ratio: float, cropped: bool
) -> None:
    target: list[float | None] = [float(s) for s in spacing]
    steps: list[dict[str, Any]] = [{"kind": "reorient", "to": "RAS"}]
    reasons = ["one orientation for all scans; predictions return to each scan's own"]
    if ratio >= THICK:
        target[thick] = None
        reasons.append(f"slice spacing is {ratio:.1f} × the pixel spacing: median spacing in plane only")
    else:
        reasons.append("median spacing of the scans")
    steps.append({"kind": "resample", "spacing_mm": target})
    if cropped:
        steps.append({"kind": "crop_background", "threshold": "minimum"})
        reasons.append(f"only {summary.foreground_share:.0%} of a typical scan contains signal")
    within = "nonzero" if summary.nonzero_share < 0.7 else "all"
    # Resampled MR scans overshoot far below 0, in a few voxels. Taken for CT, they could not be compared.
    if summary.modality == "CT" or (not summary.modality and summary.lowest <= AIR):
        steps.append({"kind": "clip_percentiles", "lower": 0.5, "upper": 99.5, "scope": "cohort"})
        reasons.append("CT numbers mean the same in every scan: one range for all scans")
        steps.append({"kind": "normalise", "method": "zscore", "scope": "cohort"})
        reasons.append("as above")
    else:
        steps.append({"kind": "clip_percentiles", "lower": 0.5, "upper": 99.5, "within": within})
        reasons.append(f"maxima lie up to {summary.far_maximum:.0f} × as far above the median as the 99.5th percentile")
        steps.append({"kind": "normalise", "method": "zscore", "scope": "patient", "within": within})
        nonzero = "over nonzero voxels, since the background is zero" if within == "nonzero" else "over all voxels"
        reasons.append(f"MR intensities have no unit: each scan is normalised by itself, {nonzero}")
    c.set("preprocessing", steps)
    c.reasons |= {f"preprocessing.{i}.kind": reason for i, reason in enumerate(reasons)}


def _choose_slices(
    c: _Choices, shape: NDArray[np.float64], thick: int, ratio: float, size: _Size
) -> tuple[list[int], str]:
    """2.5D: whole slices with their neighbours, several to a batch."""
    side = [1 if axis == thick else _round_up(shape[axis], 16) for axis in range(3)]
    in_plane = [side[axis] for axis in range(3) if axis != thick]
    while np.prod(in_plane) > size.voxels:
        in_plane[int(np.argmax(in_plane))] -= 16
    batch = int(np.clip(size.voxels // np.prod(in_plane), 2, 16))
    c.set("tiles.kind", "slices", f"slice spacing is {ratio:.1f} × the pixel spacing: 2.5D, slice by slice")
    c.set("tiles.axis", "thickest")
    c.set("tiles.shape", in_plane, "fits whole slices of nine scans in ten, within the memory budget")
    c.set("tiles.neighbours", 1, "adjacent slices help to tell lesions from vessels")
    c.set("training.batch_size", batch, "as many slices as a step of about a second allows")
    for axis, n in zip([a for a in range(3) if a != thick], in_plane, strict=True):
        side[axis] = n
    return side, "2D, for slices"


def _sides(shape: NDArray[np.float64], spacing: NDArray[np.float64], size: _Size) -> tuple[list[int], bool]:
    """Sides of the largest patch with the scans' proportions that fits the budget, and whether it holds whole scans."""
    budget = size.voxels / 2  # two tiles per step
    side = [_round_up(n, 4) for n in shape]
    whole = float(np.prod(side)) <= budget
    while np.prod(side) > budget:
        # Shrink the axis along which the patch is longest in millimetres.
        axis = int(np.argmax([n * s if n > 16 else 0 for n, s in zip(side, spacing, strict=True)]))
        side[axis] -= 4
    return [_round_up(n, 8) if n >= 48 else n for n in side], whole


def _times_coarser(
    summary: DataSummary,
    shape: NDArray[np.float64],
    spacing: NDArray[np.float64],
    free: NDArray[np.bool_],
    size: _Size,
) -> float:
    """How much longer voxels should be, along the axes that are ``free`` to change, for a patch to hold a target.

    Nine in ten pieces of the largest target should fit, and half of those of the smallest keep enough voxels.
    """
    side, whole = _sides(shape, spacing, size)
    if whole or not summary.extents_mm:
        return 1.0
    seen_mm = np.array(side) * spacing
    wanted = max(float((np.percentile(mm, 90, axis=0) / seen_mm)[free].max()) for mm in summary.extents_mm.values())
    bearable = min(float((np.median(mm, axis=0) / spacing)[free].min()) for mm in summary.extents_mm.values())
    times = min(wanted, bearable / LEAST_ACROSS, MOST_TIMES_COARSER)
    return 1.0 if times < 1.1 else times


def _choose_patches(
    c: _Choices, shape: NDArray[np.float64], spacing: NDArray[np.float64], ratio: float, size: _Size
) -> tuple[list[int], str]:
    """3D: the largest patch with the scans' proportions that fits the budget."""
    side, whole = _sides(shape, spacing, size)
    c.set("tiles.kind", "patches", f"slice spacing is {ratio:.1f} × the pixel spacing: 3D")
    reason = "fits nine scans in ten whole" if whole else "as large as a step of about a second allows"
    c.set("tiles.shape", side, reason)
    c.set("training.batch_size", 2, "two tiles: on short budgets, more steps teach more than larger batches")
    return side, "3D"


def _choose_network(c: _Choices, sides: Sequence[int], spacing: NDArray[np.float64], size: _Size, reason: str) -> None:
    """A U-Net that halves an axis while enough voxels are left and its spacing is less than twice the finest."""
    side, mm, kernels = list(sides), list(spacing), [[3] * len(sides)]
    strides: list[list[int]] = []
    if max(mm) >= THICK * min(mm):
        kernels = [[1 if s >= THICK * min(mm) else 3 for s in mm]]
    while len(strides) < 5:
        halved = [n % 2 == 0 and n // 2 >= LEAST_SIDE and s < 2 * min(mm) for n, s in zip(side, mm, strict=True)]
        step = [2 if half else 1 for half in halved]
        if max(step) == 1:
            break
        strides.append(step)
        side = [n // k for n, k in zip(side, step, strict=True)]
        mm = [s * k for s, k in zip(mm, step, strict=True)]
        kernels.append([1 if s >= THICK * min(mm) else 3 for s in mm])
    strides = strides or [[2] * len(sides)]
    kernels = kernels if len(kernels) == len(strides) + 1 else [[3] * len(sides)] * (len(strides) + 1)
    first, second = size.widths
    c.set("network.kind", "unet", reason)
    c.set("network.dimensions", len(sides))
    c.set(
        "network.widths",
        [first, *(min(second * 2**i, LARGEST_WIDTH) for i in range(len(strides)))],
        f"{len(strides)} halvings leave {' × '.join(map(str, side))} voxels; "
        f"{first} filters at first suit {size.device}",
    )
    c.set("network.strides", strides)
    c.set("network.kernels", kernels)


def _choose_sampler(c: _Choices, coverage: float, target_share: float, *, sliced: bool) -> None:
    if coverage > 0.8 and not sliced:
        c.set(
            "sampler.kind",
            "random",
            f"a tile covers {coverage:.0%} of a scan: nearly all contain the targets",
        )
        return
    fraction = 0.66 if target_share < 0.01 else 0.5
    c.set("sampler.kind", "class_balanced", f"targets make up {target_share:.2%} of the voxels")
    c.set("sampler.foreground_fraction", fraction, "the rest is drawn from anywhere")


def _choose_augmentation(c: _Choices, thick: int, ratio: float, finest_mm: float) -> None:
    flat = ratio >= THICK
    turn = [20.0 if not flat or axis == thick else 0.0 for axis in range(3)]
    c.set("augmentation.spatial.probability", 0.8)
    c.set("augmentation.spatial.rotate_degrees", turn, "in plane only: slices are thick" if flat else "about each axis")
    c.set("augmentation.spatial.scale", [0.8, 1.25])
    c.set("augmentation.spatial.elastic_mm", round(1.5 * finest_mm, 2), "one and a half voxels in plane")
    c.set("augmentation.spatial.mirror", [], "none: left and right may be different organs")
    c.set("augmentation.intensity.probability", 0.4)


def _choose_postprocessing(c: _Choices, summary: DataSummary) -> None:
    single = {name: n for name, n in summary.labels_in_one_piece.items() if n >= LEAST_LABELS}
    if single:
        c.set(
            "postprocessing.largest_component",
            list(single),
            f"in one piece in all {min(single.values())} labels: smaller pieces are taken for errors",
        )


def _round_up(n: float, to: int) -> int:
    return max(to, math.ceil(n / to - 0.05) * to)
