"""What stands in the box at the top of a run's report."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from delineate.evaluation.table import Evaluation
from delineate.recipe import TrainingSpec
from delineate.reporting.cautions import Training, cautions


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


CASES = {
    "as it should be": (trained(100, [0.5, 0.8, 0.7]), []),
    "levelled off": (trained(100, [0.5, 0.8, 0.8]), []),
    "cut short": (trained(60, [0.5, 0.8, 0.7]), ["Unfinished: 60 of 100 steps"]),
    "minutes left": (trained(60, [0.5, 0.8, 0.7], steps=None, minutes=10), ["3.0 of 10 minutes"]),
    "minutes spent before the steps": (trained(60, [0.5, 0.8, 0.7], minutes=3), []),
    "epochs left": (trained(60, [0.5, 0.8, 0.7], steps=None, epochs=8), ["6 of 8 epochs"]),
    "gave up": (trained(60, [0.8, 0.5, 0.5], validation={"patience": 2}), []),
    "did not give up yet": (trained(60, [0.8, 0.5, 0.5], validation={"patience": 3}), ["Unfinished"]),
    "rising": (trained(100, [0.5, 0.6, 0.7]), ["step 100, Dice 0.700; previous best 0.600"]),
    "rising, but not the worst target": (trained(100, [0.5, 0.6, 0.7], validation={"metric": "worst_dice"}), []),
    "both": (trained(50, [0.5, 0.6]), ["Unfinished", "Undertrained"]),
    "validated once": (trained(100, [0.5]), ["validated only once, at step 100"]),
    "rising, but the last are kept": (trained(100, [0.5, 0.6, 0.7], keep="last"), []),
    "never validated": (trained(100, []), ["The weights were never validated"]),
}


@pytest.mark.parametrize(("training", "said"), CASES.values(), ids=CASES)
def test_a_training_that_did_not_run_its_course_is_said(training: Training, said: list[str]) -> None:
    found = cautions(training, None)
    assert len(found) == len(said), found
    assert all(part in sentence for part, sentence in zip(said, found, strict=True)), found


@pytest.mark.parametrize(("bias_ml", "said"), [(8.0, "8.04 ml too large"), (-8.0, "7.96 ml too small"), (0.0, "")])
def test_volumes_beside_their_interval_are_said(bias_ml: float, said: str) -> None:
    reference = np.linspace(80, 120, 20)
    table = {
        "subject": [f"s{i}" for i in range(20)], "site": "", "target": "liver", "case": "both",
        "volume_ml": reference + bias_ml + np.tile([1.04, -0.96], 10), "reference_volume_ml": reference,
    }  # fmt: skip
    found = cautions(CASES["as it should be"][0], Evaluation(pd.DataFrame(table)))
    assert len(found) == bool(said)
    assert all(said in sentence and "n = 20" in sentence for sentence in found)
