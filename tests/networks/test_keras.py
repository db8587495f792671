"""What the prostate report's networks mean by a layer is what Keras computes."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch

from delineate.networks.blocks import KerasTransposed, keras_batch_norm


@pytest.fixture(scope="module")
def keras() -> Iterator[ModuleType]:
    """Imported for these tests alone: it takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "torch")
        yield pytest.importorskip("keras")


@pytest.mark.parametrize("dimensions", [2, 3])
def test_transposed_convolutions_are_aligned_as_keras_same(
    dimensions: int, keras: ModuleType, rng: np.random.Generator
) -> None:
    image = torch.from_numpy(rng.random((*(2, 4, 5, 6)[: dimensions + 1], 3), dtype=np.float32))
    kind = keras.layers.Conv3DTranspose if dimensions == 3 else keras.layers.Conv2DTranspose
    theirs = kind(4, 3, strides=2, padding="same", bias_initializer="random_normal")
    expected = theirs(image)
    ours = KerasTransposed(dimensions, 3, 4, bias=True)
    kernel, bias = (variable.value.detach().cpu() for variable in theirs.weights)
    # Theirs is (*kernel, outputs, inputs), torch's (inputs, outputs, *kernel).
    ours.transposed.weight.data.copy_(kernel.movedim((-1, -2), (0, 1)))
    ours.transposed.bias.data.copy_(bias)
    found = ours(image.movedim(-1, 1)).movedim(1, -1)
    torch.testing.assert_close(found, expected.cpu(), rtol=1e-5, atol=1e-5)


def test_batch_normalisation_moves_as_keras(keras: ModuleType, rng: np.random.Generator) -> None:
    theirs, ours = keras.layers.BatchNormalization(), keras_batch_norm(2, 3)
    for _ in range(3):
        image = torch.from_numpy(rng.normal(3, 2, (8, 6, 5, 3)).astype(np.float32))
        expected = theirs(image, training=True)
        found = ours.train()(image.movedim(-1, 1)).movedim(1, -1)
        torch.testing.assert_close(found, expected.cpu(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.moving_mean.value.detach().cpu())
    # Torch moves towards the variance of the sample, Keras towards that of the population: n / (n − 1).
    torch.testing.assert_close(ours.running_var, theirs.moving_variance.value.detach().cpu(), rtol=1e-3, atol=0)
    image = torch.from_numpy(rng.normal(3, 2, (2, 6, 5, 3)).astype(np.float32))
    expected = theirs(image, training=False)
    torch.testing.assert_close(ours.eval()(image.movedim(-1, 1)).movedim(1, -1), expected.cpu(), rtol=1e-3, atol=1e-3)
