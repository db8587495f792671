"""Steps in order, fitted, applied and undone as one."""

from __future__ import annotations

import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from pydantic import ValidationError

from delineate.core.grid import Grid
from delineate.core.volume import Volume
from delineate.io.formats import read_volume
from delineate.preprocessing.intensity import ClipPercentiles, Normalise
from delineate.preprocessing.pipeline import Pipeline
from delineate.preprocessing.spatial import CropOrPad, Reorient, Resample


def scans(rng: np.random.Generator, n: int = 3) -> list[Volume]:
    grid = Grid.of_spacing((6, 7, 8), (1, 1, 2))
    return [Volume(rng.normal(10 * i, 3, (1, *grid.shape)).astype(np.float32), grid) for i in range(n)]


def test_steps_apply_in_order(rng: np.random.Generator) -> None:
    steps = Reorient(to="LPS"), Resample(spacing_mm=1.5), Normalise(), CropOrPad(shape=5)
    (volume,) = scans(rng, 1)
    expected = volume
    for step in steps:
        expected, _ = step.apply(expected)
    prepared, _ = Pipeline(steps=steps).apply(volume)
    assert_array_equal(prepared.voxels, expected.voxels)
    assert prepared.grid.matches(expected.grid)


def test_each_step_is_fitted_on_what_the_steps_before_leave(rng: np.random.Generator) -> None:
    cohort = scans(rng)
    steps = ClipPercentiles(scope="cohort", lower=20, upper=80), Normalise(scope="cohort")
    fitted = Pipeline(steps=steps).fit(lambda: cohort)
    voxels = np.concatenate([fitted.apply(scan)[0].voxels for scan in cohort])
    assert_allclose([voxels.mean(), voxels.std()], [0, 1], atol=1e-5)
    assert steps[0].needs_fit


def test_nothing_is_read_where_nothing_needs_fitting() -> None:
    pipeline = Pipeline(steps=(Reorient(), ClipPercentiles(), Normalise()))
    assert pipeline.fit(lambda: pytest.fail("a scan was read")) == pipeline


@pytest.mark.parametrize("step", [Normalise(scope="cohort"), ClipPercentiles(scope="cohort")], ids=repr)
def test_fitting_holds_one_scan_at_a_time(step: Normalise | ClipPercentiles, rng: np.random.Generator) -> None:
    read: list[weakref.ref[np.ndarray]] = []

    def one_by_one() -> Iterator[Volume]:
        for _ in range(5):
            assert sum(voxels() is not None for voxels in read) <= 1
            (scan,) = scans(rng, 1)
            read.append(weakref.ref(scan.voxels))
            yield scan
            del scan

    assert not Pipeline(steps=(step,)).fit(one_by_one).needs_fit
    assert len(read) == 5


def test_a_fitted_pipeline_is_plain_text_and_back(rng: np.random.Generator) -> None:
    cohort = scans(rng)
    fitted = Pipeline(steps=(Reorient(), Resample(spacing_mm=(1, 1, None)), Normalise(scope="cohort"))).fit(
        lambda: cohort
    )
    again = Pipeline.model_validate_json(fitted.model_dump_json())
    assert again == fitted
    assert_array_equal(again.apply(cohort[0])[0].voxels, fitted.apply(cohort[0])[0].voxels)


def test_labels_take_the_same_way(rng: np.random.Generator) -> None:
    """The label of what is bright is where the prepared scan is bright."""
    (volume,) = scans(rng, 1)
    bright = volume.voxels > 0
    pipeline = Pipeline(steps=(Reorient(to="PIR"), Resample(spacing_mm=1), CropOrPad(multiple_of=8)))
    scan = Volume(bright.astype(np.float32), volume.grid)
    prepared, moved, _ = pipeline.apply_with_label(scan, bright.astype(np.uint8))
    assert prepared.grid.shape != volume.grid.shape
    assert_array_equal(moved, prepared.voxels >= 0.5)


def test_the_scan_given_stays_as_it_was(rng: np.random.Generator) -> None:
    (volume,) = scans(rng, 1)
    before = volume.voxels.copy()
    volume.voxels.flags.writeable = False
    Pipeline(steps=(Reorient(to="LAS"), ClipPercentiles(), Normalise(within="nonzero"), Resample(spacing_mm=1))).apply(
        volume
    )
    assert_array_equal(volume.voxels, before)


@pytest.mark.parametrize("order", ["C", "F"])
def test_the_order_in_memory_does_not_matter(order: str, rng: np.random.Generator) -> None:
    (volume,) = scans(rng, 1)
    pipeline = Pipeline(steps=(ClipPercentiles(), Normalise(), Resample(spacing_mm=1)))
    expected, _ = pipeline.apply(volume)
    ordered, _ = pipeline.apply(Volume(np.array(volume.voxels, order=order), volume.grid))
    assert_allclose(ordered.voxels, expected.voxels, atol=1e-6)


def test_refuses_an_unknown_step() -> None:
    with pytest.raises(ValidationError, match="normalize"):
        Pipeline.model_validate({"steps": [{"kind": "normalize"}]})


def test_real_scans_return_to_their_own_grid(real_data: Path) -> None:
    pipeline = Pipeline(
        steps=(Reorient(), Resample(spacing_mm=2, axes="in_plane"), ClipPercentiles(), Normalise(), CropOrPad(shape=48))
    )
    for pattern in ("hippocampus/imagesTr/*.nii.gz", "prostate/*/*.mhd", "sarcoma/imagesTr/*.nii.gz"):
        for path in sorted(real_data.glob(pattern))[:2]:
            volume = read_volume(path)
            prepared, undo = pipeline.apply(volume)
            assert undo.before.matches(volume.grid)
            assert undo.scores(prepared.voxels[0]).shape == volume.grid.shape
            assert np.abs(prepared.voxels).max() < 10


def test_only_resampling_waits_for_torch() -> None:
    program = (
        "import sys, numpy as np\n"
        "from delineate.core.grid import Grid\n"
        "from delineate.core.volume import Volume\n"
        "from delineate.preprocessing.cache import Pipeline\n"
        "steps = [{'kind': 'reorient'}, {'kind': 'crop_or_pad', 'multiple_of': 8}, {'kind': 'normalise'}]\n"
        "volume = Volume(np.ones((1, 3, 4, 5)), Grid.of_spacing((3, 4, 5)))\n"
        "Pipeline.model_validate({'steps': steps}).apply(volume)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
