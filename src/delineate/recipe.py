"""Recipes: everything that defines a run, in one YAML file, composed of the specifications of its parts."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from delineate.core.legend import Code, Coding, Legend
from delineate.core.targets import MOST_TARGETS, MOST_VALUE, Targets
from delineate.core.text import near, printable
from delineate.datasets.series_rules import MOST_RULES, SeriesRule
from delineate.errors import RecipeError
from delineate.io.files import parsing, read_text
from delineate.io.settings import MOST_CHARACTERS, MOST_LEVELS, parse_yaml
from delineate.losses.spec import DICE_AND_CROSS_ENTROPY, LossSpec
from delineate.metrics.catalogue import METRICS, metric_names
from delineate.metrics.quantities import QuantityMap
from delineate.networks.spec import NetworkSpec
from delineate.plugins import requirement_of
from delineate.preprocessing.pipeline import Pipeline, StepSpec
from delineate.sampling.augmentation import AugmentationSpec
from delineate.sampling.samplers import ClassBalancedTiles, SamplerSpec
from delineate.sampling.tiles import Advance, TileSpec, Weighting
from delineate.specification import (
    Axes,
    Names,
    PositiveWeight,
    Specification,
    Text,
    Weight,
    explained,
    specifications_in,
)

if TYPE_CHECKING:
    from delineate.datasets.dataset import Dataset

Average = Literal["probabilities", "logits", "tile_logits"]
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


Colour = Annotated[str, Field(pattern="^#[0-9a-fA-F]{6}$")]


class CodeSpec(Specification):
    """A coded concept, by default from SNOMED CT (``SCT``). Lengths are limited as in DICOM."""

    value: str = Field(min_length=1, max_length=16)
    scheme: str = Field(default="SCT", min_length=1, max_length=16)
    meaning: str = Field(min_length=1, max_length=64)

    def code(self) -> Code:
        return Code(self.value, self.scheme, self.meaning)


class CodingSpec(Specification):
    """What a target is, for DICOM-SEG; see :class:`delineate.core.legend.Coding`."""

    category: CodeSpec
    type: CodeSpec

    def coding(self) -> Coding:
        return Coding(self.category.code(), self.type.code())


class DataSpec(Specification):
    """How a data set is read. If ``targets`` is ``null``, those that the data set names are used.

    ``images`` and ``labels`` are file patterns relative to its folder, or for DICOM series' descriptions or rules;
    several channels have one each.
    ``resample_channels``: channels on other grids are resampled to the grid of the first, instead of being an error.
    ``codes`` give targets' codes, by name, for formats that carry codes; targets without one are coded as
    unspecified regions. ``colours`` give their colours, such as ``#dd8265``, wherever a label is looked at.
    """

    layout: str = "auto"
    images: str | Annotated[dict[str, str | SeriesRule], Field(max_length=MOST_RULES)] | None = None
    labels: str | SeriesRule | None = None
    channels: Names | None = None
    resample_channels: bool = False
    targets: TargetsSpec | None = None
    codes: Annotated[dict[str, CodingSpec], Field(max_length=MOST_TARGETS)] = Field(default_factory=dict)
    colours: Annotated[dict[str, Colour], Field(max_length=MOST_TARGETS)] = Field(default_factory=dict)

    @property
    def legend(self) -> Legend:
        """How targets are coded and coloured."""
        return Legend({name: spec.coding() for name, spec in self.codes.items()}, self.colours)

    @classmethod
    def of_changes(cls, changes: Sequence[str]) -> DataSpec:
        """The ``data`` group that ``changes`` alone define; changes to other groups are ignored."""
        return group_of(cls, "data", changes)[0]

    def open(self, path: Path) -> Dataset:
        """Open the data set at ``path`` as these fields say."""
        from delineate.datasets.layouts import open_dataset  # not needed to read a recipe

        targets = None if self.targets is None else self.targets.targets()
        return open_dataset(path, layout=self.layout, images=self.images, labels=self.labels, targets=targets)


_Group = TypeVar("_Group", bound=Specification)


def group_of(kind: type[_Group], name: str, changes: Sequence[str]) -> tuple[_Group, list[str]]:
    """The group of fields that ``changes`` alone define, and the changes to other groups."""
    own = [change for change in changes if change.partition("=")[0].strip().partition(".")[0] == name]
    try:
        group = kind.model_validate(apply_changes({}, own).get(name, {}))
    except ValidationError as error:
        raise RecipeError(f"the {name} settings are not valid:\n" + explained(error, kind)) from error
    return group, [change for change in changes if change not in own]


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
    """The learning rate: a linear warm-up over the budget's first part (``warmup``), then what ``kind`` says.

    ``polynomial`` and ``cosine`` fall to zero over the budget, ``constant`` does not change. After n periods of
    ``every_steps`` or ``every_epochs`` (by default, one step), ``step`` has multiplied the rate by ``factor`` n times,
    and ``inverse`` divides it by 1 + ``decay`` · n, which for periods of one step is Keras' ``decay``.
    """

    kind: Literal["polynomial", "cosine", "constant", "step", "inverse"] = "polynomial"
    power: Annotated[float, Field(gt=0, le=100)] = 0.9
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02
    factor: Annotated[float, Field(gt=0, le=1)] = 0.5
    decay: Annotated[float, Field(ge=0, le=1e6)] = 1e-4
    every_steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    every_epochs: Annotated[int, Field(ge=1, le=10**6)] | None = None

    @model_validator(mode="after")
    def _one_period(self) -> ScheduleSpec:
        if self.every_steps is not None and self.every_epochs is not None:
            raise ValueError("the rate changes every_steps or every_epochs; got both, give one")
        return self

    def multiple(self, progress: float, steps: int = 0, steps_an_epoch: int = 1) -> float:
        """Multiple of the learning rate after ``steps``, with the fraction ``progress`` (0 … 1) of the budget spent."""
        import math

        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warmup:
            # Not from zero: the first step would be wasted.
            return 0.1 + 0.9 * progress / self.warmup
        periods = steps // (self.every_steps or (self.every_epochs or 0) * steps_an_epoch or 1)
        if self.kind == "step":
            return self.factor**periods
        if self.kind == "inverse":
            return 1 / (1 + self.decay * periods)
        done = (progress - self.warmup) / (1 - self.warmup)
        if self.kind == "polynomial":
            return (1 - done) ** self.power
        return 0.5 * (1 + math.cos(math.pi * done)) if self.kind == "cosine" else 1.0


class ValidationSpec(Specification):
    """Validation on whole volumes of a few subjects taken from the training folds, always the same ones.

    They are whole patients, at most a ninth of the subjects that are not held out, stratified by site, unless the
    split names validation subjects. Validation runs ``times`` over the budget (less often if that would take more than
    a tenth of the minutes); the best ``metric`` selects the weights to keep. ``patience`` validations without an
    improvement end the training early; ``null``: never. Every ``loss_every``
    steps, the loss is measured on a batch of their tiles without augmentation; ``null``: never. ``held_out``: validate
    on the held-out subjects instead, as reports do for their test curves; allowed only if that selects nothing
    (``keep: last`` and no ``patience``).
    """

    subjects: Annotated[int, Field(ge=0, le=10**6)] = 8
    times: Annotated[int, Field(ge=1, le=10**6)] = 10
    metric: Literal["dice", "worst_dice"] = "dice"
    patience: Annotated[int, Field(ge=1, le=10**6)] | None = None
    loss_every: Annotated[int, Field(ge=1, le=10**9)] | None = 50
    held_out: bool = False


class TrainingSpec(Specification):
    """The budget is ``minutes`` of training, a number of ``steps`` or of ``epochs``, whichever runs out first.

    An epoch is one pass of the sampler: as many steps as the pass has batches. If the batch size does not divide the
    pass, an epoch's last batch is filled from the next pass.

    ``accumulate``: a batch passes the network in so many equal parts, one after the other, whose gradients add up to
    the batch's: less memory for the same steps. A loss that pools voxels over the batch, such as Dice with
    ``over_batch``, and BatchNorms then see one part at a time. ``checkpoint_activations``: the backward pass computes
    the activations within the network's blocks again instead of keeping them: less memory, the same gradients, and
    a third more work.
    ``ema`` is the decay of the averaged weights that are validated and kept (0: none).
    ``collapse_after``: from this step on, predictions of only background are reported.
    ``folds`` are made after the last ``test_last`` subjects, by name, are set aside as the test set; with a
    single fold, that fold is trained on and the test set is held out. An existing split file decides instead.
    ``initialisation``: how the kernels of all convolutions, transposed ones included, are initialised, with biases at
    zero; ``default``: as the network defines. Weights to start from replace them.
    ``norm_statistics``: BatchNorms predict with statistics ``measured`` on training tiles with the kept weights, or
    with the ``moving`` averages from training.
    ``keep``: the bundle keeps the ``best`` weights by validation, or the ``last``; without validation, the last.
    ``frozen``: patterns of parameters that keep their initial values, such as ``encoder.0.*``; their
    BatchNorms keep their statistics, too.
    ``always_train_share``: about this share of the samples comes from the split's ``always_train`` subjects, however
    few they are; ``null``: every subject is used equally often.
    """

    batch_size: Annotated[int, Field(ge=1, le=4096)] = 2
    accumulate: Annotated[int, Field(ge=1, le=4096)] = 1
    checkpoint_activations: bool = False
    minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    steps: Annotated[int, Field(ge=1, le=10**9)] | None = None
    epochs: Annotated[int, Field(ge=1, le=10**6)] | None = None
    optimiser: OptimiserSpec = OptimiserSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.999
    clip_norm: Annotated[float, Field(gt=0, le=1e6)] | None = 1.0
    validation: ValidationSpec = ValidationSpec()
    collapse_after: Annotated[int, Field(ge=1, le=10**9)] = 300
    folds: Annotated[int, Field(ge=1, le=1000)] = 5
    test_last: Annotated[int, Field(ge=0, le=10**6)] = 0
    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 0
    initialisation: Literal["default", "xavier_normal", "glorot_uniform"] = "default"
    norm_statistics: Literal["measured", "moving"] = "measured"
    keep: Literal["best", "last"] = "best"
    frozen: Names = ()
    always_train_share: Annotated[float, Field(gt=0, lt=1)] | None = None

    @classmethod
    def of_changes(cls, changes: Sequence[str]) -> TrainingSpec:
        """The ``training`` group that ``changes`` alone define; changes to other groups are ignored."""
        return group_of(cls, "training", changes)[0]

    @model_validator(mode="after")
    def _held_out_chooses_nothing(self) -> TrainingSpec:
        if self.validation.held_out and (self.keep != "last" or self.validation.patience is not None):
            raise ValueError(
                "validation.held_out would select the weights or end the training on the held-out subjects; "
                "add keep: last, and remove patience"
            )
        return self


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
    """Tiles overlap by a fraction; their outputs are averaged by weight. ``flips``: axes mirrored at test time.

    ``average``: what is averaged over tiles, mirror images and bundles, and brought back to the scan's grid:
    ``probabilities`` or ``logits``, which become probabilities there; ``tile_logits``: logits over tiles and mirror
    images, which become probabilities before they are brought back. ``advance``: tiles advance by ``whole`` voxels,
    or by a ``fractional`` number whose places are rounded, so that tiles of odd sides are fewer; both are spread
    evenly, while a ``fixed`` number of whole voxels leaves the rest to the last tile, moved back to the border.
    ``weights: nnunet`` is nnU-Net's Gaussian, which lies half a voxel off the middle of even sides, and ``monai``
    MONAI's, whose floor in the corners is higher.
    """

    overlap: Annotated[float, Field(ge=0, le=0.95)] = 0.5
    weights: Weighting = "gaussian"
    average: Average = "probabilities"
    advance: Advance = "whole"
    flips: Axes = ()

    def changed(self, overlap: float | None = None, flips: Sequence[str] | None = None) -> InferenceSpec:
        """These settings with others for a prediction; None changes nothing. Raises :class:`RecipeError`."""
        asked = {"overlap": overlap, "flips": None if flips is None else tuple(flips)}
        changes = {name: value for name, value in asked.items() if value is not None}
        try:
            return InferenceSpec.model_validate({**self.model_dump(), **changes})
        except ValidationError as error:
            raise RecipeError("the prediction's settings are not valid:\n" + explained(error, InferenceSpec)) from error


class PostprocessingSpec(Specification):
    """Targets that keep only their largest component, and the smallest component to keep (ml), by target.

    ``drop_end_slices``: predictions are removed from this fraction of the slices at each end, rounded down (Li et al.
    2018 drop a tenth at each end); this is applied first. ``within``: of overlapping targets, the first is cut to what
    is left of the second, before its own components are chosen, such as ``{tumour: liver}``.
    """

    drop_end_slices: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    largest_component: Names = ()
    minimum_ml: Annotated[dict[str, Weight], Field(max_length=256)] = Field(default_factory=dict)
    within: Annotated[dict[str, str], Field(max_length=MOST_TARGETS)] = Field(default_factory=dict)

    @field_validator("within")
    @classmethod
    def _one_level(cls, within: dict[str, str]) -> dict[str, str]:
        if both := sorted(within.keys() & set(within.values())):
            raise ValueError(f"'{both[0]}' cannot be cut itself where others are cut to it")
        return within

    def check(self, targets: Targets) -> None:
        """Raise :class:`RecipeError` if any other target is named, or ``within`` is given for exclusive ones."""
        named = {*self.largest_component, *self.minimum_ml, *self.within, *self.within.values()}
        if unknown := sorted(named - set(targets.names)):
            raise RecipeError(f"postprocessing names unknown targets {unknown}", fix=f"use {list(targets.names)}")
        if self.within and targets.exclusive:
            raise RecipeError(
                "postprocessing.within is for overlapping targets; these exclude each other",
                fix="remove it, or set data.targets.mode: overlapping",
            )


class QuantitySpec(Specification):
    """A channel, such as a fat fraction, whose mean and median in each target are measured beside the metrics.

    Voxels count if they are ``margin_mm`` or more inside the target's surface. ``threshold`` separates patients;
    ``null``: the quantity's own, if it has one.
    """

    channel: Text
    margin_mm: Annotated[float, Field(ge=0, le=1000)] = 0.0
    threshold: Annotated[float, Field(ge=-1e9, le=1e9)] | None = None

    def map(self) -> QuantityMap:
        return QuantityMap(self.channel, self.margin_mm, self.threshold)


class Recipe(Specification):
    """Everything that defines a run: an immutable value, checked on creation.

    ``format``: the version of the recipe format. ``deviates``: where a recipe named after a report departs from it,
    one sentence each.

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

    format: Literal[1] = 1
    name: str
    description: str = ""
    deviates: Annotated[tuple[str, ...], Field(max_length=64)] = ()
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
    quantity: QuantitySpec | None = None

    @model_validator(mode="after")
    def _batch_suffices(self) -> Recipe:
        least, batch, parts = self.network.least_batch, self.training.batch_size, self.training.accumulate
        if batch % parts:
            raise ValueError(f"training.accumulate is {parts}, which does not divide training.batch_size, {batch}")
        if batch // parts < least:
            of = f" in {parts} parts" if parts > 1 else ""
            raise ValueError(
                f"network '{self.network.kind}' trains on batches of {least} or more; "
                f"training.batch_size is {batch}{of}"
            )
        return self

    @model_validator(mode="after")
    def _activations_can_be_recomputed(self) -> Recipe:
        if self.training.checkpoint_activations and not self.network.recomputes:
            raise ValueError(
                f"network '{self.network.kind}' cannot compute its activations again; "
                "remove training.checkpoint_activations"
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
        raise RecipeError(
            f"there is no recipe '{_short(name_or_path)}'{near(Path(name_or_path).name, packaged)}",
            fix=f"give the path of a YAML file, or one of {', '.join(packaged)}",
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
            raise RecipeError("the recipe is not valid:\n" + explained(error, Recipe)) from error


def apply_changes(values: dict[str, Any], changes: Iterable[str]) -> dict[str, Any]:
    """Values with ``path.to.field=value`` applied; list items are addressed by number, and one past the end appends."""
    values = _copied(values)
    for change in changes:
        with parsing(_short(change), RecipeError, fix="write path.to.field=value"):
            _change(values, change)
    return values


def change_of(path: str, value: Any) -> str:
    """The change that gives the field at ``path`` a value, so that :func:`apply_changes` puts just this value there.

    Raises :class:`TypeError` for what is not plain: numbers, text, lists and dictionaries.
    """
    return f"{path}={_scalar(json.loads(json.dumps(value)))}"


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
    value = parse_yaml(text, _short(change), RecipeError)
    if isinstance(node, list) and last == str(len(node)):
        node.append(value)
    else:
        node[_index(node, last, path) if isinstance(node, list) else last] = value


def _index(node: list[Any], key: str, path: str) -> int:
    if not key.isdecimal() or len(key) > 9 or int(key) >= len(node):
        raise RecipeError(f"'{path}': '{key}' is not an item of a list of {len(node)}", fix="count from 0")
    return int(key)


def to_yaml(values: Any, reasons: Mapping[str, str] | None = None, *, path: str = "", indent: int = 0) -> str:
    """YAML of plain values, with a reason as a comment next to each field named in ``reasons``."""
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
        elif _is_prose(value):
            lines += [f"{pad}{key}:{comment}\n", *(f"{pad}  - {_scalar(item)}\n" for item in value)]
        else:
            lines.append(f"{pad}{key}: {_scalar(value)}{comment}\n")
    return "".join(lines)


def _is_prose(value: Any) -> bool:
    """Whether a list holds sentences, which are easier to read on one line each."""
    return isinstance(value, list) and any(isinstance(item, str) and len(item) > 40 for item in value)


def _scalar(value: Any) -> str:
    """A value or a name on one line of YAML that reads back unchanged."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    text = text.removesuffix("\n").removesuffix("...").removesuffix("\n")
    if not text.isprintable():  # line breaks or control characters
        text = yaml.safe_dump(value, default_flow_style=True, default_style='"', width=10**9, sort_keys=False).strip()
    return text


def _copied(values: Any) -> Any:
    if isinstance(values, dict):
        return {key: _copied(value) for key, value in values.items()}
    return [_copied(value) for value in values] if isinstance(values, list) else values


def _short(value: object, most: int = 100) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}…"
