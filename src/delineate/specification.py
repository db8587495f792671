"""What every part of a recipe is built on: known fields, finite numbers between bounds, lists that end."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Specification(BaseModel):
    """Fields of a recipe; nothing unknown is taken, and nothing changes once it is there.

    Every number has a lower and an upper bound and every list a longest length, which lie far beyond what
    anybody uses: what is beyond them is a slip, or meant to use up memory or time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=10_000)


Weight = Annotated[float, Field(ge=0, le=1e6)]
PositiveWeight = Annotated[float, Field(gt=0, le=1e6)]
Intensity = Annotated[float, Field(ge=-1e30, le=1e30)]
Names = Annotated[tuple[str, ...], Field(max_length=256)]
Layers = Annotated[int, Field(ge=1, le=64)]
Filters = Annotated[int, Field(ge=1, le=2**14)]
Side = Annotated[int, Field(ge=1, le=4096)]
