"""MONAI's networks as ours, and what their tensors are called here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, ValidationError
from torch import Tensor

from delineate.core.text import printable
from delineate.errors import CannotImport
from delineate.importing.monai_config import ITSELF, Arguments, Component, Config, Count, Short, unknown
from delineate.networks.base import Architecture
from delineate.networks.monai_unet import MonaiUNetSpec
from delineate.networks.segresnet import SegResNetSpec
from delineate.networks.unet import UNetSpec
from delineate.specification import explained

Counts = Annotated[tuple[Count, ...], Field(min_length=1, max_length=12)]
Level = Count | Annotated[tuple[Count, ...], Field(max_length=3)]
Levels = Annotated[tuple[Level, ...], Field(min_length=1, max_length=12)]


def _named(value: Any) -> Any:
    """A layer's name and its arguments; a name alone has none."""
    if isinstance(value, str) or value is None:
        return (value or "none", {})
    return tuple(value) if isinstance(value, list) else value


Layer = Annotated[tuple[Short, dict[str, Any]], BeforeValidator(_named)]


@dataclass(frozen=True)
class Network:
    """A network of ours with the layers of one of MONAI's, and what its tensors are called here."""

    name: str
    spec: Architecture
    inputs: int
    outputs: int
    renamed: Callable[[Mapping[str, Tensor], Architecture], dict[str, Tensor]]
    absent: str
    """A pattern of the tensors of ours that MONAI's network has not, since it computes as with ones or zeros."""
    last: Mapping[str, tuple[int, ...]]
    """Patterns of tensors, and the dimensions that stand for the outputs; the first pattern that matches counts."""


class _NetworkArguments(Arguments):
    spatial_dims: Literal[2, 3] = 3
    in_channels: Annotated[int, Field(ge=1, le=64)] = 1
    out_channels: Annotated[int, Field(ge=1, le=1024)] = 2


class _UNetArguments(_NetworkArguments):
    channels: Counts
    strides: Levels
    kernel_size: Level = 3
    up_kernel_size: Level = 3
    num_res_units: Annotated[int, Field(ge=0, le=16)] = 0
    act: Layer = ("prelu", {})
    norm: Layer = ("instance", {})
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = 0.0
    bias: bool = True
    adn_ordering: Literal["NDA", "NA", "DNA", "NAD"] = "NDA"


class _SegResNetArguments(_NetworkArguments):
    init_filters: Count = 8
    dropout_prob: Annotated[float, Field(ge=0, lt=1)] | None = None
    act: Layer = ("relu", {})
    norm: Layer = ("group", {"num_groups": 8})
    norm_name: Literal["", "group", "GROUP"] = ""
    num_groups: Literal[8] = 8
    use_conv_final: Literal[True] = True
    blocks_down: Counts = (1, 2, 2, 4)
    blocks_up: Counts = (1, 1, 1)
    upsample_mode: Literal["nontrainable"] = "nontrainable"


class _DynUNetArguments(_NetworkArguments):
    kernel_size: Levels
    strides: Levels
    upsample_kernel_size: Levels
    filters: Counts | None = None
    dropout: Any = None
    norm_name: Layer = ("instance", {"affine": True})
    act_name: Layer = ("leakyrelu", {})
    deep_supervision: Any = None
    deep_supr_num: Any = None
    res_block: Literal[False] = False
    trans_bias: bool = False


def network_of(config: Config) -> Network:
    """Our network of the same layers. Raises :class:`CannotImport` for any other."""
    name = "network_def" if "network_def" in config.entries else "network"
    component = config.component(config.entries.get(name), name)
    known = {"UNet": _unet, "Unet": _unet, "SegResNet": _segresnet, "DynUNet": _dynunet, "DynUnet": _dynunet}
    if component is None or component.name not in known:
        found = "null" if component is None else printable(component.name)
        raise CannotImport(f"network '{found}' is not known", fix=f"{ITSELF}; known are UNet, SegResNet and DynUNet")
    if "dimensions" in component.arguments:  # before MONAI 0.9
        arguments = dict(component.arguments)
        arguments.setdefault("spatial_dims", arguments.pop("dimensions"))
        component = Component(component.name, arguments, component.place, config)
    try:
        return known[component.name](component)
    except ValidationError as error:
        raise CannotImport(
            f"the {component.name} cannot be built:\n{explained(error, Architecture)}", fix="correct network_def"
        ) from error


def _unet(component: Component) -> Network:
    read = component.read(_UNetArguments)
    d, levels = read.spatial_dims, len(read.channels) - 1
    norm = _norm(read.norm, component.name)
    if norm == "group":
        raise unknown("a UNet", "GroupNorm")
    spec = MonaiUNetSpec.model_validate(
        {
            "dimensions": d,
            "widths": read.channels,
            "strides": [_sides(stride, d) for stride in read.strides[:levels]],
            "residual_units": read.num_res_units,
            "kernel": _sides(read.kernel_size, d),
            "up_kernel": _sides(read.up_kernel_size, d),
            "norm": norm,
            "activation": _activation(read.act, component.name),
            "dropout": read.dropout or 0.0,
        }
    )
    absent = _absent(r"\.N", read.norm) + ("" if read.bias else r"|.*\.(conv|residual)\.bias")
    last = {
        r"model\.2\.(0\.)?conv\.weight": (1,),  # transposed: inputs come first
        r"model\.2\.1\.conv\.unit0\.conv\.weight": (0, 1),
        r"model\.2\..*": (0,),
    }
    return Network(component.name, spec, read.in_channels, read.out_channels, _of_unet, absent, last)


def _segresnet(component: Component) -> Network:
    read = component.read(_SegResNetArguments)
    norm = _norm(read.norm, component.name)
    if norm == "none":  # MONAI's activation then overwrites what is added to a block's result
        raise unknown("a SegResNet", "no normalisation")
    spec = SegResNetSpec.model_validate(
        {
            "dimensions": read.spatial_dims,
            "first_filters": read.init_filters,
            "blocks": read.blocks_down,
            "decoder_blocks": read.blocks_up,
            "norm": norm,
            "activation": _activation(read.act, component.name),
            "dropout": read.dropout_prob or 0.0,
        }
    )
    absent, last = _absent(r"(\.norm[12]|conv_final\.0)", read.norm), {r"conv_final\.2\..*": (0,)}
    return Network(component.name, spec, read.in_channels, read.out_channels, _of_segresnet, absent, last)


def _dynunet(component: Component) -> Network:
    read = component.read(_DynUNetArguments)
    d, levels = read.spatial_dims, len(read.strides)
    strides = [_sides(stride, d) for stride in read.strides]
    most = 320 if d == 3 else 512
    norm, activation = _norm(read.norm_name, component.name), _activation(read.act_name, component.name)
    if any(side != 1 for side in strides[0]):
        raise unknown("a DynUNet", "a stride at full resolution")
    if [_sides(kernel, d) for kernel in read.upsample_kernel_size] != strides[1:]:
        raise unknown("a DynUNet", "upsample_kernel_size other than its strides")
    kernels = [_sides(kernel, d) for kernel in read.kernel_size]
    if len({*kernels}) > 1:  # its decoder has each level's kernel one level higher than ours
        raise unknown("a DynUNet", "different kernels at different levels")
    spec = UNetSpec.model_validate(
        {
            "dimensions": d,
            "widths": (read.filters or tuple(min(2 ** (5 + i), most) for i in range(levels)))[:levels],
            "strides": strides[1:],
            "kernels": kernels,
            "norm": norm,
            "activation": activation,
        }
    )
    if norm == "group" or activation == "prelu":
        raise unknown("a DynUNet", "GroupNorm or PReLU")
    absent = _absent(r"\.layers\.[14]", read.norm_name) + ("" if read.trans_bias else r"|up\.\d+\.bias")
    last = {r"head\..*": (0,)}
    return Network(component.name, spec, read.in_channels, read.out_channels, _of_dynunet, absent, last)


def _absent(layers: str, norm: tuple[str, dict[str, Any]]) -> str:
    """A pattern of the tensors that the normalisations lack in MONAI's network, whose names end as ``layers``."""
    has_weights = norm[1].get("affine", norm[0].lower() != "instance")
    return rf".*{layers}\.num_batches_tracked" + ("" if has_weights else rf"|.*{layers}\.(weight|bias)")


def _sides(value: Level, dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else value


def _norm(layer: tuple[str, dict[str, Any]], network: str) -> str:
    name, arguments = layer[0].lower(), layer[1]
    known = name in ("instance", "batch", "group", "none") and arguments.get("eps", 1e-5) == 1e-5
    if name == "group":
        known = known and arguments.get("num_groups") == 8
    if not known or arguments.get("track_running_stats", name == "batch") != (name == "batch"):
        raise unknown(f"a {network}", f"normalisation {layer[0]} {arguments or ''}")
    return name


def _activation(layer: tuple[str, dict[str, Any]], network: str) -> str:
    name, arguments = layer[0].lower(), layer[1]
    names = {"prelu": "prelu", "relu": "relu", "leakyrelu": "leaky_relu"}
    slope, slopes = arguments.get("negative_slope", 0.01), arguments.get("num_parameters", 1)
    if name not in names or slope != 0.01 or slopes != 1:
        raise unknown(f"a {network}", f"activation {layer[0]} {arguments or ''}")
    return names[name]


def reordered(found: Mapping[str, Tensor], network: Network, order: list[int]) -> dict[str, Tensor]:
    """The last layers' tensors with the outputs in another order."""
    result = dict(found)
    for name, tensor in found.items():
        dims = next((dims for pattern, dims in network.last.items() if re.fullmatch(pattern, name)), ())
        for dim in dims:
            if tensor.ndim and tensor.shape[dim] == network.outputs:
                tensor = tensor.index_select(dim, torch.tensor(order))
        result[name] = tensor
    return result


def _of_unet(given: Mapping[str, Tensor], spec: Architecture) -> dict[str, Tensor]:
    """Without biases before a normalisation, which subtracts the mean: they only shift BatchNorm's running mean."""
    assert isinstance(spec, MonaiUNetSpec)
    found = dict(given)
    if spec.norm in ("none", "group"):
        return found
    for name, bias in given.items():
        if name.endswith(".conv.bias") and (unit := name.removesuffix(".conv.bias")) + ".conv.weight" in given:
            if _bare(unit, spec):
                continue
            del found[name]
            mean = f"{unit}.adn.N.running_mean"
            if mean in found:
                found[mean] = found[mean] - bias
    return found


def _bare(unit: str, spec: MonaiUNetSpec) -> bool:
    """Whether a unit is the last one, a convolution alone."""
    return unit == ("model.2" if spec.residual_units == 0 else "model.2.1.conv.unit0")


def _of_segresnet(given: Mapping[str, Tensor], spec: Architecture) -> dict[str, Tensor]:
    """As they are, but for the activation that MONAI holds twice in each block."""
    found = {}
    for name, tensor in given.items():
        if ".act." in name:
            found[name.replace(".act.", ".act1.")] = tensor
            found[name.replace(".act.", ".act2.")] = tensor.clone()  # safetensors writes none that share memory
        elif not name.startswith("act_mod."):
            found[name] = tensor
    return found


def _of_dynunet(given: Mapping[str, Tensor], spec: Architecture) -> dict[str, Tensor]:
    """By our U-Net's names; MONAI holds its layers a second time, in the order in which they run."""
    assert isinstance(spec, UNetSpec)
    last = len(spec.widths) - 1
    blocks = {"input_block": "encoder.0", "bottleneck": f"encoder.{last}"}
    blocks |= {f"downsamples.{i}": f"encoder.{i + 1}" for i in range(last - 1)}
    blocks |= {f"upsamples.{i}.conv_block": f"decoder.{i}" for i in range(last)}
    layers = {"conv1.conv": "layers.0", "norm1": "layers.1", "conv2.conv": "layers.3", "norm2": "layers.4"}
    names = {f"{block}.{layer}": f"{ours}.{mine}" for block, ours in blocks.items() for layer, mine in layers.items()}
    names |= {f"upsamples.{i}.transp_conv.conv": f"up.{i}" for i in range(last)}
    names["output_block.conv.conv"] = "head"
    found = {}
    for name, tensor in given.items():
        if not name.startswith(("skip_layers.", "deep_supervision_heads.", "heads.")):
            layer, _, kind = name.rpartition(".")
            found[f"{names.get(layer, layer)}.{kind}"] = tensor
    return found
