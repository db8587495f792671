"""Everything that a network must satisfy, checked by Delineate's contract suite."""

from __future__ import annotations

import pytest
from own_network import OwnNetSpec

from delineate.testing import check_network


@pytest.mark.parametrize("dimensions", [2, 3])
def test_it_keeps_the_promises_of_a_network(dimensions: int) -> None:
    check_network(OwnNetSpec(dimensions=dimensions, width=4, blocks=2))
