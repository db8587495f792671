"""Options that need more than a type: targets, and a data set with its targets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from delineate.core.targets import Targets
from delineate.errors import RecipeError

if TYPE_CHECKING:
    from delineate.datasets.dataset import Dataset


def parse_targets(text: str | None) -> Targets | None:
    """``liver=1,tumour=2`` or, overlapping, ``whole=1+2+4,core=1+4``.

    Raises :class:`RecipeError` that shows the form.
    """
    if not text:
        return None
    values: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, equals, numbers = part.partition("=")
        if not equals or not all(n.strip().isdecimal() for n in numbers.split("+")):
            raise RecipeError(f"'{part}' is not name=value; write for example --targets 'liver=1,tumour=2'")
        values[name.strip()] = tuple(int(n) for n in numbers.split("+"))
    used = [v for numbers in values.values() for v in numbers]
    return Targets(values, "exclusive" if len(set(used)) == len(used) else "overlapping")


def opened(path: Path, layout: str, images: str | None, labels: str | None, targets: str | None = None) -> Dataset:
    """The data set at ``path``."""
    from delineate.datasets.layouts import open_dataset

    return open_dataset(path, layout=layout, images=images, labels=labels, targets=parse_targets(targets))
