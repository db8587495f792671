"""What every part promises, as plain functions for testing your own parts.

Each raises an :class:`AssertionError` that names the broken law; ``skip`` names laws that a part need not keep, for
reasons to be given where it is used::

    from delineate.testing import check_network

    def test_it_keeps_the_promises_of_a_network():
        check_network(OwnNetSpec(dimensions=3))
"""

from delineate.testing.formats import check_format
from delineate.testing.layouts import check_layout
from delineate.testing.losses import check_loss
from delineate.testing.metrics import check_metric
from delineate.testing.networks import check_network
from delineate.testing.samplers import check_sampler
from delineate.testing.steps import check_step

__all__ = [
    "check_format",
    "check_layout",
    "check_loss",
    "check_metric",
    "check_network",
    "check_sampler",
    "check_step",
]
