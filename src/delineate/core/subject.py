"""One patient's examination: which files are its channels and its label, and what is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from delineate.core.text import printable
from delineate.errors import MissingFile


@dataclass(frozen=True)
class Subject:
    """An examination, by its files; nothing is read until it is asked for.

    ``id`` is unique in its data set and names the files of its predictions. ``scans`` maps channel
    names to files, in channel order; several names may share one file that holds all channels (4D):
    ``file_channels`` are then all of that file's, in its own order, whichever ``scans`` are taken.
    ``patient`` groups examinations of one person: they never part in a split. ``site`` is the
    scanner or centre. In all these names, what a terminal would
    take for a command is spelled out. ``resample``: channels on other grids than the first one's are brought onto it.

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

    def __post_init__(self) -> None:
        # Names of files and of people's tables: here they become text that can be shown and written anywhere.
        for name in ("id", "site", "patient"):
            object.__setattr__(self, name, printable(getattr(self, name)))
        object.__setattr__(self, "scans", {printable(channel): file for channel, file in self.scans.items()})
        object.__setattr__(self, "file_channels", tuple(map(printable, self.file_channels)))
        object.__setattr__(self, "attributes", {printable(k): printable(v) for k, v in self.attributes.items()})
        if not self.patient:
            object.__setattr__(self, "patient", self.id)

    @property
    def channels(self) -> tuple[str, ...]:
        return tuple(self.scans)

    def with_channels(self, channels: Sequence[str]) -> Subject:
        """This subject with exactly these channels, by name; a single channel may have any name.

        Raises :class:`MissingFile` where it lacks some.
        """
        if len(channels) == len(self.scans) == 1:
            return replace(self, scans=dict(zip(channels, self.scans.values(), strict=True)))
        missing = [channel for channel in channels if channel not in self.scans]
        if missing:
            raise MissingFile(
                f"subject '{self.id}' has channels {list(self.scans)}, lacks {missing}",
                fix="add them, or rename the channels of the data set",
            )
        return replace(self, scans={channel: self.scans[channel] for channel in channels})

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the subject, once, the label last."""
        label = () if self.label is None else (self.label,)
        return (*dict.fromkeys(self.scans.values()), *label)
