"""One examination of a patient: which files are its channels and its label, and what is known about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from delineate.core.text import printable
from delineate.errors import MissingFile


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
    ``acquisition`` is how it was scanned, with units in the names: ``{"field_strength_t": "3"}``.

    >>> from pathlib import Path
    >>> subject = Subject("case7", {"T1": Path("t1.nii.gz"), "FLAIR": Path("flair.nii.gz")}, site="Utrecht")
    >>> subject.channels, subject.patient
    (('T1', 'FLAIR'), 'case7')
    """

    id: str
    scans: Mapping[str, Path]
    label: Path | None = None
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
        """Every file of the subject, each once, the label last."""
        label = () if self.label is None else (self.label,)
        return (*dict.fromkeys(self.scans.values()), *label)
