from __future__ import annotations

import pytest
import torch

from delineate.networks.segresnet import ResidualBlock, SegResNetSpec


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "prelu"])
@pytest.mark.parametrize("norm", ["none", "group", "instance", "batch"])
def test_a_block_whose_convolutions_give_nothing_is_the_identity(norm, activation) -> None:
    block = ResidualBlock(SegResNetSpec(dimensions=2, norm=norm, activation=activation), 8)
    torch.nn.init.zeros_(block.conv2.conv.weight)
    image = torch.randn(2, 8, 6, 6)
    torch.testing.assert_close(block(image.clone()), image)
