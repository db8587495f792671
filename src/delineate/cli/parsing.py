"""Options that need more than a type: targets, and patterns for a data set's files."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import typer

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.metrics.quantities import QuantityMap


def parse_targets(text: str | None) -> Targets | None:
    """Targets from ``liver=1,tumour=2`` or, overlapping, ``whole=1+2+4,core=1+4``.

    Raises a :class:`RecipeError` that shows the form.
    """
    if not text:
        return None
    values: dict[str, tuple[int, ...]] = {}
    for part in text.split(","):
        name, equals, numbers = part.partition("=")
        name = name.strip()
        # More digits than any label value has.
        if not (name and equals) or not all(re.fullmatch("[0-9]{1,9}", n.strip()) for n in numbers.split("+")):
            raise RecipeError(
                f"'{part[:100]}' is not name=value", fix="write, for example, --targets 'liver=1,tumour=2'"
            )
        if name in values:
            raise RecipeError(f"target '{name}' is given twice", fix=f"join its values: {name}=1+2")
        values[name] = tuple(int(n.strip()) for n in numbers.split("+"))
    used = [v for numbers in values.values() for v in numbers]
    return Targets(values, "exclusive" if len(set(used)) == len(used) else "overlapping")


def parse_patterns(texts: Sequence[str] | None) -> str | dict[str, str] | None:
    """Patterns from ``*/artery.nii``, or from ``T1=*/t1.nii`` and others. Raises :class:`RecipeError` for a mixture."""
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        return texts[0]
    if bad := [text for text in texts if "=" not in text]:
        raise RecipeError(f"'{bad[0]}' does not name its channel", fix="write, for example, --images T1='*/t1.nii'")
    pairs = [(name, pattern) for name, _, pattern in (text.partition("=") for text in texts)]
    if len(dict(pairs)) < len(pairs) or not all(name and pattern for name, pattern in pairs):
        raise RecipeError(f"{', '.join(texts)[:300]} gives a channel twice, or none", fix="name each channel once")
    return dict(pairs)


def parse_quantity(text: str | None, margin_mm: float, threshold: float | None) -> QuantityMap | None:
    """``fat_fraction``, or ``fat_fraction=maps`` if its maps are in that folder. Raises :class:`RecipeError`."""
    if text is None:
        if threshold is not None or margin_mm:
            raise typer.BadParameter("--margin-mm and --threshold need a quantity; name its channel with --quantity")
        return None
    channel, equals, maps = text.partition("=")
    if not channel or (equals and not maps):
        raise RecipeError(f"'{text[:100]}' does not name a channel", fix="write --quantity fat_fraction, or =FOLDER")
    return QuantityMap(channel, margin_mm, threshold, Path(maps) if maps else None)


def data_changes(layout: str, images: str | None, labels: str | None, targets: str | None) -> list[str]:
    """The options as changes to a recipe's ``data``, so that the recipe alone reproduces the run."""
    asked = parse_targets(targets)
    values = {
        "layout": None if layout == "auto" else layout,
        "images": images,
        "labels": labels,
        "targets": None if asked is None else asked.as_dict(),
    }
    # JSON is valid YAML, and quotes everything that needs quoting.
    return [f"data.{name}={json.dumps(value)}" for name, value in values.items() if value is not None]
