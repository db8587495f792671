"""Recipes: everything that makes a run, in one YAML file, composed of each floor's specifications."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from delineate.core.targets import Targets
from delineate.errors import RecipeError
from delineate.losses.spec import DICE_AND_CROSS_ENTROPY, LossSpec
from delineate.metrics.catalogue import metric_names
from delineate.networks.spec import NetworkSpec
from delineate.preprocessing.pipeline import Pipeline, StepSpec
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.samplers import ClassBalancedTiles, SamplerSpec
from delineate.sampling.tiles import TileSpec


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TargetsSpec(_Spec):
    """What is segmented; see :class:`delineate.core.targets.Targets`."""

    values: dict[str, int | tuple[int, ...]]
    mode: Literal["exclusive", "overlapping"] = "exclusive"
    ignore: tuple[int, ...] = ()

    def targets(self) -> Targets:
        values = {name: (v,) if isinstance(v, int) else tuple(v) for name, v in self.values.items()}
        return Targets(values, self.mode, self.ignore)

    @classmethod
    def of(cls, targets: Targets) -> TargetsSpec:
        return cls.model_validate(targets.as_dict())


class DataSpec(_Spec):
    """How a data set is read. ``null`` targets are those that the data set itself names.

    ``images`` and ``labels`` are patterns below its folder, several channels have a pattern each.
    ``resample_channels``: channels on other grids are brought onto the first one's, instead of being an error.
    """

    layout: str = "auto"
    images: str | dict[str, str] | None = None
    labels: str | None = None
    channels: tuple[str, ...] | None = None
    resample_channels: bool = False
    targets: TargetsSpec | None = None


class OptimiserSpec(_Spec):
    """``adamw`` decouples the weight decay; ``sgd`` uses Nesterov momentum ``beta1``.

    ``rates`` multiply the learning rate of parameters whose names fit a pattern, such as
    ``encoder.*``; the first that fits counts.
    """

    kind: Literal["adamw", "adam", "sgd"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    rates: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)


class ScheduleSpec(_Spec):
    """The learning rate over the budget: a linear warm-up over its first part, then a decay to zero."""

    kind: Literal["polynomial", "cosine", "constant"] = "polynomial"
    power: Annotated[float, Field(gt=0)] = 0.9
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


class ValidationSpec(_Spec):
    """Validation on whole volumes of a few subjects taken from the training folds, always the same ones.

    ``times`` over the budget (less often where that would take more than a tenth of the
    minutes); the bundle keeps the weights of the best ``metric``. ``patience``
    validations without a better one end the training early; ``null``: never. ``loss_every`` so many
    steps the loss is measured on a batch of their tiles, not augmented; ``null``: never.
    """

    subjects: Annotated[int, Field(ge=0)] = 8
    times: Annotated[int, Field(ge=1)] = 10
    metric: Literal["dice", "worst_dice"] = "dice"
    patience: Annotated[int, Field(ge=1)] | None = None
    loss_every: Annotated[int, Field(ge=1)] | None = 50


class TrainingSpec(_Spec):
    """The budget is ``minutes`` of training or a number of ``steps``, whichever ends first.

    ``ema`` is the decay of the averaged weights that are validated and kept (0: none).
    ``collapse_after``: from this step on, predictions of background alone are reported.
    ``frozen``: patterns of parameters that stay as they begin, such as ``encoder.0.*``; their
    BatchNorms keep their statistics, too.
    """

    batch_size: Annotated[int, Field(ge=1)] = 2
    minutes: Annotated[float, Field(gt=0)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    optimiser: OptimiserSpec = OptimiserSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    validation: ValidationSpec = ValidationSpec()
    collapse_after: Annotated[int, Field(ge=1)] = 300
    folds: Annotated[int, Field(ge=2)] = 5
    seed: Annotated[int, Field(ge=0)] = 0
    frozen: tuple[str, ...] = ()


class StartSpec(_Spec):
    """Weights to begin with: those of a run or bundle, or of a file of tensors.

    What fits by name and shape is loaded, the rest reported; ``include`` and ``exclude`` are patterns of
    names. Outputs are matched by their target's name; ``rows`` names the source's target for
    a target of another name. ``channels`` converts kernels for other numbers of input channels.
    """

    weights: str
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    rows: dict[str, str] = Field(default_factory=dict)
    channels: Literal["repeat", "mean"] | None = "repeat"


class InferenceSpec(_Spec):
    """Tiles overlap by a fraction; their answers are averaged by weight. ``flips``: axes mirrored at test time."""

    overlap: Annotated[float, Field(ge=0, lt=1)] = 0.5
    weights: Literal["gaussian", "uniform"] = "gaussian"
    flips: tuple[Literal["x", "y", "z"], ...] = ()


class PostprocessingSpec(_Spec):
    """Targets of which only the largest component stays, and the smallest component kept, in ml, by target."""

    largest_component: tuple[str, ...] = ()
    minimum_ml: dict[str, float] = Field(default_factory=dict)


class Recipe(_Spec):
    """Everything that makes a run."""

    name: str
    description: str = ""
    data: DataSpec = DataSpec()
    preprocessing: tuple[StepSpec, ...] = ()
    tiles: TileSpec
    sampler: SamplerSpec = ClassBalancedTiles()
    augmentation: AugmentationSpec = AugmentationSpec()
    network: NetworkSpec
    start: StartSpec | None = None
    loss: LossSpec = DICE_AND_CROSS_ENTROPY
    training: TrainingSpec = TrainingSpec()
    inference: InferenceSpec = InferenceSpec()
    postprocessing: PostprocessingSpec = PostprocessingSpec()
    metrics: tuple[str, ...] = ("standard",)

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
            raise ValueError(error.message) from error
        return names

    @property
    def pipeline(self) -> Pipeline:
        return Pipeline(steps=self.preprocessing)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for YAML, every default written out."""
        return self.model_dump(mode="json")


def packaged_recipes() -> dict[str, Path]:
    """Names and files of the recipes that come with the package."""
    folder = resources.files("delineate") / "recipes"
    return {file.stem: file for file in sorted(Path(str(folder)).rglob("*.yaml"))}


def load_recipe(name_or_path: str | Path, changes: Iterable[str] = ()) -> Recipe:
    """The packaged recipe of a name, or the one in a YAML file, with ``path.to.field=value`` changes.

    A file may begin with ``extends``, the name or path (from its own folder) of a recipe whose fields it takes
    over. Groups are joined field by field; one with a ``kind`` of its own stands alone.

    Raises :class:`RecipeError` naming the field, what was found, and the nearest valid name.
    """
    return recipe_from(apply_changes(_read(name_or_path), changes))


def _read(name_or_path: str | Path, beside: Path | None = None, extended: tuple[Path, ...] = ()) -> dict[str, Any]:
    packaged = packaged_recipes()
    path = packaged.get(str(name_or_path), (beside or Path()) / name_or_path)
    if not path.is_file():
        near = difflib.get_close_matches(str(name_or_path), packaged, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise RecipeError(
            f"no recipe '{name_or_path}'{hint} Packaged are: {', '.join(packaged)}; else give the path of a YAML file"
        )
    if path in extended:
        raise RecipeError(f"{path.name} extends itself, by way of {extended[-1].name}; break the circle")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise RecipeError(f"{path.name} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path.name} holds {type(values).__name__}, not fields; see `delineate recipes show`")
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
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        raise RecipeError("the recipe is not valid:\n" + "\n".join(_explain(e) for e in error.errors())) from error


def apply_changes(values: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Values with ``path.to.field=value`` applied; list items are reached by their number."""
    values = _copied(values)
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise RecipeError(f"'{change}' is not path.to.field=value; write for example training.batch_size=4")
        *parents, last = path.strip().split(".")
        node: Any = values
        for key in parents:
            node = node[_index(node, key, path)] if isinstance(node, list) else node.setdefault(key, {})
            if not isinstance(node, dict | list):
                raise RecipeError(f"'{path}': '{key}' is a single value, not a group of fields; shorten the path")
        try:
            node[_index(node, last, path) if isinstance(node, list) else last] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise RecipeError(f"'{change}': the value is not valid YAML") from error
    return values


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or int(key) >= len(node):
        raise RecipeError(f"'{path}': '{key}' is not an item of a list of {len(node)}; count from 0")
    return int(key)


def to_yaml(values: Any, reasons: Mapping[str, str] | None = None, *, path: str = "", indent: int = 0) -> str:
    """YAML of plain values, with a reason as a comment beside each field named in ``reasons``."""
    pad, reasons, lines = "  " * indent, reasons or {}, []
    for key, value in values.items():
        here = f"{path}.{key}" if path else str(key)
        comment = f"  # {reasons[here]}" if here in reasons else ""
        if isinstance(value, dict) and value:
            lines.append(f"{pad}{_in_line(key)}:{comment}\n" + to_yaml(value, reasons, path=here, indent=indent + 1))
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            lines.append(f"{pad}{_in_line(key)}:{comment}\n")
            for i, item in enumerate(value):
                body = to_yaml(item, reasons, path=f"{here}.{i}", indent=indent + 2)
                lines.append(f"{pad}  - {body.lstrip()}")
        else:
            lines.append(f"{pad}{_in_line(key)}: {_in_line(value)}{comment}\n")
    return "".join(lines)


def _in_line(value: Any) -> str:
    """YAML of a key or a value on one line, quoted where it would read back as something else."""
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    text = text.removesuffix("\n").removesuffix("...").strip()
    if len(text.splitlines()) > 1:
        text = yaml.safe_dump(value, default_flow_style=True, default_style='"', width=float("inf")).strip()
    return text


def _copied(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    return [_copied(value) for value in values] if isinstance(values, list) else values


def _explain(error: Any) -> str:
    """One line for one pydantic error: where, what, and the nearest valid name for a misspelt field."""
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(error["loc"][-1]), _field_names(Recipe), n=1)
        return f"  {where}: no such field" + (f"; did you mean '{near[0]}'?" if near else "; remove it")
    if error["type"] in ("union_tag_invalid", "literal_error"):
        found, expected = error["ctx"].get("tag", error["input"]), error["ctx"].get("expected_tags", "")
        expected = expected or error["ctx"].get("expected", "")
        names = [name.strip(" '") for name in expected.replace(" or ", ",").split(",")]
        near = difflib.get_close_matches(str(found), names, n=1)
        return f"  {where}: '{found}' is not one of {', '.join(names)}" + (
            f"; did you mean '{near[0]}'?" if near else ""
        )
    if error["type"] == "value_error":  # one of ours: it says what it got
        return f"  {where}: ".replace("  : ", "  ") + str(error["ctx"]["error"])
    return f"  {where}: {error['msg']}, got {error['input']!r}"


def _field_names(model: type[BaseModel]) -> set[str]:
    """Every field name in a recipe, at any depth."""
    names: set[str] = set()
    seen: set[type] = set()

    def walk(annotation: Any) -> None:
        for part in getattr(annotation, "__args__", ()):
            walk(part)
        if isinstance(annotation, type) and issubclass(annotation, BaseModel) and annotation not in seen:
            seen.add(annotation)
            for name, field in annotation.model_fields.items():
                names.add(name)
                walk(field.annotation)

    walk(model)
    return names
