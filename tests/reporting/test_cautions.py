"""What stands in the box at the top of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from delineate.evaluation.table import Evaluation
from delineate.metrics.quantities import QuantityMap
from delineate.recipe import TrainingSpec
from delineate.reporting.cautions import Training, cautions, cautions_of_groups, trend


def trained(done: int, scores: Sequence[float], **spec: Any) -> Training:
    """Validated at even shares of the steps, a minute each."""
    at = [done * (i + 1) // len(scores) for i in range(len(scores))]
    validation = {"step": at, "dice": scores, "dice_a": scores, "dice_b": 0.5, "minutes": range(1, len(at) + 1)}
    return Training(
        TrainingSpec.model_validate({"steps": 100} | spec),
        pd.DataFrame({"step": range(done), "loss": 1.0}),
        pd.DataFrame(validation) if scores else None,
        steps_an_epoch=10,
    )


FEW = "Whether validation was still rising cannot be told from 3 validations; it takes 4."
CASES = {
    "as it should be": (trained(100, [0.5, 0.8, 0.7]), ["Trained for 100 steps (3.0 minutes, 10 epochs).", FEW]),
    "cut short": (trained(60, [0.5, 0.8, 0.7]), ["Unfinished: 60 of 100 steps", FEW]),
    "minutes left": (trained(60, [0.5, 0.8, 0.7], steps=None, minutes=10), ["3.0 of 10 minutes", FEW]),
    "minutes spent before the steps": (trained(60, [0.5, 0.8, 0.7], minutes=3), ["Trained for 60 steps", FEW]),
    "epochs left": (trained(60, [0.5, 0.8, 0.7], steps=None, epochs=8), ["6 of 8 epochs", FEW]),
    "gave up": (trained(60, [0.8, 0.5, 0.5], validation={"patience": 2}), ["Trained for 60 steps", FEW]),
    "did not give up yet": (trained(60, [0.8, 0.5, 0.5], validation={"patience": 3}), ["Unfinished", FEW]),
    "best last": (trained(100, [0.5, 0.6, 0.7]), ["Trained", "step 100, Dice 0.700; previous best 0.600"]),
    "best last, but not the worst target": (
        trained(100, [0.5, 0.6, 0.7], validation={"metric": "worst_dice"}), ["Trained", FEW],
    ),
    "best last, and cut short": (trained(50, [0.5, 0.6]), ["Unfinished", "Undertrained"]),
    "validated once": (trained(100, [0.5]), ["Trained", "validated only once, at step 100"]),
    "best last, but the last are kept": (trained(100, [0.5, 0.6, 0.7], keep="last"), ["Trained", FEW]),
    "never validated": (trained(100, []), ["Trained", "The weights were never validated"]),
    "rising": (
        trained(120, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], steps=120),
        ["Trained", "still rising at the end, +0.300 Dice from step 60 to 120 (95 % interval +0.300 to +0.300"],
    ),
    "level": (trained(100, [0.1, 0.2, 0.7, 0.7, 0.7, 0.7]), ["Trained", "Validation had levelled off, +0.000 Dice"]),
    "falling": (trained(100, [0.1, 0.9, 0.8, 0.7, 0.6]), ["Trained", "Validation was falling at the end"]),
    "too noisy": (trained(100, [0.5, 0.8, 0.4, 0.7, 0.6]), ["Trained", "may still have been rising"]),
}  # fmt: skip


@pytest.mark.parametrize(("training", "said"), CASES.values(), ids=CASES)
def test_how_training_ended_is_said(training: Training, said: list[str]) -> None:
    found = cautions(training, None)
    assert len(found) == len(said), found
    assert all(part in sentence for part, sentence in zip(said, found, strict=True)), found


def test_the_trend_is_that_of_the_last_third_and_its_interval_covers_it(rng: np.random.Generator) -> None:
    steps = np.arange(10, 310, 10)
    true = np.where(steps < 200, 0.5, 0.5 + 0.001 * (steps - 200))
    exact = trend(list(zip(steps.tolist(), true.tolist(), strict=True)))
    assert exact is not None
    assert (exact.n, exact.steps) == (10, (210, 300))
    assert exact.rise == pytest.approx(0.09)
    covered = 0
    for _ in range(300):
        noisy = trend(list(zip(steps.tolist(), (true + 0.02 * rng.standard_normal(30)).tolist(), strict=True)))
        assert noisy is not None
        covered += noisy.ci95[0] <= 0.09 <= noisy.ci95[1]
    assert 0.92 <= covered / 300 <= 0.98


def volumes(predicted: np.ndarray, reference: np.ndarray, **columns: object) -> Evaluation:
    names = [f"s{i}" for i in range(len(reference))]
    table = {"subject": names, "site": "", "target": "liver", "volume_ml": predicted, "reference_volume_ml": reference}
    return Evaluation(pd.DataFrame(table | columns))


@pytest.mark.parametrize(("bias_ml", "said"), [(8.0, "8.04 ml too large"), (-8.0, "7.96 ml too small"), (0.0, "")])
def test_volumes_beside_their_interval_are_said(bias_ml: float, said: str) -> None:
    reference = np.linspace(80, 120, 20)
    found = cautions(None, volumes(reference + bias_ml + np.tile([1.04, -0.96], 10), reference))
    assert len(found) == bool(said)
    assert all(said in sentence and "n = 20" in sentence for sentence in found)


def test_readings_beside_their_interval_are_said_in_percentage_points() -> None:
    reference = np.linspace(2, 20, 10)
    more = {"quantity_mean": reference - 1 + np.tile([0.1, -0.1], 5), "reference_quantity_mean": reference}
    found = cautions(None, replace(volumes(reference, reference, **more), quantity=QuantityMap("fat_fraction")))
    assert [sentence for sentence in found if "1 percentage points too low on average" in sentence]


def test_who_lacks_a_target_or_lost_it_is_named() -> None:
    case = ["both"] * 7 + ["prediction empty", "reference empty", "both empty"]
    dice = [0.0, *[0.8] * 6, 0.0, 0.0, 1.0]
    found = cautions(None, volumes(np.ones(10), np.ones(10), case=case, dice=dice))
    said = ("in 2 of the 8 subjects that have it (s0, s7)", "in 1 of 2 subjects (s8)", "in the reference: 2 of 10")
    for part in said:
        assert sum(part in sentence for sentence in found) == 1, found
    assert not any("no target was missed" in sentence for sentence in found)


@pytest.mark.parametrize(
    ("shift", "sites", "said"),
    [
        (0.2, "AB", "Sites differ: mean Dice at A is 0.200 higher than at the others"),
        (0.0, "AB", "No site's mean Dice differs from the others' beyond chance"),
        (0.2, "AABBC", "Sites differ: mean Dice at B"),
        (0.2, "AAAAAAAAAAAB", "Too few patients at each site to tell"),
        (0.2, "A", ""),
    ],
)
def test_sites_that_differ_are_named(shift: float, sites: str, said: str) -> None:
    site = [(sites * 20)[i] for i in range(20)]
    dice = 0.7 + 0.01 * np.tile([1, 1, -1, -1], 5) - shift * (np.array(site) == "B")
    found = cautions(None, volumes(np.ones(20), np.ones(20), site=site, dice=dice))
    assert any(said in sentence for sentence in found), found
    assert any("ite" in sentence for sentence in found) == bool(said)


def test_what_few_patients_cannot_tell() -> None:
    """No miss in 20 patients still allows one in seven: 0.05 ^ (1 / 20) = 0.861."""
    many = cautions(None, volumes(np.ones(20), np.ones(20), case="both"))
    assert any("up to 14 % of patients" in sentence for sentence in many)
    few = cautions(None, volumes(np.ones(5), np.ones(5), case="both"))
    assert "Fewer than 6 patients cannot tell two methods apart, whatever the difference." in few
    assert cautions(None, volumes(np.ones(1), np.ones(1))) == ["n = 1 patient: nothing can be said about others."]


def test_of_several_groups_shared_sentences_stand_once() -> None:
    reference = np.linspace(80, 120, 20)
    same, biased = volumes(reference, reference, case="both"), volumes(reference + 5, reference, case="both")
    found = cautions_of_groups({"one": same, "two": biased})
    assert sum("n = 20 patients tell" in sentence for sentence in found) == 1
    assert [sentence.partition(":")[0] for sentence in found if "Biased" in sentence] == ["two"]
    counted = cautions_of_groups({f"g{i}": biased if i < 3 else same for i in range(6)})
    assert counted == ["3 of 6 groups of runs have biased volumes or readings: see the agreement with the references."]
