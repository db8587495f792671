"""What fine-tuning cost on the source data."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from delineate.bundle import Bundle, Provenance, hidden
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.datasets.phantoms.writing import write_phantoms
from delineate.errors import BundleError, DatasetError
from delineate.evaluation.forgetting import measure_forgetting
from delineate.evaluation.measure import Measuring
from delineate.evaluation.table import Evaluation
from delineate.io.pseudonyms import key_id
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry

PLAN = plan_compute(device="cpu", precision="fp32", compile="off")


def saved(folder: Path, targets: Targets, seed: int, training: list[str], *, bias: float | None = None) -> Bundle:
    """Random weights; with a ``bias`` of 1e4, everything is the one target, with -1e4 nothing is."""
    recipe = recipe_from(
        {
            "name": "small",
            "preprocessing": [{"kind": "resample", "spacing_mm": [12, 12, None]}, {"kind": "normalise"}],
            "tiles": {"kind": "slices", "shape": [32, 32]},
            "network": {"kind": "unet", "dimensions": 2, "widths": [4, 8]},
        }
    )
    geometry = TileGeometry((32, 32, 1), slice_axis=2)
    bundle = Bundle(recipe, recipe.pipeline, targets, ("MRI",), geometry, (12.0, 12.0, 7.0))
    torch.manual_seed(seed)
    provenance = Provenance(key=key_id(), training=hidden(training))
    weights = bundle.network().state_dict()
    if bias is not None:
        weights["head.bias"] = torch.tensor([0.0, bias])
    replace(bundle, provenance=provenance).save(folder, weights, {})
    return Bundle.load(folder)


def test_both_are_measured_on_what_neither_saw_in_what_both_name(tmp_path: Path) -> None:
    source = write_phantoms(tmp_path / "scans", 4)
    subjects = source.subjects
    both = saved(tmp_path / "a", Targets({"liver": (1,), "tumour": (2,)}), 0, [subjects[0].id])
    tumour = saved(tmp_path / "b", Targets({"tumour": (1,)}), 1, [subjects[1].id])
    found = measure_forgetting(both, tumour, source, tmp_path / "out", PLAN, Measuring("dice,volume_ml"))
    for evaluation in found.values():
        assert evaluation.targets == ("tumour",)
        assert evaluation.subjects == tuple(s.id for s in subjects[2:])
        assert evaluation.simulated
    assert Evaluation.read(tmp_path / "out/before_evaluation").simulated
    same = measure_forgetting(both, both, source, tmp_path / "same", PLAN, Measuring("lits"))
    assert same["before"].table.equals(same["after"].table)
    assert same["before"].targets == ("liver", "tumour")


def test_before_is_the_first_and_after_the_second(tmp_path: Path) -> None:
    source = write_phantoms(tmp_path / "scans", 2)
    everywhere, nowhere = (
        saved(tmp_path / name, Targets({"organ": (1, 2)}), 0, ["somebody"], bias=bias)
        for name, bias in (("everywhere", 1e4), ("nowhere", -1e4))
    )
    found = measure_forgetting(everywhere, nowhere, source, tmp_path / "out", PLAN, Measuring("volume_ml"))
    assert found["before"].table["volume_ml"].min() > 0
    assert found["after"].table["volume_ml"].max() == 0
    assert Evaluation.read(tmp_path / "out/before_evaluation").table["volume_ml"].min() > 0


def test_what_cannot_be_compared_is_said(tmp_path: Path) -> None:
    source = write_phantoms(tmp_path / "scans", 1)
    subjects = source.subjects
    liver = saved(tmp_path / "a", Targets({"liver": (1,), "tumour": (2,)}), 0, ["somebody"])
    brain = saved(tmp_path / "b", Targets({"lesion": (1,)}), 1, [subjects[0].id])
    with pytest.raises(BundleError, match="they have no target in common"):
        measure_forgetting(liver, brain, source, tmp_path / "out", PLAN, Measuring("dice"))
    seen = saved(tmp_path / "c", Targets({"liver": (1,), "tumour": (2,)}), 1, [subjects[0].id])
    with pytest.raises(DatasetError, match="seen in training"):
        measure_forgetting(liver, seen, source, tmp_path / "out", PLAN, Measuring("dice"))
