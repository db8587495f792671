"""Checks on a run folder before a run starts in it: no other files may be overwritten."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from delineate.datasets.dataset import Dataset
from delineate.errors import OutputError
from delineate.io.overwriting import check_folder
from delineate.training.events import EVENTS, MESSAGES

_WRITTEN = (
    "bundle",
    "last",
    "logs",
    "predictions",
    "evaluation",
    "plan.json",
    "data.json",
    "subjects.json",
    "report.html",
    "card.html",
)
"""What a run writes. An existing recipe.yaml or split.json is used; of the recipe, only the budget may be replaced."""


def check_run_folder(folder: Path, dataset: Dataset) -> None:
    """Raise :class:`OutputError` if a run in ``folder`` would overwrite scans, labels or other files.

    A run that was started there is resumed, which overwrites only its own files.
    """
    files = (file for subject in dataset.subjects for file in subject.files)
    marks = [folder / "logs" / name for name in (EVENTS, MESSAGES)]
    check_own(folder, _WRITTEN, files, marks, what="run")


def check_own(folder: Path, written: Sequence[str], files: Iterable[Path], marks: Iterable[Path], what: str) -> None:
    """Raise :class:`OutputError` if writing ``written`` into ``folder`` would replace input ``files`` or others' files.

    Any of ``marks`` shows that the same command wrote what is there, to be resumed.
    """
    check_folder(folder)
    places = [(folder / name).resolve() for name in written]
    for file in files:
        if any(place in (path := file.resolve()).parents or place == path for place in places):
            article = "an" if what[0] in "aeiou" else "a"
            raise OutputError(
                f"'{file}' is an input, and {article} {what} would overwrite it", fix="choose another --out"
            )
    there = [str(folder / name) for name in written if os.path.lexists(folder / name)]
    if there and not any(mark.exists() for mark in marks):
        raise OutputError(
            f"{', '.join(there)} would be overwritten, but no {what} wrote it", fix="choose another --out"
        )
