"""Expand a study on a data set into runs: the recipe, the training subjects and the held-out subjects of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import Split, make_split
from delineate.errors import StudyError
from delineate.recipe import Recipe, load_recipe, packaged_recipes
from delineate.studies.specification import Arm, CrossValidation, LearningCurve, MovedSubjects, Size, Study

_FIRST_FOLD = 0
"""The held-out fold of a split that is made for one run."""


@dataclass(frozen=True)
class PlannedRun:
    """One training of a study.

    Runs of one ``group`` are pooled: those of an arm and, along a curve, of a ``count`` and direction. ``seed``
    tells repetitions apart. ``fold`` of ``split`` is held out.
    """

    name: str
    arm: str
    seed: int
    fold: int
    recipe: Recipe
    split: Split
    count: int | None = None
    direction: str = ""

    @property
    def group(self) -> str:
        """Name of the group of runs whose held-out subjects are pooled."""
        parts = [self.arm, self.direction, "" if self.count is None else str(self.count)]
        return " ".join(part for part in parts if part)


def plan_runs(study: Study, size: Size, dataset: Dataset, beside: Path = Path()) -> tuple[PlannedRun, ...]:
    """Every run of a study at a size, in running order: repetitions last.

    Recipe paths are relative to ``beside``. A pure function of its arguments. Raises :class:`StudyError` if the
    data set does not fit the design, and :class:`RecipeError` for a wrong change.
    """
    recipes = {name: arm_recipe(study, arm, size, beside) for name, arm in study.compared.items()}
    match study.design:
        case CrossValidation() as design:
            runs = _cross_validation(design, size, dataset.subjects, recipes)
        case LearningCurve() as design:
            runs = _learning_curve(design, size, dataset.subjects, recipes)
        case MovedSubjects() as design:
            runs = _moved_subjects(design, size, dataset.subjects, recipes)
    return tuple(runs)


def arm_recipe(study: Study, arm: Arm, size: Size, beside: Path) -> Recipe:
    """The recipe of an arm with the changes of the study, the arm and the size, in this order."""
    name = arm.recipe or study.recipe
    own = name not in packaged_recipes() and (beside / name).is_file()
    return load_recipe(beside / name if own else name, [*study.set, *arm.set, *size.set])


def _seeded(recipe: Recipe, seed: int) -> Recipe:
    return recipe.model_copy(update={"training": recipe.training.model_copy(update={"seed": seed})})


def _cross_validation(
    design: CrossValidation, size: Size, subjects: Sequence[Subject], recipes: dict[str, Recipe]
) -> Iterable[PlannedRun]:
    split = make_split(subjects, folds=design.folds)  # the same for every seed, so that repetitions pair
    for seed in size.seeds:
        for fold in size.folds if size.folds is not None else range(design.folds):
            for arm, recipe in recipes.items():
                yield PlannedRun(f"{arm}-fold{fold}-seed{seed}", arm, seed, fold, _seeded(recipe, seed), split)


def _learning_curve(
    design: LearningCurve, size: Size, subjects: Sequence[Subject], recipes: dict[str, Recipe]
) -> Iterable[PlannedRun]:
    whole = make_split(subjects, folds=design.held_out)
    held_out = whole.held_out(_FIRST_FOLD)
    labelled = [subject for subject in subjects if subject.id in whole.training_of(_FIRST_FOLD)]
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
                yield PlannedRun(name, arm, seed, _FIRST_FOLD, _seeded(recipe, seed), split, count)


def _moved_subjects(
    design: MovedSubjects, size: Size, subjects: Sequence[Subject], recipes: dict[str, Recipe]
) -> Iterable[PlannedRun]:
    by_site: dict[str, list[Subject]] = defaultdict(list)
    for subject in subjects:
        by_site[subject.site].append(subject)
    for source, target in _directions(design, sorted(by_site)):
        judged, rest = make_split(by_site[target], folds=2).folds
        candidates = [subject for subject in by_site[target] if subject.id in rest]
        for seed in size.seeds:
            order = in_turn(candidates, seed)
            for count in size.counts or design.counts:
                if count > len(candidates):
                    raise StudyError(
                        f"{count} subjects of site '{target}' are to be moved, and {len(candidates)} can be",
                        fix="choose smaller counts",
                    )
                moved = first_patients(order, count)
                trained = tuple(sorted(subject.id for subject in by_site[source]))
                # The few moved subjects are trained on, not spent on choosing weights.
                always_train = tuple(sorted(subject.id for subject in moved))
                split = Split((judged, trained), seed=seed, always_train=always_train)
                direction = f"{source}-to-{target}"
                for arm, recipe in recipes.items():
                    name = f"{arm}-{_in_a_name(direction)}-{count}-draw{seed}"
                    changed = _seeded(recipe, seed)
                    yield PlannedRun(name, arm, seed, _FIRST_FOLD, changed, split, count, direction)


def _directions(design: MovedSubjects, sites: Sequence[str]) -> list[tuple[str, str]]:
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
