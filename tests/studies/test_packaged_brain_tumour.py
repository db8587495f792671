"""The study of the brain tumour report: its arms are the packaged recipes, and its quick size is small."""

from __future__ import annotations

from pathlib import Path

import pytest

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.recipe import Recipe, load_recipe
from delineate.sampling.tiles import geometry_for
from delineate.studies.designs import PlannedRun
from delineate.studies.planning import plan_runs
from delineate.studies.specification import load_study

STUDY = load_study("brain-tumour-minicubes")
NETWORKS = {"2D": "brain_2d", "3D": "brain_3d", "3D-context": "brain_3d_context", "small": "brain_3d_small"}
LOSSES = {"dice": "", "cross-entropy": "_cross_entropy", "focal-tversky": "_focal_tversky"}
GAMMAS = {"gamma1": 1, "gamma1.33": 4 / 3, "gamma2": 2, "gamma3": 3}
WEIGHTS = {"fp.3": (0.3, 0.7), "fp.5": (0.5, 0.5), "fp.7": (0.7, 0.3)}
CUBES = ("3D", "3D-context", "small")


def planned(size: str, patients: int) -> dict[str, PlannedRun]:
    """The runs by arm."""
    channels = {name: Path(f"{name}.nii") for name in ("FLAIR", "T1", "T1c", "T2")}
    subjects = tuple(Subject(f"p{i:03}", channels, Path("label.nii"), patient=f"p{i:03}") for i in range(patients))
    runs = plan_runs(STUDY, STUDY.sizes[size], {"scans": Dataset("d", Path(), "msd", subjects)}).runs  # type: ignore[index]
    assert len({run.label for run in runs}) == len(runs), "one run for each arm"
    return {run.label: run for run in runs}


def what_matters(recipe: Recipe) -> dict[str, object]:
    return recipe.model_dump(exclude={"name", "description", "deviates"})


def test_the_paper_size_trains_the_packaged_recipes() -> None:
    """484 labelled scans, about a sixth of them for the test; four networks with three losses, a grid, overlap."""
    runs = planned("paper", 484)
    assert len(runs) == 12 + 12 + 3
    for network, name in NETWORKS.items():
        for loss, suffix in LOSSES.items():
            run = runs[f"networks/{network}+{loss}"]
            assert what_matters(run.recipe) == what_matters(load_recipe(name + suffix))
            assert (len(run.split.training_of(run.fold)), len(run.split.held_out(run.fold))) == (403, 81)
            assert (run.recipe.training.epochs, run.recipe.training.batch_size) == (10, 8 if network == "2D" else 2)
    assert len({run.split for run in runs.values() if run.weights_of is None}) == 1
    assert {run.seed for run in runs.values()} == {0}


@pytest.mark.parametrize("size", STUDY.sizes)
def test_the_grid_varies_the_parameters_of_focal_tversky_alone(size: str) -> None:
    runs = planned(size, 18)
    same = load_recipe("brain_3d_focal_tversky").loss.model_dump()
    for gamma, value in GAMMAS.items():
        for weights, (fp, fn) in WEIGHTS.items():
            recipe = runs[f"grid/{gamma}+{weights}"].recipe
            assert recipe.loss.model_dump() == same | {"gamma": value, "fp_weight": fp, "fn_weight": fn}
            first = runs["grid/gamma1+fp.3"].recipe
            assert recipe.model_copy(update={"loss": first.loss}) == first
    assert runs["grid/gamma1.33+fp.3"].recipe.network.kind == {"quick": "minicube_net", "paper": "context_unet"}[size]


@pytest.mark.parametrize("size", STUDY.sizes)
def test_overlap_is_tested_with_the_same_networks_and_subjects(size: str) -> None:
    runs = planned(size, 18)
    for network in CUBES:
        eight, overlapping = runs[f"networks/{network}+dice"], runs[f"overlap/{network}"]
        assert (overlapping.weights_of, overlapping.changes) == (eight.name, ("inference.overlap=0.5",))
        assert overlapping.split.held_out(overlapping.fold) == eight.split.held_out(eight.fold)
        volume = eight.recipe.preprocessing[-2].model_dump()["shape"]
        geometry = geometry_for(eight.recipe.tiles, volume, (1, 1, 1), eight.recipe.network)
        assert eight.recipe.inference.overlap == 0
        assert [len(geometry.tiles(volume, overlap)) for overlap in (0.0, 0.5)] == [8, 27]


def test_the_quick_size_is_the_paper_s_at_a_quarter_of_the_resolution() -> None:
    quick, paper = planned("quick", 18), planned("paper", 18)
    assert quick.keys() == paper.keys()
    for label, run in quick.items():
        if run.weights_of is not None:
            continue
        small, whole = run.recipe, paper[label].recipe
        assert len(run.split.held_out(run.fold)) == 6, "as many as it takes to tell two arms apart"
        assert (small.training.steps, small.training.epochs, small.training.minutes) == (400, None, None)
        assert (small.loss, small.sampler, small.inference) == (whole.loss, whole.sampler, whole.inference)
        small_side, full = (recipe.model_dump()["tiles"]["shape"] for recipe in (small, whole))
        assert tuple(4 * side for side in small_side) == full
        assert [step.kind for step in small.preprocessing if step.kind != "resample"] == [
            step.kind for step in whole.preprocessing
        ]


def test_figures_beside_table_2_are_of_its_networks_and_classes() -> None:
    tables = [table for table in STUDY.published if table.measures]
    assert [table.measures[0] for table in tables] == [
        f"precision@{name}" for name in ("background", "edema", "non_enhancing", "enhancing")
    ]
    for table in tables:
        assert "swapped" in table.source
        assert [table.arms[row[0]] for row in table.rows] == [f"networks/{n}+dice" for n in ("2D", "3D", "3D-context")]
