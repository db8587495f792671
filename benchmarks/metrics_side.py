"""Metrics of many volumes, compared with MONAI's on the same masks."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch
from measuring import Row, peak_of

from delineate.core.grid import Grid


def masks_of(seed: int, shape: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray]:
    """A reference with an organ and a few lesions, and a slightly wrong prediction."""
    from scipy import ndimage

    rng = np.random.default_rng(seed)
    coarse = ndimage.gaussian_filter(rng.standard_normal([n // 4 for n in shape]), 2)
    field = np.kron(coarse, np.ones((4, 4, 4)))
    reference = field > np.quantile(field, 0.9)
    return reference, np.roll(reference, 2, 0) ^ np.roll(field > np.quantile(field, 0.995), 3, 1)


def measure_with_monai(reference: np.ndarray, prediction: np.ndarray, spacing: tuple[float, ...]) -> dict[str, float]:
    """The metrics that MONAI also has, each computed with its own function, as its users would."""
    from monai import metrics as monai

    truth, said = (torch.from_numpy(m)[None, None].float() for m in (reference, prediction))
    confusion = monai.get_confusion_matrix(said, truth)
    return {
        "dice": float(monai.compute_dice(said, truth)),
        "jaccard": float(monai.compute_iou(said, truth)),
        **{
            name: float(monai.compute_confusion_matrix_metric(theirs, confusion)[0, 0])
            for name, theirs in (("precision", "precision"), ("recall", "sensitivity"), ("specificity", "specificity"))
        },
        "hd_mm": float(monai.compute_hausdorff_distance(said, truth, spacing=spacing)),
        "hd95_mm": float(monai.compute_hausdorff_distance(said, truth, percentile=95, spacing=spacing)),
        "assd_mm": float(monai.compute_average_surface_distance(said, truth, symmetric=True, spacing=spacing)),
        "surface_dice_1mm": float(monai.compute_surface_dice(said, truth, [1.0], spacing=spacing)),
    }


def measure_volumes(count: int, quick: bool) -> None:
    """All our metrics of ``count`` volumes, one after the other."""
    from delineate.metrics.catalogue import METRICS
    from delineate.metrics.comparison import Comparison

    shape = (48, 48, 16) if quick else (256, 256, 64)
    for seed in range(count):
        comparison = Comparison.of(*masks_of(seed, shape), Grid.of_spacing(shape, (0.8, 0.8, 3.0)))
        for metric in METRICS.values():
            metric.of(comparison)


def bench_metrics(quick: bool) -> list[Row]:
    """Metrics of volumes of 256×256×64, one after the other: those that MONAI also has, and all."""
    from monai import metrics as _  # noqa: F401 (its import is no part of what is timed)

    from delineate.metrics.catalogue import METRICS
    from delineate.metrics.comparison import Comparison

    shape, count = ((48, 48, 16), 2) if quick else ((256, 256, 64), 200)
    spacing = (0.8, 0.8, 3.0)
    grid = Grid.of_spacing(shape, spacing)
    common = (
        "dice",
        "jaccard",
        "precision",
        "recall",
        "specificity",
        "hd_mm",
        "hd95_mm",
        "assd_mm",
        "surface_dice_1mm",
    )
    same, ours, theirs, furthest = [], [], [], 0.0
    for seed in range(count):
        masks = masks_of(seed, shape)
        start = time.perf_counter()
        comparison = Comparison.of(*masks, grid)
        found = {name: METRICS[name].of(comparison) for name in common}
        same.append(time.perf_counter() - start)
        found = {name: metric.of(comparison) for name, metric in METRICS.items()}
        ours.append(time.perf_counter() - start)
        if seed % (1 if quick else 10) == 0:  # only a tenth of them, since MONAI takes long
            start = time.perf_counter()
            other = measure_with_monai(*masks, spacing)
            theirs.append(time.perf_counter() - start)
            furthest = max(furthest, *(abs(found[name] - value) for name, value in other.items()))
    mine, all_mine, yours = (statistics.median(seconds) for seconds in (same, ours, theirs))
    return [
        {"case": "Delineate, the same 9 metrics", "ms a volume": 1000 * mine, "times faster": yours / mine},
        {"case": f"Delineate, all {len(METRICS)}", "ms a volume": 1000 * all_mine, "times faster": yours / all_mine},
        {"case": "MONAI, 9 metrics", "ms a volume": 1000 * yours, "times faster": 1.0},
        {"case": "largest difference, in 1e-9", "ms a volume": 1e9 * furthest, "times faster": None},
        *(
            {
                "case": f"peak memory of {n} volumes, MB",
                "ms a volume": 1e3 * peak_of(f"import metrics_side; metrics_side.measure_volumes({n}, {quick})"),
                "times faster": None,
            }
            for n in ((2,) if quick else (2, 40))
        ),
    ]
