"""Which subjects a run was trained on, by name: kept in the run folder, since its bundle is shared."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

from delineate.bundle import Provenance, hidden
from delineate.errors import DelineateError, TrainingError
from delineate.io.documents import Document

_FILE = "subjects.json"


class RunSubjects(Document):
    """The role of each subject; ``left_out`` lists those with broken files. ``file_hashes`` by subject and file."""

    error: ClassVar[type[DelineateError]] = TrainingError
    fix: ClassVar[str] = "restore it, or train into another --out"

    data_set: str
    fold: int | None
    training: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    file_hashes: Mapping[str, Mapping[str, str]] = {}

    def differing(self, before: RunSubjects | Provenance) -> list[str]:
        """Roles whose subjects differ from those ``before``, whether these are names or pseudonyms."""
        named = isinstance(before, RunSubjects)
        roles = ("training", "validation", "held_out")
        differing = ["fold"] if self.fold != before.fold else []
        return differing + [
            role
            for role in roles
            if getattr(before, role) != (getattr(self, role) if named else hidden(getattr(self, role)))
        ]

    def changed(self, before: RunSubjects) -> list[str]:
        """Subjects in a role whose files are others than ``before``."""
        known = before.file_hashes
        used = (*self.training, *self.validation, *self.held_out)
        return sorted(name for name in used if name in known and self.file_hashes.get(name) != known[name])

    def save(self, folder: Path) -> None:
        """Write it to a run folder."""
        self.write(folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> RunSubjects | None:
        """Read a run's subjects; None for runs of earlier versions, which have none. Raises :class:`TrainingError`."""
        return cls.read(folder / _FILE) if (folder / _FILE).exists() else None
