"""A run folder before a run is begun in it: nothing of somebody else's may be in the way."""

from __future__ import annotations

from pathlib import Path

from delineate.datasets.dataset import Dataset
from delineate.errors import OutputError
from delineate.io.overwriting import check_folder
from delineate.training.events import EVENTS, MESSAGES

_WRITTEN = ("bundle", "last", "logs", "predictions", "evaluation", "plan.json", "data.json", "report.html")
"""What a run writes. A recipe.yaml and a split.json that are there are used, and stay as they are."""


def check_run_folder(folder: Path, dataset: Dataset) -> None:
    """Raise :class:`OutputError` where a run in ``folder`` would write over scans, labels or other files.

    A run that was begun there is resumed, which replaces what it wrote itself.
    """
    check_folder(folder)
    places = [(folder / name).resolve() for name in _WRITTEN]
    for file in (file for subject in dataset.subjects for file in subject.files):
        if any(place in (path := file.resolve()).parents or place == path for place in places):
            raise OutputError(f"'{file}' is of the data set, and a run would write over it", fix="choose another --out")
    there = [str(folder / name) for name in _WRITTEN if (folder / name).exists()]
    if there and not any((folder / "logs" / name).exists() for name in (EVENTS, MESSAGES)):
        raise OutputError(
            f"{', '.join(there)} would be written over, and no run did write it", fix="choose another --out"
        )
