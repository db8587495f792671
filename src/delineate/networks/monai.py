"""Any MONAI network, by name."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from torch import nn

from delineate.errors import RecipeError
from delineate.networks.base import Architecture, Step


class MonaiSpec(Architecture):
    """A network from ``monai.networks.nets`` (needs ``pip install delineate[monai]``).

    ``arguments`` go to its constructor, in addition to the dimensions and the numbers of input and output
    channels, which Delineate supplies. The sides of its input must be multiples of ``sides_divide_by``.
    """

    kind: Literal["monai"] = "monai"
    name: str
    arguments: Annotated[dict[str, Any], Field(max_length=64)] = Field(default_factory=dict)
    sides_divide_by: Annotated[tuple[Annotated[int, Field(ge=1, le=512)], ...], Field(max_length=3)] | None = None

    @model_validator(mode="after")
    def _fits(self) -> MonaiSpec:
        if self.sides_divide_by is not None and len(self.sides_divide_by) != self.dimensions:
            raise ValueError(f"sides_divide_by has {len(self.sides_divide_by)} numbers; give {self.dimensions}")
        return self

    @property
    def divisor(self) -> Step:
        return self.sides_divide_by or (32,) * self.dimensions

    @property
    def smallest(self) -> Step:
        # Norms over space reject a single voxel, which is all that one divisor leaves at the coarsest level.
        return tuple(2 * d for d in self.divisor)

    def body(self, inputs: int, outputs: int) -> nn.Module:
        try:
            from monai.networks import nets
        except ImportError as error:
            raise RecipeError(
                "network 'monai' needs MONAI, which is not installed", fix="pip install 'delineate[monai]'"
            ) from error
        network = getattr(nets, self.name, None)
        if not (isinstance(network, type) and issubclass(network, nn.Module)):
            raise RecipeError(f"MONAI has no network '{self.name}'", fix="see monai.networks.nets for the names")
        channels = {"in_channels": inputs, "out_channels": outputs}
        try:
            return network(spatial_dims=self.dimensions, **channels, **self.arguments)
        except (TypeError, ValueError, AssertionError) as error:
            raise RecipeError(
                f"MONAI's {self.name} rejects its arguments: {error}", fix="see its documentation"
            ) from error
