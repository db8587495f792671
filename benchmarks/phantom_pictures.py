"""Simulated scans next to real ones, as shown in docs/images/phantoms.webp.

    python benchmarks/phantom_pictures.py DATA docs/images/phantoms.webp

DATA holds the real data sets brats, wmh and prostate. The pictures are axial slices where the reference is largest,
with the patient's right on the left and the outlines of the reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from delineate.core.grid import permute_axes
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import load_label, load_scan
from delineate.datasets.layouts import open_dataset
from delineate.datasets.phantoms.kinds import KINDS

ROWS: tuple[tuple[str, int, str | None], ...] = (
    ("liver", 0, None),
    ("liver-ct", 0, None),
    ("liver-fat", 2, None),
    ("brain-tumour", 2, "brats"),
    ("white-matter", 0, "wmh"),
    ("prostate", 0, "prostate"),
)
COLOURS = ("#f0e442", "#e8590c", "#56b4e9")


def draw(axes: Axes, scan: Volume, label: LabelVolume, channel: int, title: str, *, ct: bool = False) -> None:
    order, flip = scan.grid.axes_to("LPI")
    spacing_mm = scan.grid.permute(order, flip).spacing_mm
    image, truth = (permute_axes(voxels, order, flip) for voxels in (scan.voxels[channel], label.voxels))
    at = int(np.count_nonzero(truth, axis=(0, 1)).argmax())
    low, high = (-160, 240) if ct else np.percentile(image[image != 0], [1, 99.7])
    plane = image[..., at].T
    axes.imshow(plane, cmap="gray", vmin=low, vmax=high, aspect=spacing_mm[1] / spacing_mm[0])
    for value, colour in zip((1, 2, 3, 4), (*COLOURS, COLOURS[1]), strict=True):
        if (truth[..., at] == value).any():
            axes.contour((truth[..., at] == value).T, [0.5], colors=[colour], linewidths=0.8)
    axes.set_title(title, fontsize=8, color="white")
    # Crop empty borders.
    shown = np.argwhere(plane > low + 0.08 * (high - low))
    (top, left), (bottom, right) = shown.min(axis=0), shown.max(axis=0)
    axes.set_xlim(left - 2, right + 2)
    axes.set_ylim(bottom + 2, top - 2)


def main() -> None:
    data, out = map(Path, sys.argv[1:3])
    figure = Figure((10, 15), facecolor="black", layout="constrained")
    grid = figure.subplots(len(ROWS), 4)
    for row, (name, channel, real) in zip(grid, ROWS, strict=True):
        kind = KINDS[name]
        for patient in range(4 if real is None else 3):
            scan, label, _ = kind.simulate(11, patient)
            shown = kind.channels[channel]
            title = f"simulated {name}, {kind.scanner_of(patient).name}: {shown}"
            draw(row[patient], scan, label, channel, title, ct=kind.modality == "CT")
        if real is not None:
            dataset = open_dataset(data / real)
            subject = next(s for s in dataset.subjects if s.label is not None and kind.channels[channel] in s.scans)
            scan = load_scan(subject, [kind.channels[channel]])
            draw(row[3], scan, load_label(subject, None, scan.grid), 0, f"real: {real}, {kind.channels[channel]}")
    for axes in grid.ravel():
        axes.set_axis_off()
    figure.savefig(out, dpi=110, pil_kwargs={"quality": 80})


if __name__ == "__main__":
    main()
