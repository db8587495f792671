"""Trying laws one by one, so that a failure names the broken law."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

from delineate.plugins import Parts
from delineate.specification import Specification

Law = Callable[..., None]


def require(condition: object, message: str) -> None:
    """Raise :class:`AssertionError` with a message; unlike ``assert``, also under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def close(found: float, expected: float, *, absolute: float = 0.0, relative: float = 1e-6) -> bool:
    """Whether two numbers agree; NaN agrees with NaN."""
    return found == expected or (found != found and expected != expected) or (
        abs(found - expected) <= max(absolute, relative * abs(expected))
    )  # fmt: skip


def hold(what: object, laws: Sequence[Law], skip: Container[str], *arguments: Any) -> None:
    """Try laws; raise an :class:`AssertionError` that names ``what`` and the first law that it breaks."""
    names = [law.__name__ for law in laws]
    unknown = [name for name in skip if name not in names] if isinstance(skip, list | tuple | set | frozenset) else []
    require(not unknown, f"there is no law {', '.join(unknown)}; known are {', '.join(names)}")
    for law in laws:
        if law.__name__ in skip:
            continue
        try:
            law(*arguments)
        except AssertionError as error:
            raise AssertionError(f"{what} breaks the law '{law.__name__}': {error}") from error
        except Exception as error:
            raise AssertionError(
                f"{what} fails under the law '{law.__name__}': {type(error).__name__}: {error}"
            ) from error


def require_own_name(parts: Parts[Any], name: str, part: object) -> None:
    """A part has a name of its own, which none of Delineate's parts has."""
    require(name, f"the {parts.what} has no name")
    require(
        parts.packaged.get(name) in (None, part),
        f"'{name}' is one of Delineate's own {parts.what} names; choose another",
    )


def survives_writing(spec: Specification) -> None:
    """Fields are plain values: they read back as they were written."""
    back = type(spec).model_validate_json(spec.model_dump_json())
    require(back == spec, f"{spec!r} reads back as {back!r}")
