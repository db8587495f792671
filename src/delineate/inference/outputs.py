"""Where predictions go: their files, what they may overwrite, and which of them already exist."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from delineate.bundle import Bundle
from delineate.core.legend import Legend
from delineate.core.subject import Subject
from delineate.core.targets import Targets
from delineate.core.text import from_cell, printable
from delineate.core.volume import LabelVolume, Volume
from delineate.errors import BadFormat, DelineateError, MissingFile, OutputError
from delineate.inference.measurements import beside_as_json, read_measurements
from delineate.inference.review import read_queue
from delineate.io.exports import exported_files
from delineate.io.formats import is_series, parts_of, suffix_of
from delineate.io.overwriting import check_folder, check_outputs
from delineate.io.suffixes import DICOM_SUFFIXES, PREVIEW_SUFFIX, REPORT_SUFFIX
from delineate.io.surfaces import surface_files
from delineate.metrics.quantities import QuantityMap
from delineate.specification import to_json

REVIEW = "review.csv"
MEASUREMENTS = "measurements.csv"

_LABELS = re.compile(
    r"(labels?|masks?|annotations?|references?|ground.?truths?|gts?)([-_. ]?(tr|ts|train|test|val))?", re.I
)
"""Names of folders that hold labels; a file there that predict did not write is somebody's work."""


Picture = Callable[[Volume, LabelVolume, Targets, Legend], bytes]
"""Draws a label on its scan, as PNG."""


class Planned(NamedTuple):
    """Subjects to predict, those already predicted, and those that cannot be, with the reason.

    ``unmeasured`` are those already predicted whose labels have yet to be measured as they are now.
    """

    ahead: list[Subject]
    done: list[Subject]
    failed: list[tuple[Subject, DelineateError]]
    unmeasured: list[Subject]
    undrawn: list[Subject]
    """Those already predicted whose surfaces or pictures are missing, or older than their labels."""

    @property
    def total(self) -> int:
        """Number of subjects that are not done."""
        return len(self.ahead) + len(self.failed) + len(self.unmeasured) + len(self.undrawn)

    @property
    def expected_seconds(self) -> float:
        """About how long the networks will compute: a second a scan. It decides whether compiling pays."""
        return float(len(self.ahead))


@dataclass(frozen=True)
class Outputs:
    """The files of predictions in ``folder``, in the format of ``suffix``, and of probabilities if they are kept.

    ``settings`` is what a label depends on besides the bundles and the scan; ``quantity`` is measured within it, and
    so are all channels of the ``bundles``.
    """

    folder: Path
    suffix: str = ".nii.gz"
    probabilities: Path | None = None
    bundles: Sequence[Bundle] = ()
    settings: Mapping[str, object] = field(default_factory=dict)
    quantity: QuantityMap | None = None
    surfaces: str = ""
    """The format of surfaces, if they are written."""
    picture: Picture | None = None
    """Draws the picture beside each label, if there is to be one."""

    @property
    def measurements(self) -> Path:
        """Path of the table of each target's measurements; the same as JSON is next to it."""
        return self.folder / MEASUREMENTS

    @property
    def channels(self) -> tuple[str, ...]:
        """Channels that the bundles take."""
        return self.bundles[0].channels if self.bundles else ()

    @property
    def quantities(self) -> tuple[QuantityMap, ...]:
        """What is measured within each target: the bundles' channels, and last the quantity that was asked for."""
        asked = () if self.quantity is None else (self.quantity,)
        return (*(QuantityMap(name) for name in self.channels if name not in {one.channel for one in asked}), *asked)

    @property
    def review(self) -> Path:
        """The list of what to look at first."""
        return self.folder / REVIEW

    def label(self, subject: Subject) -> Path:
        """Path of a subject's label. Raises :class:`OutputError` for a name that no file can have."""
        name = f"{subject.id}{self.suffix}"
        if subject.id in ("", ".", "..") or "\0" in name or Path(name).name != name:
            raise OutputError(f"'{printable(subject.id)}' cannot be used as a file name", fix="rename the subject")
        return self.folder / name

    def report(self, subject: Subject) -> Path | None:
        """Path of the DICOM report of a subject's measurements; None for labels in other formats."""
        if self.suffix not in DICOM_SUFFIXES or not self.quantities:
            return None
        return self.label(subject).with_suffix(REPORT_SUFFIX)

    def files(self, subject: Subject) -> list[Path]:
        """Every file that is written for a subject."""
        kept = [] if self.probabilities is None else [self.probabilities / f"{subject.id}.nii.gz"]
        report = self.report(subject)
        return [*exported_files(self.label(subject)), *kept, *([] if report is None else [report])]

    def surface_files(self, subject: Subject) -> dict[str, Path]:
        """The file of each target's surface, if they are written."""
        if not self.surfaces:
            return {}
        return surface_files(self.folder / "surfaces" / subject.id, self.bundles[0].targets.names, self.surfaces)

    def preview(self, subject: Subject) -> Path | None:
        """Path of the picture of a subject, if there is to be one."""
        return None if self.picture is None else self.folder / f"{subject.id}{PREVIEW_SUFFIX}"

    def drawn(self, subject: Subject) -> list[Path]:
        """Every file that is drawn of a subject's label: surfaces and picture."""
        preview = self.preview(subject)
        return [*dict.fromkeys(self.surface_files(subject).values()), *([] if preview is None else [preview])]

    def check(self, subject: Subject) -> None:
        """Raise any error that would keep a subject from being written and can be found without reading its scan."""
        for path in [*self.files(subject), *self.drawn(subject)]:
            _check_name(path)
        channels = [*self.channels, *([] if self.quantity is None else [self.quantity.channel])]
        if missing := [channel for channel in channels if channel not in subject.scans]:
            raise MissingFile(
                f"'{printable(subject.id)}' lacks {', '.join(missing)}", fix="add them, or leave the subject out"
            )
        source = next(iter(subject.scans.values()), None)
        if self.suffix.endswith(DICOM_SUFFIXES) and (source is None or not is_series(source)):
            raise BadFormat(
                f"a label in DICOM must refer to a DICOM series, which '{source}' is not",
                fix="give the DICOM series that the scan came from, or select another --format",
            )

    def made_by(self, subject: Subject) -> str:
        """A digest of the bundles, the settings and the scan's files, by which a prediction is recognised later."""
        channels = self.channels or subject.channels
        files = _described([subject.scans[channel] for channel in channels if channel in subject.scans])
        return _digest([self._bundles, self.suffix, self.probabilities is not None, dict(self.settings), files])

    def made_from(self, subject: Subject) -> dict[str, str]:
        """Digests of the label, a map and its settings, by which measurements are recognised later, by channel."""
        label = _described([self.label(subject)])
        maps = {one.channel: _described([subject.scans[one.channel]]) for one in self.quantities}
        return {one.channel: _digest([one.as_dict(), sorted(label + maps[one.channel])]) for one in self.quantities}

    @cached_property
    def _bundles(self) -> list[list[object]]:
        made = [[b.weights_sha256, b.recipe.as_dict(), b.pipeline.model_dump_json()] for b in self.bundles]
        # Labels do not depend on it, but intervals do.
        return [
            [*one, *([to_json(b.calibrated)] if b.calibrated else [])]
            for one, b in zip(made, self.bundles, strict=True)
        ]

    def plan(self, subjects: Sequence[Subject], kept: Sequence[Path], *, overwrite: bool = False) -> Planned:
        """Decide what to predict, before predicting anything.

        A subject is already done if the same bundle has predicted the same scan, unless ``overwrite`` is set.
        Raises :class:`OutputError` if a prediction would overwrite one of the ``kept`` files (scans and
        labels) or, without ``overwrite``, any other file.
        """
        check_folder(self.folder)
        rows = {from_cell(row["subject"]): row for row in read_queue(self.review)}
        tables = [self.measurements, beside_as_json(self.measurements)]
        check_outputs(tables, kept, overwrite=True)
        measured: dict[str, set[str]] = defaultdict(set)
        for line in read_measurements(tables[0]):
            measured[from_cell(line["subject"])].add(line.get("made_from", ""))
        planned = Planned([], [], [], [], [])
        outputs: list[Path] = []
        leftovers: list[Path] = []
        for subject in subjects:
            try:
                self.check(subject)
                files = self.files(subject)
            except DelineateError as error:
                planned.failed.append((subject, error))
                continue
            row = rows.get(printable(subject.id), {})
            made_by = row.get("made_by")
            own = bool(made_by) and not overwrite and made_by == self._known(subject)
            report = self.report(subject)
            if own and all(os.path.lexists(file) for file in files if file != report):
                planned.done.append(subject)
                if self._lag_behind(subject):
                    planned.undrawn.append(subject)
                # What can be measured only while it is predicted is an error only if it is asked for.
                if self.quantity is not None or self._reads_back:
                    known = set(self.made_from(subject).values()) <= measured[printable(subject.id)]
                    if not known or (report is not None and not os.path.lexists(report)):
                        planned.unmeasured.append(subject)
                continue
            planned.ahead.append(subject)
            # The label is written last: without it, the other files are left from a process that was killed.
            (leftovers if own and not os.path.lexists(self.label(subject)) else outputs).extend(
                [*files, *self.drawn(subject)]
            )
            if _LABELS.fullmatch(self.folder.resolve().name) and not row:
                kept = [*kept, *files]
        check_outputs(outputs, kept, overwrite=overwrite)
        check_outputs(leftovers, kept, overwrite=True)
        return planned

    @property
    def _reads_back(self) -> bool:
        """Whether labels that were written can be read again."""
        return self.suffix.endswith(DICOM_SUFFIXES) or bool(suffix_of(Path(f"label{self.suffix}")))

    def _lag_behind(self, subject: Subject) -> bool:
        """Whether anything drawn of a label is missing, or older than the label, which somebody may have corrected."""
        written = self.label(subject).stat().st_mtime_ns
        return any(not path.exists() or path.stat().st_mtime_ns < written for path in self.drawn(subject))

    def _known(self, subject: Subject) -> str | None:
        try:
            return self.made_by(subject)
        except (DelineateError, OSError):
            return None  # it cannot be read, as the attempt to predict it will report


def _described(paths: Sequence[Path]) -> list[tuple[str, int, int]]:
    """Names, sizes and times of all files of some scans."""
    files = [file for path in dict.fromkeys(paths) for file in _scan_files(path)]
    return sorted((file.name, found.st_size, found.st_mtime_ns) for file in files if (found := file.stat()))


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _scan_files(path: Path) -> list[Path]:
    if path.is_dir():
        return [Path(place, name) for place, _, names in os.walk(path) for name in names]
    return parts_of(path)


def _check_name(path: Path) -> None:
    """Raise :class:`OutputError` for a name that the disk does not accept: too long, or impossible to encode."""
    place = path.parent
    while not place.is_dir() and place != place.parent:
        place = place.parent
    try:
        (place / path.name).lstat()
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        why = (isinstance(error, OSError) and error.strerror) or "its name cannot be encoded"
        raise OutputError(f"'{printable(path.name)}' cannot be written: {why}", fix="rename the scan") from error
