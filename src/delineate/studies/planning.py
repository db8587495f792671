"""Expand a study on its data sets into runs: the recipe, the training subjects and the held-out subjects of each."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile
from pathlib import Path
from types import MappingProxyType

from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.splits import Split, make_split
from delineate.derivation import AUTO
from delineate.errors import StudyError
from delineate.metrics.catalogue import METRICS, metric_names
from delineate.recipe import DataSpec, Recipe, StartSpec, load_recipe, packaged_recipes
from delineate.studies.deriving import AutoRecipes, Derive
from delineate.studies.designs import (
    FIRST_FOLD,
    Draw,
    PlannedRun,
    cross_validation,
    directions,
    first_patients,
    fixed_split,
    in_turn,
    learning_curve,
    recipe_split,
)
from delineate.studies.ordering import ScanComparison
from delineate.studies.search import drawn_trials
from delineate.studies.specification import (
    Arm,
    Changes,
    CrossValidation,
    LearningCurve,
    LockedTest,
    MovedSubjects,
    Order,
    RecipeSplit,
    Search,
    Size,
    Stage,
    Study,
)
from delineate.studies.trials import steps_for_gflop

Scores = Mapping[str, float | None]
"""The study's metric of each arm whose runs have all ended; None where one of them failed."""

Rankings = Mapping[str, tuple[str, ...]]
"""Subjects in the order in which they are moved, by the name of a :class:`ScanComparison`, or of a run that ranks."""


@dataclass(frozen=True)
class Plan:
    """The runs of a study that are known so far, in running order, and what the others wait for.

    ``comparisons``: scans to compare before there are more runs.
    """

    runs: tuple[PlannedRun, ...]
    pending: tuple[str, ...] = ()
    comparisons: tuple[ScanComparison, ...] = ()


def plan_runs(
    study: Study,
    size: Size,
    datasets: Mapping[str, Dataset],
    beside: Path = Path(),
    *,
    scores: Scores = MappingProxyType({}),
    rankings: Rankings = MappingProxyType({}),
    final: bool = False,
    derive: Derive | None = None,
) -> Plan:
    """The runs of a study at a size.

    Stages that build on the best arm of another, and searches, have more runs once ``scores`` tell how the arms
    before did, and designs that order subjects once ``rankings`` tell the order; each plan has the runs of the one
    before. The locked test is planned only if ``final``, and once nothing else waits for results. Recipe paths are
    relative to ``beside``. ``derive`` makes the recipes of arms whose recipe is ``auto``, by default for this machine.
    A function of its arguments and, for recipes that sample a limited number of slices, of the labels, which say which
    subjects these come from. Raises :class:`StudyError` if a data set does not fit the design,
    and :class:`RecipeError` for a wrong change.
    """
    limited = {name: _limited(data, size) for name, data in datasets.items()}
    planning = _Planning(study, size, limited, beside, scores, rankings, derive or AutoRecipes())
    locked = study.locked_stages
    for stage in (one for one in study.parts if one.name not in locked):
        if not planning.decided(stage):
            planning.pending.append(f"{stage.name} waits for the best arm of {stage.best_of}")
        else:
            planning.add(stage)
    last = [stage for stage in study.parts if stage.name in locked]
    undecided = bool(planning.pending) or not all(map(planning.decided, last))
    for stage in last:
        name = stage.name or "the locked test"
        if not final:
            planning.pending.append(f"{name} runs only with --final")
        elif undecided:
            planning.pending.append(f"{name} waits until everything else has been decided")
        else:
            planning.add(stage)
    return Plan(tuple(planning.runs.values()), tuple(planning.pending), tuple(planning.comparisons))


def data_of_arm(study: Study, stage: Stage, arm: Arm, beside: Path) -> DataSpec:
    """How an arm reads its data set."""
    changes = _changes(study, stage, arm)
    if _recipe_name(study, arm) == AUTO:
        return DataSpec.of_changes(changes)
    return _loaded(_recipe_name(study, arm), changes, beside).data


def _recipe_name(study: Study, arm: Arm) -> str:
    return arm.recipe or study.recipe


def _changes(study: Study, stage: Stage, arm: Arm, of_size: Changes = ()) -> list[str]:
    """What an arm changes in its recipe: by the study, the stage, the arm, and the size, in this order."""
    return [*study.set, *stage.set, *arm.set, *of_size]


def _loaded(name: str, changes: Sequence[str], beside: Path) -> Recipe:
    own = name not in packaged_recipes() and (beside / name).is_file()
    return load_recipe(beside / name if own else name, changes)


def _limited(dataset: Dataset, size: Size) -> Dataset:
    """The data set with the size's number of subjects, each site with its share."""
    if size.subjects is None or len(dataset.subjects) <= size.subjects:
        return dataset
    kept = {subject.id for subject in first_patients(in_turn(dataset.subjects, 0), size.subjects)}
    return replace(dataset, subjects=tuple(subject for subject in dataset.subjects if subject.id in kept))


@dataclass(frozen=True)
class _Settled:
    """A trained arm with what it builds on, and what the size changes in this arm and in those that it builds on.

    These changes stay apart, as they come after those that the size makes in every arm.
    """

    arm: Arm
    of_size: Changes


@dataclass
class _Planning:
    """The plan as it grows, stage by stage."""

    study: Study
    size: Size
    datasets: Mapping[str, Dataset]
    beside: Path
    scores: Scores
    rankings: Rankings
    derive: Derive
    runs: dict[str, PlannedRun] = field(default_factory=dict)
    pending: list[str] = field(default_factory=list)
    comparisons: list[ScanComparison] = field(default_factory=list)
    settled: dict[str, _Settled] = field(default_factory=dict)
    """Trained arms by label."""

    def decided(self, stage: Stage) -> bool:
        """Whether what the stage builds on, if anything, has been found."""
        return stage.best_of is None or self.best(stage.best_of, self.study.data_of(stage, Arm())) is not None

    def best(self, stage: str, data: str) -> _Settled | None:
        """The best of a stage's arms that are trained on this data set, once all of them have ended."""
        [planned] = [one for one in self.study.parts if one.name == stage]
        trained = [run for run in self.runs.values() if run.stage == stage and run.weights_of is None]
        labels = {run.label for run in trained if run.data == data}
        growing = isinstance(planned.design, Search) and len(labels) < self._trials(planned.design)
        if not labels or growing or not labels <= set(self.scores):
            return None
        sign = 1 if METRICS[self.study.metric].better == "higher" else -1
        known = {label: sign * score for label in sorted(labels) if (score := self.scores[label]) is not None}
        if not known:
            raise StudyError(f"every arm of stage '{stage}' failed", fix="see the failures in the report")
        return self.settled[max(known, key=lambda label: known[label])]

    def add(self, stage: Stage) -> None:
        """Add the runs of a stage; of a search, as many as what is known allows."""
        arms = self._searched(stage) if isinstance(stage.design, Search) else stage.compared
        base = self.best(stage.best_of, self.study.data_of(stage, Arm())) if stage.best_of else None
        if base is not None:
            arms = {name: arm if arm.weights_of else base.arm.joined(arm) for name, arm in arms.items()}
        inherited: Changes = () if base is None else base.of_size
        trained = {name: arm for name, arm in arms.items() if arm.weights_of is None}
        for name, arm in trained.items():
            label = stage.label(name)
            source = stage.label(arm.start_from) if arm.start_from in arms else arm.start_from
            whole = arm.model_copy(update={"start_from": source})
            self.settled[label] = _Settled(whole, (*inherited, *self.size.changes_to(label)))
        by_data: dict[str, dict[str, Arm]] = defaultdict(dict)
        for name, arm in trained.items():
            by_data[self.study.data_of(stage, arm)][name] = arm
        for data, some in by_data.items():
            recipes = {name: self._recipe(stage, arm, stage.label(name), data) for name, arm in some.items()}
            for run in self._designed(stage, data, recipes):
                self._put(run if run.ranks else self._started(stage, run, some[run.arm].start_from))
        for name, arm in arms.items():
            if arm.weights_of is not None:
                self._add_tests(stage, name, arm)

    def _put(self, run: PlannedRun) -> None:
        if run.name in self.runs:
            raise StudyError(f"two runs have the name '{run.name}'", fix="give stages and arms other names")
        self.runs[run.name] = run

    def _recipe(self, stage: Stage, arm: Arm, label: str, data: str) -> Recipe:
        dataset, name = self.datasets[data], _recipe_name(self.study, arm)
        changes = _changes(self.study, stage, arm, (*self.size.set, *self.settled[label].of_size))
        if name == AUTO:
            recipe = self.derive(data, replace(dataset, subjects=tuple(self._free(data))), changes)
        else:
            recipe = _loaded(name, changes, self.beside)
        if self.study.metric not in metric_names(",".join(recipe.metrics)):
            raise StudyError(
                f"the study compares '{self.study.metric}', which recipe '{recipe.name}' of arm '{label}' does not "
                f"measure: its metrics are {', '.join(recipe.metrics)}",
                fix=f'add it: set: ["metrics=[{", ".join((*recipe.metrics, self.study.metric))}]"]',
            )
        if self.size.gflop is None:
            return recipe
        targets = dataset.targets if recipe.data.targets is None else recipe.data.targets.targets()
        channels = len(recipe.data.channels or dataset.channels)
        outputs = None if targets is None else targets.outputs
        steps = steps_for_gflop(recipe, channels, self.size.gflop, outputs=outputs)
        training = recipe.training.model_copy(update={"steps": steps, "minutes": None, "epochs": None})
        return recipe.model_copy(update={"training": training})

    def _designed(self, stage: Stage, data: str, recipes: dict[str, Recipe]) -> Iterable[PlannedRun]:
        free = self._free(data)
        match stage.design:
            case CrossValidation() as design:
                runs = cross_validation(design, self.size, free, recipes)
            case Search() as design:
                first = self.size if self.size.folds else self.size.model_copy(update={"folds": (FIRST_FOLD,)})
                runs = cross_validation(design, first, free, recipes)
            case RecipeSplit():
                runs = recipe_split(self.size, replace(self.datasets[data], subjects=tuple(free)), recipes)
            case LearningCurve() as design:
                runs = learning_curve(design, self.size, free, recipes)
            case MovedSubjects() as design:
                runs = self._moved_subjects(stage, design, data, free, recipes)
            case LockedTest():
                split = Split((tuple(sorted(subject.id for subject in free)),), tuple(sorted(self._locked(data))))
                runs = fixed_split(self.size, split, recipes)
        prefix = f"{stage.name}-" if stage.name else ""
        for run in runs:
            tested = run.weights_of and prefix + run.weights_of
            yield replace(run, name=prefix + run.name, stage=stage.name, data=data, weights_of=tested)

    def _moved_subjects(
        self,
        stage: Stage,
        design: MovedSubjects,
        data: str,
        subjects: Sequence[Subject],
        recipes: dict[str, Recipe],
    ) -> Iterable[PlannedRun]:
        by_site: dict[str, list[Subject]] = defaultdict(list)
        for subject in subjects:
            by_site[subject.site].append(subject)
        counts = self.size.counts or design.counts
        # By uncertainty last, since these runs wait for others.
        for which, order in enumerate(sorted(design.order, key=lambda order: order == "uncertainty")):
            for source, target in directions(design, sorted(by_site)):
                judged, rest = make_split(by_site[target], folds=2).folds
                candidates = [subject for subject in by_site[target] if subject.id in rest]
                if max(counts) > len(candidates):
                    raise StudyError(
                        f"{max(counts)} subjects of site '{target}' are to be moved, and {len(candidates)} can be",
                        fix="choose smaller counts",
                    )
                trained = tuple(sorted(subject.id for subject in by_site[source]))
                direction = f"{source}-to-{target}"
                for seed in self.size.seeds:
                    draw = Draw(direction, judged, trained, candidates, seed)
                    if 0 in counts and not which:
                        # Without moved subjects there is no order: these runs are the beginning of every curve.
                        yield from draw.runs(0, "", [], recipes)
                    if order == "uncertainty":
                        yield draw.ranking(next(iter(recipes.items())))
                    turn = self._turn(stage, data, draw, order, recipes)
                    if turn is not None:
                        for count in filter(None, counts):
                            yield from draw.runs(count, "" if order == "random" else order, turn, recipes)

    def _turn(
        self, stage: Stage, data: str, draw: Draw, order: Order, recipes: dict[str, Recipe]
    ) -> list[list[Subject]] | None:
        """Candidates by patient in the order in which they are moved; None if it is not known yet."""
        if order == "random":
            return in_turn(draw.candidates, draw.seed)
        name = " ".join(part for part in (stage.name, data, draw.direction) if part)
        if order == "uncertainty":
            first = next(iter(recipes.items()))
            name = f"{stage.name}-" * bool(stage.name) + draw.ranking(first).name
        if name not in self.rankings:
            waits_for = f"the predictions of {name}" if order == "uncertainty" else "a comparison of the scans"
            note = f"moving from {draw.direction} in order of {order} waits for {waits_for}"
            if note not in self.pending:
                self.pending.append(note)
            if order == "distance" and name not in {one.name for one in self.comparisons}:
                reading = next(iter(recipes.values())).data
                ids = tuple(sorted(subject.id for subject in draw.candidates))
                self.comparisons.append(ScanComparison(name, data, reading, draw.trained, ids))
            return None
        rank = {subject: k for k, subject in enumerate(self.rankings[name])}
        scans: dict[str, list[Subject]] = defaultdict(list)
        for subject in sorted(draw.candidates, key=lambda one: rank.get(one.id, len(rank))):
            scans[subject.patient].append(subject)
        return list(scans.values())

    def _free(self, data: str) -> list[Subject]:
        """The subjects of a data set that are not locked."""
        locked = self._locked(data)
        return [subject for subject in self.datasets[data].subjects if subject.id not in locked]

    def _locked(self, data: str) -> frozenset[str]:
        """The subjects of a data set that are for the locked test alone."""
        share = self.study.data[data].locked
        subjects = self.datasets[data].subjects
        return frozenset(make_split(subjects, 1, share).test) if share else frozenset()

    def _started(self, stage: Stage, run: PlannedRun, arm: str | None) -> PlannedRun:
        """The run with the one whose weights it starts from: of the same seed and, on the same data, the same fold."""
        if arm is None:
            return run
        found = self._runs_of(stage, arm)
        alike = [one for one in found if one.seed == run.seed] or found
        if same_data := [one for one in alike if one.data == run.data]:
            same = (run.split, run.fold, run.count, run.order)  # orders may move the same subjects
            alike = [one for one in same_data if (one.split, one.fold, one.count, one.order) == same]
        if len(alike) != 1:
            raise StudyError(
                f"arm '{run.arm}' starts from '{arm}', of which {len(alike)} runs fit '{run.name}'",
                fix="give both the same design on the same data, or the other arm one run for each seed",
            )
        source = alike[0].name
        weights = {"weights": f"runs/{source}"}  # in the study's folder
        start = StartSpec(**weights) if run.recipe.start is None else run.recipe.start.model_copy(update=weights)
        return replace(run, start_from=source, recipe=run.recipe.model_copy(update={"start": start}))

    def _runs_of(self, stage: Stage, arm: str) -> list[PlannedRun]:
        labels = (stage.label(arm), arm)
        found = [run for run in self.runs.values() if run.label in labels and not run.ranks]
        if not found:
            raise StudyError(f"arm '{arm}' has no runs to build on", fix="put it before the arms that refer to it")
        return found

    def _add_tests(self, stage: Stage, name: str, arm: Arm) -> None:
        """A test of each network of another arm: on those of the data set's subjects that it has not seen."""
        assert arm.weights_of is not None
        data = self.study.data_of(stage, arm)
        read = next((run.recipe.data for run in self._trained_on(data)), None)
        for trained in self._runs_of(stage, arm.weights_of):
            locked = isinstance(stage.design, LockedTest)
            judged = self._locked(data) if locked else self._unseen(trained, data)
            split = Split(((),), tuple(sorted(judged)))
            recipe = trained.recipe if read is None else trained.recipe.model_copy(update={"data": read})
            self._put(
                replace(
                    trained,
                    name=f"{stage.name + '-' if stage.name else ''}{name}-of-{trained.name}",
                    arm=name,
                    stage=stage.name,
                    data=data,
                    fold=FIRST_FOLD,
                    recipe=recipe,
                    split=split,
                    start_from=None,
                    weights_of=trained.name,
                    changes=arm.set,
                )
            )

    def _trained_on(self, data: str) -> list[PlannedRun]:
        return [run for run in self.runs.values() if run.data == data and run.weights_of is None]

    def _unseen(self, trained: PlannedRun, data: str) -> Iterable[str]:
        """The subjects of a data set that a run's network is tested on.

        Those held out from it or from what it started from, if that was on this data set, otherwise all that are not
        locked. Where runs on this data set keep to their recipe's split, they are the ones that none of these runs was
        trained on, so that networks which have seen the data set are compared with others, and on more than what the
        split holds out.
        """
        there = {subject.id for subject in self._free(data)}
        chain = [trained]
        while (needed := chain[-1].needs) is not None:
            chain.append(self.runs[needed])
        on_this = [run for run in chain if run.data == data and run.weights_of is None]
        fixed = [run for run in self._trained_on(data) if self._keeps_the_split(run)]
        if fixed and all(self._keeps_the_split(run) for run in on_this):
            used = {name for run in fixed for name in (*run.split.training_of(run.fold), *run.split.validation)}
            return there - used
        return on_this[0].split.held_out(on_this[0].fold) if on_this else there

    def _keeps_the_split(self, run: PlannedRun) -> bool:
        [stage] = [stage for stage in self.study.parts if stage.name == run.stage]
        return isinstance(stage.design, RecipeSplit)

    def _trials(self, design: Search) -> int:
        return self.size.trials or design.trials

    def _searched(self, stage: Stage) -> dict[str, Arm]:
        """The trials of a search that can be drawn now: each batch needs the scores of the ones before."""
        assert isinstance(stage.design, Search)
        names = [f"trial{k}" for k in range(self._trials(stage.design))]
        known = takewhile(self.scores.__contains__, map(stage.label, names))
        done = [self.scores[label] for label in known]
        drawn = drawn_trials(stage.design, done, len(names), METRICS[self.study.metric].better == "higher")
        if len(drawn) < len(names):
            self.pending.append(f"{len(names) - len(drawn)} more trials wait for the results of these")
        return {name: Arm(set=changes) for name, changes in zip(names, drawn, strict=False)}
