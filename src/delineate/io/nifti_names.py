"""Names and colours of targets inside a NIfTI label: the header extension that TotalSegmentator writes and reads.

It is the XML of Caret, Connectome Workbench's ancestor: a table with the key, colour and name of each label value.
"""

from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree
from xml.sax.saxutils import escape

from delineate.core.legend import Legend
from delineate.core.targets import Targets
from delineate.core.text import printable
from delineate.errors import RecipeError, ScanError
from delineate.io.legends import rows
from delineate.io.nifti import extensions_of

CODE = 0
"""TotalSegmentator's. 30 is registered for this XML, but nibabel refuses to give out what it finds there."""

_READ = {CODE, 30}
_MOST_BYTES = 2**20
_TARGET = "delineate.target"
"""Targets that share label values, as ``1,2 liver``: a table with one name for each value cannot say it."""


def names_and_colours(targets: Targets, legend: Legend) -> bytes:
    """The extension's content. A value that belongs to several targets has the name of the innermost."""
    labels = []
    for value, name, colour in rows(targets, legend):
        red, green, blue = (f"{part / 255:.6g}" for part in colour)
        labels.append(
            f'<Label Key="{value}" Red="{red}" Green="{green}" Blue="{blue}" Alpha="1">{escape(name)}</Label>\n'
        )
    shared = ""
    if not targets.exclusive:
        for name, values in targets.values.items():
            told = escape(f"{','.join(map(str, values))} {name}")
            shared += f"<MD><Name>{_TARGET}</Name><Value>{told}</Value></MD>\n"
        shared = f"<MetaData>\n{shared}</MetaData>\n"
    # Without the date that others write: the same label gives the same bytes.
    text = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<CaretExtension>\n<VolumeInformation Index="0">\n'
        f"<LabelTable>\n{''.join(labels)}</LabelTable>\n{shared}<StudyMetaDataLinkSet></StudyMetaDataLinkSet>\n"
        "<VolumeType>Label</VolumeType>\n</VolumeInformation>\n</CaretExtension>\n"
    )
    return text.encode()


def targets_named_in(path: Path) -> Targets | None:
    """The targets that a NIfTI label's header names; None if it names none, or not in a way that can be understood.

    Only the header is read.
    """
    try:
        found = [content for code, content in extensions_of(path, _MOST_BYTES) if code in _READ]
    except (ScanError, OSError):  # reading the label will say what is wrong
        return None
    for content in found:
        try:
            return _targets(content.rstrip(b"\0 \n").decode())
        except (ElementTree.ParseError, RecipeError, ValueError):
            continue
    return None


def _targets(text: str) -> Targets:
    """Raise :class:`ValueError` or :class:`RecipeError` for anything but a table of labels."""
    if "<!DOCTYPE" in text:  # only there can entities be defined, which may grow without limit
        raise ValueError("no document type is needed")
    root = ElementTree.fromstring(text)
    if root.tag != "CaretExtension":
        raise ValueError("another document")
    named: dict[str, tuple[int, ...]] = {}
    for entry in root.iterfind("VolumeInformation/MetaData/MD"):
        if entry.findtext("Name") == _TARGET:
            values, _, name = (entry.findtext("Value") or "").partition(" ")
            named[name] = tuple(map(int, values.split(",")))
    if named:
        return Targets(named, "overlapping")
    for label in root.iterfind("VolumeInformation/LabelTable/Label"):
        value, name = int(label.get("Key", "")), printable((label.text or "").strip())
        if value != 0 and name:
            named[name] = (*named.get(name, ()), value)
    return Targets(named)
