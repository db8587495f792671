"""Tiles in, probabilities out: a network slides over a prepared volume in bounded memory."""

from __future__ import annotations

import math
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import IO, ClassVar, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from delineate.compute import ComputePlan
from delineate.core.grid import AXES
from delineate.errors import BundleError
from delineate.io.files import refused, reserve
from delineate.recipe import Average
from delineate.sampling.tiles import Advance, Tile, TileGeometry, Weighting, standardised

Network = Callable[[Tensor], Tensor]

VOXELS_PER_BATCH = {"cpu": 2**17, "cuda": 2**22, "mps": 2**20}
"""Input voxels per batch; larger batches gain nothing on that kind of device."""


_LARGEST = float(np.finfo(np.float16).max)


class Abridged:
    """Within it, a network runs for ``seconds`` in each volume, and for the other tiles its last answer is taken again.

    So a trial does all that a prediction does, of any length. ``began`` are the moments at which volumes were begun,
    ``skipped`` those at which tiles were skipped, and the seconds that they would have taken. It holds for the whole
    process.
    """

    _current: ClassVar[Abridged | None] = None

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.began: list[float] = []
        self.skipped: list[tuple[float, float]] = []

    def __enter__(self) -> Self:
        Abridged._current = self
        return self

    def __exit__(self, *_: object) -> None:
        Abridged._current = None

    @classmethod
    def of(cls, network: Network) -> Network:
        """``network``, or its abridged form in a trial."""
        return network if cls._current is None else cls._current._abridge(network)

    def _abridge(self, network: Network) -> Network:
        self.began.append(time.time())
        took: list[float] = []
        last = torch.empty(0)

        def answer(x: Tensor) -> Tensor:
            nonlocal last
            # The first pass allocates memory, and may compile.
            if sum(took[1:]) > self.seconds and len(last) == len(x):
                self.skipped.append((time.time(), sum(took[1:]) / len(took[1:])))
                return last
            start = time.perf_counter()
            last = network(x)
            if x.is_cuda:
                torch.cuda.synchronize(x.device)  # the pass has only been queued
            took.append(time.perf_counter() - start)
            return last

        return answer


@dataclass(frozen=True)
class Sliding:
    """How a network slides over volumes.

    ``flips`` are axes (x, y, z) mirrored at test time: the probabilities of all combinations are
    averaged. ``budget_bytes`` limits the memory that the probabilities of one volume may take;
    beyond it they are kept in a temporary file, and what is summed up at a time is as little as can
    be. ``weights``, ``average`` and ``advance`` are as in :class:`~delineate.recipe.InferenceSpec`.
    """

    plan: ComputePlan
    exclusive: bool
    outputs: int
    overlap: float = 0.5
    weights: Weighting = "gaussian"
    average: Average = "probabilities"
    advance: Advance = "whole"
    flips: tuple[str, ...] = ()
    budget_bytes: int = 2**30

    def probabilities(
        self,
        network: Network,
        volume: NDArray[np.float32],
        geometry: TileGeometry,
        progress: Callable[[int, int], None] | None = None,
    ) -> NDArray[np.float16]:
        """Probabilities (K, X, Y, Z) of a prepared volume (C, X, Y, Z), or logits where these are brought back."""
        return np.stack(list(self.scores(network, volume, geometry, progress)))

    def scores(
        self,
        network: Network,
        volume: NDArray[np.float32],
        geometry: TileGeometry,
        progress: Callable[[int, int], None] | None = None,
    ) -> Scores:
        """What :meth:`probabilities` gives, class by class.

        Tiles advance along one axis. Only planes within reach of the current tiles are accumulated
        in float32; finished planes are divided by their sum of weights and stored as float16. Batches of
        background alone, where each channel has one value, are answered once.
        """
        shape, network = volume.shape[1:], Abridged.of(network)
        slow = self._slow_axis(shape, geometry)
        tiles = sorted(geometry.tiles(shape, self.overlap, self.advance), key=lambda tile: tile.start[slow])
        result = Scores(self.outputs, shape, slow, self.budget_bytes)
        plane = [n for axis, n in enumerate(shape) if axis != slow]
        finish = self._linked if self.average == "tile_logits" else None
        window = _Window(self.outputs, plane, geometry.shape[slow], self.plan.device, finish)
        weight = torch.from_numpy(geometry.weights(self.weights)).to(self.plan.device)
        done = 0
        background: tuple[bytes, Tensor] | None = None
        with torch.inference_mode(), self.plan.autocast():
            for group in self._groups(tiles, geometry):
                boxes = np.stack([geometry.to_network(geometry.read(volume, tile)) for tile in group])
                value = _only_value(boxes)
                if value is None or background is None or background[0] != value:
                    answers = self._answer(network, boxes, geometry)
                    background = background if value is None else (value, answers)
                else:  # the same input to the bit
                    answers = background[1]
                for tile, answer in zip(group, answers, strict=True):
                    inside, where = _clip(tile, shape)
                    window.advance(where[slow].start, result)
                    window.add(
                        (answer * weight)[(slice(None), *inside)].movedim(slow + 1, -1),
                        weight[inside].movedim(slow, -1),
                        [w for axis, w in enumerate(where) if axis != slow],
                        where[slow],
                    )
                done += len(group)
                if progress is not None:
                    progress(done, len(tiles))
            window.advance(shape[slow], result)
        return result

    def _slow_axis(self, shape: Sequence[int], geometry: TileGeometry) -> int:
        """The axis along which tiles advance: z, or the one with the smallest window if that of z is beyond the budget.

        Tiles of slices advance from slice to slice.
        """
        if geometry.slice_axis is not None:
            return geometry.slice_axis
        window = [4 * self.outputs * int(np.prod(shape)) // n * m for n, m in zip(shape, geometry.shape, strict=True)]
        return 2 if window[2] <= self.budget_bytes else int(np.argmin(window))

    def passes(self, shape: tuple[int, int, int], geometry: TileGeometry) -> int:
        """How often the network runs for a prepared volume of ``shape``."""
        tiles = len(geometry.tiles(shape, self.overlap, self.advance))
        return -(-tiles // self._batch_size(geometry)) * len(self._mirrorings(geometry))

    def _mirrorings(self, geometry: TileGeometry) -> list[tuple[int, ...]]:
        """The dimensions of the network's input (N, C, …) along which each pass is mirrored; in the first, none."""
        in_plane = [AXES[axis] for axis in range(3) if axis != geometry.slice_axis]
        flipped = [in_plane.index(axis) + 2 for axis in self.flips if axis in in_plane]
        return [dims for count in range(len(flipped) + 1) for dims in combinations(flipped, count)]

    def _groups(self, tiles: Sequence[Tile], geometry: TileGeometry) -> Iterator[list[Tile]]:
        size = self._batch_size(geometry)
        for first in range(0, len(tiles), size):
            yield list(tiles[first : first + size])

    def _batch_size(self, geometry: TileGeometry) -> int:
        return max(1, VOXELS_PER_BATCH.get(self.plan.device.type, 2**17) // int(np.prod(geometry.input_shape)))

    def _answer(self, network: Network, boxes: NDArray[np.float32], geometry: TileGeometry) -> Tensor:
        """Probabilities or logits (N, K, *tile) of what the network reads for N tiles, averaged over the flips."""
        count, dimensions = len(boxes), boxes.ndim - 2
        # A batch of another size would be compiled again, so the last one is padded.
        if self.plan.compile and (missing := self._batch_size(geometry) - count):
            boxes = np.concatenate([boxes, np.repeat(boxes[-1:], missing, axis=0)])
        read = torch.from_numpy(boxes)
        x = standardised(read, geometry.standardise).to(
            self.plan.device, memory_format=self.plan.memory_format(dimensions)
        )
        total: Tensor | None = None
        mirrorings = self._mirrorings(geometry)
        for dims in mirrorings:
            p = network(x.flip(dims) if dims else x).float()
            if self.average == "probabilities":
                p = self._linked(p, 1)
            p = p.flip(dims) if dims else p
            total = p if total is None else total + p
        assert total is not None  # the empty combination is always there
        mean = total[:count] / len(mirrorings)
        return mean if geometry.slice_axis is None else mean.unsqueeze(geometry.slice_axis + 2)

    def _linked(self, logits: Tensor, classes: int = 0) -> Tensor:
        """Probabilities of logits, whose classes lie along a dimension."""
        return torch.softmax(logits, classes) if self.exclusive else torch.sigmoid(logits)


class Scores:
    """Probabilities or logits (K, X, Y, Z) of a volume as float16, read class by class.

    Beyond ``budget_bytes`` they lie in a temporary file, which is read and written instead of mapped: pages of a map
    count as this process's memory. ``slow`` is the axis along which planes are written.
    """

    def __init__(self, outputs: int, shape: Sequence[int], slow: int, budget_bytes: int) -> None:
        # As scans lie in memory: x is the fastest axis, but for the slow one.
        self._axes = [slow, *(axis for axis in (2, 1, 0) if axis != slow)]
        self._stored = [shape[axis] for axis in self._axes]
        self._outputs, self._bytes = outputs, 2 * math.prod(shape)
        self._array: NDArray[np.float16] | None = None
        self._file: IO[bytes] | None = None
        if outputs * self._bytes <= budget_bytes:
            self._array = np.empty((outputs, *self._stored), np.float16)
        else:
            self._file = tempfile.TemporaryFile(prefix="delineate-")  # noqa: SIM115 - open as long as this lives
            weakref.finalize(self, self._file.close)
            reserve(self._file, outputs * self._bytes)

    @property
    def planes(self) -> int:
        """How many planes there are to be written of each class."""
        return self._stored[0]

    def __len__(self) -> int:
        return self._outputs

    def __getitem__(self, k: int) -> NDArray[np.float16]:
        """Class k (X, Y, Z), Fortran-ordered."""
        if self._array is not None:
            stored = self._array[k]
        else:
            assert self._file is not None
            self._file.seek(k * self._bytes)
            stored = np.fromfile(self._file, np.float16, self._bytes // 2).reshape(self._stored)
        return np.asfortranarray(stored.transpose(np.argsort(self._axes)))

    def __iter__(self) -> Iterator[NDArray[np.float16]]:
        return (self[k] for k in range(self._outputs))

    def write(self, k: int, first: int, planes: NDArray[np.floating]) -> None:
        """Store planes (A, B, planes) of class k from the first on; A and B are the other axes in their order."""
        # A logit beyond float16 would be infinite, and probabilities, of differences of infinities, undefined.
        stored = planes.T.clip(-_LARGEST, _LARGEST)
        if self._array is not None:
            self._array[k, first : first + len(stored)] = stored
        else:
            assert self._file is not None
            self._file.seek(k * self._bytes + first * self._bytes // self._stored[0])
            try:
                np.ascontiguousarray(stored, np.float16).tofile(self._file)
            except OSError as error:
                raise refused(Path(tempfile.gettempdir()), error) from error


class _Window:
    """Sums of weighted outputs for the planes that tiles still reach, sliding along the slow axis.

    ``finish`` is applied to the means of finished planes (K, A, B, planes).
    """

    def __init__(
        self,
        outputs: int,
        plane: Sequence[int],
        depth: int,
        device: torch.device,
        finish: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        self.finish = finish
        self.total = torch.zeros(outputs, *plane, depth, device=device)
        self.weight = torch.zeros(*plane, depth, device=device)
        self.first = 0

    def add(self, answer: Tensor, weight: Tensor, where: Sequence[slice], planes: slice) -> None:
        local = slice(planes.start - self.first, planes.stop - self.first)
        self.total[(slice(None), *where, local)] += answer
        self.weight[(*where, local)] += weight

    def advance(self, first: int, finished: Scores) -> None:
        """Write out the planes before ``first``, which no tile reaches any more, and move on."""
        gone = min(first - self.first, self.total.shape[-1])
        if gone <= 0:
            return
        done = min(gone, finished.planes - self.first)
        weight = self.weight[..., :done]
        # Class by class, if none needs the others: all together would be a second copy of the sums.
        means = (_finite(total[..., :done] / weight) for total in self.total)
        if self.finish is not None:
            means = iter(self.finish(torch.stack(list(means))))
        for k, mean in enumerate(means):
            finished.write(k, self.first, mean.cpu().numpy())
        for sums in (*self.total, self.weight):
            rest = sums[..., gone:].clone()
            sums.zero_()
            sums[..., : rest.shape[-1]] = rest
        self.first = first


def _finite(mean: Tensor) -> Tensor:
    """What a network found, unless it is not finite."""
    if not torch.isfinite(mean).all():
        raise BundleError(
            "the network's output is not finite",
            fix=(
                "predict with --precision fp32; if that does not help, the scan is beyond what the network can "
                "handle, or its training has diverged"
            ),
        )
    return mean


def _only_value(boxes: NDArray[np.floating]) -> bytes | None:
    """The values of tiles (N, C, *space) in which each channel has only one, to the bit; None for any others."""
    bits = boxes.reshape(*boxes.shape[:2], -1).view(f"i{boxes.itemsize}")
    some, first = bits[..., ::1009], bits[..., :1]  # a few voxels tell of nearly all tiles that they have more
    return first.tobytes() if (some == first).all() and (bits == first).all() else None


def _clip(tile: Tile, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """The part of a tile that lies inside a volume, as slices of the tile and of the volume."""
    inside, where = [], []
    for start, n, size in zip(tile.start, tile.shape, shape, strict=True):
        low, high = max(start, 0), min(start + n, size)
        inside.append(slice(low - start, high - start))
        where.append(slice(low, high))
    return tuple(inside), tuple(where)
