"""From a scan to a label on the scan's own grid, with one bundle or several."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import nan
from typing import Any, Literal

import numpy as np
import scipy  # loads its submodules on first use
import torch
from numpy.typing import NDArray

from delineate.bundle import Bundle
from delineate.calibration import Calibration, Confidence, expected_dice, mutual_dice
from delineate.compute import ComputePlan
from delineate.core.grid import AXES, Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import check_shows_something
from delineate.errors import BundleError
from delineate.fingerprint import Oddity, oddities
from delineate.inference.converted import Converted
from delineate.inference.engines import Told, Tried
from delineate.inference.postprocess import postprocess
from delineate.inference.sliding import Network, Scores, Sliding
from delineate.metrics.reliability import seam_score
from delineate.preprocessing.spatial import value_counts
from delineate.preprocessing.step import Undo, empty_channels

Progress = Callable[[int, int], None]

CERTAIN = 30.0
"""Logit of the background outside whatever the preparation cut off; the targets' is the opposite."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """A label on the scan's own grid, the confidence in each target, and the seconds that each stage took.

    ``probabilities`` (T, X, Y, Z) of the targets are kept if they were requested. ``engines`` ran the networks.
    """

    label: LabelVolume
    seconds: dict[str, float] = field(default_factory=dict)
    confidence: Mapping[str, Confidence] = field(default_factory=dict)
    probabilities: NDArray[np.float16] | None = None
    engines: tuple[str, ...] = ("torch",)


@dataclass(frozen=True)
class _Variant:
    """One variant's probabilities (K, X, Y, Z) on its prepared grid, or logits, and the way back."""

    scores: Scores
    undo: Undo
    mirrored: tuple[int, ...] = ()

    def plane(self, k: int) -> NDArray[np.float16]:
        """Class k (X, Y, Z), the right way round."""
        return np.flip(self.scores[k], self.mirrored)


@dataclass(frozen=True, eq=False)
class _Decision:
    """The variants' joint decision before postprocessing, a label as targets encode it, and the confidence in it."""

    encoded: NDArray[np.uint8]
    expected_dice: tuple[float, ...]
    mutual_dice: tuple[float, ...]
    probabilities: NDArray[np.float16] | None


class Predictor:
    """Applies bundles to scans. Several bundles form an ensemble: the mean of their probabilities, or logits.

    ``overlap`` and ``flips`` override the recipe's, whose limits they keep. ``budget_bytes`` limits the memory that
    the probabilities of one scan may take. With ``mirrored``, each bundle that was trained on mirrored scans also
    predicts the mirror image, and the agreement of both is measured; ``probabilities`` keeps those of the targets.
    ``told`` hears how the plan computes, and later which engine runs a network if that is left to a trial.
    ``networks`` are the bundles' if they are built already, or what :func:`ready_network` has made of them. Raises
    :class:`BundleError` for bundles that are no ensemble, and :class:`RecipeError` for an overlap or flips that no
    recipe could have.
    """

    def __init__(
        self,
        bundles: Sequence[Bundle],
        plan: ComputePlan,
        *,
        networks: Sequence[Network] | None = None,
        overlap: float | None = None,
        flips: Sequence[str] | None = None,
        budget_bytes: int = 2**30,
        mirrored: bool = False,
        probabilities: bool = False,
        told: Told = lambda choice: None,
    ) -> None:
        first = bundles[0]
        self._mirrored, self._keep = mirrored, probabilities
        for other in bundles[1:]:
            if other.targets != first.targets or other.channels != first.channels:
                raise BundleError(
                    f"bundles differ: {first.folder} segments {list(first.targets.names)} from {list(first.channels)}, "
                    f"{other.folder} {list(other.targets.names)} from {list(other.channels)}",
                    fix="an ensemble needs the same targets and channels",
                )
        kinds = {bundle.recipe.inference.average for bundle in bundles}
        if len(kinds) > 1:
            raise BundleError(
                f"some bundles average {' and others '.join(sorted(kinds))}",
                fix="give all of them the same inference.average, or predict with them one by one",
            )
        self._logits = kinds == {"logits"}
        settings = [bundle.recipe.inference.changed(overlap, flips) for bundle in bundles]
        self.bundles, self.plan, self.targets, self.channels = list(bundles), plan, first.targets, first.channels
        # The first bundle's calibration, if it has one; read before any network is built.
        self.calibration = None if first.folder is None else Calibration.load(first.folder)
        self._sliding = []
        self._networks: list[Network] = []
        self._scans_ahead = 1
        for choice in plan.choices:
            told(choice)
        for i, (bundle, inference) in enumerate(zip(bundles, settings, strict=True)):
            network = networks[i] if networks is not None else bundle.trained_network()
            if isinstance(network, torch.nn.Module):
                network = ready_network(network, bundle, plan, told)
            self._networks.append(network)
            self._sliding.append(
                Sliding(
                    plan,
                    first.targets.exclusive,
                    first.targets.outputs,
                    overlap=inference.overlap,
                    weights=inference.weights,
                    average=inference.average,
                    advance=inference.advance,
                    flips=inference.flips,
                    budget_bytes=budget_bytes,
                )
            )

    def expect(self, scans: int) -> None:
        """So many scans are ahead. They are taken to be like the first, which decides how soon a trial pays."""
        self._scans_ahead = scans

    def oddities(self, volume: Volume) -> list[Oddity]:
        """Anything unusual about a scan, found before it is segmented."""
        first = self.bundles[0]
        known = "trained on" if first.calibrated is None else "calibrated on"
        return oddities(first.familiar, volume, self.channels, known)

    def predict(self, volume: Volume, progress: Progress | None = None) -> Prediction:
        """The label of a scan, on its own grid: shape and affine are the scan's.

        Raises :class:`BundleError` for a wrong number of channels, :class:`ConstantScan` and
        :class:`BadShape` for a scan that shows nothing.
        """
        if volume.channels != len(self.channels):
            raise BundleError(
                f"the scan has {volume.channels} channels, but the bundle needs {len(self.channels)}: "
                f"{', '.join(self.channels)}",
                fix="give one file for each, or a 4D file",
            )
        check_shows_something("the scan", volume)
        clock = _Clock()
        variants: list[_Variant] = []
        seams = []
        engines: set[str] = set()
        for bundle, ready, sliding in zip(self.bundles, self._networks, self._sliding, strict=True):
            network = _noting(ready, engines)
            prepared, undo = bundle.pipeline.apply(volume)
            clock.lap("preprocess")
            geometry = bundle.geometry_of(prepared.grid.shape)
            mirrors = _mirrors(bundle) if self._mirrored else ()
            if isinstance(ready, Tried):
                passes = sliding.passes(prepared.grid.shape, geometry) * (2 if mirrors else 1)
                alike = self._scans_ahead if geometry == bundle.geometry else 1
                ready.expect(passes * alike)
            found = sliding.scores(network, prepared.voxels, geometry, progress)
            variants.append(_Variant(found, undo))
            if mirrors:
                flipped = np.ascontiguousarray(np.flip(prepared.voxels, tuple(axis + 1 for axis in mirrors)))
                variants.append(_Variant(sliding.scores(network, flipped, geometry, progress), undo, mirrors))
            clock.lap("network")
            borders = geometry.borders(prepared.grid.shape, sliding.overlap, sliding.advance)
            seams.append([seam_score(p, borders) for p in self._of_targets(found)])
        self._scans_ahead = max(1, self._scans_ahead - 1)
        decision = self._decide(variants, volume.grid)
        clock.lap("undo")
        encoded = postprocess(decision.encoded, self.targets, volume.grid, self.bundles[0].recipe.postprocessing)
        label = LabelVolume(self.targets.decode(encoded), volume.grid)
        # Volumes are those of the label as written: where targets overlap, tumour also counts as liver.
        if self.targets.exclusive:
            voxels = value_counts(encoded[0])[1:].tolist()
        else:
            voxels = [np.count_nonzero(mask) for mask in self.targets.masks(label.voxels).values()]
        confidence = {
            name: _confidence(count * volume.grid.voxel_ml, expected, mutual, seam)
            for name, count, expected, mutual, seam in zip(
                self.targets.names,
                voxels[: len(self.targets.names)],
                decision.expected_dice,
                decision.mutual_dice,
                map(_mean_of_defined, zip(*seams, strict=True)),
                strict=True,
            )
        }
        clock.lap("postprocess")
        return Prediction(label, clock.seconds, confidence, decision.probabilities, tuple(sorted(engines)))

    def _of_targets(self, found: Scores) -> Iterator[NDArray[np.floating]]:
        """The probabilities of each target, from what a network found (K, X, Y, Z)."""
        link = self._link()
        if self._logits and self.targets.exclusive:
            for plane in found:
                link.add(plane.astype(np.float32))
        return (link(found[k]) for k in range(len(found) - len(self.targets.names), len(found)))

    def _link(self) -> _Link:
        return _Link("given" if not self._logits else "softmax" if self.targets.exclusive else "sigmoid")

    def _planes(self, variants: Sequence[_Variant], k: int) -> Iterator[NDArray[np.float32]]:
        """Each variant's probabilities of class k on the scan's grid, or logits."""
        background = self.targets.exclusive and k == 0
        outside = 1.0 if background else 0.0
        if self._logits:
            outside = CERTAIN if background else -CERTAIN
        return (one.undo.scores(one.plane(k).astype(np.float32), outside) for one in variants)

    def _decide(self, variants: Sequence[_Variant], grid: Grid) -> _Decision:
        """The label on the scan's grid, one class at a time so that memory stays small."""
        exclusive, names = self.targets.exclusive, self.targets.names
        first = 1 if exclusive else 0  # the targets' first class
        everyone = Winners(self.targets, grid)
        each = [Winners(self.targets, grid) for _ in variants] if len(variants) > 1 else []
        kept = empty_channels(len(names), grid.shape, np.float16) if self._keep else None
        link, links = self._link(), [self._link() for _ in each]
        if self._logits and exclusive:  # a class's probability depends on the logits of all
            for k in range(first + len(names)):
                link.add(_mean(self._planes(variants, k), [one.add for one in links]))
        votes = [lambda plane, one=one, to=to: one.add(to(plane)) for one, to in zip(each, links, strict=True)]
        for k in range(first + len(names)):
            mean = link(_mean(self._planes(variants, k), votes))
            everyone.add(mean)
            if kept is not None and k >= first:
                kept[k - first] = mean
        return _Decision(
            everyone.encoded,
            tuple(everyone.expected_dice()),
            tuple(mutual_dice([self.targets.mask(one.encoded, t) for one in each]) for t in range(len(names))),
            kept,
        )


def ready_network(
    network: torch.nn.Module,
    bundle: Bundle,
    plan: ComputePlan,
    told: Told = lambda choice: None,
    *,
    at_once: bool = False,
) -> Network:
    """A bundle's network as the plan runs it. What was tried of its engines stays with it; see :class:`Tried`."""
    placed = plan.place(network, bundle.recipe.network.dimensions).eval()
    run: Network = plan.compiled(placed)
    if plan.engine == "torch":
        return run
    exclusive = bundle.targets.exclusive
    converted = Converted.of(placed, bundle.recipe.network, plan, exclusive)
    return Tried(placed, run, plan, exclusive, told, converted, at_once=at_once)


def _noting(network: Network, engines: set[str]) -> Network:
    """A network that notes which engine gave each answer."""

    def run(x: torch.Tensor) -> torch.Tensor:
        answer = network(x)
        engines.add(network.last if isinstance(network, Tried) else "torch")
        return answer

    return run


class _Link:
    """Probabilities of a class from what is averaged: as ``given``, or by a ``softmax`` or ``sigmoid`` of logits.

    A softmax needs the logits of all classes to be added first.
    """

    def __init__(self, kind: Literal["given", "softmax", "sigmoid"]) -> None:
        self.kind = kind
        self._log_sum: NDArray[np.float32] | None = None

    def add(self, logits: NDArray[np.float32]) -> None:
        self._log_sum = logits if self._log_sum is None else np.logaddexp(self._log_sum, logits)

    def __call__(self, plane: NDArray[Any]) -> NDArray[Any]:
        if self.kind == "given":
            return plane
        logits = plane.astype(np.float32, copy=False)
        result: NDArray[np.float32]
        if self.kind == "sigmoid":
            result = scipy.special.expit(logits)
        else:
            assert self._log_sum is not None  # every class was added
            result = np.exp(logits - self._log_sum)
        return result


def _mean(
    planes: Iterable[NDArray[np.float32]], tell: Sequence[Callable[[NDArray[np.float32]], None]]
) -> NDArray[np.float32]:
    """The mean of the variants' planes, after telling each to its own of ``tell``, if there are any."""
    total, count = None, 0
    for plane in planes:
        if tell:
            tell[count](plane)
        total, count = (plane if total is None else total + plane), count + 1
    assert total is not None  # there is a bundle
    return total if count == 1 else total / np.float32(count)


class Winners:
    """Which target each voxel belongs to, found class by class; a label as targets encode it."""

    def __init__(self, targets: Targets, grid: Grid) -> None:
        self.targets = targets
        self.encoded = empty_channels(1 if targets.exclusive else len(targets.names), grid.shape, np.uint8)
        """The label (T, X, Y, Z), as :meth:`Targets.encode` gives it."""
        self._best: NDArray[np.floating] | None = None
        self._sums: list[float] = []
        self._within: list[float] = []

    def add(self, probability: NDArray[np.floating]) -> None:
        """Add the next class's probability (X, Y, Z); background comes first if targets are exclusive."""
        k = len(self._sums)
        self._sums.append(float(probability.sum(dtype=np.float64)))
        if not self.targets.exclusive:
            inside = probability > 0.5
            self.encoded[k] = inside
            self._within.append(float(probability.sum(dtype=np.float64, where=inside)))
        elif self._best is None:
            self._best = np.array(probability)
            self.encoded[0] = 0
        else:
            np.copyto(self.encoded[0], k, where=probability > self._best)
            np.maximum(self._best, probability, out=self._best)

    def expected_dice(self) -> Iterator[float]:
        """Expected Dice of each target."""
        if self._best is not None:
            voxels = value_counts(self.encoded[0]).tolist()[: len(self._sums)]
            within = _sums_by_value(self.encoded[0], self._best, len(self._sums))
        else:
            voxels, within = [int(np.count_nonzero(plane)) for plane in self.encoded], self._within
        first = len(self._sums) - len(self.targets.names)
        for found in zip(self._sums[first:], within[first:], voxels[first:], strict=True):
            yield expected_dice(*found)


def _sums_by_value(values: NDArray[np.uint8], weights: NDArray[np.floating], count: int) -> list[float]:
    """The sum of the weights (X, Y, Z) of the voxels that have each value below ``count``."""
    sums = np.zeros(count)
    for z in range(values.shape[2]):  # `bincount` makes copies of eight bytes a voxel
        sums += np.bincount(values[..., z].ravel(order="K"), weights[..., z].ravel(order="K"), minlength=count)
    return sums.tolist()


def _mean_of_defined(values: Sequence[float]) -> float:
    defined = [value for value in values if value == value]
    return sum(defined) / len(defined) if defined else nan


def _confidence(volume_ml: float, expected: float, mutual: float, seam: float) -> Confidence:
    """The confidence in a target as it is written; the Dice that is expected of what was decided is known."""
    if not volume_ml and expected == expected:  # postprocessing has removed all of it: nothing was found
        expected = mutual = nan
    return Confidence(volume_ml, expected, mutual, seam)


def _mirrors(bundle: Bundle) -> tuple[int, ...]:
    """Axes of an array along which the bundle's training tiles were mirrored: slices only within their plane."""
    spatial = bundle.recipe.augmentation.spatial if bundle.recipe.augmentation else None
    mirrored = () if spatial is None else spatial.mirror
    return tuple(AXES.index(axis) for axis in mirrored if AXES.index(axis) != bundle.geometry.slice_axis)


class _Clock:
    """Seconds per stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now - self._last
        self._last = now
