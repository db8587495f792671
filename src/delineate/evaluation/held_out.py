"""Labelled subjects that a bundle has not seen: which they are, how their labels are read, and how it does on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from delineate.bundle import Bundle, hidden
from delineate.calibration import Case, Confidence
from delineate.core.subject import Subject
from delineate.core.targets import SharedTargets, Targets
from delineate.datasets.dataset import Dataset, with_maps
from delineate.datasets.splits import check_split, load_split
from delineate.errors import BundleError, DatasetError, DelineateError, MissingFile, UnknownKey
from delineate.evaluation.measure import Measuring, evaluate, probabilities_of_regions
from delineate.evaluation.pairs import Pair
from delineate.evaluation.table import Evaluation
from delineate.inference.batch import Outcome
from delineate.io.documents import Document
from delineate.io.tables import write_table
from delineate.metrics.catalogue import targets_of
from delineate.recipe import InferenceSpec, PostprocessingSpec, TargetsSpec

CONFIDENCE = "confidence.csv"


@dataclass(frozen=True)
class HeldOut:
    """Labelled subjects to measure a bundle on, and the targets that it shares with their labels.

    ``stated``: that the bundle was not trained on them is the user's word, since it cannot tell.
    """

    subjects: tuple[Subject, ...]
    shared: SharedTargets
    stated: bool = False

    @classmethod
    def of(
        cls,
        bundle: Bundle,
        dataset: Dataset,
        *,
        split_file: Path | None = None,
        fold: int = 0,
        targets: Targets | None = None,
        all_unseen: bool = False,
    ) -> HeldOut:
        """The held-out subjects of a fold of the split or, without one, all labelled subjects that were not seen.

        With ``all_unseen`` nobody is taken to be seen where the bundle cannot tell.
        ``targets`` say what the labels hold; without them, :func:`targets_of_labels` does. Raises
        :class:`DatasetError` if the bundle has seen any subject of the fold, or all of the data set,
        :class:`BadSplit`, :class:`MissingFile` for a subject of the fold without a label, :class:`RecipeError` if no
        target is shared, and whatever :meth:`~delineate.bundle.Bundle.seen` raises.
        """
        tells = _Seen(bundle, all_unseen)
        subjects = _labelled_unseen(tells, dataset) if split_file is None else _of(tells, dataset, split_file, fold)
        references = targets or targets_of_labels(bundle, dataset, subjects)
        resample = bundle.recipe.data.resample_channels
        chosen = tuple(replace(subject, resample=resample) for subject in subjects)
        return cls(chosen, SharedTargets.of(bundle.targets, references), tells.stated)

    @property
    def notes(self) -> tuple[str, ...]:
        """What a reader should know about the labels: targets that are not measured, and other label values."""
        predicted, named, notes = self.shared.of_predictions.values, self.shared.of_references.values, []
        if left := [name for name in predicted if name not in named]:
            notes.append(f"Not measured, since the labels do not name them: {', '.join(left)}.")
        if differing := [
            f"{name} is {_plus(named[name])} in them, {_plus(predicted[name])} in predictions"
            for name in self.shared.targets.names
            if set(named[name]) != set(predicted[name])
        ]:
            notes.append(f"Labels are matched by their targets' names: {'; '.join(differing)}.")
        if self.stated:
            notes.append(
                "The bundle cannot tell whether it was trained on these subjects: that it was not is its user's word."
            )
        return tuple(notes)

    def check(self, measuring: Measuring) -> None:
        """Raise any error by which measuring would fail after everything has been predicted."""
        named, quantity = self.shared.targets, measuring.quantity
        regions = targets_of(measuring.wanted, named) or named
        if measuring.probabilities is not None:
            probabilities_of_regions(np.zeros((len(named.names), 1, 1, 1), np.float32), named, regions)
        if quantity is None:
            return
        mapped = self.subjects if quantity.maps is None else with_maps(self.subjects, quantity.channel, quantity.maps)
        if lacking := [subject.id for subject in mapped if quantity.channel not in subject.scans]:
            raise MissingFile(
                f"{', '.join(lacking)[:300]} lack {quantity.channel}",
                fix=f"name its files (--images), or give the folder of maps: {quantity.channel}=FOLDER",
            )


def targets_of_labels(bundle: Bundle, dataset: Dataset, subjects: Sequence[Subject]) -> Targets:
    """What the label values of a data set stand for, in the names of a bundle's targets as far as it has them.

    Labels that name their targets have whichever values the data set gives them.
    They are the bundle's own where the data set names none, where what it names does not contradict them, and for
    subjects that were held out when it was trained, whose labels were read so. Otherwise the data set's hold.
    """
    own, named = bundle.targets, dataset.targets
    if named is None or set(hidden([subject.id for subject in subjects])) <= set(bundle.provenance.held_out):
        return own
    if dataset.by_name or not _agree(own, named):
        return named
    values = {name: own.values[name] for name in own.names if name in named.values}
    ignore = tuple(dict.fromkeys((*own.ignore, *named.ignore)))
    # Other structures of the data set are background, which does not make their values unknown.
    others = {n: v for n, v in named.values.items() if n not in values and not set(v) & set(ignore)}
    used = [v for numbers in (*values.values(), *others.values()) for v in numbers]
    exclusive = own.exclusive and len(set(used)) == len(used)
    return Targets(values | others, "exclusive" if exclusive else "overlapping", ignore)


def _agree(own: Targets, named: Targets) -> bool:
    """Whether both call each label value of the targets that they share alike, even if one says more than the other.

    A value may be liver in one and tumour within the liver in the other, but not liver in one and spleen in the other.
    """
    both = [name for name in own.names if name in named.values]
    values = {v for name in both for v in (*own.values[name], *named.values[name])}
    here, there = ({v: {n for n in t.names if v in t.values[n]} for v in values} for t in (own, named))
    return bool(both) and all(v not in named.ignore and (not there[v] or here[v] & there[v]) for v in values)


class PlannedTest(Document):
    """What is measured in a folder, written before the first prediction: only the same again replaces its results."""

    weights_sha256: str
    inference: InferenceSpec
    postprocessing: PostprocessingSpec
    data_set: str
    subjects: tuple[str, ...]
    references: TargetsSpec
    metrics: str
    lesion_overlap: float
    quantity: str

    @classmethod
    def of(cls, bundle: Bundle, dataset: Dataset, held_out: HeldOut, measuring: Measuring) -> PlannedTest:
        """What is about to be measured."""
        quantity = measuring.quantity
        return cls(
            weights_sha256=bundle.weights_sha256,
            inference=bundle.recipe.inference,
            postprocessing=bundle.recipe.postprocessing,
            data_set=dataset.name,
            subjects=tuple(subject.id for subject in held_out.subjects),
            references=TargetsSpec.of(held_out.shared.of_references),
            metrics=measuring.wanted,
            lesion_overlap=measuring.lesion_overlap,
            quantity="" if quantity is None else str(quantity),
        )

    def begun(self, path: Path) -> bool:
        """Whether a file says that this very test was begun."""
        with suppress(DelineateError, OSError):
            return PlannedTest.read(path) == self
        return False


class MeasuredSubjects(NamedTuple):
    """What was measured, and the predictions it was measured on, in the same order."""

    evaluation: Evaluation
    pairs: list[Pair]
    outcomes: list[Outcome]


def measure_outcomes(
    outcomes: Iterable[Outcome],
    subjects: Sequence[Subject],
    shared: SharedTargets,
    measuring: Measuring,
    *,
    simulated: bool = False,
    on_outcome: Callable[[Outcome, int], None] = lambda outcome, done: None,
) -> MeasuredSubjects:
    """Measure the predictions of labelled subjects, in the order of ``subjects``, once all of them are made.

    ``on_outcome`` is called with each as it is made, and their number; an exception that it raises ends everything.
    Raises the error of the first subject that could not be predicted, after predicting the others, and whatever
    :func:`~delineate.evaluation.measure.evaluate` raises.
    """
    made: dict[str, Outcome] = {}
    for outcome in outcomes:
        made[outcome.subject.id] = outcome
        on_outcome(outcome, len(made))
    pairs = []
    for subject in subjects:
        outcome = made[subject.id]
        if outcome.error is not None or outcome.path is None:
            raise outcome.error or BundleError(f"'{subject.id}' could not be predicted")
        assert subject.label is not None  # they are labelled
        relabelling = shared if shared.relabels else None
        pairs.append(Pair(subject.id, outcome.path, subject.label, subject, relabelling))
    evaluation = evaluate(pairs, shared.targets, measuring, simulated=simulated)
    return MeasuredSubjects(evaluation, pairs, [made[subject.id] for subject in subjects])


def calibration_cases(
    subjects: Iterable[Subject], confidences: Mapping[str, Mapping[str, Confidence]], evaluation: Evaluation
) -> list[Case]:
    """The confidence of each prediction in each target that was measured, with its actual Dice and reference volume."""
    measured = evaluation.table.set_index(["subject", "target"])[["dice", "reference_volume_ml"]]
    return [
        Case(target, subject.site, subject.patient, confidence, *map(float, measured.loc[(subject.id, target)]))
        for subject in subjects
        for target, confidence in confidences.get(subject.id, {}).items()
        if (subject.id, target) in measured.index
    ]


def write_confidence(folder: Path, confidences: Mapping[str, Mapping[str, Confidence]]) -> None:
    """Write what predictions said of themselves, by subject and target, to ``confidence.csv`` beside an evaluation."""
    rows = [
        {"subject": subject, "target": target, **asdict(confidence)}
        for subject, by_target in confidences.items()
        for target, confidence in by_target.items()
    ]
    write_table(folder / CONFIDENCE, list(rows[0]) if rows else [], rows)


class _Seen:
    """Whether a bundle has seen a subject. ``stated``: it could not tell, and the user's word was taken."""

    def __init__(self, bundle: Bundle, all_unseen: bool) -> None:
        self._bundle, self._all_unseen, self.stated = bundle, all_unseen, False

    def __call__(self, subject: str) -> bool:
        try:
            return self._bundle.seen(subject)
        except (BundleError, UnknownKey) as error:
            if not self._all_unseen:
                fix = f"{error.fix}; or say with --all-unseen that it was trained on none of these subjects"
                raise type(error)(error.message, fix=fix) from error
        self.stated = True
        return False


def _labelled_unseen(seen: _Seen, dataset: Dataset) -> list[Subject]:
    labelled = [subject for subject in dataset.subjects if subject.label is not None and subject.scans]
    if not labelled:
        raise DatasetError(f"no subject of '{dataset.name}' has a scan and a label", fix="give labelled scans")
    unseen = [subject for subject in labelled if not seen(subject.id)]
    if not unseen:
        raise DatasetError(
            f"all {len(labelled)} labelled subjects of '{dataset.name}' were seen in training",
            fix="give scans that the bundle was not trained on",
        )
    return unseen


def _of(seen: _Seen, dataset: Dataset, split_file: Path, fold: int) -> list[Subject]:
    if not split_file.exists():
        raise MissingFile(f"there is no split file '{split_file}'", fix="give a run's split.json, or leave it out")
    split = load_split(split_file)
    check_split(split, dataset, str(split_file))
    names = set(split.held_out(fold))
    held_out = [subject for subject in dataset.subjects if subject.id in names]
    if not held_out:
        raise DatasetError(f"fold {fold} of '{split_file}' has no subject", fix="name another fold")
    if known := [subject.id for subject in held_out if seen(subject.id)]:
        raise DatasetError(
            f"{', '.join(known)} of fold {fold} were seen in training, which would flatter the result",
            fix="give the fold that the bundle was trained without, or other scans",
        )
    if unlabelled := [subject.id for subject in held_out if subject.label is None]:
        raise MissingFile(f"{', '.join(unlabelled)[:300]} of fold {fold} have no label", fix="add them")
    return held_out


def _plus(values: Sequence[int]) -> str:
    return "+".join(map(str, values))
