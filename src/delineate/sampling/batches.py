"""Batches for training: crops of prepared volumes, stacked in the network's layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from delineate.core.grid import AXES
from delineate.preprocessing.cache import PreparedDataset, PreparedSubject
from delineate.sampling.augmentation import AugmentationSpec, augment, context_voxels
from delineate.sampling.samplers import Sampler
from delineate.sampling.tiles import TileGeometry, standardised


class Batch(NamedTuple):
    """``image`` (N, C, *source) float32 and ``target`` (N, T, *source) uint8, not yet augmented.

    ``spacing_mm`` (N, d) is each sample's, along the axes that the network works on; ``number`` is the batch's place in
    the stream.
    """

    image: Tensor
    target: Tensor
    spacing_mm: Tensor
    number: int


class BatchSource:
    """Batch ``i`` of process ``rank`` among ``world``: always the same, in whatever order batches are requested.

    The processes share one stream of samples and take turns, so none sees another's samples.
    """

    def __init__(
        self,
        sampler: Sampler,
        augmentation: AugmentationSpec,
        batch_size: int,
        *,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.sampler, self.augmentation, self.batch_size = sampler, augmentation, batch_size
        self.rank, self.world = rank, world
        geometry = sampler.geometry
        self.geometry: TileGeometry = geometry
        self.context = context_voxels(augmentation, geometry.shape, geometry.slice_axis)
        self._axes = [axis for axis in range(3) if axis != geometry.slice_axis]  # that the network works on

    def for_process(self, rank: int, world: int) -> BatchSource:
        """The same source for process ``rank`` among ``world``."""
        return BatchSource(self.sampler, self.augmentation, self.batch_size, rank=rank, world=world)

    @property
    def subjects(self) -> Sequence[PreparedSubject]:
        return self.sampler.subjects

    @property
    def steps_an_epoch(self) -> int:
        """Batches per process in which all processes together cover one pass."""
        return -(-self.sampler.pass_length // (self.batch_size * self.world))

    def samples(self, i: int) -> list[int]:
        """Numbers of the samples in batch ``i``."""
        first = (i * self.world + self.rank) * self.batch_size
        return list(range(first, first + self.batch_size))

    @property
    def ahead(self) -> int:
        """How many batches ahead :meth:`fetch` should be called; 0 if all subjects are at hand."""
        return -(-self.sampler.ahead // (self.batch_size * self.world))

    def fetch(self, i: int) -> None:
        """Have the subjects of all processes' batches ``i`` prepared, as far as they are this one's to prepare."""
        subjects = self.subjects
        assert isinstance(subjects, PreparedDataset)
        first = i * self.world * self.batch_size
        for index in {self.sampler.subject_of(j) for j in range(first, first + self.world * self.batch_size)}:
            if index % self.world == self.rank:
                subjects.fetch(index)

    def batch(self, i: int) -> Batch:
        """Batch ``i``, read with the context that augmentation needs."""
        images, targets, spacings = [], [], []
        for j in self.samples(i):
            draw = self.sampler.draw(j)
            subject = self.subjects[draw.subject]
            image = self.geometry.read(subject.image, draw.tile, self.context)
            target = self.geometry.read(subject.target, draw.tile, self.context)
            images.append(self.geometry.to_network(image))
            # A 2D network reads neighbours but segments only the middle slice.
            targets.append(self.geometry.to_network(self._middle_slice(target)))
            spacings.append([subject.spacing_mm[axis] for axis in self._axes])
        return Batch(
            torch.from_numpy(np.stack(images).astype(np.float32)),
            torch.from_numpy(np.stack(targets)),
            torch.tensor(spacings, dtype=torch.float32),
            i,
        )

    def augmented(self, batch: Batch, seed: int) -> tuple[Tensor, Tensor]:
        """Image (N, C, *input) and target (N, T, *tile) of a batch, varied on the batch's device.

        The random changes depend only on the seed, the process and the batch's number.
        """
        geometry, device = self.geometry, batch.image.device
        generator = torch.Generator(device=device)
        generator.manual_seed(int(np.random.SeedSequence((seed, 2, self.rank, batch.number)).generate_state(1)[0]))
        image, target = augment(
            batch.image,
            batch.target,
            self.augmentation,
            shape=[geometry.input_shape[axis] for axis in self._axes],
            spacing_mm=batch.spacing_mm,
            generator=generator,
            axes="".join(AXES[axis] for axis in self._axes),
        )
        image = standardised(image, geometry.standardise)
        for dim, axis in enumerate(self._axes, start=2):
            target = target.narrow(dim, geometry.margin[axis], geometry.shape[axis])
        return image, target

    def _middle_slice(self, target: np.ndarray) -> np.ndarray:
        axis = self.geometry.slice_axis
        if axis is None:
            return target
        return np.take(target, [self.geometry.margin[axis]], axis=axis + 1)
