"""What all specifications share: known fields, finite bounded numbers, bounded lists, open kinds, one JSON form."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, TypeAdapter, ValidationError
from pydantic_core import CoreSchema, PydanticKnownError, core_schema

from delineate.core.text import near
from delineate.plugins import Parts

T = TypeVar("T")


class Specification(BaseModel):
    """Fields of a recipe: unknown ones are refused, and none can be changed later.

    Every number has a lower and an upper bound and every list a longest length, all far beyond what anybody
    uses: a value outside them is a slip, or an attempt to use up memory or time.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, str_max_length=10_000)


def to_json(value: Any, indent: int | None = 1) -> str:
    """A specification, or a dataclass with typed fields, as JSON; :func:`from_json` returns an equal one."""
    return _adapter(type(value)).dump_json(value, indent=indent).decode()


def from_json(kind: type[T], text: str | bytes) -> T:
    """The ``kind`` that :func:`to_json` wrote. Raises pydantic's ``ValidationError``, a :class:`ValueError`."""
    value: T = _adapter(kind).validate_json(text)
    return value


def explained(error: ValidationError, kind: type[BaseModel], most: int = 20) -> str:
    """A line for each wrong field of a ``kind``."""
    lines = [_explain(e, kind) for e in error.errors()]
    return "\n".join([*lines[:most], *([f"  and {len(lines) - most} more"] if len(lines) > most else [])])


def _explain(error: Any, kind: type[BaseModel]) -> str:
    """One line for one pydantic error: where, what, and the nearest valid name for a misspelt field."""
    where = ".".join(_short(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"  {where}: no such field" + (near(_short(error["loc"][-1]), _field_names(kind)) or "; remove it")
    if error["type"] in ("union_tag_invalid", "literal_error"):
        found, expected = _short(error["ctx"].get("tag", error["input"])), error["ctx"].get("expected_tags", "")
        expected = expected or error["ctx"].get("expected", "")
        names = [name.strip(" '") for name in expected.replace(" or ", ",").split(",")]
        return f"  {where}: '{found}' is not one of {', '.join(names)}{near(str(found), names)}"
    if error["type"] == "value_error":  # one of ours: it says what it got
        return f"  {where}: ".replace("  : ", "  ") + _short(error["ctx"]["error"], 500)
    return f"  {where}: {error['msg']}, got {_short(repr(error['input']))}"


def _short(value: object, most: int = 100) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _field_names(model: type[BaseModel]) -> set[str]:
    """Every field name of a specification, at any depth."""
    names: set[str] = set()
    seen: set[type] = set()

    def walk(annotation: Any) -> None:
        for part in (*getattr(annotation, "__args__", ()), *getattr(annotation, "__metadata__", ())):
            walk(part)
        if isinstance(annotation, Parts):
            for part in (*annotation.packaged.values(), *annotation.usable()):
                walk(part)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen.add(annotation)
            for name, field in annotation.model_fields.items():
                names.add(name)
                walk(field.annotation)
                for part in field.metadata:
                    walk(part)

    walk(model)
    return names


_ADAPTERS: dict[Any, TypeAdapter[Any]] = {}


def _adapter(kind: Any) -> TypeAdapter[Any]:
    """A type's adapter, made only once since that takes milliseconds."""
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]


S = TypeVar("S", bound=Specification)


class Kinds(Parts[type[S]]):
    """Specifications told apart by ``kind``: Delineate's own, and those from other packages, found by name.

    As an annotation, ``Annotated[Base, KINDS]``, it is an open union: a kind that is not packaged is looked up
    when it is met.
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
        # Each value is serialised by its own class, whichever that is.
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
    """A specification and every one nested in it."""
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


def _each_once(axes: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(axes)) < len(axes):
        raise ValueError(f"{', '.join(axes)} names an axis twice")
    return axes


Axes = Annotated[tuple[Literal["x", "y", "z"], ...], Field(max_length=3), AfterValidator(_each_once)]
