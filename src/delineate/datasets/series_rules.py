"""Rules that pick series of DICOM studies: by description, protocol, modality, number and folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError

from delineate.errors import RecipeError
from delineate.io.files import parsing, read_text
from delineate.io.settings import MOST_CHARACTERS, parse_yaml
from delineate.specification import Specification, explained

if TYPE_CHECKING:
    from delineate.io.dicom_series import Series

LABEL = "label"
"""The rule in a file that picks the label; every other one picks the channel that it is called after."""

MOST_RULES = 64

_LONGEST_NAME, _MOST_SHOWN = 100, 20
_EXAMPLE = 'T1: {description: "*t1*", modality: MR, number: 3}'
_Pattern = Annotated[str, Field(min_length=1, max_length=256)]


class SeriesRule(Specification):
    """What a series must be like, in all of its fields; those that are not given allow anything.

    ``description``, ``protocol`` and ``folder`` are patterns as in a shell and ignore case. ``folder`` fits the names
    of the innermost folders: ``InPhase``, or ``T2SPIR/*`` for a folder in ``T2SPIR``.
    """

    description: _Pattern = "*"
    protocol: _Pattern = "*"
    modality: Annotated[str, Field(pattern="^[A-Z]{2,16}$")] | None = None
    number: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    folder: _Pattern = "*"

    def fits(self, series: Series) -> bool:
        """Whether a series is like this; its UID counts as a description."""
        return (
            (series.uid == self.description or _like(series.description, self.description))
            and _like(series.protocol, self.protocol)
            and self.modality in (None, series.modality)
            and self.number in (None, series.number)
            and self.fits_folder(series.instances[0].folder)
        )

    def fits_folder(self, folder: str | Path) -> bool:
        """Whether a folder is where the rule says, whatever lies in it."""
        parts, patterns = PurePath(folder).parts, PurePath(self.folder).parts
        pairs = zip_longest(reversed(parts), reversed(patterns), fillvalue="")
        return all(_like(part, pattern) for part, pattern in list(pairs)[: len(patterns)])

    @property
    def only_folder(self) -> bool:
        """Whether anything in the right folder fits, DICOM or not."""
        return self == SeriesRule(folder=self.folder)

    def __str__(self) -> str:
        told = self.model_dump(exclude_defaults=True)
        return ", ".join(f"{name} {value}" for name, value in told.items()) or "anything"


Rule = str | SeriesRule | Mapping[str, Any]
"""A pattern for a description, or a :class:`SeriesRule`, or its fields."""

Images = str | Mapping[str, Rule]
"""A rule for each channel, or a pattern for the only one."""


@dataclass(frozen=True)
class Rules:
    """The rule for each channel, and the one for the label, if there is one."""

    images: Mapping[str, SeriesRule]
    label: SeriesRule | None = None


def rule_of(rule: Rule, name: str) -> SeriesRule:
    """The rule that a pattern, or a rule's fields, stand for; ``name`` is what it picks.

    Raises :class:`RecipeError`.
    """
    return rules_of({name: rule})[name]


def rules_of(rules: Mapping[str, Any], where: str = "") -> dict[str, SeriesRule]:
    """As :func:`rule_of`, for several by name. The :class:`RecipeError` lists every wrong field."""
    made, wrong = {}, []
    for name, rule in rules.items():
        if not isinstance(name, str) or not 0 < len(name) <= _LONGEST_NAME:
            wrong.append(f"  {str(name)[:_LONGEST_NAME] or 'nothing'}: not a name of {_LONGEST_NAME} letters at most")
            continue
        if isinstance(rule, SeriesRule):
            made[name] = rule
            continue
        try:
            made[name] = SeriesRule.model_validate({"description": rule} if isinstance(rule, str) else rule)
        except ValidationError as error:
            lines = explained(error, SeriesRule).splitlines()
            wrong += [f"  {name}.{line.strip()}".replace(".: ", ": ", 1) for line in lines]
    if wrong:
        raise RecipeError(f"rules for series{where} are not valid:\n" + "\n".join(wrong[:_MOST_SHOWN]))
    return made


def read_rules(path: Path) -> Rules:
    """The rules in a YAML file: ``T1: {description: "*t1*", number: 3}``, or ``T1: "*t1*"`` for its description alone.

    Raises :class:`RecipeError`.
    """
    with parsing(path, RecipeError, fix="give a YAML file of rules"):
        values = parse_yaml(read_text(path, 4 * MOST_CHARACTERS), str(path), RecipeError)
    if not isinstance(values, dict) or not values.keys() - {LABEL}:
        raise RecipeError(f"'{path}' has no rule that picks a channel", fix=f"write, for example, {_EXAMPLE}")
    if len(values) > MOST_RULES:
        raise RecipeError(f"'{path}' has {len(values)} rules", fix=f"write {MOST_RULES} at most")
    rules = rules_of(values, f" in '{path}'")
    label = rules.pop(LABEL, None)
    return Rules(rules, label)


def _like(text: str, pattern: str) -> bool:
    return fnmatch(text.lower(), pattern.lower())
