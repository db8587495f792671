"""Validation on whole prepared volumes, shared among the processes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import numpy as np
import torch

from delineate.bundle import Bundle
from delineate.compute import ComputePlan
from delineate.core.targets import IGNORED
from delineate.errors import BundleError, TrainingError
from delineate.inference.predictor import Winners
from delineate.inference.sliding import Sliding
from delineate.preprocessing.cache import PreparedSubject


class Score(NamedTuple):
    """A target of one subject: Dice (both empty: 1), by how much its volume is off, and whether it is there at all."""

    dice: float
    error_ml: float
    present: bool


def validate(
    network: torch.nn.Module, bundle: Bundle, plan: ComputePlan, subjects: Sequence[PreparedSubject]
) -> list[dict[str, Score]]:
    """Scores by target for each subject, on the prepared grid. Without flips, which ``predict`` adds."""
    targets, inference = bundle.targets, bundle.recipe.inference
    # Half the usual overlap needs a fraction of the tiles and ranks weights just as well.
    overlap = min(inference.overlap, 0.25)
    plan = replace(plan, compile=False)  # the network that is kept is not compiled
    sliding = Sliding(plan, targets.exclusive, targets.outputs, overlap, inference.weights)
    was_training = network.training
    network.eval()
    scores = []
    for subject in subjects:
        image = np.asarray(subject.image, dtype=np.float32)
        shape = (image.shape[1], image.shape[2], image.shape[3])
        try:
            found = sliding.scores(network, image, bundle.geometry_of(shape))
        except BundleError as error:
            raise TrainingError(
                "training has diverged: the network's output is not finite at validation",
                fix="lower training.optimiser.learning_rate, or train with --precision fp32",
            ) from error
        reference = np.asarray(subject.target)
        known = reference[0] != IGNORED
        winners = Winners(targets, subject.grid)
        for probability in found:
            winners.add(probability)
        if targets.exclusive:
            pairs = ((winners.encoded[0] == k, reference[0] == k) for k in range(1, targets.outputs))
        else:
            pairs = ((p == 1, r == 1) for p, r in zip(winners.encoded, reference, strict=True))
        voxel_ml = subject.grid.voxel_ml
        scores.append({name: _score(p & known, r, voxel_ml) for name, (p, r) in zip(targets.names, pairs, strict=True)})
    network.train(was_training)
    return scores


@dataclass(frozen=True)
class Means:
    """Mean Dice of all targets and of each, over the subjects that have it, or over all if none does.

    The weights are selected by ``score``, of the targets that any subject has; NaN if there are none: a network that
    predicts nothing would be right about every other. ``error_ml``: mean absolute error of each target's volume.
    """

    dice: float
    targets: Mapping[str, float]
    error_ml: Mapping[str, float]
    score: float


def summary(scores: Sequence[dict[str, Score]], metric: str) -> Means:
    """Means of what :func:`validate` returned; ``metric`` says which is the score."""
    names = list(scores[0])
    having = {name: [s[name].dice for s in scores if s[name].present] for name in names}
    means = {name: fmean(having[name] or [s[name].dice for s in scores]) for name in names}
    judged = [means[name] for name in names if having[name]]
    error_ml = {name: math.fsum(s[name].error_ml for s in scores) / len(scores) for name in names}
    score = math.nan if not judged else fmean(judged) if metric == "dice" else min(judged)
    return Means(fmean(means.values()), means, error_ml, score)


def _score(prediction: np.ndarray, reference: np.ndarray, voxel_ml: float) -> Score:
    found, true = int(prediction.sum()), int(reference.sum())
    dice = 2 * int((prediction & reference).sum()) / (found + true) if found + true else 1.0
    return Score(dice, abs(found - true) * voxel_ml, true > 0)
