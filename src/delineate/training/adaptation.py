"""Adapt a trained bundle to a new scanner with a few labelled scans, and measure what that gained and what it cost.

::

    OUT/
        adaptation.json     what is adapted, how, and who is trained on or held out
        folds/K/            a training without fold K of the new subjects, and its predictions of them
        final/              a training on all new subjects
        bundle/             the adapted bundle
        new/                the new subjects before and after, each held out once
        original/           unseen original subjects before and after

Fine-tuned weights are averaged with the original ones, which keeps most of what was gained and forgets less (WiSE-FT,
Wortsman et al. 2022). The share of the fine-tuned weights is chosen by what it scores on held-out subjects.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from delineate.bundle import Bundle, Provenance, is_whole
from delineate.compute import ComputePlan, plan_compute, torch_threads
from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection
from delineate.datasets.splits import Split, make_split, save_split
from delineate.errors import BundleError, DatasetError
from delineate.evaluation.card import write_card
from delineate.evaluation.card_facts import CardFacts, Kind, Result
from delineate.evaluation.change import JUDGED_BY, Change
from delineate.evaluation.forgetting import AFTER, BEFORE, measure_forgetting
from delineate.evaluation.measure import STANDARD, Measuring, evaluate
from delineate.evaluation.pairs import Pair
from delineate.evaluation.table import Evaluation
from delineate.fingerprint import fingerprint_of, merged
from delineate.inference.batch import predict_subjects
from delineate.inference.predictor import Predictor
from delineate.metrics.statistics import fewest_patients
from delineate.recipe import Recipe
from delineate.training.adapted import PLAN, AdaptationPlan, Adapted
from delineate.training.fine_tuning import Parts
from delineate.training.lock import stop_file
from delineate.training.options import Reporter, RunOptions, Stop
from delineate.training.preparation import inspected
from delineate.training.run import train

SHARES = (0.25, 0.5, 0.75, 1.0)
"""Shares of the fine-tuned weights to choose from."""

UNMEASURED_SHARE = 0.5
"""Share if too few patients can be held out to choose one."""

_VARIANTS = {BEFORE: 0.0, **{f"share_{share:g}": share for share in SHARES}}
"""What predicts a held-out subject, by name: the original weights, or a share of fine-tuned ones."""


def adapt(
    origin: Bundle,
    parts: Parts,
    recipe: Recipe,
    folder: Path,
    options: RunOptions,
    report: Reporter,
    *,
    folds: int = 3,
) -> Adapted:
    """Adapt ``origin`` into ``folder``; run it again with the same arguments to resume.

    The new subjects are divided into at most ``folds`` folds of whole patients. Raises :class:`BrokenSubjects` if
    inspection finds errors, :class:`DatasetError` if ``folder`` holds another adaptation, and what training raises.
    """
    options = replace(options, fold=None, split_file=None, evaluate=False)
    dataset, _, inspection = inspected(recipe, parts.dataset, None, options, report)
    plan = _planned(origin, parts, dataset, recipe, folds)
    _begin(plan, folder)
    work = _Work(origin, plan, dataset, inspection, folder, options, report)
    compute = plan_compute(device=options.device, precision=options.precision, compile="off", threads=options.threads)
    for k in range(len(plan.folds)) if plan.measurable else ():
        stopped = work.measure_fold(k, compute)
        if stopped is not None:
            return Adapted(folder, plan, stopped=stopped)
    gain, share, notes = None, UNMEASURED_SHARE, list(parts.notes)
    if plan.measurable:
        gain, share = work.gain()
    else:
        notes.append(
            "All labelled scans are of one patient, and all were trained on: what was gained cannot be measured, nor "
            f"was the share of fine-tuned weights ({UNMEASURED_SHARE:.0%}) chosen by measurement. Two patients give a "
            f"difference to look at; with {fewest_patients()} patients it can be told from chance."
        )
    if not is_whole(folder / "bundle"):
        stopped = work.train_on_all(share)
        if stopped is not None:
            return Adapted(folder, plan, stopped=stopped)
    forgetting = None
    if parts.unseen is None:
        notes.append(
            "What was forgotten was not measured: give --original, the data that the bundle was trained on."
            if not plan.rehearsed
            else "What was forgotten cannot be measured: the bundle was trained on every subject of --original."
        )
    else:
        forgetting = work.forgetting(parts.unseen, compute)
    work.write_card(gain, forgetting)
    return Adapted(folder, plan, share, gain, forgetting, tuple(notes), dataset.simulated)


def _planned(origin: Bundle, parts: Parts, dataset: Dataset, recipe: Recipe, folds: int) -> AdaptationPlan:
    """The folds of the new subjects that inspection left, and everybody else's part."""
    new = [subject for subject in dataset.subjects if subject.id in parts.new]
    if not new:
        raise DatasetError(f"no subject of '{dataset.name}' is usable", fix="repair some: `delineate data inspect`")
    patients = len({subject.patient for subject in new})
    divided = make_split(new, min(folds, patients)).folds if min(folds, patients) > 1 else ()
    return AdaptationPlan(
        origin=origin.weights_sha256,
        data_set=dataset.name,
        recipe=recipe,
        folds=divided or (tuple(sorted(s.id for s in new)),),
        rehearsed=tuple(sorted(s.id for s in dataset.subjects if s.id not in parts.new)),
        unseen=() if parts.unseen is None else tuple(sorted(s.id for s in parts.unseen.subjects)),
    )


def _begin(plan: AdaptationPlan, folder: Path) -> None:
    """Write the plan, or check that it is the same. Raises :class:`DatasetError`."""
    if not (folder / PLAN).exists():
        plan.write(folder / PLAN)
    before = AdaptationPlan.read(folder / PLAN)
    if differing := [name for name in AdaptationPlan.model_fields if getattr(before, name) != getattr(plan, name)]:
        raise DatasetError(
            f"'{folder}' holds another adaptation (they differ in {', '.join(differing)})",
            fix="use another --out, or resume it with the options and data it was started with",
        )


@dataclass(frozen=True)
class _Work:
    """An adaptation in progress; whatever is finished is in its folder and is not done again."""

    origin: Bundle
    plan: AdaptationPlan
    dataset: Dataset
    inspection: Inspection
    folder: Path
    options: RunOptions
    report: Reporter

    def measure_fold(self, k: int, compute: ComputePlan) -> Stop | None:
        """Train without fold ``k``, and predict it with the original weights and with every share of the new ones."""
        subjects, run = self._subjects(self.plan.folds[k]), self.folder / "folds" / str(k)
        if all(self._prediction(k, name, s).exists() for name in _VARIANTS for s in subjects):
            return None
        trained = tuple(name for name in self.plan.new if name not in self.plan.folds[k])
        split = Split((self.plan.folds[k], self.plan.rehearsed), always_train=trained)
        title = f"fold {k + 1} of {len(self.plan.folds)}"
        stopped = self._train(run, split, 0, title)
        if stopped is not None:
            return stopped
        tuned = Bundle.load(run / "bundle")
        with torch_threads(compute.threads):
            for done, (variant, share) in enumerate(_VARIANTS.items(), start=1):
                missing = [s for s in subjects if not self._prediction(k, variant, s).exists()]
                network = mixed_network(self.origin, tuned, share)
                predictor = Predictor([tuned if share else self.origin], compute, networks=[network])
                for outcome in predict_subjects(predictor, missing, run / "predictions" / variant):
                    if outcome.error is not None:
                        raise outcome.error
                    if stop_file(self.folder).exists():
                        return Stop.FILE
                self.report.progress(f"{title}: predicting held-out subjects", done, len(_VARIANTS))
        return None

    def gain(self) -> tuple[Change, float]:
        """The new subjects before and after, and the share of the fine-tuned weights that measured best.

        The share that a fold's subjects are measured with is chosen on the other folds, so that no subject's
        outcome takes part in choosing it.
        """
        folds, dice = range(len(self.plan.folds)), Measuring(JUDGED_BY)
        names = {share: name for name, share in _VARIANTS.items() if share}
        columns = {
            share: self._evaluation(dict.fromkeys(folds, name), dice).mean_of_targets(JUDGED_BY)
            for share, name in names.items()
        }
        scores = pd.DataFrame(columns)
        patients = {subject.id: subject.patient for subject in self.dataset.subjects}
        chosen = {k: names[chosen_share(scores.drop(index=list(self.plan.folds[k])), patients)] for k in folds}
        before, after = (self._evaluation(variants) for variants in (dict.fromkeys(folds, BEFORE), chosen))
        for name, evaluation in ((BEFORE, before), (AFTER, after)):
            evaluation.write(self.folder / "new" / f"{name}_evaluation")
        return Change.between(before, after), chosen_share(scores, patients)

    def train_on_all(self, share: float) -> Stop | None:
        """Train on all new subjects, and save the adapted bundle."""
        split = Split((self.plan.rehearsed,), always_train=tuple(sorted(self.plan.new)))
        stopped = self._train(self.folder / "final", split, None, "all new subjects")
        if stopped is not None:
            return stopped
        tuned = Bundle.load(self.folder / "final" / "bundle")
        new = fingerprint_of([row for row in self.inspection.rows if row.subject in self.plan.new])
        adapted = replace(
            tuned,
            fingerprint=merged(self.origin.fingerprint, new),
            provenance=_provenance(self.origin, tuned.provenance),
        )
        weights = mixed_network(self.origin, tuned, share).state_dict()
        about = {"step": tuned.metadata.get("step", "?"), "share_of_fine_tuned_weights": share}
        adapted.save(self.folder / "bundle", weights, about)
        return None

    def forgetting(self, unseen: Dataset, compute: ComputePlan) -> Change:
        """Original subjects that no training has seen, before and after."""
        out = self.folder / "original"
        folders = [out / f"{name}_evaluation" for name in (BEFORE, AFTER)]
        if all((folder / "summary.json").exists() for folder in folders):
            return Change.between(*(Evaluation.read(folder) for folder in folders))
        adapted = Bundle.load(self.folder / "bundle")
        with torch_threads(compute.threads):
            found = measure_forgetting(
                self.origin,
                adapted,
                unseen,
                out,
                compute,
                STANDARD,
                lambda done, total: self.report.progress("predicting original subjects", done, total),
            )
        return Change.between(found[BEFORE], found[AFTER])

    def write_card(self, gain: Change | None, forgetting: Change | None) -> None:
        """Write the adapted bundle's card, which begins with what the original's author wrote."""
        adapted, tuned = (Bundle.load(folder / "bundle") for folder in (self.folder, self.folder / "final"))
        effort = CardFacts.of(tuned).effort
        effort = None if effort is None else replace(effort, weights_sha256=adapted.weights_sha256)
        facts = CardFacts.of(adapted).model_copy(update={"effort": effort})
        measured: dict[Kind, Change | None] = {"adapted": gain, "original": forgetting}
        try:
            for kind, change in measured.items():
                if change is not None:
                    facts = facts.with_result(Result.of(kind, adapted, change.after))
            write_card(self.folder / "bundle", facts, like=self.origin.folder)
        except BundleError as error:
            self.report(f"the bundle's card was not written: {error}")

    def _train(self, run: Path, split: Split, fold: int | None, title: str) -> Stop | None:
        if not (run / "split.json").exists():
            save_split(run / "split.json", split)
        options = replace(self.options, fold=fold)
        report = _named(self.report, title, self.folder, run)
        return train(self.plan.recipe, self.dataset, run, options, report, self.inspection).stopped

    def _subjects(self, names: Sequence[str]) -> list[Subject]:
        return [subject for subject in self.dataset.subjects if subject.id in names]

    def _prediction(self, k: int, variant: str, subject: Subject) -> Path:
        return self.folder / "folds" / str(k) / "predictions" / variant / f"{subject.id}.nii.gz"

    def _evaluation(self, variants: Mapping[int, str], measuring: Measuring = STANDARD) -> Evaluation:
        """All new subjects, those of each fold as one variant predicted them."""
        pairs = [
            Pair(subject.id, self._prediction(k, variant, subject), subject.label, subject)
            for k, variant in variants.items()
            for subject in self._subjects(self.plan.folds[k])
            if subject.label is not None  # inspection has refused those without
        ]
        return evaluate(pairs, self.origin.targets, measuring, simulated=self.dataset.simulated)


def mixed(before: Mapping[str, Tensor], after: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Weights on the line between two networks: ``share`` 0 is the first, 1 the second. Counts are the second's."""
    return {
        name: torch.lerp(before[name], tensor, share) if tensor.is_floating_point() else tensor
        for name, tensor in after.items()
    }


def mixed_network(before: Bundle, after: Bundle, share: float) -> torch.nn.Module:
    """The network of two bundles with :func:`mixed` weights."""
    network = after.trained_network()
    network.load_state_dict(mixed(before.trained_network().state_dict(), network.state_dict(), share))
    return network


def chosen_share(scores: pd.DataFrame, patients: Mapping[str, str]) -> float:
    """The smallest share that scores within one standard error of the best; a row for each subject, higher is better.

    The nearer to the original weights, the less is forgotten. The standard error is that of the mean over patients
    of the difference from the best (the one-standard-error rule, Breiman et al. 1984).
    """
    means = scores.groupby([patients[name] for name in scores.index]).mean()
    if len(means) < 2:
        return UNMEASURED_SHARE
    behind = means.rsub(means[means.mean().idxmax()], axis=0)
    tolerated = behind.std(ddof=1) / sqrt(len(means))
    return float(min(share for share in scores.columns if behind[share].mean() <= tolerated[share]))


def _provenance(origin: Bundle, tuned: Provenance) -> Provenance:
    """Where the adapted bundle comes from: the original's subjects are still its own."""
    was = origin.provenance
    keys = {*was.other_keys, *([] if was.key in (None, tuned.key) else [was.key])}
    same = was.key == tuned.key
    return replace(
        tuned,
        simulated=was.simulated or tuned.simulated,
        training=tuple(dict.fromkeys((*(was.training if same else ()), *tuned.training))),
        validation=tuple(name for name in was.validation if name not in tuned.training) if same else (),
        adapted_from=origin.weights_sha256,
        other_keys=tuple(sorted(keys)),
    )


def _named(report: Reporter, title: str, folder: Path, run: Path) -> Reporter:
    """A reporter for one of several trainings; a stop file in the adaptation's folder stops it."""

    def told(what: str, done: int, total: int) -> None:
        report.progress(f"{title}: {what}", done, total)
        if stop_file(folder).exists():
            stop_file(run).touch()

    return Reporter(lambda text: report(f"{title}: {text}"), told, status=report.status)
