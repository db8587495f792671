"""MONAI's configuration files: values, references ``@id::part`` and components; expressions are never evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from delineate.core.text import printable
from delineate.errors import CannotImport
from delineate.io.files import parsing, read_json, read_text
from delineate.io.settings import MOST_CHARACTERS, parse_yaml
from delineate.specification import explained

ITSELF = "predict with MONAI itself"
_FIX = f"{ITSELF}, or change the entry with --entry"

Short = Annotated[str, Field(max_length=200)]
Count = Annotated[int, Field(ge=1, le=2**14)]
Side = Annotated[int, Field(ge=-1, le=4096)]

_MOST_STEPS = 64
"""From reference to reference, and from level to level."""

_MOST_VALUES = 20_000
"""Written out: a few references to lists of references could stand for any number of values."""

_FOR_EACH_KEY = (
    *("mode", "padding_mode", "align_corners", "allow_smaller", "argmax", "threshold", "to_onehot", "rounding"),
    *("softmax", "sigmoid", "nearest_interp"),
)
"""Arguments that may be lists with an entry for each key of a component."""

_ABOUT = ("_target_", "_desc_", "_disabled_", "_requires_", "_mode_")


class Arguments(BaseModel):
    """The arguments of a component that matter; those of type ``Any`` are not read, and no other may be given."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    keys: Any = None
    allow_missing_keys: Any = None


A = TypeVar("A", bound=Arguments)


@dataclass(frozen=True)
class Component:
    """A class with its arguments, not built; ``place`` is the id of its entry."""

    name: str
    arguments: Mapping[str, Any]
    place: str
    config: Config

    def read(self, kind: type[A], key: str | None = None) -> A:
        """The arguments as a ``kind``; of lists with one entry for each of the component's keys, that of ``key``.

        Raises :class:`CannotImport`, naming the component and the argument.
        """
        keys = self.keys
        values: dict[str, Any] = {}
        for name, value in self.arguments.items():
            field = kind.model_fields.get(name)
            if field is not None and field.annotation is not Any:
                value = self.config.value(value, f"{self.place}::{name}")
                if name in _FOR_EACH_KEY and key in keys and isinstance(value, list) and len(value) == len(keys):
                    value = value[keys.index(key)]
            values[name] = None if field is not None and field.annotation is Any else value
        try:
            return kind.model_validate(values)
        except ValidationError as error:
            raise CannotImport(
                f"{printable(self.name)} ({printable(self.place)}) is not known with these arguments:\n"
                f"{explained(error, kind)}",
                fix=_FIX,
            ) from error

    @property
    def keys(self) -> list[str]:
        """What the component works on."""
        found = self.config.value(self.arguments.get("keys", []), f"{self.place}::keys")
        return [str(one) for one in (found if isinstance(found, list) else [found])]

    def dtypes(self, key: str) -> list[str]:
        """The types that ``dtype`` may give ``key``, by name; read as text, for no expression is evaluated."""
        given = self.arguments.get("dtype")
        if isinstance(given, str) and given.startswith("@"):
            given = self.config.value(given, f"{self.place}::dtype")
        names = re.findall(r"\b[a-z]+\d*\b(?!\.)", str(given)[:1000])
        keys = self.keys
        return [names[keys.index(key)]] if key in keys and len(names) == len(keys) else names


class Config:
    """The entries of a configuration file.

    An id is the names and numbers of the levels to an entry, joined by ``::``, or ``#`` as older files have it.
    """

    def __init__(self, entries: Mapping[str, Any]) -> None:
        self.entries = entries
        self._written_out = 0

    @classmethod
    def read(cls, file: Path, changes: Sequence[str] = ()) -> Config:
        """The entries of a JSON or YAML file, each of ``changes`` (``ID=VALUE``) made."""
        fix = "give the folder of a bundle as MONAI wrote it"
        if file.suffix == ".json":
            entries: Any = read_json(file, CannotImport, fix=fix)
        else:
            with parsing(file, CannotImport, fix=fix):
                entries = parse_yaml(read_text(file, 4 * MOST_CHARACTERS), file.name, CannotImport)
        if not isinstance(entries, dict):
            raise CannotImport(f"'{file}' holds no entries", fix=fix)
        for change in changes:
            _change(entries, change)
        return cls(entries)

    def value(self, value: Any, place: str, steps: int = 0) -> Any:
        """A value with every reference in it replaced by what it refers to. Raises :class:`CannotImport`."""
        self._written_out += 1
        if steps > _MOST_STEPS or self._written_out > _MOST_VALUES:
            raise CannotImport(
                f"'{printable(place)}' refers to itself, or to too many values", fix="correct its references"
            )
        value, place = self._followed(value, place)
        if isinstance(value, dict):
            return {name: self.value(one, f"{place}::{name}", steps + 1) for name, one in value.items()}
        if isinstance(value, list):
            return [self.value(one, f"{place}::{i}", steps + 1) for i, one in enumerate(value)]
        return value

    def component(self, value: Any, place: str) -> Component | None:
        """The component that an entry describes; None if it is disabled or null."""
        value, place = self._followed(value, place)
        if value is None:
            return None
        if not isinstance(value, dict) or not isinstance(value.get("_target_"), str):
            raise CannotImport(f"'{printable(place)}' names no component with _target_", fix=_FIX)
        disabled = self.value(value.get("_disabled_", False), f"{place}::_disabled_")
        if disabled is True or str(disabled).lower() == "true":
            return None
        module, _, name = value["_target_"].rpartition(".")
        if module and not module.startswith("monai."):
            raise CannotImport(
                f"'{printable(place)}' is {printable(value['_target_'])}, which is not MONAI's own", fix=_FIX
            )
        if value.get("_mode_", "default") != "default":
            raise CannotImport(f"'{printable(place)}' has a _mode_, which is not known", fix=_FIX)
        return Component(name, {key: one for key, one in value.items() if key not in _ABOUT}, place, self)

    def composed(self, value: Any, place: str) -> Iterator[Component]:
        """The components of a ``Compose``, or of a list, that an entry describes; none if it is null."""
        value, place = self._followed(value, place)
        if isinstance(value, dict) and "_target_" in value:
            compose = self.component(value, place)
            if compose is None:
                return
            if compose.name != "Compose":
                raise CannotImport(
                    f"'{printable(place)}' is a {printable(compose.name)}, not a Compose of transforms", fix=_FIX
                )
            compose.read(_Compose)
            value, place = self._followed(compose.arguments.get("transforms"), f"{place}::transforms")
        if value is not None and not isinstance(value, list):
            raise CannotImport(f"'{printable(place)}' is not a list of transforms", fix=_FIX)
        for i, one in enumerate(value or ()):
            component = self.component(one, f"{place}::{i}")
            if component is not None:
                yield component

    def _followed(self, value: Any, place: str) -> tuple[Any, str]:
        """A value and its id, once references are followed."""
        for _ in range(_MOST_STEPS):
            if not isinstance(value, str) or not value.startswith(("@", "$", "%")):
                return value, place
            target = value.removeprefix("$")
            parts = target[1:].replace("#", "::").split("::")
            if not target.startswith("@") or not all(
                part.replace("_", "").replace("-", "").isalnum() for part in parts
            ):
                what = "a macro" if value.startswith("%") else "an expression"
                raise CannotImport(
                    f"'{printable(place)}' is {what}, '{printable(value)[:100]}', and none is ever evaluated",
                    fix=f"give its value: --entry '{printable(place)}=…'",
                )
            value, place = self._at(parts, place), "::".join(parts)
        raise CannotImport(f"'{printable(place)}' refers to itself", fix="correct its references")

    def _at(self, parts: Sequence[str], place: str) -> Any:
        found: Any = self.entries
        for part in parts:
            if isinstance(found, list) and part.isdecimal() and int(part[:9]) < len(found):
                found = found[int(part)]
            elif isinstance(found, dict) and part in found:
                found = found[part]
            else:
                raise CannotImport(
                    f"'{printable(place)}' refers to '{printable('::'.join(parts))}', which is not there",
                    fix="copy the bundle again, or give the value with --entry",
                )
        return found


class _Compose(Arguments):
    transforms: Any = None
    map_items: Literal[True] = True
    unpack_items: Literal[False] = False
    lazy: Literal[False] | None = None
    log_stats: Any = None


def unknown(what: str, has: str) -> CannotImport:
    return CannotImport(f"{what} with {printable(has.strip())[:200]} is not known", fix=ITSELF)


def _change(entries: dict[str, Any], change: str) -> None:
    """Set one entry in place."""
    path, equals, text = change.partition("=")
    parts = path.strip().replace("#", "::").split("::")
    if not equals or not all(parts):
        raise CannotImport(f"'{printable(change)[:100]}' is not ID=VALUE", fix="write, for example, pixdim=[1,1,2]")
    value = parse_yaml(text, printable(change)[:100], CannotImport)
    node: Any = entries
    for part in parts[:-1]:
        node = _entry(node, part, path)
    if isinstance(node, list):
        _entry(node, parts[-1], path)
        node[int(parts[-1])] = value
    elif isinstance(node, dict):
        node[parts[-1]] = value
    else:
        raise CannotImport(f"'{printable(path)[:100]}' is not an entry", fix="write the names of its levels, with ::")


def _entry(node: Any, part: str, path: str) -> Any:
    if isinstance(node, list) and part.isdecimal() and int(part[:9]) < len(node):
        return node[int(part)]
    if isinstance(node, dict) and part in node:
        return node[part]
    raise CannotImport(f"'{printable(path)[:100]}' is not an entry: there is no '{printable(part)[:50]}'", fix=_FIX)
