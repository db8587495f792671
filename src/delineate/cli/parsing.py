"""Options that need more than a type: targets, and patterns for a data set's files."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.metrics.quantities import QuantityMap

if TYPE_CHECKING:
    from delineate.datasets.series_rules import Images, Rule


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


def parse_reading(
    images: str | Sequence[str] | None, labels: str | None, rules: Path | None
) -> tuple[Images | None, Rule | None]:
    """The rules or patterns for channels, and those for labels, that the options ask for.

    Raises :class:`RecipeError`, and a usage error for rules and patterns together.
    """
    if rules is None:
        return parse_patterns([images] if isinstance(images, str) else images), None if labels is None else _rule(
            labels
        )
    if images or labels:
        raise typer.BadParameter("--rules picks images and labels; leave out --images and --labels")
    from delineate.datasets.series_rules import read_rules

    read = read_rules(rules)
    return read.images, read.label


def parse_patterns(texts: Sequence[str] | None) -> Images | None:
    """Patterns from ``*/artery.nii``, or from ``T1=*/t1.nii`` and others; or rules, ``T1={number: 3}``.

    Raises :class:`RecipeError` for a mixture.
    """
    if not texts:
        return None
    if len(texts) == 1 and "=" not in texts[0]:
        found = _rule(texts[0])
        return found if isinstance(found, str) else {"image": found}
    if bad := [text for text in texts if "=" not in text]:
        raise RecipeError(f"'{bad[0]}' does not name its channel", fix="write, for example, --images T1='*/t1.nii'")
    pairs = [(name, pattern) for name, _, pattern in (text.partition("=") for text in texts)]
    if len(dict(pairs)) < len(pairs) or not all(name and pattern for name, pattern in pairs):
        raise RecipeError(f"{', '.join(texts)[:300]} gives a channel twice, or none", fix="name each channel once")
    return {name: _rule(pattern) for name, pattern in pairs}


def _rule(text: str) -> Rule:
    """A pattern, or the rule that is written in braces."""
    if not re.fullmatch(r"\{.*:.*\}", text, re.DOTALL):  # unlike {target}
        return text
    from delineate.datasets.series_rules import rule_of
    from delineate.io.settings import parse_yaml

    return rule_of(parse_yaml(text, text[:100], RecipeError), "a series")


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


def data_changes(
    layout: str, images: str | None, labels: str | None, targets: str | None, rules: Path | None = None
) -> list[str]:
    """The options as changes to a recipe's ``data``, so that the recipe alone reproduces the run."""
    from delineate.recipe import change_of  # imports torch

    asked = parse_targets(targets)
    channels, label = parse_reading(images, labels, rules)
    values = {
        "layout": None if layout == "auto" else layout,
        "images": {name: _plain(rule) for name, rule in channels.items()}
        if isinstance(channels, Mapping)
        else channels,
        "labels": _plain(label),
        "targets": None if asked is None else asked.as_dict(),
    }
    return [change_of(f"data.{name}", value) for name, value in values.items() if value is not None]


def _plain(rule: Rule | None) -> Any:
    """A pattern, or a rule's fields."""
    from delineate.datasets.series_rules import SeriesRule

    return rule.model_dump(exclude_defaults=True) if isinstance(rule, SeriesRule) else rule


_UNITS = {"MB": 1e-3, "GB": 1.0, "TB": 1e3, "MIB": 2**20 / 1e9, "GIB": 2**30 / 1e9}


def gigabytes(text: str | None) -> float | None:
    """8 from ``8GB``."""
    if text is None:
        return None
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?) *([A-Za-z]{2,3})", text.strip())
    if match is None or match[2].upper() not in _UNITS or not float(match[1]):
        raise typer.BadParameter(f"--memory takes a size such as 8GB or 512MB, not '{text[:40]}'")
    return float(match[1]) * _UNITS[match[2].upper()]
