"""What every network specification declares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from delineate.errors import RecipeError
from delineate.io.files import parsing
from delineate.networks.blocks import channel_adapter
from delineate.specification import Filters, Specification

Step = tuple[int, ...]
Widths = Annotated[tuple[Filters, ...], Field(min_length=2, max_length=12)]
Steps = Annotated[
    tuple[Annotated[tuple[Annotated[int, Field(ge=1, le=32)], ...], Field(max_length=3)], ...], Field(max_length=12)
]
"""Strides or kernels of each level."""

MOST_PARAMETERS = 2**31


class Architecture(Specification):
    """Fields that define a network, and the geometry that tilings derive from them.

    ``project_inputs_to``: a learned 1-convolution first maps the image to this many channels, for weights
    that were trained with that number. It is initialised to repeat the channels or, if there are more than
    that, to average them.
    """

    if TYPE_CHECKING:
        kind: str  # every network has its own

    dimensions: Literal[2, 3]
    project_inputs_to: Annotated[int, Field(ge=1, le=1024)] | None = None

    @property
    def divisor(self) -> Step:
        """Input sides must be multiples of this."""
        raise NotImplementedError

    @property
    def margin(self) -> Step:
        """By how many voxels the output is smaller than the input on each side."""
        return (0,) * self.dimensions

    @property
    def smallest(self) -> Step:
        """Smallest input sides."""
        return tuple(-(-(2 * m + 1) // d) * d for m, d in zip(self.margin, self.divisor, strict=True))

    @property
    def least_batch(self) -> int:
        """The fewest tiles that a training step can take."""
        return 1

    @property
    def recomputes(self) -> bool:
        """Whether the network is a :class:`~delineate.networks.blocks.Recomputing`, or made of such."""
        return False

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The network for images (N, ``inputs``, *space), randomly initialised.

        It returns logits (N, ``outputs``, *space less the margins). Raises :class:`RecipeError`, before
        anything is allocated, if it cannot be built or has more than :data:`MOST_PARAMETERS` parameters.
        """
        if torch.get_default_device().type != "meta":  # nothing is allocated there anyway
            self._check(inputs, outputs)
        if self.project_inputs_to is None:
            return self.body(inputs, outputs)
        network = self.body(self.project_inputs_to, outputs)
        # Added to the network rather than wrapped around it, so that all other weights keep their names.
        network.add_module("project", channel_adapter(self.dimensions, inputs, self.project_inputs_to))
        network.register_forward_pre_hook(_project)
        return network

    def _check(self, inputs: int, outputs: int) -> None:
        with parsing("network", RecipeError, fix="change its widths or layers"), torch.device("meta"), Unfilled():
            network = self.body(self.project_inputs_to or inputs, outputs)
        parameters = sum(parameter.numel() for parameter in network.parameters())
        if parameters > MOST_PARAMETERS:
            raise RecipeError(
                f"the network has {parameters:,} parameters", fix=f"reduce its widths: {MOST_PARAMETERS:,} is the limit"
            )

    def body(self, inputs: int, outputs: int) -> nn.Module:
        """The network itself."""
        raise NotImplementedError

    def start_from_published(self, network: nn.Module) -> str | None:
        """Load published weights if the specification asks for them; returns a note of what was loaded."""
        return None


class Unfilled(TorchFunctionMode):
    """Skips random initial values, for networks whose weights are not used or are read from a file.

    Even on the meta device they take milliseconds per layer, and PyTorch imports its compiler for them.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (Tensor.normal_, Tensor.uniform_):
            return args[0]
        return func(*args, **(kwargs or {}))


def _project(network: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (network.project(arguments[0]),)
