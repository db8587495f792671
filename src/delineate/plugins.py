"""Parts from other packages, found by entry points or in modules that the user names. Nothing else imports them.

A package offers a network, for example, by an entry point in the group ``delineate.networks`` whose name is the
network's ``kind``. A module is named with ``--plugin``, in the variable ``DELINEATE_PLUGINS`` (separate several with
commas) or with :func:`use`; every part defined in it counts. Neither is looked at until somebody asks for a name that
Delineate itself does not have, or for a list of everything.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distribution, entry_points
from types import ModuleType
from typing import Generic, TypeVar

from delineate.errors import RecipeError

T = TypeVar("T")

VARIABLE = "DELINEATE_PLUGINS"
"""The environment variable that names the user's own modules; processes that training starts inherit it."""

GROUPS = ("networks", "losses", "metrics", "steps", "samplers", "layouts", "formats")
"""The kinds of parts; an entry point's group is ``delineate.`` followed by one of these."""

_requirements: dict[int, tuple[object, str]] = {}  # by id(part); holding the part keeps its id from being reused


class Parts(Mapping[str, T], Generic[T]):
    """The parts of one kind by name: Delineate's own, and those of other packages, which are loaded when asked for.

    ``what`` is the kind in words, for errors. ``name_of`` returns a part's name, or None for an object that is no
    such part. Raises :class:`RecipeError` where a part from another package cannot be loaded.
    """

    def __init__(
        self, group: str, what: str, packaged: Mapping[str, T], name_of: Callable[[object], str | None]
    ) -> None:
        assert group in GROUPS
        self.group, self.what, self.packaged, self.name_of = group, what, dict(packaged), name_of

    def __getitem__(self, name: str) -> T:
        if name in self.packaged:
            return self.packaged[name]
        for module in _modules():
            if (part := self._within(module).get(name)) is not None:
                _requirements[id(part)] = (part, _requirement_of_module(module.__name__))
                return part
        return self._loaded(name, _offered(self.group)[name])

    def __iter__(self) -> Iterator[str]:
        yield from self.packaged
        yield from self.foreign()

    def __len__(self) -> int:
        return len(self.packaged) + len(self.foreign())

    def __contains__(self, name: object) -> bool:
        return name in self.packaged or name in self.foreign()

    # Compared by identity and hashable, since it may be part of an annotation.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def foreign(self) -> tuple[str, ...]:
        """Names of the parts from other packages; none is loaded to find out."""
        found = [name for module in _modules() for name in self._within(module)]
        return tuple(dict.fromkeys([*found, *(name for name in _offered(self.group) if name not in self.packaged)]))

    def usable(self) -> list[T]:
        """The parts from other packages; any that cannot be loaded is left out with a warning."""
        parts = []
        for name in self.foreign():
            try:
                parts.append(self[name])
            except RecipeError as error:
                warnings.warn(error.message, stacklevel=2)
        return parts

    def _within(self, module: ModuleType) -> dict[str, T]:
        parts: dict[str, T] = {}
        for part in tuple(vars(module).values()):
            name = self.name_of(part)
            if name is None or part is self.packaged.get(name):
                continue
            if name in self.packaged:
                raise RecipeError(
                    f"module '{module.__name__}' has a {self.what} '{name}', a name that Delineate itself uses",
                    fix="give it another name",
                )
            parts[name] = part
        return parts

    def _loaded(self, name: str, points: tuple[EntryPoint, ...]) -> T:
        by = [_requirement(point.dist) for point in points]
        if len(points) > 1:
            raise RecipeError(f"{self.what} '{name}' is offered by {' and '.join(by)}", fix="uninstall all but one")
        try:
            part = points[0].load()
        except Exception as error:
            raise RecipeError(
                f"{self.what} '{name}' from {by[0]} cannot be loaded: {type(error).__name__}: {error}",
                fix="install what it needs, or uninstall that package",
            ) from error
        if self.name_of(part) != name:
            raise RecipeError(
                f"{self.what} '{name}' from {by[0]} is {points[0].value}, which is not a {self.what} of that name",
                fix=f"give its entry point the part's own name, {self.name_of(part)!r}",
            )
        _requirements[id(part)] = (part, by[0])
        return part


def use(*modules: str) -> None:
    """Import modules for the parts defined in them, here and in the processes that this one starts.

    Raises :class:`RecipeError` where one cannot be imported.
    """
    named = [name for name in os.environ.get(VARIABLE, "").split(",") if name]
    for module in modules:
        if "," in module or not module:
            raise RecipeError(
                f"plugin '{module}' is not one module", fix="name each separately, such as --plugin my_module"
            )
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ",".join(dict.fromkeys([*named, *modules]))
    try:
        _modules()
    except RecipeError:  # do not try again to import what cannot be imported
        del os.environ[VARIABLE]
        if before is not None:
            os.environ[VARIABLE] = before
        raise


def requirement_of(part: object) -> str | None:
    """What a part from another package needs installed, as ``package==version``; None for Delineate's own.

    For a module that belongs to no package, it is the module's name.
    """
    found = _requirements.get(id(part))
    return None if found is None else found[1]


def missing(requirements: Iterable[str]) -> list[str]:
    """What to do about each requirement whose package is not installed, or whose module is not named."""
    steps = []
    for requirement in requirements:
        name, equals, _ = requirement.partition("==")
        if equals and not _installed(name):
            steps.append(f"pip install '{requirement}'")
        if not equals and name not in {module.__name__ for module in _modules()}:
            steps.append(f"name its module: delineate --plugin {name} …, or {VARIABLE}={name}")
    return steps


def _modules() -> list[ModuleType]:
    """The modules that the user has named, imported."""
    return [_imported(name) for name in os.environ.get(VARIABLE, "").split(",") if name]


def _imported(name: str) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    here = os.getcwd()
    sys.path.append(here)  # last, so that nothing there shadows an installed module
    try:
        return importlib.import_module(name)
    except Exception as error:
        raise RecipeError(
            f"plugin '{name[:100]}' cannot be imported: {type(error).__name__}: {error}",
            fix=("give the name, without .py, of a module that is installed or in this folder"),
        ) from error
    finally:
        sys.path.remove(here)


def _offered(group: str) -> Mapping[str, tuple[EntryPoint, ...]]:
    """A group's entry points by name."""
    return _all_offered(tuple(sys.path)).get(group, {})


@lru_cache(maxsize=4)
def _all_offered(path: tuple[str, ...]) -> dict[str, dict[str, tuple[EntryPoint, ...]]]:
    points = entry_points()
    offered: dict[str, dict[str, tuple[EntryPoint, ...]]] = {}
    for group in GROUPS:
        for point in points.select(group=f"delineate.{group}"):
            of = offered.setdefault(group, {})
            of[point.name] = (*of.get(point.name, ()), point)
    return offered


def _requirement(package: Distribution | None) -> str:
    return "a package without a name" if package is None else f"{package.name}=={package.version}"


def _requirement_of_module(module: str) -> str:
    top = module.partition(".")[0]
    offered = (points for group in GROUPS for points in _offered(group).values())
    by = (point.dist for points in offered for point in points if point.module.partition(".")[0] == top)
    package = next(by, None) or _installed(top)
    return module if package is None else _requirement(package)


def _installed(package: str) -> Distribution | None:
    try:
        return distribution(package)
    except (PackageNotFoundError, ValueError):
        return None
