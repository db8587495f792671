"""Checks on a run folder before a run starts in it: no other files may be overwritten."""

from __future__ import annotations

from pathlib import Path

from delineate.datasets.dataset import Dataset
from delineate.errors import OutputError
from delineate.io.overwriting import check_folder
from delineate.training.events import EVENTS, MESSAGES

_WRITTEN = ("bundle", "last", "logs", "predictions", "evaluation", "plan.json", "data.json", "report.html")
"""What a run writes. An existing recipe.yaml or split.json is used and left unchanged."""


def check_run_folder(folder: Path, dataset: Dataset) -> None:
    """Raise :class:`OutputError` if a run in ``folder`` would overwrite scans, labels or other files.

    A run that was started there is resumed, which overwrites only its own files.
    """
    check_folder(folder)
    places = [(folder / name).resolve() for name in _WRITTEN]
    for file in (file for subject in dataset.subjects for file in subject.files):
        if any(place in (path := file.resolve()).parents or place == path for place in places):
            raise OutputError(f"'{file}' is in the data set, and a run would overwrite it", fix="choose another --out")
    there = [str(folder / name) for name in _WRITTEN if (folder / name).exists()]
    if there and not any((folder / "logs" / name).exists() for name in (EVENTS, MESSAGES)):
        raise OutputError(f"{', '.join(there)} would be overwritten, but no run wrote it", fix="choose another --out")
