"""One examination of a patient: which files are its channels and its label, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from delineate.core.text import near, printable
from delineate.errors import MissingFile

_SHOWN = 6
_LONGEST = 300


@dataclass(frozen=True)
class Masks:
    """A label in parts: ``files`` maps each target's name to the file that marks it.

    Several targets may share a file that holds segments by name. Masks may overlap; what a voxel in several of them
    is labelled as is for the :class:`~delineate.core.targets.Targets` to say.

    >>> from pathlib import Path
    >>> masks = Masks({"liver": Path("liver.nii.gz"), "spleen": Path("spleen.nii.gz")})
    >>> masks.names, masks.only(["spleen"], "case7").paths
    (('liver', 'spleen'), (PosixPath('spleen.nii.gz'),))
    """

    files: Mapping[str, Path]

    def __post_init__(self) -> None:
        object.__setattr__(self, "files", {printable(name): file for name, file in self.files.items()})

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.files)

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file, each once."""
        return tuple(dict.fromkeys(self.files.values()))

    def only(self, names: Sequence[str], subject: str) -> Masks:
        """The masks of these targets, in this order. Raises :class:`MissingFile` where some have none."""
        if missing := [name for name in names if name not in self.files]:
            shown, there = (
                ", ".join(names[:_SHOWN])[:_LONGEST] + (", …" if len(names) > _SHOWN else "")
                for names in (missing, self.names)
            )
            raise MissingFile(
                f"'{subject}' has no mask of {shown}; it has {there or 'none'}{near(missing[0], self.names)}",
                fix="add an empty mask where there is none of it, choose targets that all have, or leave the subject "
                "out",
            )
        return Masks({name: self.files[name] for name in names})


Label = Path | Masks
"""A label: one file with values, or a mask for each target."""


def unnamed(count: int) -> tuple[str, ...]:
    """Names of channels of which only the number is known."""
    return ("image",) if count == 1 else tuple(f"channel_{i}" for i in range(count))


@dataclass(frozen=True)
class Subject:
    """An examination, as its files; nothing is read until it is needed.

    ``id`` is unique in its data set and names the files of its predictions. ``scans`` maps channel
    names to files, in channel order; several names may share one file that holds all channels (4D):
    ``file_channels`` then lists all of that file's channels in its own order, whichever ``scans`` use.
    ``patient`` groups examinations of one person, which a split never separates. ``site`` is the
    scanner or centre. In all these names, characters that a terminal would take for a command are
    spelled out. ``resample``: channels on a different grid are resampled to the first channel's.
    ``label`` is a file whose values the targets name, or :class:`Masks`, which are named themselves.
    ``acquisition`` is how it was scanned, with units in the names: ``{"field_strength_t": "3"}``.

    >>> from pathlib import Path
    >>> subject = Subject("case7", {"T1": Path("t1.nii.gz"), "FLAIR": Path("flair.nii.gz")}, site="Utrecht")
    >>> subject.channels, subject.patient
    (('T1', 'FLAIR'), 'case7')
    """

    id: str
    scans: Mapping[str, Path]
    label: Label | None = None
    site: str = ""
    patient: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    file_channels: tuple[str, ...] = ()
    resample: bool = False
    acquisition: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Names from files and tables become text here that can be shown and written anywhere.
        for name in ("id", "site", "patient"):
            object.__setattr__(self, name, printable(getattr(self, name)))
        object.__setattr__(self, "scans", {printable(channel): file for channel, file in self.scans.items()})
        object.__setattr__(self, "file_channels", tuple(map(printable, self.file_channels)))
        for name in ("attributes", "acquisition"):
            told = getattr(self, name)
            object.__setattr__(self, name, {printable(k): printable(v) for k, v in told.items()})
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.scans)

    def with_channels(self, channels: Sequence[str]) -> Subject:
        """This subject with exactly these channels, by name; a single channel may have any name.

        Channels that have only numbers, as in nnU-Net's file names, are taken in order.
        Raises :class:`MissingFile` where it lacks some.
        """
        if len(channels) == len(self.scans) and self.channels in (unnamed(len(channels)), self.channels[:1]):
            return replace(self, scans=dict(zip(channels, self.scans.values(), strict=True)))
        missing = [channel for channel in channels if channel not in self.scans]
        if missing:
            raise MissingFile(
                f"subject '{self.id}' has channels {list(self.scans)} but lacks {missing}",
                fix="add them, or rename the data set's channels",
            )
        return replace(self, scans={channel: self.scans[channel] for channel in channels})

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the subject, each once, the label's last."""
        return (*dict.fromkeys(self.scans.values()), *paths_of(self.label))


def paths_of(label: Label | None) -> tuple[Path, ...]:
    """The files of a label, each once; none where there is no label."""
    if label is None:
        return ()
    return label.paths if isinstance(label, Masks) else (label,)


def files_of(label: Label, targets: Sequence[str] | None) -> dict[str, Path]:
    """The files of a label that some targets are read from, by target; every file if none of them is there.

    A label with values is one file, called "label".
    """
    if not isinstance(label, Masks):
        return {"label": label}
    wanted = {name: label.files[name] for name in targets or () if name in label.files}
    return wanted or dict(label.files)
