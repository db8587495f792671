"""Models of other packages: bundles that a package holds as data, found by its entry points. No code of it runs.

A package offers a bundle by an entry point in the group ``delineate.models``. Its name is the model's, its value the
bundle's folder, with dots between the names of folders. It is never imported::

    [project.entry-points."delineate.models"]
    hippocampus = "delineate_hippocampus"
"""

from __future__ import annotations

import os
import re
import sys
from collections import defaultdict
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path

from delineate.errors import BundleError

GROUP = "delineate.models"
_MANIFEST = "bundle.json"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_FOLDER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*")


@dataclass(frozen=True)
class Installed:
    """A model that a package offers. ``site`` is where the package is installed, ``place`` the folder within it.

    ``licence`` is what the package's metadata state, an SPDX expression where they are well kept; it may be empty.
    """

    name: str
    package: str
    version: str
    licence: str
    place: str
    site: Path

    @property
    def folder(self) -> Path:
        """The bundle's folder. Raises :class:`BundleError` where the package has none."""
        if not _FOLDER.fullmatch(self.place):
            raise BundleError(
                f"model '{self.name}' of {self.package} is '{self.place[:100]}', which names no folder of a package",
                fix=f"ask whoever made {self.package}: the entry point's value is its folder, such as my_model.bundle",
            )
        # An editable installation has its files elsewhere, in a folder that Python searches.
        for place in dict.fromkeys([self.site, *(Path(entry) for entry in sys.path if entry)]):
            folder = place.joinpath(*self.place.split("."))
            if (folder / _MANIFEST).is_file():
                return folder.absolute()
        raise BundleError(
            f"model '{self.name}' of {self.package} {self.version} is not there: the package has no bundle in "
            f"{self.place.replace('.', '/')}",
            fix=f"uninstall {self.package}, and install it again from where it came",
        )


def installed_models() -> dict[str, tuple[Installed, ...]]:
    """The models that installed packages offer, by name in alphabetical order; more than one where packages clash."""
    found: dict[str, list[Installed]] = defaultdict(list)
    for point in entry_points(group=GROUP):
        package = point.dist
        if package is None or not _NAME.fullmatch(point.name):
            continue
        stated = [package.metadata[field] for field in ("License-Expression", "License") if field in package.metadata]
        licence = stated[0].partition("\n")[0] if stated else ""
        site = Path(str(package.locate_file("")))
        found[point.name].append(Installed(point.name, package.name, package.version, licence, point.value, site))
    return {name: tuple(sorted(found[name], key=lambda one: one.package)) for name in sorted(found)}


def resolved(path: Path) -> Path:
    """``path`` if there is such a file or folder; else the folder of the installed model of that name, if there is one.

    Raises :class:`BundleError` for a name that several packages offer, or whose package has no bundle.
    """
    name = os.fspath(path)
    if not _NAME.fullmatch(name) or os.path.lexists(path):
        return path
    offered = installed_models().get(name, ())
    if len(offered) > 1:
        by = " and ".join(f"{one.package} {one.version}" for one in offered)
        raise BundleError(f"model '{name}' is offered by {by}", fix="uninstall all but one")
    return offered[0].folder if offered else path


def name_of(folder: Path) -> str | None:
    """The name of the installed model whose folder this is; None for any other folder."""
    for name, offered in installed_models().items():
        for one in offered:
            with suppress(BundleError, OSError):
                if os.path.samefile(one.folder, folder):
                    return name
    return None


def named_models() -> str:
    """Which models are installed, for an error that says what could be named instead."""
    names = ", ".join(installed_models())
    return f"installed models: {names}" if names else "no model is installed"
