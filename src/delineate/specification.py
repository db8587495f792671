"""What is written down: known fields, finite numbers in bounds, lists that end, open kinds, one JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from delineate.plugins import Parts

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


S = TypeVar("S", bound=Specification)


class Kinds(Parts[type[S]]):
    """Specifications told apart by ``kind``: Delineate's own, and those of others that are found by their name.

    As an annotation, ``Annotated[Base, KINDS]``, it is a union that stays open: a kind that is not packaged is looked
    up when it is met.
    """

    def __init__(self, group: str, what: str, base: type, packaged: tuple[type[S], ...]) -> None:
        def kind_of(part: object) -> str | None:
            if not (isinstance(part, type) and issubclass(part, base) and issubclass(part, Specification)):
                return None
            kind = part.model_fields.get("kind")
            return kind.default if kind is not None and isinstance(kind.default, str) else None

        super().__init__(group, what, {str(kind_of(part)): part for part in packaged}, kind_of)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        kinds = {kind: handler.generate_schema(part) for kind, part in self.packaged.items()}
        packaged = core_schema.tagged_union_schema(kinds, discriminator="kind", from_attributes=True)
        # Each is written by its own class, whatever that is.
        written = core_schema.simple_ser_schema("any")
        return core_schema.no_info_wrap_validator_function(self._validated, packaged, serialization=written)

    def _validated(self, value: Any, packaged: Any) -> S:
        kind = value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)
        if not isinstance(kind, str) or kind in self.packaged:
            return packaged(value)
        if kind not in self:
            known = ", ".join(map(repr, self))
            raise PydanticKnownError(
                "union_tag_invalid", {"discriminator": "'kind'", "tag": kind[:100], "expected_tags": known}
            )
        return self[kind].model_validate(value)


def specifications_in(value: object) -> Iterator[Specification]:
    """A specification and all that stand in it."""
    if isinstance(value, Specification):
        yield value
        for name in type(value).model_fields:
            yield from specifications_in(getattr(value, name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from specifications_in(item)
    elif isinstance(value, Mapping):
        yield from specifications_in(list(value.values()))


Weight = Annotated[float, Field(ge=0, le=1e6)]
PositiveWeight = Annotated[float, Field(gt=0, le=1e6)]
Intensity = Annotated[float, Field(ge=-1e30, le=1e30)]
Text = Annotated[str, Field(max_length=1000)]
Names = Annotated[tuple[str, ...], Field(max_length=256)]
Layers = Annotated[int, Field(ge=1, le=64)]
Filters = Annotated[int, Field(ge=1, le=2**14)]
Side = Annotated[int, Field(ge=1, le=4096)]
