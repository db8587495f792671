"""Augmentation of whole batches on the device: a single resampling, then changes of intensity.

Rotation, scaling, mirroring and elastic deformation become one sampling grid, so a batch is
interpolated only once. Labels take the nearest voxel's value: no label is invented.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Generator, Tensor

from delineate.core.grid import AXES
from delineate.specification import Axes, Specification

Probability = Annotated[float, Field(ge=0, le=1)]
Degrees = Annotated[float, Field(ge=-360, le=360)]
Shift = tuple[Annotated[float, Field(ge=-1e6, le=1e6)], Annotated[float, Field(ge=-1e6, le=1e6)]]
Factors = tuple[Annotated[float, Field(gt=0, le=1000)], Annotated[float, Field(gt=0, le=1000)]]
Deviations = tuple[Annotated[float, Field(ge=0, le=1000)], Annotated[float, Field(ge=0, le=1000)]]


class SpatialSpec(Specification):
    """Geometric changes. Angles are about each axis of the volume (2D: only the slice axis).

    ``elastic_mm`` is the standard deviation of the displacement of ``elastic_points`` control
    points along each axis of a tile; ``elastic_voxels`` is the same in voxels, whatever their size.
    ``mirror`` lists axes (x, y, z) that are flipped with probability 1/2. ``rotate_in``: rotate in
    millimetres, or in ``voxels`` as image libraries rotate arrays, whatever their spacing.
    """

    probability: Probability = 0.7
    rotate_degrees: tuple[Degrees, Degrees, Degrees] = (15.0, 15.0, 15.0)
    rotate_in: Literal["mm", "voxels"] = "mm"
    scale: Factors = (0.85, 1.18)
    elastic_mm: Annotated[float, Field(ge=0, le=1000)] = 0.0
    elastic_voxels: Annotated[float, Field(ge=0, le=1000)] = 0.0
    elastic_points: Annotated[int, Field(ge=2, le=64)] = 5
    mirror: Axes = ()

    @model_validator(mode="after")
    def _has_one_unit(self) -> SpatialSpec:
        if self.elastic_mm and self.elastic_voxels:
            raise ValueError(
                f"elastic_mm is {self.elastic_mm:g} and elastic_voxels {self.elastic_voxels:g}; give one of them"
            )
        return self

    @property
    def elastic(self) -> bool:
        """Whether control points are displaced."""
        return self.elastic_mm > 0 or self.elastic_voxels > 0

    def displacement_voxels(self, spacing_mm: Tensor) -> Tensor:
        """Standard deviation of the control points' displacement along each axis, for voxels of any sizes (…, d)."""
        return self.elastic_mm / spacing_mm + self.elastic_voxels


class IntensitySpec(Specification):
    """Changes of intensity, for images of about unit standard deviation; each with its probability.

    ``gain`` multiplies and ``offset`` shifts a channel, ``gamma`` bends its range, ``noise`` is
    the standard deviation of added Gaussian noise, ``bias_field`` that of the logarithm of a smooth
    multiplicative field (about the channel's minimum).
    """

    probability: Probability = 0.3
    gain: Factors = (0.8, 1.25)
    offset: Shift = (-0.2, 0.2)
    gamma: Factors = (0.7, 1.5)
    noise: Deviations = (0.0, 0.15)
    bias_field: Deviations = (0.0, 0.2)


class AugmentationSpec(Specification):
    """What is varied in training; ``null`` leaves a part out."""

    spatial: SpatialSpec | None = SpatialSpec()
    intensity: IntensitySpec | None = IntensitySpec()


def context_voxels(spec: AugmentationSpec, shape: Sequence[int], slice_axis: int | None) -> tuple[int, int, int]:
    """Voxels to read around a tile on each side, so that rotated corners still show image, not border.

    It is a tenth of the side: anything farther out is rarely needed, and repeats the border.
    """
    if spec.spatial is None:
        return (0, 0, 0)
    x, y, z = (0 if axis == slice_axis or n == 1 else math.ceil(n / 10) for axis, n in enumerate(shape))
    return x, y, z


def augment(
    image: Tensor,
    target: Tensor,
    spec: AugmentationSpec,
    *,
    shape: Sequence[int],
    spacing_mm: Tensor,
    generator: Generator,
    axes: str = AXES,
) -> tuple[Tensor, Tensor]:
    """Vary a batch and cut it to ``shape``.

    ``image`` (N, C, *source) float and ``target`` (N, T, *source) uint8, both with the context of
    :func:`context_voxels` around ``shape``; 2D or 3D. ``spacing_mm`` (N, d) is that of each sample along the spatial
    axes, which ``axes`` names in order. Returns image (N, C, *shape) and target (N, T, *shape).
    """
    # In bfloat16, positions would be off by a tenth of a voxel.
    with torch.autocast(image.device.type, enabled=False):
        return _augment(image, target, spec, shape, spacing_mm, generator, axes)


def _augment(
    image: Tensor,
    target: Tensor,
    spec: AugmentationSpec,
    shape: Sequence[int],
    spacing_mm: Tensor,
    generator: Generator,
    axes: str,
) -> tuple[Tensor, Tensor]:
    if spec.spatial is not None:
        grid = _sampling_grid(spec.spatial, image, shape, spacing_mm, generator, axes)
        # torch says "bilinear" in 3D too.
        image = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
        moved = F.grid_sample(target.float(), grid, mode="nearest", padding_mode="border", align_corners=False)
        target = moved.to(torch.uint8)
    if spec.intensity is not None:
        image = _change_intensity(image, spec.intensity, generator)
    return image, target


def _sampling_grid(
    spec: SpatialSpec,
    image: Tensor,
    shape: Sequence[int],
    spacing_mm: Tensor,
    generator: Generator,
    axes: str,
) -> Tensor:
    """Where each voxel of the result comes from: (N, *shape, d) in ``grid_sample``'s coordinates."""
    n, d, device = image.shape[0], len(shape), image.device
    matrix = _affine(spec, n, d, generator, device, axes)
    if spec.rotate_in == "mm":
        matrix = matrix * spacing_mm[:, None, :] / spacing_mm[:, :, None]  # voxels → mm → turned → voxels
    points = [min(spec.elastic_points if spec.elastic else 2, side) for side in shape]
    lines = [torch.linspace(-1, 1, p, device=device) * (side - 1) / 2 for p, side in zip(points, shape, strict=True)]
    control = torch.stack(torch.meshgrid(*lines, indexing="ij"), -1).reshape(-1, d)
    source = (control @ matrix.transpose(1, 2)).reshape(n, *points, d)
    if spec.elastic:
        deviation = spec.displacement_voxels(spacing_mm).view(n, *[1] * d, d)
        shift = torch.randn(n, *points, d, generator=generator, device=device) * deviation
        source = source + shift * _chosen(n, spec.probability, generator, device).view(n, *[1] * (d + 1))
    size = torch.tensor(image.shape[2:], dtype=torch.float32, device=device)
    # grid_sample's coordinates run from -1 at the first border to 1 at the last, innermost axis first.
    grid = (source * 2 / size).flip(-1)
    # Linear interpolation between control points keeps the affine part exact, so one pass makes the grid.
    for axis in reversed(range(d)):
        weights = _between(points[axis], shape[axis], device)  # (side, points)
        grid = weights @ grid.reshape(n * math.prod(points[:axis]), points[axis], -1)
        grid = grid.reshape(n, *points[:axis], *shape[axis:], d)
    return grid


def _between(points: int, side: int, device: torch.device) -> Tensor:
    """Weights (side, points) for linear interpolation between points spread from the first voxel to the last."""
    place = torch.linspace(0, points - 1, side, device=device)
    return (1 - (place[:, None] - torch.arange(points, device=device)).abs()).clamp_min(0)


def _affine(spec: SpatialSpec, n: int, d: int, generator: Generator, device: torch.device, axes: str) -> Tensor:
    """Random rotation · scaling · mirroring (N, d, d); the identity for samples not chosen."""
    chosen = _chosen(n, spec.probability, generator, device)
    angles = _uniform((n, 3), (-1, 1), generator, device) * torch.deg2rad(torch.tensor(spec.rotate_degrees)).to(device)
    angles = angles * chosen[:, None]
    low, high = math.log(spec.scale[0]), math.log(spec.scale[1])
    scale = torch.exp(_uniform((n, d), (low, high), generator, device) * chosen[:, None])
    flips = torch.where(torch.rand(n, d, generator=generator, device=device) < 0.5, -1.0, 1.0)
    mirrored = torch.tensor([axis in spec.mirror for axis in axes], device=device)
    scale = scale * torch.where(mirrored, flips, 1.0)
    if d == 2:
        across = next(i for i, axis in enumerate(AXES) if axis not in axes)
        rotation = _turn(angles[:, across], 0, 1, 2)
    else:
        rotation = _turn(angles[:, 0], 1, 2, 3) @ _turn(angles[:, 1], 0, 2, 3) @ _turn(angles[:, 2], 0, 1, 3)
    return rotation * scale[:, None, :]


def _turn(angle: Tensor, i: int, j: int, d: int) -> Tensor:
    """Rotation matrices (N, d, d) in the plane of axes i and j."""
    matrix = torch.eye(d, device=angle.device).repeat(len(angle), 1, 1)
    matrix[:, i, i] = matrix[:, j, j] = angle.cos()
    matrix[:, i, j], matrix[:, j, i] = -angle.sin(), angle.sin()
    return matrix


def _change_intensity(image: Tensor, spec: IntensitySpec, generator: Generator) -> Tensor:
    n, c, device, ones = image.shape[0], image.shape[1], image.device, [1] * (image.ndim - 2)

    def draw(bounds: tuple[float, float], neutral: float) -> Tensor:
        """A number for each sample and channel (N, C, 1…); ``neutral`` where not chosen."""
        value = _uniform((n, c), bounds, generator, device)
        chosen = _chosen(n, spec.probability, generator, device)[:, None]
        return torch.where(chosen > 0, value, neutral).view(n, c, *ones)

    gamma, gain, offset = draw(spec.gamma, 1.0), draw(spec.gain, 1.0), draw(spec.offset, 0.0)
    field_sd, noise_sd = draw(spec.bias_field, 0.0), draw(spec.noise, 0.0)
    bent, uneven, noisy = (bool(x.any()) for x in (gamma != 1, field_sd > 0, noise_sd > 0))
    if bent or uneven:
        # Both act on values above the channel's minimum, as on a scanner.
        space = tuple(range(2, image.ndim))
        low, high = image.amin(space, keepdim=True), image.amax(space, keepdim=True)
        span = (high - low).clamp_min(1e-6)
        risen = (image - low) / span
        risen = risen.pow(gamma) if bent else risen
        risen = risen * _smooth_field(image, field_sd, generator) if uneven else risen
        image = torch.addcmul(low, risen, span)
    image = torch.addcmul(offset, image, gain)
    if noisy:
        image = torch.addcmul(image, torch.randn(image.shape, generator=generator, device=device), noise_sd)
    return image


def _smooth_field(image: Tensor, sd: Tensor, generator: Generator) -> Tensor:
    """A smooth multiplicative field (N, C, *space), like a coil's, from four control points along each axis."""
    d = image.ndim - 2
    coarse = torch.randn(*image.shape[:2], *[4] * d, generator=generator, device=image.device) * sd
    mode = "trilinear" if d == 3 else "bilinear"
    return F.interpolate(coarse.exp(), size=tuple(image.shape[2:]), mode=mode, align_corners=True)


def _chosen(n: int, probability: float, generator: Generator, device: torch.device) -> Tensor:
    return (torch.rand(n, generator=generator, device=device) < probability).float()


def _uniform(shape: tuple[int, ...], bounds: tuple[float, float], generator: Generator, device: torch.device) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * torch.rand(shape, generator=generator, device=device)
