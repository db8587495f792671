"""What every network specification declares."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from delineate.networks.blocks import channel_adapter

Step = tuple[int, ...]


class Architecture(BaseModel):
    """Fields that define a network, and the geometry that tilings derive from it.

    ``project_inputs_to``: a learned 1-convolution first brings the image to this many channels, for weights
    that were trained on so many. It begins by repeating the channels, or by their mean where there are more.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    dimensions: Literal[2, 3]
    project_inputs_to: Annotated[int, Field(ge=1)] | None = None

    @property
    def divisor(self) -> Step:
        """Input sides must divide by this."""
        raise NotImplementedError

    @property
    def margin(self) -> Step:
        """Voxels that the output lacks on each side."""
        return (0,) * self.dimensions

    @property
    def smallest(self) -> Step:
        """Least input sides."""
        return tuple(-(-(2 * m + 1) // d) * d for m, d in zip(self.margin, self.divisor, strict=True))

    @property
    def least_batch(self) -> int:
        """Tiles that a training step takes at least."""
        return 1

    def build(self, inputs: int, outputs: int) -> nn.Module:
        """The network for images (N, ``inputs``, *space), randomly initialised.

        It gives logits (N, ``outputs``, *space less the margins).
        """
        if self.project_inputs_to is None:
            return self.body(inputs, outputs)
        network = self.body(self.project_inputs_to, outputs)
        # Added to the network rather than put around it: all other weights keep their names.
        network.add_module("project", channel_adapter(self.dimensions, inputs, self.project_inputs_to))
        network.register_forward_pre_hook(_project)
        return network

    def body(self, inputs: int, outputs: int) -> nn.Module:
        """The network itself."""
        raise NotImplementedError

    def start_from_published(self, network: nn.Module) -> str | None:
        """Fill in published weights where the specification asks for them; says what was filled in."""
        return None


def _project(network: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    return (network.project(arguments[0]),)
