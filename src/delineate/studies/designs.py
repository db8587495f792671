"""The designs of studies: which runs each makes of the subjects."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import Split, make_split
from delineate.errors import StudyError
from delineate.recipe import Recipe
from delineate.studies.specification import CrossValidation, LearningCurve, MovedSubjects, Search, Size
from delineate.training.preparation import new_split, reached

FIRST_FOLD = 0
"""The held-out fold of a split that is made for one run."""


@dataclass(frozen=True)
class Entry:
    """What a study's plan says of a run: one training, or one test of another run's network (``weights_of``).

    Runs of one ``group`` are pooled: those of an arm and, along a curve, of a ``count``, direction and ``order`` (empty
    if random). A test that ``ranks`` says which subjects are uncertain, and is no result. ``seed`` tells repetitions
    apart. ``fold`` of the split is held out. ``data`` names the study's data set. ``start_from`` is the run whose
    weights it starts from.
    """

    name: str
    arm: str
    seed: int
    fold: int
    count: int | None = None
    direction: str = ""
    stage: str = ""
    data: str = "scans"
    start_from: str | None = None
    weights_of: str | None = None
    changes: tuple[str, ...] = ()
    """Of a test: what it changes in the network's own recipe."""
    order: str = ""
    ranks: bool = False

    @property
    def label(self) -> str:
        """The arm's name within the study."""
        return f"{self.stage}/{self.arm}" if self.stage else self.arm

    @property
    def group(self) -> str:
        """Name of the group of runs whose held-out subjects are pooled."""
        parts = [self.label, self.direction, self.order, "" if self.count is None else str(self.count)]
        return " ".join(part for part in parts if part)

    @property
    def needs(self) -> str | None:
        """The run that has to be done before this one."""
        return self.start_from or self.weights_of


@dataclass(frozen=True, kw_only=True)
class PlannedRun(Entry):
    """A run with its recipe and its split."""

    recipe: Recipe
    split: Split

    @property
    def entry(self) -> Entry:
        return Entry(**{one.name: getattr(self, one.name) for one in fields(Entry)})


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})


def cross_validation(
    design: CrossValidation | Search, size: Size, subjects: Sequence[Subject], recipes: dict[str, Recipe]
) -> Iterable[PlannedRun]:
    """A run of each arm, fold and seed."""
    split = make_split(subjects, folds=design.folds)  # the same for every seed, so that repetitions pair
    chosen = [fold for fold in size.folds or range(design.folds) if fold < design.folds]
    for seed in size.seeds:
        for fold in chosen:
            for arm, recipe in recipes.items():
                name = f"{arm}-fold{fold}-seed{seed}"
                yield PlannedRun(name, arm, seed, fold, recipe=_seeded(recipe, seed), split=split)


def recipe_split(size: Size, dataset: Dataset, recipes: dict[str, Recipe]) -> Iterable[PlannedRun]:
    """A run of each arm and seed, on the split that its recipe would make by itself."""
    known: list[tuple[tuple[object, ...], Split]] = []
    for arm, recipe in recipes.items():
        spec = recipe.training
        decisive: tuple[object, ...] = (
            *(recipe.sampler, recipe.tiles, recipe.preprocessing, recipe.data),
            *(spec.folds, spec.test_last, spec.seed),
        )
        split = next((split for same, split in known if same == decisive), None)
        if split is None:  # labels may have to be read
            split = new_split(recipe.training, dataset, reached(recipe, dataset))
            known.append((decisive, split))
        yield from fixed_split(size, split, {arm: recipe})


def fixed_split(size: Size, split: Split, recipes: dict[str, Recipe]) -> Iterable[PlannedRun]:
    """A run of each arm and seed on one split."""
    for seed in size.seeds:
        for arm, recipe in recipes.items():
            name = f"{arm}-seed{seed}"
            yield PlannedRun(name, arm, seed, FIRST_FOLD, recipe=_seeded(recipe, seed), split=split)


def learning_curve(
    design: LearningCurve, size: Size, subjects: Sequence[Subject], recipes: dict[str, Recipe]
) -> Iterable[PlannedRun]:
    """A run of each arm, number of labelled subjects and draw; smaller draws lie within larger ones."""
    whole = make_split(subjects, folds=design.held_out)
    held_out = whole.held_out(FIRST_FOLD)
    labelled = [subject for subject in subjects if subject.id in whole.training_of(FIRST_FOLD)]
    for seed in size.seeds:
        order = in_turn(labelled, seed)
        for count in size.counts or design.counts:
            if not 2 <= count <= len(labelled):
                raise StudyError(
                    f"{count} labelled subjects are asked for, and {len(labelled)} are not held out",
                    fix="choose counts from 2 up to that number",
                )
            split = Split((held_out, tuple(sorted(s.id for s in first_patients(order, count)))), seed=seed)
            for arm, recipe in recipes.items():
                name = f"{arm}-{count}-draw{seed}"
                yield PlannedRun(name, arm, seed, FIRST_FOLD, count, recipe=_seeded(recipe, seed), split=split)


@dataclass(frozen=True)
class Draw:
    """Subjects of one site to be judged, and candidates to be moved into the training of another, for one seed."""

    direction: str
    judged: tuple[str, ...]
    trained: tuple[str, ...]
    candidates: Sequence[Subject]
    seed: int

    def runs(
        self, count: int, order: str, turn: Iterable[Sequence[Subject]], recipes: dict[str, Recipe]
    ) -> Iterable[PlannedRun]:
        """A run of each arm with the first ``count`` candidates in training."""
        # The few moved subjects are trained on, not spent on choosing weights.
        always_train = tuple(sorted(subject.id for subject in first_patients(turn, count)))
        split = Split((self.judged, self.trained), seed=self.seed, always_train=always_train)
        for arm, recipe in recipes.items():
            yield PlannedRun(
                self._name(arm, f"{order}-{count}" if order else str(count)),
                arm,
                self.seed,
                FIRST_FOLD,
                count,
                self.direction,
                order=order,
                recipe=_seeded(recipe, self.seed),
                split=split,
            )

    def ranking(self, first: tuple[str, Recipe]) -> PlannedRun:
        """A test, on the candidates, of the first arm's network without moved subjects."""
        arm, recipe = first
        return PlannedRun(
            self._name(arm, "candidates"),
            arm,
            self.seed,
            FIRST_FOLD,
            recipe=_seeded(recipe, self.seed),
            split=Split(((),), tuple(sorted(subject.id for subject in self.candidates))),
            direction=self.direction,
            weights_of=self._name(arm, "0"),
            order="uncertainty",
            ranks=True,
        )

    def _name(self, arm: str, what: str) -> str:
        return f"{arm}-{_in_a_name(self.direction)}-{what}-draw{self.seed}"


def directions(design: MovedSubjects, sites: Sequence[str]) -> list[tuple[str, str]]:
    """Pairs of the site trained on and the site judged."""
    if design.source is not None and design.target is not None:
        if missing := [site for site in (design.source, design.target) if site not in sites]:
            raise StudyError(f"there is no site '{missing[0]}'", fix=f"the sites are {', '.join(sites) or 'none'}")
        return [(design.source, design.target)]
    if len(sites) != 2:
        raise StudyError(
            f"the data set has {len(sites)} sites ({', '.join(sites)[:300]})",
            fix="name the design's source and target, or give two sites in sites.csv",
        )
    return [(sites[0], sites[1]), (sites[1], sites[0])]


def _in_a_name(text: str) -> str:
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.+") else "_" for c in text)[:60]


def in_turn(subjects: Sequence[Subject], seed: int) -> list[list[Subject]]:
    """Scans by patient, in a random order of which every prefix has each site's share."""
    patients: dict[str, list[Subject]] = defaultdict(list)
    for subject in sorted(subjects, key=lambda one: one.id):
        patients[subject.patient].append(subject)
    by_site: dict[str, list[list[Subject]]] = defaultdict(list)
    for scans in patients.values():
        by_site[scans[0].site].append(scans)
    rng = np.random.default_rng((seed, 5))
    places = []
    for site in sorted(by_site):
        order = rng.permutation(len(by_site[site]))
        places += [((rank + 0.5) / len(order), site, by_site[site][i]) for rank, i in enumerate(order)]
    return [scans for _, _, scans in sorted(places, key=lambda place: place[:2])]


def first_patients(order: Iterable[Sequence[Subject]], count: int) -> list[Subject]:
    """Scans of the first patients: ``count`` scans, or a few more if the last patient has several."""
    chosen: list[Subject] = []
    for scans in order:
        if len(chosen) >= count:
            break
        chosen += scans
    return chosen
