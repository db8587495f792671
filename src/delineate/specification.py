"""What is written down: known fields, finite numbers between bounds, lists that end, and one way to JSON and back."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

T = TypeVar("T")


class Specification(BaseModel):
    """Fields of a recipe; nothing unknown is taken, and nothing changes once it is there.

    Every number has a lower and an upper bound and every list a longest length, which lie far beyond what
    anybody uses: what is beyond them is a slip, or meant to use up memory or time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=10_000)


def to_json(value: Any, indent: int | None = 1) -> str:
    """JSON of a specification or of a dataclass of typed fields; :func:`from_json` gives back an equal one."""
    return _adapter(type(value)).dump_json(value, indent=indent).decode()


def from_json(kind: type[T], text: str | bytes) -> T:
    """The ``kind`` that :func:`to_json` wrote. Raises pydantic's ``ValidationError``, a :class:`ValueError`."""
    value: T = _adapter(kind).validate_json(text)
    return value


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for each type: it takes milliseconds."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


Weight = Annotated[float, Field(ge=0, le=1e6)]
PositiveWeight = Annotated[float, Field(gt=0, le=1e6)]
Intensity = Annotated[float, Field(ge=-1e30, le=1e30)]
Names = Annotated[tuple[str, ...], Field(max_length=256)]
Layers = Annotated[int, Field(ge=1, le=64)]
Filters = Annotated[int, Field(ge=1, le=2**14)]
Side = Annotated[int, Field(ge=1, le=4096)]
