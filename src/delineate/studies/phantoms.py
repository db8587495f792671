"""Simulated data sets of a study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from delineate.datasets.phantoms.writing import write_phantoms
from delineate.studies.specification import Phantom, Size


def simulate(phantom: Phantom, size: Size, name: str, out: Path, progress: Callable[[int, int], None]) -> None:
    """Write the patients of a study's data set, no more than the size has subjects; those that are there stay."""
    patients = min(phantom.patients, size.subjects or phantom.patients)
    write_phantoms(
        out,
        patients,
        phantom.kind,
        seed=phantom.seed,
        layout=phantom.layout,
        sites=phantom.sites,
        coarse=size.coarse.get(name, 1.0),
        progress=progress,
    )
