"""Subjects and the channels that are asked of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from delineate.core.subject import Subject
from delineate.errors import MissingFile


def test_channels_that_have_only_numbers_are_taken_in_order() -> None:
    numbered = Subject("a", {"channel_0": Path("a_0000.nii"), "channel_1": Path("a_0001.nii")})
    chosen = numbered.with_channels(("T1", "FLAIR"))
    assert chosen.scans == {"T1": Path("a_0000.nii"), "FLAIR": Path("a_0001.nii")}
    with pytest.raises(MissingFile, match="lacks"):
        numbered.with_channels(("T1", "FLAIR", "T2"))


def test_channels_that_have_names_are_taken_by_these() -> None:
    named = Subject("a", {"T1": Path("t1.nii"), "FLAIR": Path("flair.nii")})
    assert list(named.with_channels(("FLAIR", "T1")).scans.values()) == [Path("flair.nii"), Path("t1.nii")]
    with pytest.raises(MissingFile, match=r"lacks \['T2'\]"):
        named.with_channels(("T1", "T2"))
