"""What a study is: one YAML file that names a question, recipes, what varies, and at which sizes it is run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from importlib import resources
from itertools import combinations, product
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from delineate.core.text import near, printable
from delineate.errors import StudyError
from delineate.io.files import parsing, read_text
from delineate.io.settings import MOST_CHARACTERS, parse_yaml
from delineate.metrics.catalogue import METRICS
from delineate.specification import Specification, Text, explained
from delineate.studies.measures import MEASURES

Changes = Annotated[tuple[Text, ...], Field(max_length=256)]
"""``path.to.field=value``, as ``--set`` takes them."""

Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=2**32)], ...], Field(min_length=1, max_length=100)]
Counts = Annotated[tuple[Annotated[int, Field(ge=0, le=10**6)], ...], Field(min_length=1, max_length=100)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
"""Part of the name of a run's folder."""

BASE = "base"
"""The arm that changes nothing."""

_MOST_ARMS = 256


class CrossValidation(Specification):
    """Every arm is trained once for each fold and seed; the folds' held-out subjects are pooled.

    Patients stay whole, and every fold has its share of every site.
    """

    kind: Literal["cross_validation"] = "cross_validation"
    folds: Annotated[int, Field(ge=2, le=100)] = 5


class RecipeSplit(Specification):
    """Every arm is trained once for each seed, on the split that its recipe defines; fold 0 is held out."""

    kind: Literal["recipe_split"] = "recipe_split"


class LearningCurve(Specification):
    """Every arm is trained on ever more labelled subjects, and judged on the same held-out ones.

    ``counts``: numbers of labelled subjects, those that choose the weights included. Each draw puts the
    patients in an order of its own, sites in turn by their share; smaller counts are the beginning of
    larger ones. ``held_out``: the number of folds, one of which is held out.
    """

    kind: Literal["learning_curve"] = "learning_curve"
    counts: Counts
    held_out: Annotated[int, Field(ge=2, le=100)] = 5


Order = Literal["random", "distance", "uncertainty"]


class MovedSubjects(Specification):
    """Every arm is trained on one site and judged on another, of which ``counts`` subjects are moved into training.

    Half of the other site's patients are judged, whatever is moved; moved subjects come from the other half.
    Without ``source`` and ``target``, a data set of two sites is studied in both directions.

    ``order``: which are moved first. ``random``: drawn for each seed. ``distance``: each time the one whose scan is
    farthest from all that are trained on, by spacing, field of view and contrast. ``uncertainty``: those of which the
    network of the first arm without moved subjects expects the lowest Dice, for each seed. Neither looks at labels.
    """

    kind: Literal["moved_subjects"] = "moved_subjects"
    counts: Counts = (0, 1, 3, 5, 10)
    order: Annotated[tuple[Order, ...], Field(min_length=1, max_length=3)] = ("random",)
    source: Text | None = None
    target: Text | None = None

    @model_validator(mode="after")
    def _distinct(self) -> MovedSubjects:
        if len(set(self.order)) < len(self.order):
            raise ValueError("order holds an entry twice")
        return self


class LockedTest(Specification):
    """Every arm is trained on all subjects that are not locked, and judged on the locked ones, once.

    Runs only with `--final`.
    """

    kind: Literal["locked_test"] = "locked_test"


_Number = Annotated[int, Field(ge=-(10**9), le=10**9)] | Annotated[float, Field(ge=-1e9, le=1e9)]


class Range(Specification):
    """Values from ``low`` to ``high``, on a logarithmic scale if ``log``; whole numbers if both ends are."""

    low: _Number
    high: _Number
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError("low must be below high, and above 0 on a logarithmic scale")
        return self


Choices = Annotated[tuple[bool | _Number | Text, ...], Field(min_length=2, max_length=100)]


class Search(Specification):
    """The values of recipe fields that give the best metric over the first of ``folds`` folds.

    ``parameters`` are ranges or lists of choices by field. Of ``trials``, ``at_a_time`` are drawn together from what
    the earlier ones have shown, by a tree-structured Parzen estimator (Optuna).
    """

    kind: Literal["search"] = "search"
    parameters: Annotated[dict[Text, Range | Choices], Field(min_length=1, max_length=32)]
    trials: Annotated[int, Field(ge=1, le=10**4)] = 20
    at_a_time: Annotated[int, Field(ge=1, le=256)] = 2
    folds: Annotated[int, Field(ge=2, le=100)] = 5


Design = Annotated[
    CrossValidation | RecipeSplit | LearningCurve | MovedSubjects | LockedTest | Search, Field(discriminator="kind")
]


class Arm(Specification):
    """One of the ways that are compared: ``set`` changes the study's recipe, or ``recipe`` replaces it.

    ``data``: the name of its data set, by default the stage's. ``start_from``: the arm whose weights it starts from.
    ``weights_of``: the arm whose trained networks it only tests: on another data set, or with other ``inference`` and
    ``postprocessing``. Arms of earlier stages are written ``stage/arm``.
    """

    recipe: Text | None = None
    set: Changes = ()
    data: Name | None = None
    start_from: Text | None = None
    weights_of: Text | None = None

    @model_validator(mode="after")
    def _trains_or_tests(self) -> Arm:
        if self.weights_of is not None:
            if self.recipe is not None or self.start_from is not None:
                raise ValueError("an arm with weights_of trains nothing: remove recipe and start_from")
            groups = ("inference.", "postprocessing.")
            if wrong := [change for change in self.set if not change.startswith(groups)]:
                raise ValueError(f"an arm with weights_of can change inference and postprocessing; got '{wrong[0]}'")
        return self

    def joined(self, other: Arm) -> Arm:
        """Both arms' settings; where both have one, that of the other."""
        return Arm(
            recipe=other.recipe or self.recipe,
            set=(*self.set, *other.set),
            data=other.data or self.data,
            start_from=other.start_from or self.start_from,
            weights_of=other.weights_of or self.weights_of,
        )


Factor = Changes | Annotated[dict[Name, Arm], Field(min_length=2, max_length=100)]
"""Changes that are made or not, or an arm for each of its levels."""


class Stage(Specification):
    """Part of a study: its arms, or factors that make them, in one design.

    ``factors``: changes by name, made or not, or levels by name. With ``combine: all``, there is an arm for every
    combination, named after the factors and levels it has; with ``alone``, the base and each factor on its own.
    ``best_of``: an earlier stage, whose best arm on the same data set, by the study's metric, is what this stage
    changes: with what the arm and the size change in it, but without the earlier stage's own ``set``.
    """

    name: Name | Literal[""] = ""
    set: Changes = ()
    arms: Annotated[dict[Name, Arm], Field(max_length=_MOST_ARMS)] = Field(default_factory=dict)
    factors: Annotated[dict[Name, Factor], Field(max_length=16)] = Field(default_factory=dict)
    combine: Literal["all", "alone"] = "all"
    design: Design
    data: Name | None = None
    best_of: Name | None = None

    @property
    def compared(self) -> dict[str, Arm]:
        """Arms by name; the recipe alone where there are neither arms nor factors."""
        return {**self.arms, **dict(self._combined())} or {BASE: Arm()}

    def _combined(self) -> Iterator[tuple[str, Arm]]:
        if not self.factors:
            return
        levels = [
            list(factor.items()) if isinstance(factor, dict) else [("", Arm()), (name, Arm(set=factor))]
            for name, factor in self.factors.items()
        ]
        ordered = [
            (sum(changed), [not one for one in changed], [among[k] for k, among in zip(indices, levels, strict=True)])
            for indices in product(*(range(len(among)) for among in levels))
            for changed in [[k > 0 for k in indices]]
        ]
        # As reports list them: the base, each alone, in pairs, …
        for changes, _, chosen in sorted(ordered, key=lambda one: one[:2]):
            if self.combine == "alone" and changes > 1:
                break
            arm = Arm()
            for _, other in chosen:
                arm = arm.joined(other)
            yield _joined_name([name for name, _ in chosen]), arm

    def opposites(self) -> Iterator[tuple[str, str, list[tuple[str, str]]]]:
        """For each factor, two of its levels by name, and the pairs of arms that differ in this alone."""
        if self.combine == "alone" or not self.factors:
            return
        levels = [list(factor) if isinstance(factor, dict) else ["", name] for name, factor in self.factors.items()]
        for which, names in enumerate(levels):
            rest = [["*"] if k == which else among for k, among in enumerate(levels)]
            for other, one in combinations(names, 2):
                pairs = [
                    (_joined_name(chosen, which, one), _joined_name(chosen, which, other)) for chosen in product(*rest)
                ]
                yield one or BASE, other or BASE, pairs

    @model_validator(mode="after")
    def _few(self) -> Stage:
        if (arms := len(self.compared)) > _MOST_ARMS:
            raise ValueError(f"its factors make {arms} arms; at most {_MOST_ARMS}")
        return self

    def label(self, arm: str) -> str:
        """The arm's name within the study."""
        return f"{self.name}/{arm}" if self.name else arm


def _joined_name(levels: Sequence[str], which: int | None = None, instead: str = "") -> str:
    """The name of a combination of levels, with one of them replaced."""
    names = [instead if k == which else level for k, level in enumerate(levels)]
    return "+".join(name for name in names if name) or BASE


class Size(Specification):
    """How much of the study to run: changes to every arm, such as the budget, and which folds, seeds or counts.

    ``arms``: changes to single arms by name, in which ``*`` stands for anything; a stage that builds on the best of
    them keeps that one's. ``seeds`` seed the training and, except in cross-validation, the draws. ``folds``
    and ``counts`` select from the design's; ``null``: all. ``subjects``: at most this many of each data set.
    ``gflop``: every arm trains for as many steps as this much compute allows, instead of its recipe's budget.
    ``coarse`` divides the number of voxels along each axis of the simulated scans of a data set, by its name.
    """

    set: Changes = ()
    arms: Annotated[dict[Text, Changes], Field(max_length=_MOST_ARMS)] = Field(default_factory=dict)
    seeds: Seeds = (0,)
    folds: Annotated[tuple[Annotated[int, Field(ge=0, le=99)], ...], Field(max_length=100)] | None = None
    counts: Counts | None = None
    subjects: Annotated[int, Field(ge=2, le=10**6)] | None = None
    trials: Annotated[int, Field(ge=1, le=10**4)] | None = None
    gflop: Annotated[float, Field(gt=0, le=1e15)] | None = None
    coarse: Annotated[dict[Name, Annotated[float, Field(ge=1, le=16)]], Field(max_length=16)] = Field(
        default_factory=dict
    )

    def changes_to(self, label: str) -> Changes:
        """What ``arms`` changes in the arm of this name."""
        return tuple(one for name, changes in self.arms.items() if fnmatchcase(label, name) for one in changes)

    @model_validator(mode="after")
    def _distinct(self) -> Size:
        for name in ("seeds", "folds", "counts"):
            values = getattr(self, name) or ()
            if twice := [value for value in values if values.count(value) > 1]:
                raise ValueError(f"{name} holds {twice[0]} twice")
        return self


class Claim(Specification):
    """Something a report concluded, put to the test: arm ``better`` beats arm ``worse`` in a measure.

    A metric is compared over the same patients; a measure of runs, such as ``steps_to_loss``, over the same
    seeds and folds. Along a curve, an arm's name alone means its largest count; ``arm direction count`` names another.
    """

    text: Text
    better: Text
    worse: Text
    metric: str = "dice"

    @model_validator(mode="after")
    def _measured(self) -> Claim:
        known = {metric.name: metric.better for metric in METRICS.values()}
        known |= {measure.name: measure.better for measure in MEASURES.values()}
        if known.get(self.metric) is None:
            raise ValueError(f"'{self.metric}' is no metric that says which is better{near(self.metric, known)}")
        if self.better == self.worse:
            raise ValueError(f"a claim compares arm '{self.better}' with itself")
        return self


class Published(Specification):
    """A table of a report, printed beside ours and never instead of it.

    ``columns`` are its headings, the first that of the rows' names; ``measures`` are ours for each other column, or
    null where we have none. ``arms``: which of our arms a row is about, where they differ in name; of a curve,
    ``arm direction count``.
    """

    source: Text
    columns: Annotated[tuple[Text, ...], Field(min_length=1, max_length=32)]
    rows: Annotated[tuple[tuple[Text, ...], ...], Field(max_length=200)]
    measures: Annotated[tuple[Text | None, ...], Field(max_length=31)] = ()
    arms: Annotated[dict[Text, Text], Field(max_length=200)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _rectangular(self) -> Published:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"row {list(wrong[0])} has {len(wrong[0])} cells for {len(self.columns)} columns")
        if self.measures and len(self.measures) != len(self.columns) - 1:
            raise ValueError(f"{len(self.measures)} measures for {len(self.columns) - 1} columns of figures")
        known = {*METRICS, *MEASURES}
        for measure in filter(None, self.measures):
            if (name := measure.partition("@")[0]) not in known:
                raise ValueError(f"'{name}' is no measure{near(name, known)}")
        return self


class Phantom(Specification):
    """Simulated scans to run the study on if its data are not available; see `delineate data phantom`.

    ``sites``: only patients imaged there.
    """

    kind: Text
    patients: Annotated[int, Field(ge=2, le=10**4)] = 20
    seed: Annotated[int, Field(ge=0, le=2**32)] = 0
    layout: Text | None = None
    sites: Annotated[tuple[Text, ...], Field(min_length=1, max_length=100)] | None = None


class DataSet(Specification):
    """A data set of a study. Its ``locked`` share of patients, stratified by site, is for the locked test alone."""

    description: str = ""
    phantom: Phantom | None = None
    locked: Annotated[float, Field(ge=0, lt=1)] = 0.0


class Study(Specification):
    """A question, and the runs that answer it.

    ``recipe`` is the name of a packaged recipe, a path relative to the study's file, or ``auto``: a recipe derived from
    the machine and from those subjects of each data set that are not locked. ``set`` changes it for every arm. A study
    has either ``stages`` or, with a single one, its ``arms`` (or ``factors``) and ``design``. Without
    arms, the recipe itself is studied. A ``quick`` size takes about a quarter of an hour on two
    cores, a ``paper`` size what the report or a careful answer needs.

    ``data``: its data sets by name, the first of which is that of stages and arms which name none.
    """

    format: Literal[1] = 1
    name: Name
    question: Text
    recipe: Text
    set: Changes = ()
    data: Annotated[dict[Name, DataSet], Field(min_length=1, max_length=16)] = Field(
        default_factory=lambda: {"scans": DataSet()}
    )
    arms: Annotated[dict[Name, Arm], Field(max_length=_MOST_ARMS)] = Field(default_factory=dict)
    factors: Annotated[dict[Name, Factor], Field(max_length=16)] = Field(default_factory=dict)
    combine: Literal["all", "alone"] = "all"
    design: Design | None = None
    stages: Annotated[tuple[Stage, ...], Field(max_length=16)] = ()
    sizes: Annotated[dict[Literal["quick", "paper"], Size], Field(min_length=1)]
    metric: str = "dice"
    claims: Annotated[tuple[Claim, ...], Field(max_length=100)] = ()
    published: Annotated[tuple[Published, ...], Field(max_length=20)] = ()
    deviates: Annotated[tuple[str, ...], Field(max_length=64)] = ()

    @property
    def parts(self) -> tuple[Stage, ...]:
        """The stages; the study's own arms and design as one of them where none is named."""
        if self.design is None:
            return self.stages
        return (Stage(arms=self.arms, factors=self.factors, combine=self.combine, design=self.design),)

    @property
    def labels(self) -> tuple[str, ...]:
        """Every arm by its name within the study."""
        return tuple(stage.label(arm) for stage in self.parts for arm in stage.compared)

    @property
    def locked_stages(self) -> frozenset[str]:
        """Names of the stages that test on locked subjects."""
        return frozenset(stage.name for stage in self.parts if isinstance(stage.design, LockedTest))

    def data_of(self, stage: Stage, arm: Arm) -> str:
        """The name of the data set that an arm is trained or tested on."""
        return arm.data or stage.data or next(iter(self.data))

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if (self.design is None) == (not self.stages):
            raise ValueError("a study needs either a design or stages")
        if self.stages and (self.arms or self.factors):
            raise ValueError("arms and factors belong to a stage where there are stages")
        if self.metric not in METRICS:
            raise ValueError(f"'{self.metric}' is no metric{near(self.metric, METRICS)}")
        if METRICS[self.metric].better is None:
            raise ValueError(f"'{self.metric}' says neither which arm is better nor what to average over targets")
        self._check_stages()
        labels = self.labels
        for claim in self.claims:
            if strangers := [arm for arm in (claim.better, claim.worse) if arm.partition(" ")[0] not in labels]:
                raise ValueError(f"a claim names arm '{strangers[0]}'; the arms are {', '.join(labels)}")
        for table in self.published:
            # An arm, or one point of its curve: "base A-to-B 3".
            if strangers := [arm for arm in table.arms.values() if arm.partition(" ")[0] not in labels]:
                raise ValueError(f"a published table names arm '{strangers[0]}'; the arms are {', '.join(labels)}")
        for name, size in self.sizes.items():
            self._check_size(name, size)
        return self

    def _check_stages(self) -> None:
        before: list[str] = []
        earlier: list[str] = []
        for stage in self.parts:
            if self.stages and not stage.name:
                raise ValueError("each stage needs a name")
            if stage.name in earlier:
                raise ValueError(f"two stages have the name '{stage.name}'")
            if stage.best_of is not None and stage.best_of not in earlier:
                raise ValueError(f"stage '{stage.name}' builds on '{stage.best_of}', which is no earlier stage")
            arms = stage.compared
            for name, arm in arms.items():
                data = self.data_of(stage, arm)
                if data not in self.data:
                    raise ValueError(f"arm '{name}' is on data set '{data}'; there are {', '.join(self.data)}")
                locked = isinstance(stage.design, LockedTest)
                if locked and not self.data[data].locked:
                    raise ValueError(f"stage '{stage.name}' tests on locked subjects; give data.{data}.locked a share")
                for other in filter(None, (arm.start_from, arm.weights_of)):
                    if other not in before and other not in arms:
                        raise ValueError(f"arm '{name}' refers to arm '{other}', which is not there before it")
                before.append(stage.label(name))
                if stage.name:
                    arms = {**arms, stage.label(name): arm}
            earlier.append(stage.name)

    def _check_size(self, name: str, size: Size) -> None:
        designs = [stage.design for stage in self.parts]
        folds = max((d.folds for d in designs if isinstance(d, CrossValidation | Search)), default=0)
        if size.folds is not None and not folds:
            raise ValueError(f"size {name} has folds, which no design of the study has")
        if beyond := [fold for fold in size.folds or () if fold >= folds]:
            raise ValueError(f"size {name} has fold {beyond[0]}; there are folds 0 to {folds - 1}")
        if size.counts is not None and not any(isinstance(d, LearningCurve | MovedSubjects) for d in designs):
            raise ValueError(f"size {name} has counts, which no design of the study has")
        if unknown := [data for data in size.coarse if data not in self.data]:
            raise ValueError(f"size {name} has coarse scans of '{unknown[0]}'; there are {', '.join(self.data)}")
        for design in (one for one in designs if isinstance(one, MovedSubjects)):
            if "uncertainty" in design.order and 0 not in (size.counts or design.counts):
                raise ValueError(f"size {name} orders by uncertainty, which is that of count 0; add it to counts")
        if size.trials is not None and not any(isinstance(d, Search) for d in designs):
            raise ValueError(f"size {name} has trials, which no design of the study has")
        if strangers := [arm for arm in size.arms if not any(fnmatchcase(label, arm) for label in self.labels)]:
            raise ValueError(f"size {name} changes arm '{strangers[0]}'; the arms are {', '.join(self.labels)}")


def packaged_studies() -> dict[str, Path]:
    """Names and files of the studies that come with the package."""
    folder = Path(str(resources.files("delineate") / "studies" / "packaged"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def study_file(name_or_path: str | Path) -> Path:
    """The file of a packaged study, or the path itself. Raises :class:`StudyError` where there is neither."""
    packaged = packaged_studies()
    path = packaged.get(str(name_or_path), Path(name_or_path))
    if not path.is_file():
        raise StudyError(
            f"no study '{printable(str(name_or_path))[:100]}'{near(str(name_or_path), packaged)}",
            fix=f"give a YAML file, or one of {', '.join(packaged)}",
        )
    return path


def load_study(name_or_path: str | Path) -> Study:
    """The packaged study of a name, or that in a YAML file. Raises :class:`StudyError` that lists every wrong field."""
    path = study_file(name_or_path)
    with parsing(path, StudyError, fix="see `delineate study show`"):
        values = parse_yaml(read_text(path, 4 * MOST_CHARACTERS), path.name, StudyError)
        try:
            return Study.model_validate(values)
        except ValidationError as error:
            raise StudyError(
                f"the study in '{path.name}' is not valid:\n" + explained(error, Study),
                fix="see `delineate study show`",
            ) from error
