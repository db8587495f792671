"""Text from outside, such as a file name, made safe for a terminal or a spreadsheet."""

from __future__ import annotations

from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""First characters that make a spreadsheet treat a cell as a formula, and the apostrophe that prevents it."""


def printable(text: str) -> str:
    """``text`` with control characters, lone surrogates and other invisible ones spelled out, such as ``\\x1b``.

    A terminal obeys escape sequences that are printed, and a name may contain them. Line breaks are
    spelled out too, since no name has any.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else _spelled(c) for c in text)


def printable_lines(text: str) -> str:
    """``text`` with each line made printable; line breaks stay."""
    return "\n".join(map(printable, text.split("\n")))


def cell(text: str) -> str:
    """``text`` as a spreadsheet cell: printable, and never a formula.

    Text that begins like a formula is prefixed with an apostrophe, which spreadsheets understand as
    "this is text". :func:`from_cell` removes it again.
    """
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def from_cell(text: str) -> str:
    """The printable text that was given to :func:`cell`."""
    return text.removeprefix("'")


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` to end a message with, x being the known name closest to ``name``; empty if none is."""
    import difflib

    lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean '{lower[found[0]]}'?" if found else ""


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
