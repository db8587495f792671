"""Tables as a notebook shows them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from delineate.core.text import printable


def html_table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in HTML; whatever a name holds, it is shown as text."""

    def line(kind: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{kind}>{html_text(cell)}</{kind}>" for cell in cells) + "</tr>"

    head, body = line("th", columns), "".join(line("td", row) for row in rows)
    return f"<table><caption>{html_text(caption)}</caption><thead>{head}</thead><tbody>{body}</tbody></table>"


def html_text(text: str) -> str:
    """``text`` to be shown as it is: neither a tag nor an invisible character."""
    return escape(printable(text))
