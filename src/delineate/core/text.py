"""Text that came from outside, such as a file's name, on its way to a terminal or a spreadsheet."""

from __future__ import annotations

from collections.abc import Iterable

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "'")
"""First characters that make a spreadsheet take a cell for a formula, and the mark that prevents it."""


def printable(text: str) -> str:
    """``text`` with control characters, lone surrogates and other invisible ones spelled out, such as ``\\x1b``.

    A terminal runs escape sequences that are printed, and a name may hold them. Line breaks are
    spelled out, too: a name has none.
    """
    return "".join(c if c.isprintable() else _spelled(c) for c in text)


def printable_lines(text: str) -> str:
    """Every line of ``text`` printable; where lines end is kept."""
    return "\n".join(map(printable, text.split("\n")))


def cell(text: str) -> str:
    """``text`` as a spreadsheet's cell: printable, and no formula whatever it begins with.

    What begins like a formula gets an apostrophe before it, which spreadsheets take for "this is
    text". :func:`from_cell` takes it off again.
    """
    text = printable(text)
    return f"'{text}" if text.startswith(_FORMULA) else text


def from_cell(text: str) -> str:
    """The printable text that :func:`cell` was given."""
    return text.removeprefix("'")


def near(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?`` to end a message with: the known name most like ``name``. Empty where none is."""
    import difflib

    lower = {one.lower(): one for one in known}
    found = difflib.get_close_matches(name.lower(), lower, n=1)
    return f"; did you mean '{lower[found[0]]}'?" if found else ""


def _spelled(character: str) -> str:
    return character.encode("unicode_escape", "surrogatepass").decode("ascii")
