"""What a careful colleague would say before the numbers: how training ended, who is missing, what n cannot tell."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan, sqrt

import numpy as np
import pandas as pd
import scipy  # loads its submodules on first use
from numpy.typing import NDArray

from delineate.evaluation.table import MISSED, RIGHTLY_NOTHING, Evaluation
from delineate.metrics.statistics import SIGNIFICANCE, fewest_patients, holm
from delineate.recipe import TrainingSpec

_SPENT = 0.99
"""Share of a budget from which it counts as spent."""

_LEAST_VALIDATIONS = 4
"""Fewest validations through which a line says anything about whether they still rise."""

_LEVEL = 0.01
"""A validation that rises by no more than this over the last third has levelled off."""

_LEAST_AT_A_SITE = 3
"""Fewest patients at a site whose mean is compared with the other sites'."""

_MOST_NAMES = 8
_MOST_GROUPS = 4
_FOUND, _MARKED = "both", "reference empty"


@dataclass(frozen=True, eq=False)
class Training:
    """How far training got: its curves, as stored in ``logs/``, and the budget.

    ``steps_an_epoch`` is None for a run of an earlier version, which had no epochs.
    """

    spec: TrainingSpec
    learning: pd.DataFrame | None
    validation: pd.DataFrame | None
    steps_an_epoch: int | None = None

    @property
    def steps(self) -> int:
        """Steps done; each loss is numbered by the steps before it."""
        return 0 if self.learning is None or self.learning.empty else int(self.learning["step"].iloc[-1]) + 1

    @property
    def minutes(self) -> float:
        """Minutes spent up to the last validation, which ends the budget; undefined without a validation."""
        if self.validation is None or self.validation.empty or "minutes" not in self.validation:
            return nan
        return float(self.validation["minutes"].iloc[-1])

    @property
    def epochs(self) -> float:
        """Passes over all items; undefined where their length is not known."""
        return self.steps / self.steps_an_epoch if self.steps_an_epoch else nan

    @property
    def scores(self) -> list[tuple[int, float]]:
        """Step and score of each validation; the weights are selected by this score."""
        if self.validation is None:
            return []
        table, each = self.validation, [c for c in self.validation.columns if str(c).startswith("dice_")]
        score = table["dice"] if self.spec.validation.metric == "dice" else table[each].min(axis=1)
        return [(int(step), float(value)) for step, value in zip(table["step"], score, strict=True)]

    @property
    def best(self) -> int:
        """Index of the best validation, the first among equals; -1 if there was none."""
        values = [score for _, score in self.scores]
        return int(np.argmax(values)) if values else -1

    @property
    def spent(self) -> float:
        """The share of the budget that was used; undefined if it is not known."""
        spec = self.spec
        limits = ((self.steps, spec.steps), (self.minutes, spec.minutes), (self.epochs, spec.epochs))
        shares = [done / budget for done, budget in limits if budget is not None and done == done]
        return max(shares, default=nan)

    @property
    def gave_up(self) -> bool:
        """Whether training ended because validation had stopped improving."""
        patience = self.spec.validation.patience
        return patience is not None and len(self.scores) - 1 - self.best >= patience

    @property
    def trend(self) -> Trend | None:
        """How the validation score moved at the end; None with too few validations to tell."""
        return trend(self.scores)


@dataclass(frozen=True)
class Trend:
    """By how much a validation score rose over the last ``n`` validations ``of`` all, from step to step.

    ``rise`` is that of a straight line fitted by least squares, with Student's 95 % interval; validations are taken
    as independent.
    """

    rise: float
    ci95: tuple[float, float]
    n: int
    of: int
    steps: tuple[int, int]

    @property
    def rising(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.ci95[0] > 0

    @property
    def level(self) -> bool:
        """Whether the interval leaves no room for a rise worth more training."""
        return self.ci95[1] <= _LEVEL

    def __str__(self) -> str:
        low, high = map(_signed, self.ci95)
        return (
            f"{_signed(self.rise)} Dice from step {self.steps[0]} to {self.steps[1]} (95 % interval {low} to {high}: a "
            f"straight line through the last {self.n} of {self.of} validations)"
        )


def trend(scores: Sequence[tuple[int, float]]) -> Trend | None:
    """The :class:`Trend` of scores by step, over their last third, but at least four; None for fewer."""
    if len(scores) < _LEAST_VALIDATIONS:
        return None
    steps, values = np.array(scores[-max(_LEAST_VALIDATIONS, -(-len(scores) // 3)) :], float).T
    n, span = len(steps), float(steps[-1] - steps[0])
    centred = steps - steps.mean()
    slope = float(centred @ values / (centred @ centred))
    left = values - values.mean() - slope * centred
    error = sqrt(float(left @ left) / (n - 2) / float(centred @ centred))
    half = float(scipy.special.stdtrit(n - 2, 0.975)) * error
    ends = (slope - half) * span, (slope + half) * span
    return Trend(slope * span, ends, n, len(scores), (int(steps[0]), int(steps[-1])))


def cautions(training: Training | None, evaluation: Evaluation | None) -> list[str]:
    """The sentences, most serious first: about the training, then about who was measured."""
    found = [] if training is None else [*_of_training(training)]
    if evaluation is None:
        return found
    parts = (_of_targets, _of_bias, _of_sites, _of_number)
    return [*found, *(sentence for part in parts for sentence in part(evaluation))]


def cautions_of_groups(evaluations: Mapping[str, Evaluation]) -> list[str]:
    """The sentences about several groups: what holds for all of them once, else by name; of many groups, how many."""
    if len(evaluations) > _MOST_GROUPS:
        counts = {
            what: sum(any(True for _ in part(evaluation)) for evaluation in evaluations.values())
            for what, part in (
                ("a target that was missed, was marked where there is none, or is not in every reference", _of_targets),
                ("biased volumes or readings: see the agreement with the references", _of_bias),
            )
        }
        return [f"{n} of {len(evaluations)} groups of runs have {what}." for what, n in counts.items() if n]
    said = {name: cautions(None, evaluation) for name, evaluation in evaluations.items()}
    names: dict[str, list[str]] = {}
    for name, sentences in said.items():
        for sentence in sentences:
            names.setdefault(sentence, []).append(name)
    return [
        sentence if len(found) == len(evaluations) else f"{', '.join(found)}: {sentence}"
        for sentence, found in names.items()
    ]


def _of_training(training: Training) -> Iterator[str]:
    spec, scores = training.spec, training.scores
    if training.spent < _SPENT and not training.gave_up:
        parts = []
        if spec.steps is not None:
            parts.append(f"{training.steps} of {spec.steps} steps")
        if spec.minutes is not None and training.minutes == training.minutes:
            parts.append(f"{training.minutes:.1f} of {spec.minutes:g} minutes")
        if spec.epochs is not None:
            parts.append(f"{training.epochs:.3g} of {spec.epochs} epochs")
        yield f"Unfinished: {', '.join(parts)} done. Run the same command again to resume."
    else:
        more = [f"{training.minutes:.1f} minutes"] * (not isnan(training.minutes))
        more += [f"{training.epochs:.3g} epochs"] * (not isnan(training.epochs))
        spent = f" ({', '.join(more)})" if more else ""
        yield f"Trained for {training.steps} steps{spent}."
    selects = spec.keep != "last"
    if selects and not scores:
        yield f"The weights were never validated: they are those of the last of {training.steps} steps."
    elif selects and len(scores) == 1:
        yield f"The weights were validated only once, at step {scores[0][0]}; they may still have been improving."
    elif scores:
        yield from _of_validation(training, selects)


def _of_validation(training: Training, selects: bool) -> Iterator[str]:
    """Whether validation was still rising at the end of training."""
    scores, found = training.scores, training.trend
    last = selects and training.best == len(scores) - 1
    if found is None:
        if last:
            before = max(score for _, score in scores[:-1])
            step, score = scores[-1]
            yield (
                f"Undertrained: the best weights are those of the last validation (step {step}, Dice {score:.3f}; "
                f"previous best {before:.3f}), so the network was still improving. Train longer for a fair result."
            )
        else:
            yield (
                f"Whether validation was still rising cannot be told from {len(scores)} validation"
                f"{'s' * (len(scores) > 1)}; it takes {_LEAST_VALIDATIONS}."
            )
    elif found.rising:
        yield f"Undertrained: validation was still rising at the end, {found}. Train longer for a fair result."
    elif found.ci95[1] < 0:
        yield f"Validation was falling at the end, {found}: longer training of this kind would not help."
    elif found.level:
        yield f"Validation had levelled off, {found}."
    else:
        also = "; the best weights are those of the last validation" if last else ""
        yield f"Validation may still have been rising at the end, {found}{also}."


def _of_targets(evaluation: Evaluation) -> Iterator[str]:
    """Who lacks a target, or whose target was missed."""
    table = evaluation.table
    if "case" not in table:
        return
    for target, rows in table.groupby("target", sort=False):
        names = rows["subject"].astype(str)
        missed = names[_missed(rows)].tolist()
        marked, nothing = (names[rows["case"] == case].tolist() for case in (_MARKED, RIGHTLY_NOTHING))
        without, n = len(marked) + len(nothing), len(rows)
        if missed:
            have_it = f"the {n - without} subjects that have it{_who(missed)}"
            yield f"Missed entirely (not a voxel of it found): {target} in {len(missed)} of {have_it}."
        if marked:
            yield f"Marked where there is none: {target} in {len(marked)} of {without} subjects{_who(marked)}."
        if without:
            yield (
                f"Without {target} in the reference: {without} of {n} subjects{_who([*marked, *nothing])}. They show "
                "whether it is marked wrongly, not how well it is outlined."
            )


def _missed(rows: pd.DataFrame) -> pd.Series[bool]:
    """Which targets were not found at all: nothing is predicted, or nothing of it overlaps."""
    nothing = rows["case"] == MISSED
    return nothing | ((rows["case"] == _FOUND) & (rows["dice"].astype(float) == 0)) if "dice" in rows else nothing


def _who(names: Sequence[str]) -> str:
    return f" ({', '.join(names[:_MOST_NAMES])}{', …' if len(names) > _MOST_NAMES else ''})"


def _of_bias(evaluation: Evaluation) -> Iterator[str]:
    """Volumes, and means of a quantity, whose interval excludes zero."""
    for agreeing in evaluation.agreements:
        compared, found = agreeing.compared, agreeing.absolute
        low, high = found.bias_ci95
        if not (low > 0 or high < 0) or compared.predicted not in ("volume_ml", "quantity_mean"):
            continue
        unit = f" {compared.difference_unit}" if compared.difference_unit else ""
        side = ("large" if low > 0 else "small") if compared.relative else ("high" if low > 0 else "low")
        what = "volumes" if compared.relative else compared.name.removeprefix("mean ")
        ends = " to ".join(f"{end:+.3g}".replace("-", "−") for end in (low, high))
        yield (
            f"Biased {what}: {agreeing.target} predicted {abs(found.bias):.3g}{unit} too {side} on average "
            f"(95 % interval {ends}{unit}, n = {found.count})."
        )


def _of_sites(evaluation: Evaluation) -> Iterator[str]:
    """Sites whose mean Dice differs from the others' (Welch's test over patients, Holm-corrected)."""
    if "dice" not in evaluation.metrics or len(evaluation.sites) < 2:
        return
    sites = dict(zip(evaluation.table["subject"], evaluation.table["site"], strict=True))
    scores = evaluation.mean_of_targets("dice").dropna()
    keys = pd.MultiIndex.from_tuples([(sites[name], evaluation.patients[name]) for name in scores.index])
    means = pd.Series(scores.to_numpy(float), keys).groupby(level=[0, 1], sort=True).mean()
    of_site = {str(site): values.to_numpy() for site, values in means.groupby(level=0)}
    enough = {site: values for site, values in of_site.items() if len(values) >= _LEAST_AT_A_SITE}
    if len(enough) < 2:
        counts = ", ".join(f"{site or 'no site'} {len(values)}" for site, values in of_site.items())
        yield (
            f"Too few patients at each site to tell whether sites differ ({counts}; at least {_LEAST_AT_A_SITE} at two "
            "sites are needed)."
        )
        return
    # Of two sites, one comparison says all.
    compared = [next(iter(enough))] if len(enough) == 2 else [*enough]
    found = [
        _welch(enough[site], np.concatenate([v for other, v in enough.items() if other != site])) for site in compared
    ]
    corrected = holm([p for *_, p in found])
    told = False
    for site, (difference, low, high, _), p in zip(compared, found, corrected, strict=True):
        if p < SIGNIFICANCE:
            told = True
            others = sum(len(values) for other, values in enough.items() if other != site)
            yield (
                f"Sites differ: mean Dice at {site or 'no site'} is {abs(difference):.3f} "
                f"{'higher' if difference > 0 else 'lower'} than at the others (95 % interval {_signed(low)} to "
                f"{_signed(high)}, n = {len(enough[site])} and {others} patients)."
            )
    if not told:
        widest = max(max(abs(low), abs(high)) for _, low, high, _ in found)
        yield (
            f"No site's mean Dice differs from the others' beyond chance; with these patients, a difference of up to "
            f"{widest:.3f} could go unnoticed."
        )


def _welch(first: NDArray[np.float64], second: NDArray[np.float64]) -> tuple[float, float, float, float]:
    """Difference of two means with its 95 % interval, and p; without any spread, p is undefined."""
    difference = float(first.mean() - second.mean())
    if np.ptp(first) == 0 and np.ptp(second) == 0:
        return difference, difference, difference, nan
    tested = scipy.stats.ttest_ind(first, second, equal_var=False)
    low, high = tested.confidence_interval(0.95)
    return difference, float(low), float(high), float(tested.pvalue)


def _of_number(evaluation: Evaluation) -> Iterator[str]:
    """What the number of patients leaves open."""
    n = len(set(evaluation.patients.values()))
    if n < 2:
        yield "n = 1 patient: nothing can be said about others."
        return
    dice = evaluation.overall().get("dice")
    said = []
    if dice is not None and not isnan(dice.ci95[0]):
        said.append(f"the mean Dice of all patients like these lies between {dice.ci95[0]:.3f} and {dice.ci95[1]:.3f}")
    table = evaluation.table
    has_it = table.loc[table["case"].isin([_FOUND, MISSED]), "subject"] if "case" in table else table["subject"][:0]
    if len(has_it) and not _missed(table).any():
        # Exact one-sided bound for no event (Hanley & Lippman-Hand 1983).
        often = 100 * (1 - SIGNIFICANCE ** (1 / has_it.map(evaluation.patients).nunique()))
        said.append(f"no target was missed, which still allows up to {often:.0f} % of patients with a missed one")
    if said:
        yield f"What n = {n} patients tell, with 95 % confidence: {'; '.join(said)}."
    if n < fewest_patients():
        yield f"Fewer than {fewest_patients()} patients cannot tell two methods apart, whatever the difference."


def _signed(value: float) -> str:
    return f"{round(value, 3) + 0.0:+.3f}".replace("-", "−")
