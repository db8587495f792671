"""Who a run was trained on, by name: kept in the run's folder, since its bundle is given away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from delineate.bundle import Provenance, hidden
from delineate.errors import TrainingError
from delineate.io.files import writing_beside
from delineate.specification import from_json, to_json

_FILE = "subjects.json"


@dataclass(frozen=True)
class RunSubjects:
    """What each subject of the data set was for; ``left_out`` were broken. ``file_hashes`` by subject and file."""

    data_set: str
    fold: int | None
    training: tuple[str, ...]
    validation: tuple[str, ...]
    held_out: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    file_hashes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def differing(self, before: RunSubjects | Provenance) -> list[str]:
        """In which roles these subjects are others than those ``before``, whether known by name or by pseudonym."""
        named = isinstance(before, RunSubjects)
        roles = ("training", "validation", "held_out")
        differing = ["fold"] if self.fold != before.fold else []
        return differing + [
            role
            for role in roles
            if getattr(before, role) != (getattr(self, role) if named else hidden(getattr(self, role)))
        ]

    def save(self, folder: Path) -> None:
        """Write it into a run's folder."""
        with writing_beside(folder / _FILE) as path:
            path.write_text(to_json(self), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> RunSubjects | None:
        """A run's; None where it has none, as those of earlier versions. Raises :class:`TrainingError`."""
        path = folder / _FILE
        if not path.exists():
            return None
        try:
            return from_json(cls, path.read_bytes())
        except (OSError, ValidationError) as error:
            raise TrainingError(
                f"'{path}' cannot be read ({error})", fix="restore it, or train into another --out"
            ) from (error)
