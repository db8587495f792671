"""Models that nnU-Net v2 trained (Isensee et al. 2021), as bundles that predict what it predicts.

::

    MODEL_FOLDER/               TRAINER__PLANS__CONFIGURATION, or any other name
        plans.json              preprocessing, tiles and network
        dataset.json            channels and labels
        fold_0/checkpoint_final.pth
        fold_1/checkpoint_final.pth

Arrays of nnU-Net are (Z, Y, X), transposed as its plans say; a bundle's prepared scans are the same arrays, by a step
``transpose``. Only what is named here is read from these files: no path and no description becomes part of a bundle.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
from pydantic import AliasChoices, BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from delineate.bundle import Bundle, Provenance
from delineate.core.grid import AXES
from delineate.core.targets import Targets
from delineate.core.text import printable
from delineate.errors import CannotImport, DelineateError
from delineate.importing.tensors import check_same, expected_tensors
from delineate.io.files import read_json
from delineate.networks.unet import UNetSpec
from delineate.preprocessing.intensity import ClipPercentiles, Normalise
from delineate.preprocessing.spatial import CropBackground, Reorient, Resample, Transpose
from delineate.preprocessing.step import Step
from delineate.pretrained.weights import read_checkpoint
from delineate.recipe import Recipe, TargetsSpec, recipe_from
from delineate.sampling.tiles import Patches, Slices, geometry_for
from delineate.specification import explained

CHECKPOINT = "checkpoint_final.pth"

_DAMAGED = "copy the folder again, as nnU-Net wrote it"
_STATISTICS = (
    *("numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct"),
    *("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar", "numpy.dtypes.Float32DType"),
    *("numpy.dtypes.Float64DType", "numpy.dtypes.Int64DType", "numpy.dtypes.BoolDType"),
)
"""What checkpoints hold besides tensors and plain values: losses and scores as numbers of numpy's."""

_KNOWN_TRAINERS = re.compile(
    r"nnUNetTrainer(_?("
    r"\d+ep(och)?s?|NoMirroring|onlyMirror01|NoDA|DA5|DA5ord0|DA5Segord0|DASegOrd0|DAOrd0|noDummy2DDA|warmup|CosAnneal"
    r"|(Vanilla)?Ada[mn](\d+en\d++)?|(Dice|CE|DiceCE|Topk10|DiceTopK10)Loss(LS01)?|noSmooth|NoDeepSupervision|BN"
    r"|probabilisticOversampling(_\d++)?|Benchmark_5epochs|noDataLoading))*"
)
"""Trainers that come with nnU-Net: what they change is how a network is trained, or its normalisation (BN)."""

M = TypeVar("M", bound=BaseModel)
Spacing = Annotated[float, Field(ge=0.01, le=1000)]
Axis = Literal[0, 1, 2]
Number = Annotated[float, Field(ge=-1e30, le=1e30)]
Short = Annotated[str, Field(max_length=200)]


class _Read(BaseModel):
    """Part of a file of nnU-Net's: the fields that matter, whatever else there is."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Intensities(_Read):
    mean: Number
    std: Number
    percentile_00_5: Number
    percentile_99_5: Number


class _Architecture(_Read):
    network_class_name: Short
    arch_kwargs: dict[str, Any]


class _Configuration(_Read):
    patch_size: Annotated[tuple[Annotated[int, Field(ge=1, le=4096)], ...], Field(min_length=2, max_length=3)]
    spacing: Annotated[tuple[Spacing, ...], Field(min_length=2, max_length=3)]
    normalization_schemes: Annotated[tuple[Short, ...], Field(min_length=1, max_length=64)]
    use_mask_for_norm: Annotated[tuple[bool, ...], Field(min_length=1, max_length=64)]
    preprocessor_name: Short = "DefaultPreprocessor"
    resampling_fn_data: Short
    resampling_fn_data_kwargs: dict[str, Any]
    resampling_fn_probabilities: Short
    resampling_fn_probabilities_kwargs: dict[str, Any]
    architecture: _Architecture
    previous_stage: Short | None = None


class _Plans(_Read):
    configurations: Annotated[dict[str, dict[str, Any]], Field(max_length=100)]
    transpose_forward: tuple[Axis, Axis, Axis]
    image_reader_writer: Short = "SimpleITKIO"
    # Where SimpleITK read pictures, the slice spacing is 999 times that of the pixels.
    original_median_spacing_after_transp: tuple[Annotated[float, Field(gt=0, le=1e4)], Spacing, Spacing]
    intensities: Annotated[dict[str, dict[str, Any]], Field(max_length=64)] = Field(
        default_factory=dict,
        validation_alias=AliasChoices(
            "foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"
        ),
    )

    @field_validator("transpose_forward")
    @classmethod
    def _names_each_axis(cls, axes: tuple[Axis, Axis, Axis]) -> tuple[Axis, Axis, Axis]:
        if len(set(axes)) < 3:
            raise ValueError(f"transpose_forward is {list(axes)}, which leaves out an axis")
        return axes


Digits = Annotated[str, Field(pattern=r"^\d{1,3}$")]
Label = Annotated[int, Field(ge=0, le=2**16 - 1)]


class _Dataset(_Read):
    channels: Annotated[dict[Digits, Short], Field(min_length=1, max_length=64)] = Field(
        validation_alias=AliasChoices("channel_names", "modality")
    )
    labels: Annotated[dict[Short, Label | Annotated[tuple[Label, ...], Field(max_length=256)]], Field(max_length=300)]
    regions_class_order: Annotated[tuple[Label, ...], Field(max_length=256)] | None = None


@dataclass(frozen=True)
class Imported:
    """What became of a model: its configuration and trainer, the folds that the bundle holds, and the bundle."""

    configuration: str
    trainer: str
    folds: tuple[str, ...]
    bundle: Bundle


def import_model(
    folder: Path, out: Path, folds: Sequence[str] = (), *, any_trainer: bool = False, checkpoint: str = CHECKPOINT
) -> Imported:
    """Write the bundle of an nnU-Net model; several folds become members of one network, whose logits are averaged.

    ``folds`` are numbers, or ``all``; if there are none, all numbered folds that have a checkpoint, or else ``all``.
    ``any_trainer`` accepts trainers that are not nnU-Net's own. Raises :class:`CannotImport` for cascades and other
    models that a bundle cannot hold, by name, and :class:`~delineate.errors.WeightsError` for a checkpoint that is
    damaged or holds code, which is never run.
    """
    if (folder / "plans.pkl").exists():
        raise CannotImport(f"'{folder}' was trained with nnU-Net version 1", fix=_only("what version 2 trained"))
    plans = _parsed(_Plans, folder / "plans.json")
    dataset = _parsed(_Dataset, folder / "dataset.json")
    found = _folds(folder, folds, checkpoint)
    read = [read_checkpoint(file, "network_weights", _STATISTICS) for file in found.values()]
    trainer, name = _same(read, "trainer_name", found), _configuration_of(read, found)
    if not any_trainer and not _KNOWN_TRAINERS.fullmatch(trainer):
        raise CannotImport(
            f"trainer '{printable(trainer)}' is not one of nnU-Net's own, and may have built another network",
            fix="if it changed only how the network is trained, import with --any-trainer",
        )
    configuration = _configuration(plans, name)
    targets = _targets(dataset)
    network = _network(configuration, trainer, len(read))
    recipe = _recipe(plans, dataset, configuration, targets, network, _mirrored(read, network.dimensions))
    recipe = recipe.model_copy(update={"name": f"nnunet_{name}", "description": f"Imported from nnU-Net: {trainer}."})
    bundle = _bundle(recipe, plans, configuration, targets)
    about = {"imported": "nnU-Net", "trainer": trainer, "configuration": name, "folds": ", ".join(found)}
    weights = _weights(bundle, [one["network_weights"] for one in read], list(found.values()))
    bundle.save_anew(out, weights, about)
    return Imported(name, trainer, tuple(found), Bundle.load(out))


def _parsed(kind: type[M], file: Path) -> M:
    content = read_json(file, CannotImport, fix="give the folder that nnU-Net trained, with all that is in it")
    return _validated(kind, content, file.name)


def _validated(kind: type[M], content: Mapping[str, Any], what: str) -> M:
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise CannotImport(f"{what} is not as nnU-Net v2 writes it:\n{explained(error, kind)}", fix=_DAMAGED) from error


def _folds(folder: Path, wanted: Sequence[str], checkpoint: str) -> dict[str, Path]:
    """The checkpoint of each fold."""
    there = {path.name.removeprefix("fold_"): path / checkpoint for path in folder.glob("fold_*")}
    there = {name: there[name] for name in sorted(there, key=lambda name: (len(name), name)) if there[name].is_file()}
    if missing := [name for name in wanted if name not in there]:
        raise CannotImport(
            f"there is no fold_{missing[0]}/{checkpoint} in '{folder}', which has {', '.join(there) or 'no fold'}",
            fix="give folds that are there",
        )
    numbered = [name for name in there if name.isdecimal()]
    chosen = list(dict.fromkeys(wanted)) or numbered or [name for name in there if name == "all"]
    if not chosen:
        raise CannotImport(
            f"'{folder}' has no fold_*/{checkpoint}: it is not a model that nnU-Net v2 finished training",
            fix="give the folder TRAINER__PLANS__CONFIGURATION in nnUNet_results",
        )
    return {name: there[name] for name in chosen}


def _same(read: Sequence[Mapping[str, Any]], key: str, files: Mapping[str, Path]) -> str:
    """A word that is the same in the checkpoints of all folds."""
    values = [one.get(key) for one in read]
    if not all(isinstance(value, str) and value == values[0] for value in values):
        raise CannotImport(f"the folds {', '.join(files)} have different {key}s, or none", fix="import them one by one")
    return str(values[0])


def _configuration_of(read: Sequence[Mapping[str, Any]], files: Mapping[str, Path]) -> str:
    parts = [one.get("init_args") for one in read]
    return _same([part if isinstance(part, Mapping) else {} for part in parts], "configuration", files)


def _configuration(plans: _Plans, name: str) -> _Configuration:
    """A configuration with what it inherits, in today's form."""
    values: dict[str, Any] = {}
    inherited: Any = name
    seen: set[str] = set()
    while inherited is not None:
        if not isinstance(inherited, str) or inherited in seen or inherited not in plans.configurations:
            raise CannotImport(
                f"plans.json does not define the configuration '{printable(str(inherited))}'", fix=_DAMAGED
            )
        seen.add(inherited)
        values = {**plans.configurations[inherited], **values}
        inherited = plans.configurations[inherited].get("inherits_from")
    if "architecture" not in values and "UNet_class_name" in values:
        values["architecture"] = _architecture_of_old_plans(values)
    found = _validated(_Configuration, values, f"configuration '{printable(name)}'")
    if found.previous_stage is not None:
        raise CannotImport(
            f"'{printable(name)}' is the second stage of a cascade, which starts from the labels of "
            f"'{printable(found.previous_stage)}'",
            fix=f"import a model of '{printable(found.previous_stage)}' or 3d_fullres, which need no first stage",
        )
    if found.preprocessor_name != "DefaultPreprocessor":
        raise CannotImport(
            f"preprocessor '{printable(found.preprocessor_name)}' is not nnU-Net's own",
            fix=_only("DefaultPreprocessor"),
        )
    return found


def _architecture_of_old_plans(values: Mapping[str, Any]) -> dict[str, Any]:
    """The network as plans of nnU-Net 2.0 to 2.2 describe it."""
    blocks = "n_conv_per_stage" if values["UNet_class_name"] == "PlainConvUNet" else "n_blocks_per_stage"
    old = _validated(_OldNetwork, values, "the configuration")
    count = len(old.n_conv_per_stage_encoder)
    widths = [min(old.UNet_base_num_features * 2**level, old.unet_max_num_features) for level in range(count)]
    return {
        "network_class_name": old.UNet_class_name,
        "arch_kwargs": {
            "n_stages": count,
            "features_per_stage": widths,
            "kernel_sizes": old.conv_kernel_sizes,
            "strides": old.pool_op_kernel_sizes,
            blocks: old.n_conv_per_stage_encoder,
            "n_conv_per_stage_decoder": old.n_conv_per_stage_decoder,
            "norm_op": "torch.nn.InstanceNorm",
            "norm_op_kwargs": {"affine": True},
            "nonlin": "torch.nn.LeakyReLU",
        },
    }


Level = Annotated[int, Field(ge=1, le=2**14)]
Levels = Annotated[tuple[Level, ...], Field(min_length=1, max_length=12)]
Sides = Annotated[tuple[Annotated[tuple[Level, ...], Field(max_length=3)], ...], Field(min_length=1, max_length=12)]


class _OldNetwork(_Read):
    UNet_class_name: Short
    UNet_base_num_features: Level
    unet_max_num_features: Level
    n_conv_per_stage_encoder: Levels
    n_conv_per_stage_decoder: Levels
    pool_op_kernel_sizes: Sides
    conv_kernel_sizes: Sides


class _Network(_Read):
    """The arguments of nnU-Net's networks; those that only training needs, or that weights show, are not read."""

    n_stages: Level
    features_per_stage: Levels | Level
    kernel_sizes: Sides | Level
    strides: Sides | Level
    n_conv_per_stage: Levels | Level | None = None
    n_blocks_per_stage: Levels | Level | None = None
    n_conv_per_stage_decoder: Levels | Level
    norm_op: Short | None
    norm_op_kwargs: dict[str, Any] | None = None
    nonlin: Short | None
    nonlin_kwargs: dict[str, Any] | None = None
    nonlin_first: bool = False
    block: Any = None
    stem_channels: int | None = None


def _network(configuration: _Configuration, trainer: str, members: int) -> UNetSpec:
    """Our network of the same layers. Raises :class:`CannotImport` for any other."""
    name = configuration.architecture.network_class_name.rpartition(".")[2]
    if name not in ("PlainConvUNet", "ResidualEncoderUNet"):
        raise CannotImport(f"network '{printable(name)}' is not known", fix=_only("PlainConvUNet, ResidualEncoderUNet"))
    read = _validated(_Network, configuration.architecture.arch_kwargs, f"the network of type {name}")
    dimensions, levels = len(configuration.patch_size), read.n_stages
    norm = _norm("torch.nn.BatchNorm" if trainer.endswith("BN") else read.norm_op)
    _refuse_unless(
        {
            f"activation {read.nonlin}": (read.nonlin or "").endswith(".LeakyReLU"),
            "another negative slope": (read.nonlin_kwargs or {}).get("negative_slope", 0.01) == 0.01,
            "another eps of the normalisation": (read.norm_op_kwargs or {}).get("eps", 1e-5) == 1e-5,
            "normalisation without weights": (read.norm_op_kwargs or {}).get("affine", norm == "batch"),
            "activations before normalisation": not read.nonlin_first,
            f"blocks of type {read.block}": read.block is None or str(read.block).endswith("BasicBlockD"),
            "a stem of another width": read.stem_channels in (None, _each(read.features_per_stage, levels)[0]),
        },
        name,
    )
    strides = _sides(read.strides, levels, dimensions)
    _refuse_unless({"a stride at full resolution": all(side == 1 for side in strides[0])}, name)
    fields: dict[str, Any] = {
        "dimensions": dimensions,
        "widths": _each(read.features_per_stage, levels),
        "strides": strides[1:],
        "kernels": _sides(read.kernel_sizes, levels, dimensions),
        "norm": norm,
        "deep_supervision": max(levels - 2, 0),
        "decoder_convolutions": _one(read.n_conv_per_stage_decoder, name),
        "members": members,
    }
    if name == "PlainConvUNet":
        fields["convolutions"] = _one(read.n_conv_per_stage, name)
    else:
        fields["residual_blocks"] = _each(read.n_blocks_per_stage, levels)
    return _validated_network(fields)


def _validated_network(fields: Mapping[str, Any]) -> UNetSpec:
    try:
        return UNetSpec.model_validate(fields)
    except ValidationError as error:
        raise CannotImport(f"the network cannot be built:\n{explained(error, UNetSpec)}", fix=_DAMAGED) from error


def _norm(name: str | None) -> Literal["instance", "batch"]:
    if name is not None and (kind := re.search(r"\.(Instance|Batch)Norm[23]?d?$", name)):
        return "instance" if kind[1] == "Instance" else "batch"
    raise CannotImport(f"normalisation '{printable(str(name))}' is not known", fix=_only("InstanceNorm, BatchNorm"))


def _refuse_unless(conditions: Mapping[str, bool], name: str) -> None:
    for what, holds in conditions.items():
        if not holds:
            raise CannotImport(f"a {name} with {printable(what)} is not known", fix=_only("nnU-Net's own plans"))


def _only(known: str) -> str:
    return f"predict with nnU-Net itself; what can be imported is {known}"


def _each(value: Levels | Level | None, levels: int) -> tuple[int, ...]:
    """One number for each level, of one for all or of a list."""
    return (value,) * levels if isinstance(value, int) else tuple(value or ())


def _one(value: Levels | Level | None, name: str) -> int:
    numbers = {value} if isinstance(value, int) else {*(value or ())}
    _refuse_unless({f"{sorted(numbers)} convolutions at different levels": len(numbers) == 1}, name)
    return numbers.pop()


def _sides(value: Sides | Level, levels: int, dimensions: int) -> tuple[tuple[int, ...], ...]:
    return ((value,) * dimensions,) * levels if isinstance(value, int) else value


def _targets(dataset: _Dataset) -> Targets:
    """Targets in the order of the network's outputs, with the values that nnU-Net writes."""
    values = {name: (v,) if isinstance(v, int) else tuple(v) for name, v in dataset.labels.items()}
    ignored = values.pop("ignore", ())
    if values.pop("background", None) != (0,):
        raise CannotImport("dataset.json has no label 'background' of value 0", fix=_DAMAGED)
    try:
        if all(len(v) == 1 for v in values.values()):
            ordered = dict(sorted(values.items(), key=lambda item: item[1]))
            if [v for (v,) in ordered.values()] != list(range(1, len(ordered) + 1)):
                raise CannotImport(
                    f"labels {[v for (v,) in ordered.values()]} are not 1 to {len(ordered)}: nnU-Net writes the number "
                    "of a network's output, which is then another structure's value",
                    fix="number the labels of dataset.json as the network's outputs",
                )
            return Targets(ordered, ignore=ignored)
        return Targets(_with_written_values(values, dataset.regions_class_order or ()), "overlapping", ignored)
    except CannotImport:
        raise
    except DelineateError as error:
        raise CannotImport(f"the labels of dataset.json cannot be targets: {error.message}", fix=error.fix) from error


def _with_written_values(regions: Mapping[str, tuple[int, ...]], order: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Regions whose first value is the one that nnU-Net writes for them, later regions on top."""
    if len(order) != len(regions):
        raise CannotImport(
            f"regions_class_order has {len(order)} values for {len(regions)} regions", fix="add it to dataset.json"
        )
    first = {
        name: (value, *(other for other in values if other != value)) if value in values else values
        for (name, values), value in zip(regions.items(), order, strict=True)
    }
    targets = Targets(first, "overlapping")
    for name, values, value in zip(targets.names, regions.values(), order, strict=True):
        if targets.written_value(name) != value:
            raise CannotImport(
                f"regions_class_order writes {value} for region '{name}' of values {list(values)}, "
                "which reads back as other regions",
                fix="give each region a value of its own, which no later region has",
            )
    return first


def _mirrored(read: Sequence[Mapping[str, Any]], dimensions: int) -> tuple[str, ...]:
    """The axes of prepared scans that nnU-Net mirrors when it predicts: those of the first fold, as it does."""
    axes = read[0].get("inference_allowed_mirroring_axes") or ()
    if not isinstance(axes, tuple | list) or not all(isinstance(a, int) and a in range(dimensions) for a in axes):
        raise CannotImport(f"the checkpoint mirrors axes {axes!r:.80} of {dimensions}", fix=_DAMAGED)
    return tuple(AXES[axis + 3 - dimensions] for axis in sorted({*axes}))


def _recipe(
    plans: _Plans,
    dataset: _Dataset,
    configuration: _Configuration,
    targets: Targets,
    network: UNetSpec,
    mirrored: tuple[str, ...],
) -> Recipe:
    steps = [*_spatial(plans, configuration)]
    crop = 1 + next(i for i, step in enumerate(steps) if isinstance(step, CropBackground))
    steps[crop:crop] = _normalisation(plans, configuration, len(dataset.channels))
    # Tiles of a 2D network are slices across the prepared scan's first axis.
    tiles: dict[str, Any] = {"kind": "patches"} if network.dimensions == 3 else {"kind": "slices", "axis": "x"}
    spatial = {"mirror": mirrored}
    return recipe_from(
        {
            "name": "nnunet",
            "data": {"targets": TargetsSpec.of(targets), "channels": _channel_names(dataset)},
            "preprocessing": steps,
            "tiles": {**tiles, "shape": configuration.patch_size, "outside": "zero"},
            "augmentation": {"spatial": spatial},
            "network": network,
            "inference": {"weights": "nnunet", "average": "logits", "advance": "fractional", "flips": mirrored},
        }
    )


def _channel_names(dataset: _Dataset) -> tuple[str, ...]:
    """Names of the channels in order, each with its number where two are called the same."""
    names = [printable(name) or "image" for _, name in sorted(dataset.channels.items(), key=lambda item: int(item[0]))]
    return tuple(f"{name}_{i:04}" if names.count(name) > 1 else name for i, name in enumerate(names))


def _spatial(plans: _Plans, configuration: _Configuration) -> Iterator[Step]:
    """Orientation, order of axes, crop and spacing, in this order."""
    if plans.image_reader_writer.endswith("IOWithReorient"):
        yield Reorient(to="RAS")
    elif plans.image_reader_writer not in ("SimpleITKIO", "NibabelIO"):
        raise CannotImport(
            f"scans are read by '{printable(plans.image_reader_writer)}'", fix=_only("what SimpleITK or nibabel reads")
        )
    a, b, c = (AXES[2 - axis] for axis in plans.transpose_forward)
    yield Transpose.model_validate({"order": (a, b, c)})
    yield CropBackground()
    if configuration.resampling_fn_data == "no_resampling_hack":
        return
    order, across = _resampling(configuration.resampling_fn_data, configuration.resampling_fn_data_kwargs)
    back = _resampling(configuration.resampling_fn_probabilities, configuration.resampling_fn_probabilities_kwargs)
    if back != ("linear", across):
        raise CannotImport(
            f"probabilities are resampled {back[0]}ly ({back[1]} across slices), scans with {across} across slices",
            fix=_only("linear resampling of probabilities, with the same rule for thick slices as for scans"),
        )
    spacing = (*(None,) * (3 - len(configuration.spacing)), *configuration.spacing)
    yield Resample.model_validate({"spacing_mm": spacing, "order": order, "across": across})


class _Resampling(_Read):
    """The arguments of nnU-Net's functions that resample, with their defaults."""

    is_seg: bool = False
    order: int = 3
    order_z: int = 0
    force_separate_z: bool | None
    separate_z_anisotropy_threshold: Number = 3
    mode: Short = "linear"
    aniso_axis_mode: Short = "nearest-exact"


def _resampling(function: str, settings: Mapping[str, Any]) -> tuple[str, str]:
    """How a function of nnU-Net's resamples: its order, and what it does across thick slices."""
    by_torch = function == "resample_torch_fornnunet"
    default = {"force_separate_z": None if by_torch else False}
    read = _validated(_Resampling, {**default, **settings}, f"resampling by {printable(function)}")
    separate = {None: "nearest", False: "interpolate"}.get(read.force_separate_z)
    if by_torch:
        order = "linear" if read.mode == "linear" else None
        across = read.aniso_axis_mode == "nearest-exact"
    else:
        order = {1: "linear", 3: "cubic"}.get(read.order)
        known = function in ("resample_data_or_seg_to_shape", "resample_data_or_seg_to_spacing")
        across = known and read.order_z == 0
    if read.is_seg or read.separate_z_anisotropy_threshold != 3:
        across = False
    if order is None or separate is None or not across:
        given = ", ".join(f"{name}: {value}" for name, value in settings.items())
        raise CannotImport(
            f"resampling by {printable(function)} with {printable(given)} is not known", fix=_only("its own planners'")
        )
    return order, separate


def _normalisation(plans: _Plans, configuration: _Configuration, channels: int) -> Iterator[Step]:
    """Channels that are normalised alike share a step; those within the outline come first, while it is there."""
    if not len(configuration.normalization_schemes) == len(configuration.use_mask_for_norm) == channels:
        raise CannotImport(f"the plans are not for the {channels} channels of dataset.json", fix=_DAMAGED)
    alike: dict[tuple[bool, str], list[int]] = {}
    for channel, (scheme, masked) in enumerate(
        zip(configuration.normalization_schemes, configuration.use_mask_for_norm, strict=True)
    ):
        alike.setdefault((scheme != "ZScoreNormalization" or not masked, scheme), []).append(channel)
    for (whole, scheme), numbers in sorted(alike.items()):
        of = {} if len(numbers) == channels else {"channels": tuple(numbers)}
        if scheme == "ZScoreNormalization":
            yield Normalise.model_validate({"within": "all" if whole else "filled", **of})
        elif scheme == "CTNormalization":
            known = [_validated(_Intensities, plans.intensities.get(str(i), {}), f"channel {i}") for i in numbers]
            low, high = [k.percentile_00_5 for k in known], [k.percentile_99_5 for k in known]
            yield ClipPercentiles.model_validate({"scope": "cohort", "low": low, "high": high, **of})
            shift, scale = [k.mean for k in known], [max(k.std, 1e-8) for k in known]
            yield Normalise.model_validate({"scope": "cohort", "shift": shift, "scale": scale, **of})
        elif scheme == "RescaleTo01Normalization":
            yield Normalise.model_validate({"method": "minmax", **of})
        elif scheme == "RGBTo01Normalization":
            zeros, most = (0,) * len(numbers), (255,) * len(numbers)
            yield Normalise.model_validate({"scope": "cohort", "shift": zeros, "scale": most, **of})
        elif scheme != "NoNormalization":
            raise CannotImport(f"normalisation '{printable(scheme)}' is not nnU-Net's own", fix=_only("its own five"))


def _bundle(recipe: Recipe, plans: _Plans, configuration: _Configuration, targets: Targets) -> Bundle:
    assert isinstance(recipe.tiles, Patches | Slices)
    spacing = plans.original_median_spacing_after_transp[: 3 - len(configuration.spacing)]
    a, b, c = (*spacing, *configuration.spacing)
    shape = (*(1,) * (3 - len(configuration.patch_size)), *configuration.patch_size)
    geometry = geometry_for(recipe.tiles, shape, (a, b, c), recipe.network)
    if geometry.shape != shape:
        raise CannotImport(
            f"the network takes sides that are multiples of {recipe.network.divisor}, not tiles of {shape}",
            fix=_DAMAGED,
        )
    assert recipe.data.channels is not None
    return Bundle(
        recipe=recipe,
        pipeline=recipe.pipeline,
        targets=targets,
        channels=recipe.data.channels,
        geometry=geometry,
        spacing_mm=(a, b, c),
        provenance=Provenance(layout="nnunet"),
    )


def _weights(bundle: Bundle, read: Sequence[Mapping[str, Tensor]], files: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors by our names. Raises :class:`CannotImport` if they are not those of the plans' network."""
    spec = bundle.recipe.network
    assert isinstance(spec, UNetSpec)
    one = expected_tensors(spec.model_copy(update={"members": 1}), len(bundle.channels), bundle.targets.outputs)
    weights = {}
    for i, (own, file) in enumerate(zip(read, files, strict=True)):
        found = _renamed(spec, own, file)
        fix = "its trainer built another network; predict with nnU-Net itself"
        check_same(one, found, file, "the network of the plans", fix)
        prefix = "" if spec.members == 1 else f"members.{i}."
        weights.update({prefix + name: tensor for name, tensor in found.items()})
    return weights


def _renamed(spec: UNetSpec, own: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """One network's tensors by our names, as float32.

    A bias before a normalisation, which subtracts the mean, does nothing but shift BatchNorm's running mean.
    """
    # The decoder holds the encoder again, and each block its layers twice.
    left = {
        name.removeprefix("module.").removeprefix("_orig_mod."): tensor
        for name, tensor in own.items()
        if "decoder.encoder." not in name and ".all_modules." not in name
    }
    found: dict[str, Tensor] = {}
    for theirs, ours, norm in _layers(spec):
        kernel, bias = left.pop(f"{theirs}.weight", None), left.pop(f"{theirs}.bias", None)
        if kernel is not None:
            found[f"{ours}.weight"] = kernel
        if norm is None:
            if bias is None and kernel is not None:  # a transposed convolution without one
                bias = torch.zeros(kernel.shape[1])
            if bias is not None:
                found[f"{ours}.bias"] = bias
            continue
        of_norm = theirs.removesuffix(".conv") + ".norm."
        for name in [name for name in left if name.startswith(of_norm)]:
            found[f"{norm}.{name.removeprefix(of_norm)}"] = left.pop(name)
        if bias is not None and f"{norm}.running_mean" in found:
            found[f"{norm}.running_mean"] = found[f"{norm}.running_mean"] - bias
    if left:
        raise CannotImport(
            f"'{file}' holds {len(left)} tensors that the network of the plans has not, such as {next(iter(left))}",
            fix="its trainer built another network; predict with nnU-Net itself",
        )
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}


def _layers(spec: UNetSpec) -> Iterator[tuple[str, str, str | None]]:
    """Each convolution: its name in nnU-Net, here, and that of the normalisation after it, if there is one."""
    last = len(spec.widths) - 1

    def block(theirs: str, ours: str, count: int) -> Iterator[tuple[str, str, str | None]]:
        for i in range(count):
            yield f"{theirs}.convs.{i}.conv", f"{ours}.layers.{3 * i}", f"{ours}.layers.{3 * i + 1}"

    if spec.residual_blocks is None:
        for level in range(last + 1):
            yield from block(f"encoder.stages.{level}.0", f"encoder.{level}", spec.convolutions)
    else:
        yield from block("encoder.stem", "encoder.0.0", 1)
        for level, count in enumerate(spec.residual_blocks):
            for i in range(count):
                theirs, ours = f"encoder.stages.{level}.blocks.{i}", f"encoder.{level}.{i + (level == 0)}"
                yield f"{theirs}.conv1.conv", f"{ours}.layers.0", f"{ours}.layers.1"
                yield f"{theirs}.conv2.conv", f"{ours}.layers.3", f"{ours}.layers.4"
                if i == 0 and level > 0 and spec.widths[level] != spec.widths[level - 1]:
                    pooled = any(side != 1 for side in spec.level_strides[level - 1])
                    yield f"{theirs}.skip.{int(pooled)}.conv", f"{ours}.project.0", f"{ours}.project.1"
    for i in range(last):
        yield f"decoder.transpconvs.{i}", f"up.{i}", None
        yield from block(f"decoder.stages.{i}", f"decoder.{i}", spec.decoder_convolutions or spec.convolutions)
        level = last - 1 - i
        yield f"decoder.seg_layers.{i}", "head" if level == 0 else f"coarse_heads.{level - 1}", None
