"""What is settled before the first step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import LabelVolume, Volume
from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection
from delineate.datasets.splits import Split, save_split
from delineate.errors import BrokenSubjects
from delineate.io.formats import write_label, write_volume
from delineate.recipe import Recipe, apply_changes, recipe_from
from delineate.training.options import Reporter, RunOptions
from delineate.training.preparation import Derived, assign_roles, derived_recipe, inspected


def test_a_target_that_means_other_values_than_the_data_set_s_is_warned_of(balls, recipe: Recipe) -> None:
    """BraTS' edema is 2, that of the Decathlon's first task 1; a value more is somebody's choice."""
    dataset = replace(balls, targets=Targets({"edema": (2,), "enhancing": (3,)}))
    said = {}
    for values in ({"edema": 1, "enhancing": 3}, {"edema": [2, 1], "enhancing": 3}, {"tumour": 1}):
        report = Reporter()
        named = recipe_from({**recipe.as_dict(), "data": {"targets": {"values": values}}})
        inspected(named, dataset, Inspection("balls", (), ()), RunOptions(), report)
        said[str(values)] = report.messages
    first, *others = said.values()
    assert len(first) == 1
    assert "'edema' is label value 1 in the recipe, but 2 in the data set" in first[0]
    assert others == [[], []]


def test_one_sound_subject_is_too_few_and_is_counted(balls) -> None:
    alone = replace(balls, subjects=balls.subjects[:1])
    with pytest.raises(BrokenSubjects, match="1 usable subject is left; training needs at least two"):
        derived_recipe(alone, RunOptions(device="cpu"), Reporter(), ["training.steps=2"])


def test_a_recipe_is_derived_from_scans_as_training_will_read_them(balls, tmp_path: Path, rng) -> None:
    """T1 has a grid of its own, and one subject lacks it."""
    grid, subjects = Grid.of_spacing((8, 8, 6), (2, 2, 3)), []
    for subject in balls.subjects:
        [flair] = subject.scans.values()
        t1 = tmp_path / f"{subject.id}.nii"
        write_volume(t1, Volume(rng.random((1, *grid.shape), np.float32), grid))
        subjects.append(replace(subject, scans={"FLAIR": flair, "T1": t1}))
    both = replace(balls, subjects=tuple(subjects))
    lacking = replace(both, subjects=(*subjects[:-1], replace(subject, scans={"FLAIR": flair})))

    def derived(dataset: Dataset, *changes: str) -> Derived:
        return derived_recipe(dataset, RunOptions(device="cpu"), Reporter(), ["training.steps=2", *changes])

    with pytest.raises(BrokenSubjects, match="E_GRID_MISMATCH"):
        derived(both)
    resampled = derived(both, "data.resample_channels=true")
    assert {row.channels for row in resampled.inspection.rows} == {("FLAIR", "T1")}
    chosen, alone = derived(lacking, "data.channels=[FLAIR]"), derived(balls)
    assert {row.channels for row in chosen.inspection.rows} == {("FLAIR",)}
    assert chosen.recipe.preprocessing == alone.recipe.preprocessing


def test_subjects_that_are_held_out_decide_nothing(balls, tmp_path: Path, rng) -> None:
    """They are the most, and of 1 or of 5 mm."""
    held, others = balls.subjects[:4], balls.subjects[4:]
    file = tmp_path / "split.json"
    save_split(file, Split(tuple(tuple(s.id for s in part) for part in (held, others))))
    scan, label = tmp_path / "scan.nii.gz", tmp_path / "label.nii.gz"
    derived = {}
    for fold in (0, None):
        for spacing_mm in (1.0, 5.0):
            grid = Grid.of_spacing((16, 16, 16), (spacing_mm,) * 3)
            write_volume(scan, Volume(rng.random((1, *grid.shape), np.float32), grid))
            write_label(label, LabelVolume(rng.integers(0, 2, grid.shape, np.uint8), grid))
            moved = [replace(s, scans=dict.fromkeys(s.scans, scan), label=label) for s in held]
            dataset = replace(balls, subjects=(*moved, *others))
            options = RunOptions(device="cpu", fold=fold, split_file=file)
            made = derived_recipe(dataset, options, Reporter(), ["training.steps=2"])
            derived[fold, spacing_mm] = made.recipe.as_dict(), made.reasons
    assert derived[0, 1.0] == derived[0, 5.0]
    assert derived[None, 1.0] != derived[None, 5.0]


@pytest.mark.parametrize(
    ("change", "gone"),
    [
        ("sampler={kind: class_balanced}", "sampler.kind"),
        ("preprocessing=[]", "preprocessing.1.kind"),
        ("preprocessing.1.spacing_mm=[2,2,2]", "preprocessing.1.kind"),
        ("augmentation.spatial=null", "augmentation.spatial.mirror"),
        ("tiles.shape=[8,8,8]", "tiles.shape"),
        ("training.optimiser.learning_rate=0.001", "training.optimiser.learning_rate"),
    ],
)
def test_what_a_change_gives_has_no_reason(balls, change: str, gone: str) -> None:
    said = {}
    for changes in ((), (change,)):
        report = Reporter()
        derived = derived_recipe(balls, RunOptions(device="cpu"), report, ["training.steps=2", *changes])
        said[changes] = derived.reasons
        assert [path for path in derived.reasons if f"auto: {path} = " not in "\n".join(report.messages)] == []
    assert said[change,].items() < said[()].items()
    assert gone not in said[change,]
    assert "network.widths" in said[change,]


@pytest.mark.parametrize(("always", "others"), [(1, 5), (2, 4), (5, 1), (3, 3)])
def test_subjects_always_trained_on_get_their_share_of_the_samples(balls, recipe, always, others) -> None:
    names = [subject.id for subject in balls.subjects]
    split = Split((tuple(names[always:]),), always_train=tuple(names[:always]))
    for share in (0.25, 0.5, 0.8):
        changed = recipe_from(apply_changes(recipe.as_dict(), [f"training.always_train_share={share}"]))
        unvalidated = recipe_from(apply_changes(changed.as_dict(), ["training.validation.subjects=0"]))
        roles = assign_roles(balls.subjects, split, None, unvalidated)
        assert len(roles.training) == 6
        few = sum(n for s, n in zip(roles.training, roles.repeats, strict=True) if s.id in split.always_train)
        # Repeats are whole numbers, so that the share is met to within the rounding of one of them.
        assert abs(few / sum(roles.repeats) - share) < 0.12
    assert set(assign_roles(balls.subjects, split, None, recipe).repeats) == {1}
