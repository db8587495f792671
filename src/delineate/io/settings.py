"""YAML as people write settings in it: plain values, within limits that no recipe comes near."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

from delineate.errors import DelineateError
from delineate.io.files import parsing

MOST_CHARACTERS, MOST_VALUES, MOST_LEVELS = 2**17, 20_000, 32

_FASTEST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def parse_yaml(text: str, what: str, kind: type[DelineateError]) -> Any:
    """Values in YAML: dictionaries, lists, strings, numbers, booleans, null. Raises ``kind``, naming ``what``.

    A date is read as text, since no setting is a date. Refused are tags, a key given twice, and more than
    :data:`MOST_VALUES` values once aliases are replaced by what they stand for.
    """
    if len(text) > MOST_CHARACTERS:
        raise kind(f"'{what}' has {len(text):,} characters of YAML", fix=f"write {MOST_CHARACTERS:,} at most")
    with parsing(what, kind, fix="write plain YAML"):
        _check_size(text)
        return yaml.load(text, _Loader)


def _check_size(text: str) -> None:
    """Raise where there are too many levels, or too many values, counting an alias as all that it stands for."""
    sizes: dict[str, int] = {}
    around: list[tuple[str | None, int]] = []
    anchor: str | None
    size = 0
    for event in yaml.parse(text, _FASTEST):
        if isinstance(event, yaml.CollectionStartEvent):
            around.append((event.anchor, size))
            size = 1
            if len(around) > MOST_LEVELS:  # stop now: each further level costs more than the last
                raise yaml.YAMLError(f"it is nested in more than {MOST_LEVELS} levels")
            continue
        if isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes:
                raise yaml.YAMLError(f"alias '{event.anchor}' stands for nothing that is complete before it")
            size += sizes[event.anchor]
        elif isinstance(event, yaml.ScalarEvent):
            size += 1
            if event.anchor:
                sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = around.pop()
            if anchor:
                sizes[anchor] = size
            size += before
        if size > MOST_VALUES:
            raise yaml.YAMLError(f"it has more than {MOST_VALUES:,} values (aliases written out)")


class _Loader(_FASTEST):
    """Knows the tags of plain values only."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [(key.tag, key.value) for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if len(set(keys)) < len(keys):
            twice = next(value for tag, value in keys if keys.count((tag, value)) > 1)
            raise yaml.constructor.ConstructorError(None, None, f"'{twice}' is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_PLAIN = {f"tag:yaml.org,2002:{name}" for name in ("null", "bool", "int", "float", "str", "seq", "map")}
_Loader.yaml_constructors = {
    tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag in _PLAIN or tag is None
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:timestamp"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
