"""What a study is: one YAML file that names a question, a recipe, what varies, and at which sizes it is run."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from delineate.core.text import near, printable
from delineate.errors import StudyError
from delineate.io.files import parsing, read_text
from delineate.io.settings import MOST_CHARACTERS, parse_yaml
from delineate.metrics.catalogue import METRICS
from delineate.specification import Specification, Text, explained

Changes = Annotated[tuple[Text, ...], Field(max_length=256)]
"""``path.to.field=value``, as ``--set`` takes them."""

Seeds = Annotated[tuple[Annotated[int, Field(ge=0, le=2**32)], ...], Field(min_length=1, max_length=100)]
Counts = Annotated[tuple[Annotated[int, Field(ge=0, le=10**6)], ...], Field(min_length=1, max_length=100)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]{0,63}$")]
"""Part of the name of a run's folder."""


class CrossValidation(Specification):
    """Every arm is trained once for each fold and seed; the folds' held-out subjects are pooled.

    Patients stay whole, and every fold has its share of every site.
    """

    kind: Literal["cross_validation"] = "cross_validation"
    folds: Annotated[int, Field(ge=2, le=100)] = 5


class LearningCurve(Specification):
    """Every arm is trained on ever more labelled subjects, and judged on the same held-out ones.

    ``counts``: numbers of labelled subjects, those that choose the weights included. Each draw puts the
    patients in an order of its own, sites in turn by their share; smaller counts are the beginning of
    larger ones. ``held_out``: the number of folds, one of which is held out.
    """

    kind: Literal["learning_curve"] = "learning_curve"
    counts: Counts
    held_out: Annotated[int, Field(ge=2, le=100)] = 5


class MovedSubjects(Specification):
    """Every arm is trained on one site and judged on another, of which ``counts`` subjects are moved into training.

    Half of the other site's patients are judged, whatever is moved; moved subjects come from the other half.
    Without ``source`` and ``target``, a data set of two sites is studied in both directions.
    """

    kind: Literal["moved_subjects"] = "moved_subjects"
    counts: Counts = (0, 1, 3, 5, 10)
    source: Text | None = None
    target: Text | None = None


Design = Annotated[CrossValidation | LearningCurve | MovedSubjects, Field(discriminator="kind")]


class Arm(Specification):
    """One of the ways of training that are compared: ``set`` changes the study's recipe, or ``recipe`` replaces it."""

    recipe: Text | None = None
    set: Changes = ()


class Size(Specification):
    """How much of the study to run: changes to every arm, such as the budget, and which folds, seeds or counts.

    ``seeds`` seed the training and, except in cross-validation, the draws. ``folds`` and ``counts`` select from the
    design's; ``null``: all.
    """

    set: Changes = ()
    seeds: Seeds = (0,)
    folds: Annotated[tuple[Annotated[int, Field(ge=0, le=99)], ...], Field(max_length=100)] | None = None
    counts: Counts | None = None


class Claim(Specification):
    """Something a report concluded, put to the test: arm ``better`` beats arm ``worse`` in a metric."""

    text: Text
    better: Name
    worse: Name
    metric: str = "dice"

    @model_validator(mode="after")
    def _measured(self) -> Claim:
        if self.metric not in METRICS or METRICS[self.metric].better is None:
            raise ValueError(f"'{self.metric}' is no metric that says which is better{near(self.metric, METRICS)}")
        return self


class Published(Specification):
    """A table of a report, printed beside ours and never instead of it: ``columns``, and a row for each line."""

    source: Text
    columns: Annotated[tuple[Text, ...], Field(min_length=1, max_length=32)]
    rows: Annotated[tuple[tuple[Text, ...], ...], Field(max_length=200)]

    @model_validator(mode="after")
    def _rectangular(self) -> Published:
        if wrong := [row for row in self.rows if len(row) != len(self.columns)]:
            raise ValueError(f"row {list(wrong[0])} has {len(wrong[0])} cells for {len(self.columns)} columns")
        return self


class Phantom(Specification):
    """Simulated scans to run the study on if its data are not available."""

    kind: Text
    patients: Annotated[int, Field(ge=2, le=10**4)] = 20
    seed: Annotated[int, Field(ge=0, le=2**32)] = 0


class Study(Specification):
    """A question, and the runs that answer it.

    ``recipe`` is the name of a packaged recipe, or a path relative to the study's file; ``set`` changes it for every
    arm. Without ``arms``, the recipe itself is studied. A ``quick`` size takes about a quarter of an hour on two
    cores, a ``paper`` size what the report or a careful answer needs.
    """

    format: Literal[1] = 1
    name: Name
    question: Text
    recipe: Text
    set: Changes = ()
    arms: Annotated[dict[Name, Arm], Field(max_length=100)] = Field(default_factory=dict)
    design: Design
    sizes: Annotated[dict[Literal["quick", "paper"], Size], Field(min_length=1)]
    phantom: Phantom | None = None
    metric: str = "dice"
    claims: Annotated[tuple[Claim, ...], Field(max_length=100)] = ()
    published: Annotated[tuple[Published, ...], Field(max_length=20)] = ()

    @property
    def compared(self) -> dict[str, Arm]:
        """The arms; the recipe alone where none is named."""
        return self.arms or {"base": Arm()}

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for claim in self.claims:
            if strangers := [arm for arm in (claim.better, claim.worse) if arm not in self.compared]:
                raise ValueError(f"a claim names arm '{strangers[0]}'; the arms are {', '.join(self.compared)}")
        if self.metric not in METRICS:
            raise ValueError(f"'{self.metric}' is no metric{near(self.metric, METRICS)}")
        for name, size in self.sizes.items():
            if isinstance(self.design, CrossValidation):
                if size.counts is not None:
                    raise ValueError(f"size {name} has counts, which cross-validation has not; choose folds")
                if beyond := [fold for fold in size.folds or () if fold >= self.design.folds]:
                    raise ValueError(f"size {name} has fold {beyond[0]}; there are folds 0 to {self.design.folds - 1}")
            elif size.folds is not None:
                raise ValueError(f"size {name} has folds, which {self.design.kind} has not; choose counts")
        return self


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
