"""The formats that results come in, each called by its suffix: the one list of them. Needs nothing but Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Literal, get_args

OutputFormat = Literal[
    "nii.gz", "mha", "nrrd", "seg.nrrd", "vtk", "vti", "dcm", "sr.dcm", "rtstruct.dcm",
    "stl.zip", "obj.zip", "vtp.zip", "glb", "png", "json",
]  # fmt: skip
"""What ``delineate predict`` writes. Surfaces of a file for each target come as a zip: all of a format is one file."""

OUTPUTS: tuple[OutputFormat, ...] = get_args(OutputFormat)

COMPANIONS: Mapping[str, tuple[str, ...]] = {"vtk": ("nii.gz",), "dcm": ("sr.dcm",), "sr.dcm": ("dcm",)}
"""Formats that never come alone: a .vtk has no directions, and a report refers to its segmentation, which has one."""

SUFFIXES = tuple(f".{format}" for format in sorted(OUTPUTS, key=len, reverse=True))
"""Suffixes of results. The first that a name ends in counts."""


def written(asked: Iterable[str]) -> list[str]:
    """The formats that are written when some are asked for: those, a .json, and what comes along."""
    found = dict.fromkeys([*asked, "json"])
    return list(found | dict.fromkeys(other for format in found for other in COMPANIONS.get(format, ())))


def suffix_of(path: PurePath) -> str:
    """The suffix of a result; empty for a name of no known format."""
    return next((one for one in SUFFIXES if path.name.lower().endswith(one)), "")
