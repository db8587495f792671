"""From a scan to a label on the scan's own grid, with one bundle or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.grid import Grid
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BundleError
from delineate.inference.postprocess import postprocess
from delineate.inference.sliding import Sliding
from delineate.preprocessing.step import Undo

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prediction:
    """A label on the scan's own grid, and the seconds that each stage took."""

    label: LabelVolume
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Scores:
    """One bundle's probabilities (K, X, Y, Z) on its prepared grid, and the way back."""

    probabilities: NDArray[np.float16]
    undo: Undo


class Predictor:
    """Applies bundles to scans. Several bundles form an ensemble: the mean of their probabilities.

    ``overlap`` and ``flips`` override the recipe's. ``budget_bytes`` bounds what the probabilities
    of one scan may hold in memory.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        plan: ComputePlan,
        *,
        networks: Sequence[torch.nn.Module] | None = None,
        overlap: float | None = None,
        flips: Sequence[str] | None = None,
        budget_bytes: int = 2**30,
    ) -> None:
        first = bundles[0]
        for other in bundles[1:]:
            if other.targets != first.targets or other.channels != first.channels:
                raise BundleError(
                    f"bundles differ: {first.folder} segments {list(first.targets.names)} from {list(first.channels)}, "
                    f"{other.folder} {list(other.targets.names)} from {list(other.channels)}; "
                    "an ensemble needs the same targets and channels"
                )
        self.bundles, self.plan, self.targets, self.channels = list(bundles), plan, first.targets, first.channels
        self._sliding = []
        self._networks = []
        for i, bundle in enumerate(bundles):
            network = networks[i] if networks is not None else bundle.trained_network()
            dimensions = bundle.recipe.network.dimensions
            self._networks.append(plan.compiled(plan.place(network, dimensions).eval()))
            inference = bundle.recipe.inference
            self._sliding.append(
                Sliding(
                    plan,
                    first.targets.exclusive,
                    first.targets.outputs,
                    overlap=inference.overlap if overlap is None else overlap,
                    weights=inference.weights,
                    flips=tuple(inference.flips if flips is None else flips),
                    budget_bytes=budget_bytes,
                )
            )

    def predict(self, volume: Volume, progress: Progress | None = None) -> Prediction:
        """The label of a scan, on its own grid: shape and affine are the scan's."""
        if volume.channels != len(self.channels):
            raise BundleError(
                f"the scan has {volume.channels} channels, the bundle wants {len(self.channels)}: "
                f"{', '.join(self.channels)}; give one file for each, or a 4D file"
            )
        clock = _Clock()
        scores = []
        for bundle, network, sliding in zip(self.bundles, self._networks, self._sliding, strict=True):
            prepared, undo = bundle.pipeline.apply(volume)
            clock.lap("preprocess")
            geometry = bundle.geometry_of(prepared.grid.shape)
            probabilities = sliding.probabilities(network, prepared.voxels, geometry, progress)
            scores.append(_Scores(probabilities, undo))
            clock.lap("network")
        masks = self._masks(scores, volume.grid)
        clock.lap("undo")
        masks = postprocess(masks, self.targets, volume.grid, self.bundles[0].recipe.postprocessing)
        label = LabelVolume(self.targets.decode(masks), volume.grid)
        clock.lap("postprocess")
        return Prediction(label, clock.seconds)

    def _masks(self, scores: Sequence[_Scores], grid: Grid) -> NDArray[np.bool_]:
        """Target masks (T, X, Y, Z) on the scan's grid, one class at a time so that memory stays small."""
        names = self.targets.names
        if not self.targets.exclusive:
            return np.stack([self._plane(scores, k, 0.0) > 0.5 for k in range(len(names))])
        best = self._plane(scores, 0, 1.0)
        winner = np.zeros(grid.shape, dtype=np.uint8)
        for k in range(1, len(names) + 1):
            plane = self._plane(scores, k, 0.0)
            better = plane > best
            winner[better] = k
            np.maximum(best, plane, out=best)
        return np.stack([winner == k for k in range(1, len(names) + 1)])

    def _plane(self, scores: Sequence[_Scores], k: int, outside: float) -> NDArray[np.float32]:
        """Probability (X, Y, Z) of one class on the scan's grid, mean over the bundles."""
        total = scores[0].undo.scores(scores[0].probabilities[k].astype(np.float32), outside)
        for other in scores[1:]:
            total = total + other.undo.scores(other.probabilities[k].astype(np.float32), outside)
        return np.array(total / np.float32(len(scores)))


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
