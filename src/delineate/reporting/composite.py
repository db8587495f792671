"""What a crop fitted to a composite image keeps of the training scans: before and after."""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from numpy.typing import NDArray

from delineate.core.subject import Subject
from delineate.datasets.dataset import load_scan
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.spatial import CropComposite

MOST_SCANS = 24
"""Largest number of training scans in the picture."""


def composite_picture(pipeline: Pipeline, subjects: Sequence[Subject], channels: Sequence[str]) -> bytes | None:
    """A WebP of the composite image with the fitted box, and of what the crop keeps; None without such a crop.

    The composite is the mean, over some of the ``subjects``, of each scan's maximum-intensity projection
    across the slices, aligned at their centres as the crop does.
    """
    at = next((i for i, step in enumerate(pipeline.steps) if isinstance(step, CropComposite)), None)
    if at is None:
        return None
    crop, before = pipeline.steps[at], Pipeline(steps=pipeline.steps[:at])
    assert isinstance(crop, CropComposite)
    assert crop.box is not None
    chosen = subjects[:: max(1, -(-len(subjects) // MOST_SCANS))]
    planes, spacing_mm, towards = [], (1.0, 1.0), "LP"
    for subject in chosen:
        scan, _ = before.apply(load_scan(subject, channels))
        across = scan.grid.slice_axis
        first, second = (axis for axis in range(3) if axis != across)
        spacing_mm = scan.grid.spacing_mm[first], scan.grid.spacing_mm[second]
        towards = scan.grid.orientation[first] + scan.grid.orientation[second]
        plane = scan.voxels.max(axis=(0, across + 1))
        least, most = np.percentile(plane, [0.5, 99.5])
        planes.append(np.clip((plane - least) / max(most - least, 1e-9), 0, 1))
    return _drawn(_laid_over(planes), crop.box, spacing_mm, towards)


def _laid_over(planes: Sequence[NDArray]) -> NDArray[np.float64]:
    """Mean of planes (X, Y) of any sizes, aligned at their centre voxels; black beyond a plane's edges."""
    shape = np.max([plane.shape for plane in planes], axis=0)
    total = np.zeros(shape)
    for plane in planes:
        x, y = (int(whole // 2 - part // 2) for whole, part in zip(shape, plane.shape, strict=True))
        total[x : x + plane.shape[0], y : y + plane.shape[1]] += plane
    return total / len(planes)


def _drawn(composite: NDArray, box: Sequence[tuple[int, int]], spacing_mm: tuple[float, float], towards: str) -> bytes:
    """``towards`` gives the directions in which both axes run; shown in radiological convention."""
    (left, right), (front, back) = (
        (n // 2 + first, n // 2 + last) for n, (first, last) in zip(composite.shape, box, strict=True)
    )
    kept = composite[max(left, 0) : right + 1, max(front, 0) : back + 1]
    figure = Figure((7.2, 3.6), facecolor="black", layout="constrained")
    axes = figure.subplots(1, 2)
    share = kept.size / composite.size
    for ax, image, title in zip(
        axes, (composite, kept), ("composite of training scans", f"after the crop: {share:.0%}"), strict=True
    ):
        ax.imshow(image.T, cmap="gray", vmin=0, vmax=1, aspect=spacing_mm[1] / spacing_mm[0])
        ax.set_title(title, color="white", fontsize=10)
        ax.set_axis_off()
        # To the patient's left, back and feet.
        if towards[0] not in "LPI":
            ax.invert_xaxis()
        if towards[1] not in "LPI":
            ax.invert_yaxis()
        for letter, x in zip({"L": "RL", "R": "RL"}.get(towards[0], "AP"), (0.03, 0.97), strict=True):
            ax.text(x, 0.5, letter, color="white", ha="center", va="center", transform=ax.transAxes)
    size = right - left + 1, back - front + 1
    axes[0].add_patch(Rectangle((left - 0.5, front - 0.5), *size, fill=False, edgecolor="#f0e442", linewidth=1.5))
    written = BytesIO()
    figure.savefig(written, format="webp", dpi=110, pil_kwargs={"quality": 85})
    return written.getvalue()
