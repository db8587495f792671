"""The page of a bundle's model card: the Markdown of the card, as far as cards use it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, Final

from delineate.bundle import Bundle
from delineate.errors import BundleError
from delineate.evaluation.card import BEGIN, END, card_of
from delineate.reporting.html import CardReport, write_report

CARD_PAGE: Final = "card.html"


def card_beside(folder: Path, bundle: Bundle) -> tuple[str, list[str]]:
    """Write the card's page into a run's folder; return its name, or a sentence that says why it cannot be shown."""
    try:
        write_card_page(folder / CARD_PAGE, bundle)
    except BundleError as error:
        return "", [f"The bundle's card cannot be shown: {error}."]
    return CARD_PAGE, []


def write_card_page(path: Path, bundle: Bundle) -> None:
    """Write the page of a bundle's card to ``path``. Raises :class:`BundleError` if ``card.md`` cannot be read."""
    blocks = list(blocks_of(card_of(bundle)))
    write_report(
        path,
        CardReport(
            title=bundle.recipe.name,
            description=bundle.recipe.description,
            simulated=bundle.provenance.simulated,
            blocks=blocks,
        ),
    )


def blocks_of(text: str) -> Iterator[tuple[str, Any]]:
    """The headings, tables, lists and paragraphs of a card; anything else in Markdown or HTML stays text.

    A table without headings is ``facts``: pairs of a name and a value. The card's own title, of the highest level, and
    the markers around its facts are left out.
    """
    lines = [line.strip() for line in text.splitlines()]
    for kind, group in groupby((line for line in lines if line not in (BEGIN, END)), key=_kind):
        found = list(group)
        if kind == "table":
            yield _table([_cells(line) for line in found])
        elif kind == "list":
            yield kind, [_plain(re.sub(r"^([-*+]|[0-9]+\.) +", "", line)) for line in found]
        elif kind in ("heading", "subheading"):
            yield from ((kind, _plain(line.lstrip("#"))) for line in found)
        elif kind == "paragraph":
            yield kind, _plain(" ".join(found))


def _kind(line: str) -> str:
    if not line or re.match(r"# ", line):
        return "nothing"
    if line.startswith("## "):
        return "heading"
    if re.match(r"#{3,6} ", line):
        return "subheading"
    if re.match(r"([-*+]|[0-9]+\.) ", line):
        return "list"
    return "table" if line.startswith("|") else "paragraph"


def _table(rows: Sequence[Sequence[str]]) -> tuple[str, Any]:
    shown = [row for row in rows if not all(re.fullmatch(":?-+:?", cell) for cell in row)]
    if shown and not any(shown[0]) and all(len(row) == 2 for row in shown):
        return "facts", shown[1:]
    return "table", shown


def _cells(line: str) -> list[str]:
    return [_plain(cell) for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


def _plain(text: str) -> str:
    """Text without the backslashes of :func:`~delineate.evaluation.card.escaped`, and without code marks."""
    return re.sub(r"\\([\\`*\[\]<>|])|`", lambda m: m[1] or "", text.strip())
