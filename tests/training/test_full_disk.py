"""A disk that is full wherever a training writes: a code, what was there stays, and the same command resumes."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from delineate.errors import OutputError
from delineate.inference.sliding import Scores
from delineate.preprocessing.cache import prepare
from delineate.preprocessing.intensity import Normalise
from delineate.preprocessing.pipeline import Pipeline
from delineate.recipe import Recipe, recipe_from
from delineate.reporting.run import write_run_report
from delineate.training.lock import holding
from delineate.training.options import Reporter, RunOptions
from delineate.training.run import train

PAGE = 4096
THOROUGH = "DELINEATE_THOROUGH" in os.environ
"""Whether the disk grows page by page, which takes minutes."""


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """A disk of one page."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={PAGE}", "none", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    if not mounted:
        pytest.skip("only who may mount a file system can fill one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def grow(disk: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", str(disk)], check=True)


def whole(recipe: Recipe, dataset, folder: Path, cache: Path) -> dict[str, np.ndarray] | OutputError:
    """All that ``delineate train`` does; the weights that it leaves, or why it cannot."""
    options = RunOptions(cache=cache, device="cpu", precision="fp32", compile="off", threads=1)
    try:
        with holding(folder):
            train(recipe, dataset, folder, options, Reporter())
            write_run_report(folder, dataset)
    except OutputError as error:
        return error
    return load_file(folder / "last/weights.safetensors")


def refused_path(error: OutputError) -> Path:
    return Path(re.search(r"'(.*?)'", error.message)[1])


def test_every_writer_on_a_full_disk_gives_a_code_and_the_same_command_resumes(recipe, balls, tmp_path, disk) -> None:
    """The disk grows by little after each failure, so that one writer after the other meets its end."""
    values = recipe.as_dict()
    # BatchNorms are measured anew after the last step, which a resumed run must do as well.
    values["network"] |= {"widths": [2, 2], "norm": "batch"}
    values["training"] |= {"steps": 6}
    small = recipe_from(values)
    expected = whole(small, balls, tmp_path / "run", tmp_path / "cache")
    least = 1 if THOROUGH else 10
    size, step, met = PAGE, least, [Path()]
    while isinstance(weights := whole(small, balls, disk / "run", tmp_path / "cache"), OutputError):
        met.append(refused_path(weights).relative_to(disk))
        assert "No space left" in weights.message
        assert "free some space" in weights.fix
        # Nothing half-written, and nothing is in the way of the next run.
        assert not [p for p in disk.rglob(".*") if p.is_file()]
        step = 2 * step if met[-1] == met[-2] else least
        size += step * PAGE
        grow(disk, size)
    assert len(set(met)) > 5, met
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)


def test_preparing_on_a_full_disk_resumes(recipe, balls, tmp_path, disk) -> None:
    pipeline, targets = Pipeline(steps=(Normalise(),)), balls.targets
    expected = prepare(balls.subjects, pipeline, targets, tmp_path / "cache")
    size, prepared = PAGE, None
    while prepared is None:
        try:
            prepared = prepare(balls.subjects, pipeline, targets, disk)
        except OutputError:
            assert not [p for p in disk.rglob(".*") if p.is_file()]
        size += PAGE
        grow(disk, size)
    assert size > 10 * PAGE
    for subject, other in zip(prepared, expected, strict=True):
        np.testing.assert_array_equal(subject.image, other.image)


def test_probabilities_beyond_memory_on_a_full_disk_are_refused_not_fatal(disk, monkeypatch) -> None:
    """Before the network runs for minutes, and not in the middle."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    with pytest.raises(OutputError, match="free some space"):
        Scores(2, (64, 64, 64), 2, budget_bytes=0)
