"""MONAI's transforms as steps and settings of ours; those that are not known are refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from delineate.core.text import printable
from delineate.errors import CannotImport
from delineate.importing.monai_config import ITSELF, Arguments, Component, Config, Count, Short, Side, unknown
from delineate.preprocessing.intensity import ClipPercentiles, Normalise
from delineate.preprocessing.spatial import CropBackground, CropOrPad, Reorient, Resample, Resize
from delineate.preprocessing.step import Step
from delineate.specification import explained

Number = Annotated[float, Field(ge=-1e30, le=1e30)]


@dataclass(frozen=True)
class After:
    """What becomes of the network's output.

    ``exclusive``: the largest counts, rather than each above a half. ``average`` and ``back`` are as in recipes, the
    latter None if scores do not return. ``decided_first``: labels, not scores, are brought back. ``largest``: numbers
    of the structures that keep their largest component; None for all.
    """

    exclusive: bool
    average: str
    back: Literal["linear", "nearest"] | None
    decided_first: bool
    largest: tuple[int, ...] | None


Axes3 = Annotated[tuple[Number, ...], Field(min_length=1, max_length=3)]


class _Orientation(Arguments):
    axcodes: Annotated[str, Field(max_length=3)] | None = None
    as_closest_canonical: bool = False
    labels: None = None
    lazy: Literal[False] = False


class _Spacing(Arguments):
    pixdim: Axes3 | Number
    diagonal: Literal[False] = False
    mode: Literal["bilinear", "trilinear", 1] = "bilinear"
    padding_mode: Literal["border"] = "border"
    align_corners: Any = None
    dtype: Any = None
    scale_extent: Literal[False] = False
    recompute_affine: Any = None
    min_pixdim: None = None
    max_pixdim: None = None
    meta_keys: Any = None
    meta_key_postfix: Any = None
    ensure_same_shape: Any = None
    lazy: Literal[False] = False


class _Resize(Arguments):
    spatial_size: Annotated[tuple[Side, Side, Side], Field()] | Side
    size_mode: Literal["all"] = "all"
    mode: Literal["trilinear"]
    align_corners: Literal[False] | None = None
    anti_aliasing: Literal[False] = False
    anti_aliasing_sigma: Any = None
    dtype: Any = None
    lazy: Literal[False] = False


class _Range(Arguments):
    a_min: Number
    a_max: Number
    b_min: Number | None = None
    b_max: Number | None = None
    clip: bool = False
    dtype: Any = None


class _Percentiles(Arguments):
    lower: Annotated[float, Field(ge=0, le=100)]
    upper: Annotated[float, Field(ge=0, le=100)]
    b_min: Number | None
    b_max: Number | None
    clip: bool = False
    relative: Literal[False] = False
    channel_wise: bool = False
    dtype: Any = None


class _Scale(Arguments):
    minv: Number | None = 0.0
    maxv: Number | None = 1.0
    factor: None = None
    channel_wise: bool = False
    dtype: Any = None


class _Normalise(Arguments):
    subtrahend: Number | Annotated[tuple[Number, ...], Field(max_length=64)] | None = None
    divisor: Number | Annotated[tuple[Number, ...], Field(max_length=64)] | None = None
    nonzero: bool = False
    channel_wise: bool = False
    dtype: Any = None


class _Foreground(Arguments):
    source_key: Short
    select_fn: None = None
    channel_indices: None = None
    margin: Annotated[int, Field(ge=0, le=4096)] = 0
    allow_smaller: bool = False
    k_divisible: Literal[1] = 1
    mode: Any = None
    start_coord_key: Any = None
    end_coord_key: Any = None
    lazy: Literal[False] = False


class _Pad(Arguments):
    method: Literal["symmetric"] = "symmetric"
    mode: Literal["constant", "edge", "replicate"] = "constant"
    value: Number = 0.0
    constant_values: Number = 0.0
    lazy: Literal[False] = False

    @property
    def fill(self) -> float | str:
        return (self.value or self.constant_values) if self.mode == "constant" else "edge"


class _SpatialPad(_Pad):
    spatial_size: Annotated[tuple[Side, Side, Side], Field()] | Side


class _DivisiblePad(_Pad):
    k: Annotated[tuple[Side, Side, Side], Field()] | Side


_PLAIN = (
    *("LoadImage", "EnsureChannelFirst", "AddChannel", "AsChannelFirst", "EnsureType", "ToTensor", "CastToType"),
    *("ToDevice", "Identity", "SimulateDelay", "SaveImage"),
)

_WHOLE_NUMBERS = re.compile(r"u?int\d*|bool\d*|long|short|byte|char")


def _base_name(component: Component) -> str:
    """The transform's name, without what marks it as one of dictionaries."""
    return re.sub(r"(d|D|Dict)$", "", component.name)


def preprocessing(config: Config, channels: int, after: After) -> Iterator[Step]:
    """MONAI's transforms of the scan as steps of ours, in order."""
    known: dict[str, Callable[[Component, str, int, After], Iterator[Step]]] = {
        "Orientation": _orientation,
        "Spacing": _spacing,
        "Resize": _resize,
        "ScaleIntensityRange": _range,
        "ScaleIntensityRangePercentiles": _percentiles,
        "ScaleIntensity": _scale,
        "NormalizeIntensity": _normalise,
        "CropForeground": _foreground,
        "SpatialPad": _spatial_pad,
        "DivisiblePad": _divisible_pad,
    }
    key: str | None = None
    for component in _of_the_scan(config):
        name = _base_name(component)
        if key is None:
            if name != "LoadImage":
                raise CannotImport(f"the preprocessing begins with {printable(component.name)}", fix="add LoadImaged")
            key = component.keys[0] if component.keys else "image"
        if component.keys and key not in component.keys:
            continue
        if whole := [one for one in component.dtypes(key) if _WHOLE_NUMBERS.fullmatch(one)]:
            place = printable(component.place)
            raise CannotImport(
                f"{printable(component.name)} ({place}) rounds voxels to {whole[0]}, which is not known",
                fix=f"if they are whole numbers anyway: --entry '{place}::dtype=torch.float32'",
            )
        if name in _PLAIN:
            continue
        if name not in known:
            raise unknown("preprocessing", f"{component.name} ({component.place})")
        yield from known[name](component, key, channels, after)


def _of_the_scan(config: Config) -> list[Component]:
    """The transforms that a bundle reads its scans with: MONAI runs those of the data set, which most call by name."""
    dataset = config.entries.get("dataset")
    inline = dataset.get("transform") if isinstance(dataset, Mapping) else None
    named = [*config.composed(config.entries.get("preprocessing"), "preprocessing")]
    used = [*config.composed(inline, "dataset::transform")]
    if named and used and [(one.name, one.arguments) for one in named] != [(one.name, one.arguments) for one in used]:
        raise CannotImport(
            "dataset::transform is not the same as preprocessing, and MONAI applies the former",
            fix="remove the one that the network was not trained with",
        )
    if not named and not used:
        raise CannotImport(
            "the configuration has neither preprocessing nor dataset::transform", fix="add them, LoadImaged first"
        )
    return named or used


def _orientation(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Orientation, key)
    yield _step(Reorient, {"to": "RAS" if read.as_closest_canonical else read.axcodes}, component)


def _spacing(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Spacing, key)
    pixdim = read.pixdim if isinstance(read.pixdim, tuple) else (read.pixdim,)
    spacing = [side if side > 0 else None for side in (*pixdim, *(pixdim[-1],) * (3 - len(pixdim)))]
    yield _step(Resample, {"spacing_mm": spacing, "align": "monai", "back": _back(component, after)}, component)


def _resize(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Resize, key)
    if _back(component, after) == "nearest":
        raise unknown(component.name, "labels that return by nearest neighbours")
    yield _step(Resize, {"shape": _none_below_one(read.spatial_size)}, component)


def _back(component: Component, after: After) -> str:
    """How scores return from voxels of another size."""
    if after.back is None:
        raise CannotImport(
            f"{component.name} changes the size of voxels, and no Invertd brings labels back to the scan's",
            fix=ITSELF,
        )
    if after.decided_first and after.back == "linear":
        raise CannotImport(
            "Invertd interpolates between the numbers of labels, whose results are no labels",
            fix="let it take the nearest: --entry the id of its nearest_interp to true, such as "
            "postprocessing::transforms::2::nearest_interp=true",
        )
    return after.back


def _range(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Range, key)
    if read.a_max <= read.a_min:
        raise unknown(component.name, f"a_min {read.a_min} and a_max {read.a_max}")
    if read.clip:
        if read.b_min is None or read.b_max is None or read.b_max <= read.b_min:
            raise unknown(component.name, f"clip, b_min {read.b_min} and b_max {read.b_max}")
        window = {"scope": "cohort", "low": [read.a_min] * channels, "high": [read.a_max] * channels}
        yield _step(ClipPercentiles, window, component)
    yield from _to_range(component, channels, read.a_min, read.a_max, read.b_min, read.b_max)


def _to_range(
    component: Component, channels: int, low: float, high: float, to_low: float | None, to_high: float | None
) -> Iterator[Step]:
    """A fixed scaling that moves a range to another one, 0 to 1 if none is given."""
    to_low, to_high = (0.0, 1.0) if to_low is None or to_high is None else (to_low, to_high)
    if to_high <= to_low:
        raise unknown(component.name, f"a range from {to_low} to {to_high}")
    scale = (high - low) / (to_high - to_low)
    shift = low - to_low * scale
    if (shift, scale) != (0, 1):
        fixed = {"scope": "cohort", "shift": [shift] * channels, "scale": [scale] * channels}
        yield _step(Normalise, fixed, component)


def _percentiles(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Percentiles, key)
    _refuse_joint(component, read.channel_wise, channels)
    if not read.clip and (read.lower, read.upper) != (0, 100):
        raise unknown(component.name, "clip: false")
    yield _step(ClipPercentiles, {"lower": read.lower, "upper": read.upper, "every_voxel": True}, component)
    yield Normalise(method="minmax")
    yield from _to_range(component, channels, 0, 1, read.b_min, read.b_max)


def _scale(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Scale, key)
    _refuse_joint(component, read.channel_wise, channels)
    yield Normalise(method="minmax")
    yield from _to_range(component, channels, 0, 1, read.minv, read.maxv)


def _normalise(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Normalise, key)
    within = "nonzero" if read.nonzero else "all"
    if read.subtrahend is None and read.divisor is None:
        _refuse_joint(component, read.channel_wise, channels)
        yield _step(Normalise, {"within": within}, component)
        return
    if read.subtrahend is None or read.divisor is None:
        raise unknown(component.name, "only one of subtrahend and divisor")
    shift, scale = (
        value if isinstance(value, tuple) else (value,) * channels for value in (read.subtrahend, read.divisor)
    )
    scale = tuple(one or 1.0 for one in scale)
    if len(shift) != channels or len(scale) != channels or not (read.channel_wise or channels == 1):
        raise unknown(component.name, f"subtrahend and divisor not for each of {channels} channels")
    yield _step(Normalise, {"scope": "cohort", "shift": shift, "scale": scale, "within": within}, component)


def _refuse_joint(component: Component, channel_wise: bool, channels: int) -> None:
    if channels > 1 and not channel_wise:
        raise unknown(component.name, f"one range for all of {channels} channels (channel_wise: false)")


def _foreground(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_Foreground, key)
    if read.source_key != key:
        raise unknown(component.name, f"source_key {read.source_key}")
    if read.margin and not read.allow_smaller:
        raise unknown(component.name, "a margin without allow_smaller, which pads in some versions of MONAI")
    if after.back is None:
        raise CannotImport(f"{component.name} crops, and no Invertd brings labels back to the whole scan", fix=ITSELF)
    yield CropBackground(threshold=0.0, margin=read.margin)


def _spatial_pad(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_SpatialPad, key)
    yield _step(CropOrPad, {"at_least": _none_below_one(read.spatial_size), "fill": read.fill}, component)


def _divisible_pad(component: Component, key: str, channels: int, after: After) -> Iterator[Step]:
    read = component.read(_DivisiblePad, key)
    multiples = [side or 1 for side in _none_below_one(read.k)]
    yield _step(CropOrPad, {"multiple_of": multiples, "fill": read.fill}, component)


def _none_below_one(sides: tuple[int, int, int] | int) -> list[int | None]:
    """MONAI keeps an axis for 0 or -1."""
    return [side if side > 0 else None for side in (sides if isinstance(sides, tuple) else (sides,) * 3)]


def _step(kind: type[Step], fields: Mapping[str, Any], component: Component) -> Step:
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise CannotImport(
            f"{component.name} ({printable(component.place)}) cannot be a step:\n{explained(error, kind)}", fix=ITSELF
        ) from error


_PREPARATION = ("@preprocessing", "@dataset::transform", "@dataset#transform")
"""How the transforms of the scan are referred to."""


class _Activations(Arguments):
    sigmoid: bool = False
    softmax: bool = False
    other: None = None
    kwargs: Any = None


class _Discrete(Arguments):
    argmax: bool = False
    to_onehot: None = None
    threshold: Number | None = None
    rounding: None = None


class _Invert(Arguments):
    transform: Any = None
    orig_keys: Any = None
    meta_keys: Any = None
    orig_meta_keys: Any = None
    meta_key_postfix: Any = None
    nearest_interp: bool = True
    to_tensor: Any = None
    device: Any = None
    post_func: None = None


class _Largest(Arguments):
    applied_labels: Annotated[tuple[Count, ...], Field(max_length=256)] | Count | None = None
    is_onehot: bool | None = None
    independent: bool = True
    connectivity: Literal[3] | None = None
    num_components: Literal[1] = 1


def postprocessing(config: Config, named: bool) -> After:
    """What becomes of the network's output, from MONAI's transforms of it.

    ``named``: the label values of structures that overlap were given, so code that joins them has nothing left to say.
    """
    link: str | None = None
    decision: _Discrete | None = None
    back: Literal["linear", "nearest"] | None = None
    linked_first = decided_first = False
    largest: tuple[int, ...] | None = ()
    for component in config.composed(config.entries.get("postprocessing"), "postprocessing"):
        name = _base_name(component)
        if name in _PLAIN or (component.keys and "pred" not in component.keys):
            continue
        if name == "Activations":
            activations = component.read(_Activations, "pred")
            if activations.softmax == activations.sigmoid or link or decision:
                raise unknown("postprocessing", f"{component.name} other than one softmax or sigmoid")
            link = "softmax" if activations.softmax else "sigmoid"
            linked_first = back is None
        elif name == "AsDiscrete":
            if decision is not None:
                raise unknown("postprocessing", f"a second {component.name}")
            decision = component.read(_Discrete, "pred")
            decided_first = back is None
        elif name == "Invert":
            nearest = component.read(_Invert, "pred").nearest_interp
            if back is not None or component.arguments.get("transform") not in _PREPARATION:
                raise unknown("postprocessing", f"{component.name} of anything but @preprocessing")
            back = "nearest" if nearest else "linear"
        elif name == "KeepLargestConnectedComponent" and decision is not None:
            more = _largest(component)
            largest = None if largest is None or more is None else (*largest, *more)
        elif name != "Lambda" or decision is None or decision.argmax or not named:
            fix = f"{ITSELF}; if it only joins overlapping outputs to labels, give these with --targets"
            raise CannotImport(
                f"postprocessing with {printable(component.name)} ({printable(component.place)}) is not known",
                fix=fix if name == "Lambda" else ITSELF,
            )
    exclusive = decision is not None and decision.argmax and decision.threshold is None and link != "sigmoid"
    overlapping = decision is not None and not decision.argmax and decision.threshold == 0.5 and link == "sigmoid"
    if not (exclusive or overlapping):
        raise CannotImport(
            "the postprocessing decides neither by AsDiscreted's argmax, nor by a sigmoid and a threshold of 0.5",
            fix=ITSELF,
        )
    # Argmax is the same of logits and of their softmax, but not once either is interpolated.
    returned_as_they_are = back == "linear" and not linked_first and not decided_first
    average = "logits" if returned_as_they_are else "tile_logits"
    return After(exclusive, average, back, decided_first and back is not None, largest)


def _largest(component: Component) -> tuple[int, ...] | None:
    read = component.read(_Largest, "pred")
    labels = read.applied_labels
    numbers = (labels,) if isinstance(labels, int) else labels
    if not read.independent and (numbers is None or len(numbers) > 1):
        raise unknown(component.name, "independent: false")
    return numbers
