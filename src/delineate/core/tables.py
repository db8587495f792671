"""Tables for display in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from delineate.core.text import printable


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in HTML; names are shown as text, whatever they contain."""

    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html_text(cell)}</{kind}>" for cell in cells) + "</tr>"

    head, body = line("th", columns), "".join(line("td", row) for row in rows)
    return f"<table><caption>{html_text(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def html_text(text: str) -> str:
    """``text`` escaped so that it is shown as it is, without tags or invisible characters."""
    return escape(printable(text))
