"""Examining one subject: what its files hold, and everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from delineate.core.grid import Grid, Shape3, box_around
from delineate.core.subject import Subject, files_of
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import (
    SAME_GRID_MM,
    NonFinite,
    Orientation,
    channels_in,
    check_channels,
    check_grids,
    is_line,
    read_numbered,
)
from delineate.datasets.measuring import (
    Foreground,
    Intensity,
    Piece,
    count_values,
    find_foreground,
    in_grey,
    label_hash,
    largest_pieces,
    measure_intensity,
    scan_hash,
)
from delineate.datasets.mirroring import suspicion
from delineate.errors import BadVoxels, DelineateError
from delineate.io.formats import read_volume

LEAST_ON_IMAGE = 0.5
"""Fraction of a label that should lie where the image shows something."""

Severity = Literal["error", "warning"]
_LEAVE_OUT = "fix it, or leave the subject out"


@dataclass(frozen=True)
class Problem:
    """A problem: ``subject`` is "" if it concerns the whole data set; ``fix`` says what to do."""

    code: str
    severity: Severity
    subject: str
    message: str
    fix: str


@dataclass(frozen=True)
class SubjectRow:
    """What one readable subject holds; axes are the file's own.

    ``foreground_shape`` is the shape of the box around voxels above the background in any channel,
    ``label_box_shape`` that of the box around the targets, (0, 0, 0) if there are none. ``hashes`` are
    BLAKE2b hashes of the files' bytes, by channel and "label"; masks have one for all that are
    read. ``largest_pieces`` are those of known targets that the label has. ``acquisition`` is how it was scanned.
    """

    subject: str
    site: str
    patient: str
    shape: Shape3
    spacing_mm: tuple[float, float, float]
    orientation: str
    channels: tuple[str, ...]
    dtype: str
    intensities: Mapping[str, Intensity]
    foreground_shape: Shape3
    label_voxels: Mapping[int, int]
    volume_ml: Mapping[str, float]
    label_box_shape: Shape3
    hashes: Mapping[str, str]
    largest_pieces: Mapping[str, Piece] = field(default_factory=dict)
    acquisition: Mapping[str, str] = field(default_factory=dict)

    @property
    def scanned_with(self) -> str:
        """How it was scanned, as text."""
        return ", ".join(f"{name} {value}" for name, value in self.acquisition.items())


@dataclass(frozen=True)
class Rules:
    """The rules that every subject is checked against."""

    channels: Sequence[str]
    targets: Targets | None
    for_training: bool
    nan: NonFinite
    orientation: Orientation


@dataclass
class Examination:
    """One subject, as far as it can be read: each problem is noted, and the examination continues."""

    subject: Subject
    rules: Rules
    problems: list[Problem] = field(default_factory=list)
    grid: Grid | None = None
    grid_of: str = ""
    dtypes: set[str] = field(default_factory=set)
    intensities: dict[str, Intensity] = field(default_factory=dict)
    foreground: Foreground | None = None
    # Each channel in 256 grey levels, until the label has been compared with them.
    grey: list[NDArray[np.uint8]] = field(default_factory=list)
    label_voxels: dict[int, int] = field(default_factory=dict)
    label_box: Shape3 = (0, 0, 0)
    largest_pieces: dict[str, Piece] = field(default_factory=dict)
    hashes: dict[str, str] = field(default_factory=dict)

    def run(self) -> None:
        if missing := [channel for channel in self.rules.channels if channel not in self.subject.scans]:
            self.note("E_MISSING", f"channel {', '.join(missing)} is missing", "add it, or leave the subject out")
        for path in dict.fromkeys(self.subject.scans.values()):
            self.guarded(
                partial(self.examine_scan, path), [path], f"channel {', '.join(channels_in(self.subject, path))}"
            )
        self.check_constant()
        if self.subject.label is not None:
            targets = self.rules.targets
            files = files_of(self.subject.label, targets.names if targets else None)
            self.guarded(partial(self.examine_label, files), [*files.values()], "the label")
        elif self.rules.for_training:
            self.note("E_MISSING", "the label is missing", "add it, or leave the subject out")

    def note(self, code: str, message: str, fix: str, severity: Severity = "error") -> None:
        self.problems.append(Problem(code, severity, self.subject.id, message, fix))

    def guarded(self, examine: Callable[[], None], files: Sequence[Path], what: str) -> None:
        """Examine files and note any failure, so that the other files are examined too."""
        if lost := [path for path in files if not path.exists()]:
            self.note("E_MISSING", f"{what} is missing: no '{lost[0]}'", "restore it, or leave the subject out")
            return
        try:
            examine()
        except DelineateError as error:
            self.note_error(error)
        except Exception as error:
            shown = f"'{files[0]}'" if len(files) == 1 else what
            self.note("E_SCAN", f"{shown} cannot be read: {error!r}", _LEAVE_OUT)

    def note_error(self, error: DelineateError, severity: Severity = "error") -> None:
        self.note(error.code, error.message, error.fix or _LEAVE_OUT, severity)

    def examine_scan(self, path: Path) -> None:
        names = channels_in(self.subject, path)
        volume = self.read(path)
        taken = [name for name in names if name in self.subject.scans]
        self.hashes |= dict.fromkeys(taken, scan_hash(path))
        self.dtypes.add(str(volume.voxels.dtype))
        check_channels(self.subject, path, volume.channels)
        voxels = {name: volume.voxels[names.index(name)] for name in taken}
        self.intensities |= {name: measure_intensity(voxels[name]) for name in taken}
        if self.grid is None:
            self.grid, self.grid_of = volume.grid, f"'{path.name}'"
        elif self.subject.resample and not volume.grid.matches(self.grid, SAME_GRID_MM):
            return  # to be resampled to the first one's grid; comparing it with the label there would take memory
        check_grids(self.subject.id, f"'{path.name}'", volume.grid, self.grid_of, self.grid)
        for name in taken:
            if self.subject.label is not None:
                self.grey.append(in_grey(voxels[name], self.intensities[name]))
            found = find_foreground(voxels[name], self.intensities[name])
            self.foreground = self.foreground | found if self.foreground else found

    def read(self, path: Path) -> Volume:
        """The scan; voxels that are not finite are noted, and filled so that the scan can be measured."""
        try:
            return read_volume(path, orientation=self.rules.orientation)
        except BadVoxels as error:
            self.note_error(error, "warning" if self.rules.nan == "fill" else "error")
            return read_volume(path, orientation=self.rules.orientation, nan="fill")

    def check_constant(self) -> None:
        constant = [name for name, intensity in self.intensities.items() if intensity.constant]
        if self.grid is not None and is_line(self.grid) and len(constant) < len(self.intensities):
            self.note("E_SHAPE", "the scan is a line of voxels, not an image", "export the whole scan")
        if not constant:
            return
        message = f"channel {', '.join(constant)} has the same value everywhere"
        if len(constant) < len(self.intensities):
            self.note("W_CONSTANT", message, "check that the channel is not a placeholder", "warning")
        else:
            self.note("E_CONSTANT", message, "export the scan again, or leave the subject out")

    def examine_label(self, files: Mapping[str, Path]) -> None:
        assert self.subject.label is not None
        targets, orientation = self.rules.targets, self.rules.orientation
        label = read_numbered(self.subject.label, targets, self.subject.id, self.grid, orientation=orientation)
        self.hashes["label"] = label_hash(files)
        if self.grid is not None:
            self.check_mirrored(label)
            check_grids(self.subject.id, "label", label.grid, "image", self.grid)
        self.label_voxels = count_values(label.voxels)
        unknown = {v: n for v, n in self.label_voxels.items() if targets and v not in targets.known_values}
        if targets and unknown:
            found = ", ".join(f"{value} ({n} voxels)" for value, n in unknown.items())
            known = ", ".join(map(str, sorted(targets.known_values)))
            message = f"the label has values that no target includes: {found}; known values are {known}"
            self.note("E_LABEL_VALUE", message, "add them to a target or to 'ignore'")
        wanted = {v for v in self.label_voxels if v != 0 and not (targets and v in targets.ignore)}
        if not wanted:
            self.note("W_EMPTY_LABEL", "the label marks nothing", "check that this is right", "warning")
            return
        marked = np.isin(label.voxels, list(wanted))
        box = box_around(marked)
        assert box is not None
        x, y, z = label.voxels[box].shape
        self.label_box = x, y, z
        self.largest_pieces = largest_pieces(label.voxels[box], targets) if targets else {}
        share = self.foreground.share_of(marked) if self.foreground else 1.0
        if share < LEAST_ON_IMAGE:
            message = f"only {share:.0%} of the label lies where the image shows something"
            self.note("W_LABEL_OFF_IMAGE", message, "view them together: is the label mirrored?", "warning")

    def check_mirrored(self, label: LabelVolume) -> None:
        """Note evidence that the label's header does not belong to its voxels."""
        targets = self.rules.targets
        mask = label.voxels > 0 if targets is None else targets.foreground(label.voxels)
        assert self.grid is not None
        found = suspicion(self.grey, self.grid, mask, label.grid)
        self.grey.clear()
        if found is not None:
            self.note(
                "W_MIRRORED",
                str(found),
                "view them together; `delineate data inspect --repair` writes a corrected copy",
                "warning",
            )

    def row(self) -> SubjectRow | None:
        if self.grid is None:
            return None
        values = self.rules.targets.values if self.rules.targets else named_by_value(self.label_voxels)
        volume_ml = {
            name: sum(self.label_voxels.get(v, 0) for v in numbers) * self.grid.voxel_ml
            for name, numbers in values.items()
        }
        return SubjectRow(
            subject=self.subject.id,
            site=self.subject.site,
            patient=self.subject.patient,
            shape=self.grid.shape,
            spacing_mm=self.grid.spacing_mm,
            orientation=self.grid.orientation,
            channels=tuple(self.intensities),
            dtype=", ".join(sorted(self.dtypes)),
            intensities=self.intensities,
            foreground_shape=self.foreground.box_shape if self.foreground else (0, 0, 0),
            label_voxels=self.label_voxels,
            volume_ml=volume_ml if self.label_voxels else {},
            label_box_shape=self.label_box,
            largest_pieces=self.largest_pieces,
            hashes=self.hashes,
            acquisition=self.subject.acquisition,
        )


def named_by_value(values: Mapping[int, int]) -> dict[str, tuple[int, ...]]:
    """A target for each label value, for a data set that names none."""
    return {f"label_{value}": (value,) for value in sorted(values) if value != 0}
