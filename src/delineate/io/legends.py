"""Names and colours of targets in the files of the programs that show labels."""

from __future__ import annotations

from pathlib import Path

from delineate.core.legend import Legend
from delineate.core.targets import Targets
from delineate.errors import OutputError
from delineate.io.files import writing_beside

ITK_SNAP = "targets.itksnap.txt"
SLICER = "targets.ctbl"
_FIRST_LINE = "# Targets and colours, written by Delineate"


def write_legends(folder: Path, targets: Targets, legend: Legend) -> list[Path]:
    """Write the files that ITK-SNAP (*Segmentation, Import Label Descriptions*) and 3D Slicer (*Colors*) read.

    A value that belongs to several targets is shown as the innermost of them, which lies on top.
    Raises :class:`OutputError` instead of overwriting a file of somebody else's.
    """
    written = {folder / ITK_SNAP: _itk_snap(targets, legend), folder / SLICER: _slicer(targets, legend)}
    for path in written:
        if path.exists() and not path.read_bytes().startswith(_FIRST_LINE.encode()):
            raise OutputError(f"'{path}' exists and is not ours", fix="move it away, or choose another folder")
    for path, text in written.items():
        with writing_beside(path) as beside:
            beside.write_text(text, encoding="utf-8")
    return [*written]


def rows(targets: Targets, legend: Legend) -> list[tuple[int, str, tuple[int, int, int]]]:
    """Value, name in one line, and colour; of every value that a label may hold."""
    colours = legend.colours_of(targets.names)
    by_value = {value: name for name in targets.outer_first for value in targets.values[name]}
    return [(value, " ".join(name.split()), colours[name]) for value, name in sorted(by_value.items())]


def _itk_snap(targets: Targets, legend: Legend) -> str:
    lines = [_FIRST_LINE, "# ITK-SnAP Label Description File", '    0     0    0    0        0  0  0    "Clear Label"']
    for value, name, (red, green, blue) in rows(targets, legend):
        quoted = name.replace('"', "'")
        lines.append(f'{value:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"')
    return "\n".join(lines) + "\n"


def _slicer(targets: Targets, legend: Legend) -> str:
    lines = [_FIRST_LINE, "0 background 0 0 0 0"]
    for value, name, (red, green, blue) in rows(targets, legend):
        lines.append(f"{value} {name.replace(' ', '_')} {red} {green} {blue} 255")
    return "\n".join(lines) + "\n"
