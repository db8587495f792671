"""Recipes: everything that defines a run, in one YAML file, composed of the specifications of its parts."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from delineate.core.targets import MOST_TARGETS, MOST_VALUE, Code, Coding, Targets
from delineate.core.text import printable
from delineate.errors import RecipeError
from delineate.io.files import parsing, read_text
from delineate.io.settings import MOST_CHARACTERS, MOST_LEVELS, parse_yaml
from delineate.losses.spec import DICE_AND_CROSS_ENTROPY, LossSpec
from delineate.metrics.catalogue import METRICS, metric_names
from delineate.networks.spec import NetworkSpec
from delineate.plugins import Parts, requirement_of
from delineate.preprocessing.pipeline import Pipeline, StepSpec
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.samplers import ClassBalancedTiles, SamplerSpec
from delineate.sampling.tiles import TileSpec
from delineate.specification import Names, PositiveWeight, Specification, Weight, specifications_in

if TYPE_CHECKING:
    from delineate.datasets.dataset import Dataset

LabelValue = Annotated[int, Field(ge=0, le=MOST_VALUE)]


class TargetsSpec(Specification):
    """What is segmented; see :class:`delineate.core.targets.Targets`."""

    values: Annotated[
        dict[str, LabelValue | Annotated[tuple[LabelValue, ...], Field(max_length=256)]], Field(max_length=MOST_TARGETS)
    ]
    mode: Literal["exclusive", "overlapping"] = "exclusive"
    ignore: Annotated[tuple[Annotated[int, Field(ge=-MOST_VALUE, le=MOST_VALUE)], ...], Field(max_length=256)] = ()

    def targets(self) -> Targets:
        values = {name: (v,) if isinstance(v, int) else tuple(v) for name, v in self.values.items()}
        return Targets(values, self.mode, self.ignore)

    @classmethod
    def of(cls, targets: Targets) -> TargetsSpec:
        return cls.model_validate(targets.as_dict())


class CodeSpec(Specification):
    """A coded concept, by default from SNOMED CT (``SCT``). Lengths are limited as in DICOM."""

    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field(default="SCT", min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)

    def code(self) -> Code:
        return Code(self.value, self.scheme, self.meaning)


class CodingSpec(Specification):
    """What a target is, for DICOM-SEG; see :class:`delineate.core.targets.Coding`."""

    category: CodeSpec
    type: CodeSpec

    def coding(self) -> Coding:
        return Coding(self.category.code(), self.type.code())


class DataSpec(Specification):
    """How a data set is read. If ``targets`` is ``null``, those that the data set names are used.

    ``images`` and ``labels`` are file patterns relative to its folder; several channels have one pattern each.
    ``resample_channels``: channels on other grids are resampled to the grid of the first, instead of being an error.
    ``codes`` say what targets are, by name, in formats that carry codes; targets without one are coded as
    unspecified regions.
    """

    layout: str = "auto"
    images: str | Annotated[dict[str, str], Field(max_length=64)] | None = None
    labels: str | None = None
    channels: Names | None = None
    resample_channels: bool = False
    targets: TargetsSpec | None = None
    codes: Annotated[dict[str, CodingSpec], Field(max_length=MOST_TARGETS)] = Field(default_factory=dict)

    def codings(self) -> dict[str, Coding]:
        return {name: spec.coding() for name, spec in self.codes.items()}

    @classmethod
    def of_changes(cls, changes: Sequence[str]) -> DataSpec:
        """The ``data`` group that ``changes`` alone define; changes to other groups are ignored."""
        of_data = [change for change in changes if change.startswith("data.")]
        try:
            return cls.model_validate(apply_changes({}, of_data).get("data", {}))
        except ValidationError as error:
            raise RecipeError("the data settings are not valid:\n" + explained(error)) from error

    def open(self, path: Path) -> Dataset:
        """Open the data set at ``path`` as these fields say."""
        from delineate.datasets.layouts import open_dataset  # not needed to read a recipe

        targets = None if self.targets is None else self.targets.targets()
        return open_dataset(path, layout=self.layout, images=self.images, labels=self.labels, targets=targets)


class OptimiserSpec(Specification):
    """``adamw`` decouples the weight decay; ``sgd`` uses Nesterov momentum ``beta1``.

    ``rates`` multiply the learning rate of parameters whose names match a pattern, such as
    ``encoder.*``; the first match counts.
    """

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0, le=100)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    rates: Annotated[dict[str, PositiveWeight], Field(max_length=256)] = Field(default_factory=dict)


class ScheduleSpec(Specification):
    """The learning rate over the budget: a linear warm-up over its first part, then a decay to zero."""

    kind: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: Annotated[float, Field(gt=0, le=100)] = 0.9
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02

    def factor(self, progress: float) -> float:
        """Multiple of the learning rate when ``progress`` (0 … 1) of the budget is spent."""
        import math

        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            # Not from zero: the first step would be wasted.
            return 0.1 + 0.9 * progress / self.warmup
        done = (progress - self.warmup) / (1 - self.warmup)
        if self.kind == "polynomial":
            return (1 - done) ** self.power
        return 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1.0


class ValidationSpec(Specification):
    """Validation on whole volumes of a few subjects taken from the training folds, always the same ones.

    ``times`` over the budget (less often where that would take more than a tenth of the
    minutes); the bundle keeps the weights of the best ``metric``. ``patience``
    validations without a better one end the training early; ``null``: never. Every ``loss_every``
    steps, the loss is measured on a batch of their tiles without augmentation; ``null``: never.
    """

    subjects: Annotated[int, Field(ge=0, le=10**6)] = 8
    times: Annotated[int, Field(ge=1, le=10**6)] = 10
    metric: Literal["dice", "worst_dice"] = "dice"
    patience: Annotated[int, Field(ge=1, le=10**6)] | None = None
    loss_every: Annotated[int, Field(ge=1, le=10**9)] | None = 50


class TrainingSpec(Specification):
    """The budget is ``minutes`` of training or a number of ``steps``, whichever ends first.

    ``ema`` is the decay of the averaged weights that are validated and kept (0: none).
    ``collapse_after``: from this step on, predictions of background alone are reported.
    ``frozen``: patterns of parameters that keep their initial values, such as ``encoder.0.*``; their
    BatchNorms keep their statistics, too.
    """

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 2
    minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    optimiser: OptimiserSpec = OptimiserSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    validation: ValidationSpec = ValidationSpec()
    collapse_after: Annotated[int, Field(ge=1, le=10**9)] = 300
    folds: Annotated[int, Field(ge=2, le=1000)] = 5
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    frozen: Names = ()


class StartSpec(Specification):
    """Weights to start from: those of a run or bundle, or of a file of tensors.

    Tensors that match by name and shape are loaded, the rest reported; ``include`` and ``exclude`` are patterns of
    names. Outputs are matched by their target's name; ``rows`` maps a target to the source's target if
    their names differ. ``channels`` converts kernels for a different number of input channels.
    """

    weights: str
    include: Names = ("*",)
    exclude: Names = ()
    rows: Annotated[dict[str, str], Field(max_length=256)] = Field(default_factory=dict)
    channels: Literal["repeat", "mean"] | None = "repeat"


class InferenceSpec(Specification):
    """Tiles overlap by a fraction; their outputs are averaged by weight. ``flips``: axes mirrored at test time."""

    overlap: Annotated[float, Field(ge=0, le=0.95)] = 0.5
    weights: Literal["gaussian", "uniform"] = "gaussian"
    flips: Annotated[tuple[Literal["x", "y", "z"], ...], Field(max_length=3)] = ()


class PostprocessingSpec(Specification):
    """Targets that keep only their largest component, and the smallest component to keep (ml), by target."""

    largest_component: Names = ()
    minimum_ml: Annotated[dict[str, Weight], Field(max_length=256)] = Field(default_factory=dict)


class Recipe(Specification):
    """Everything that defines a run: an immutable value, checked on creation.

    >>> recipe = Recipe.model_validate(
    ...     {
    ...         "name": "mine",
    ...         "tiles": {"kind": "patches", "shape": [64, 64, 32]},
    ...         "network": {"kind": "unet", "dimensions": 3, "widths": [16, 32, 64]},
    ...         "training": {"minutes": 30},
    ...     }
    ... )
    >>> recipe.training.batch_size, recipe.sampler.kind
    (2, 'class_balanced')
    """

    name: str
    description: str = ""
    data: DataSpec = DataSpec()
    preprocessing: Annotated[tuple[StepSpec, ...], Field(max_length=64)] = ()
    tiles: TileSpec
    sampler: SamplerSpec = ClassBalancedTiles()
    augmentation: AugmentationSpec = AugmentationSpec()
    network: NetworkSpec
    start: StartSpec | None = None
    loss: LossSpec = DICE_AND_CROSS_ENTROPY
    training: TrainingSpec = TrainingSpec()
    inference: InferenceSpec = InferenceSpec()
    postprocessing: PostprocessingSpec = PostprocessingSpec()
    metrics: Names = ("standard",)

    @model_validator(mode="after")
    def _batch_suffices(self) -> Recipe:
        least = self.network.least_batch
        if self.training.batch_size < least:
            raise ValueError(
                f"network '{self.network.kind}' trains on batches of {least} or more; "
                f"training.batch_size is {self.training.batch_size}"
            )
        return self

    @field_validator("metrics")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        try:
            metric_names(",".join(names))
        except RecipeError as error:
            raise ValueError(error.text) from error
        return names

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(steps=self.preprocessing)

    @property
    def requires(self) -> tuple[str, ...]:
        """The packages that provide parts of this recipe, each as ``package==version``."""
        parts = [*map(type, specifications_in(self)), *(METRICS[name] for name in metric_names(",".join(self.metrics)))]
        return tuple(sorted({found for part in parts if (found := requirement_of(part))}))

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, every default written out."""
        return self.model_dump(mode="json")


def packaged_recipes() -> dict[str, Path]:
    """Names and files of the recipes that come with the package."""
    folder = resources.files("delineate") / "recipes"
    return {file.stem: file for file in sorted(Path(str(folder)).rglob("*.yaml"))}


def load_recipe(name_or_path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """A packaged recipe by name, or one from a YAML file, with ``path.to.field=value`` changes.

    A file may begin with ``extends``, the name or path (relative to its own folder) of a recipe whose fields it
    inherits. Groups are merged field by field, but a group with its own ``kind`` replaces the inherited one.

    Raises :class:`RecipeError` naming the field, what was found, and the nearest valid name.
    """
    with parsing(_short(name_or_path), RecipeError, fix="see `delineate recipes show`"):
        values = _read(name_or_path)
    return recipe_from(apply_changes(values, changes))


def _read(name_or_path: str | Path, beside: Path | None = None, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    packaged = packaged_recipes()
    path = packaged.get(str(name_or_path), (beside or Path()) / name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(_short(name_or_path), packaged, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else "."
        raise RecipeError(
            f"no recipe '{_short(name_or_path)}'{hint} Packaged recipes are {', '.join(packaged)}",
            fix="choose one of these, or give the path of a YAML file",
        )
    if path in extended:
        raise RecipeError(f"{path.name} extends itself, by way of {extended[-1].name}", fix="remove one `extends`")
    values = parse_yaml(read_text(path, 4 * MOST_CHARACTERS), path.name, RecipeError)
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name} holds {type(values).__name__}, not fields", fix="see `delineate recipes show`")
    if len(extended) > MOST_LEVELS:
        raise RecipeError(
            f"{path.name} is number {len(extended)} in a chain of recipes that extend each other",
            fix=f"use at most {MOST_LEVELS}",
        )
    base = values.pop("extends", None)
    return values if base is None else _joined(_read(str(base), path.parent, (*extended, path)), values)


def _joined(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    joined = dict(base)
    for key, value in values.items():
        before = joined.get(key)
        alike = isinstance(before, dict) and isinstance(value, dict) and "kind" not in value
        joined[key] = _joined(before, value) if alike else value  # type: ignore[arg-type]
    return joined


def recipe_from(values: Mapping[str, Any]) -> Recipe:
    """A recipe from plain values; raises :class:`RecipeError` that lists every wrong field."""
    with parsing("the recipe", RecipeError, fix="see `delineate recipes show`"):
        try:
            return Recipe.model_validate(values)
        except ValidationError as error:
            raise RecipeError("the recipe is not valid:\n" + explained(error)) from error


def apply_changes(values: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Values with ``path.to.field=value`` applied; list items are addressed by number."""
    values = _copied(values)
    for change in changes:
        with parsing(_short(change), RecipeError, fix="write path.to.field=value"):
            _change(values, change)
    return values


def _change(values: dict[str, Any], change: str) -> None:
    """Apply one change in place."""
    path, equals, text = change.partition("=")
    if not equals:
        raise RecipeError(f"'{change}' is not path.to.field=value", fix="write for example training.batch_size=4")
    *parents, last = path.strip().split(".")
    if len(parents) >= MOST_LEVELS:
        raise RecipeError(f"'{path[:80]}…' has {len(parents) + 1} levels", fix=f"use at most {MOST_LEVELS}")
    node: Any = values
    for key in parents:
        node = node[_index(node, key, path)] if isinstance(node, list) else node.setdefault(key, {})
        if not isinstance(node, dict | list):
            raise RecipeError(f"'{path}': '{key}' is a single value, not a group of fields", fix="shorten the path")
    node[_index(node, last, path) if isinstance(node, list) else last] = parse_yaml(text, _short(change), RecipeError)


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
        raise RecipeError(f"'{path}': '{key}' is not an item of a list of {len(node)}", fix="count from 0")
    return int(key)


def to_yaml(values: Any, reasons: Mapping[str, str] | None = None, *, path: str = "", indent: int = 0) -> str:
    """YAML of plain values, with a reason as a comment beside each field named in ``reasons``."""
    pad, reasons, lines = "  " * indent, reasons or {}, []
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        comment = f"  # {printable(reasons[here])}" if here in reasons else ""
        key = _scalar(str(key))
        if isinstance(value, dict) and value:
            lines.append(f"{pad}{key}:{comment}\n" + to_yaml(value, reasons, path=here, indent=indent + 1))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{pad}{key}:{comment}\n")
            for i, item in enumerate(value):
                body = to_yaml(item, reasons, path=f"{here}.{i}", indent=indent + 2)
                lines.append(f"{pad}  - {body.lstrip()}")
        else:
            lines.append(f"{pad}{key}: {_scalar(value)}{comment}\n")
    return "".join(lines)


def _scalar(value: Any) -> str:
    """A value or a name on one line of YAML that reads back unchanged."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("...").strip()
    if not text.isprintable():  # line breaks or control characters
        text = yaml.safe_dump(value, default_flow_style=True, default_style='"', width=10**9).strip()
    return text


def _copied(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    return [_copied(value) for value in values] if isinstance(values, list) else values


def explained(error: ValidationError, most: int = 20) -> str:
    """A line for each wrong field."""
    lines = [_explain(e) for e in error.errors()]
    return "\n".join([*lines[:most], *([f"  and {len(lines) - most} more"] if len(lines) > most else [])])


def _explain(error: Any) -> str:
    """One line for one pydantic error: where, what, and the nearest valid name for a misspelt field."""
    where = ".".join(_short(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(_short(error["loc"][-1]), _field_names(Recipe), n=1)
        return f"  {where}: no such field" + (f"; did you mean '{near[0]}'?" if near else "; remove it")
    if error["type"] in ("union_tag_invalid", "literal_error"):
        found, expected = _short(error["ctx"].get("tag", error["input"])), error["ctx"].get("expected_tags", "")
        expected = expected or error["ctx"].get("expected", "")
        names = [name.strip(" '") for name in expected.replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(found), names, n=1)
        return f"  {where}: '{found}' is not one of {', '.join(names)}" + (
            f"; did you mean '{near[0]}'?" if near else ""
        )
    if error["type"] == "value_error":  # raised by our own validators, which say what they got
        return f"  {where}: ".replace("  : ", "  ") + _short(error["ctx"]["error"], 500)
    return f"  {where}: {error['msg']}, got {_short(repr(error['input']))}"


def _short(value: object, most: int = 100) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"


def _field_names(model: type[BaseModel]) -> set[str]:
    """Every field name in a recipe, at any depth."""
    names: set[str] = set()
    seen: set[type] = set()

    def walk(annotation: Any) -> None:
        for part in (*getattr(annotation, "__args__", ()), *getattr(annotation, "__metadata__", ())):
            walk(part)
        if isinstance(annotation, Parts):
            for part in (*annotation.packaged.values(), *annotation.usable()):
                walk(part)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen.add(annotation)
            for name, field in annotation.model_fields.items():
                names.add(name)
                walk(field.annotation)
                for part in field.metadata:
                    walk(part)

    walk(model)
    return names
