"""The registry of networks is this type: a new network is one file and one word here."""

from __future__ import annotations

from delineate.networks.unet import UNetSpec

# With a second family: NetworkSpec = Annotated[UNetSpec | OtherSpec, Field(discriminator="kind")]
NetworkSpec = UNetSpec
