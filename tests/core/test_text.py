"""Text from outside can neither steer a terminal nor become a formula, and comes back from a table as it was."""

from hypothesis import given
from hypothesis import strategies as st

from delineate.core.text import cell, from_cell, printable

ANY = st.text(st.characters())  # surrogates included


@given(ANY)
def test_printable_text_is_printable_and_encodes(text):
    made = printable(text)
    assert made.isprintable()
    made.encode("utf-8")


@given(st.text(st.characters(categories=["L", "N", "P", "S"])))
def test_what_was_printable_stays_as_it_was(text):
    assert printable(text) == text


@given(ANY)
def test_no_cell_is_a_formula(text):
    assert not cell(text).startswith(("=", "+", "-", "@", "\t", "\r"))


@given(ANY)
def test_a_cell_gives_its_text_back(text):
    assert from_cell(cell(text)) == printable(text)


def test_escape_sequences_are_spelled_out():
    assert printable("a\x1b[31mred\n") == "a\\x1b[31mred\\n"
    assert cell("=cmd|' /C calc'!A0") == "'=cmd|' /C calc'!A0"
