from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from delineate.networks.unet import UNetSpec


def test_parameters_of_a_small_network_by_hand() -> None:
    """2D, widths 4 and 8, one convolution a block, batch norm: counted layer by layer."""
    network = UNetSpec(dimensions=2, widths=(4, 8), convolutions=1, norm="batch").build(1, 3)
    first, second = 9 * 1 * 4 + 2 * 4, 9 * 4 * 8 + 2 * 8
    up, joined, head = 4 * 8 * 4 + 4, 9 * 8 * 4 + 2 * 4, 4 * 3 + 3
    assert sum(p.numel() for p in network.parameters()) == first + second + up + joined + head


def test_strides_decide_the_divisor() -> None:
    spec = UNetSpec(dimensions=3, widths=(4, 8, 16), strides=((2, 2, 1), (2, 2, 2)))
    assert spec.divisor == (4, 4, 2)


def test_wrong_numbers_of_strides_are_refused_with_the_right_ones() -> None:
    with pytest.raises(ValidationError, match="give 2 entries of 3 numbers"):
        UNetSpec(dimensions=3, widths=(4, 8, 16), strides=((2, 2, 2),))


def test_deep_supervision_answers_at_coarser_levels_in_training_only() -> None:
    network = UNetSpec(dimensions=3, widths=(4, 6, 8, 10), deep_supervision=2).build(1, 3)
    image = torch.randn(1, 1, 16, 16, 8)
    fine, half, quarter = network.train()(image)
    assert [tuple(x.shape[2:]) for x in (fine, half, quarter)] == [(16, 16, 8), (8, 8, 4), (4, 4, 2)]
    assert network.eval()(image).shape == (1, 3, 16, 16, 8)
    (fine.sum() + half.sum() + quarter.sum()).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_more_supervised_levels_than_there_are_is_refused() -> None:
    with pytest.raises(ValidationError, match="1 decoder levels below the finest"):
        UNetSpec(dimensions=2, widths=(4, 8, 16), deep_supervision=2)
