"""Bundles of MONAI (Cardoso et al. 2022), as bundles that predict what MONAI predicts.

::

    BUNDLE_FOLDER/
        configs/metadata.json          names of channels and structures
        configs/inference.json         preprocessing, network, tiles and postprocessing; or inference.yaml
        models/model.pt                the weights

Expressions of the configuration are never evaluated, and no code of the weights' file runs. Only what is named here is
read: no path and no description becomes part of a bundle.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from delineate.bundle import Bundle, Provenance
from delineate.core.grid import AXES, Shape3
from delineate.core.targets import Targets
from delineate.core.text import printable
from delineate.errors import CannotImport, DelineateError
from delineate.importing.monai_config import ITSELF, Arguments, Config, Short, Side, unknown
from delineate.importing.monai_networks import Network, network_of, reordered
from delineate.importing.monai_transforms import After, postprocessing, preprocessing
from delineate.importing.tensors import check_same, expected_tensors
from delineate.io.files import read_json
from delineate.networks.base import Architecture
from delineate.preprocessing.spatial import Resample
from delineate.preprocessing.step import Step
from delineate.pretrained.weights import read_tensors
from delineate.recipe import Recipe, TargetsSpec, recipe_from
from delineate.sampling.tiles import Patches, Slices, Whole, geometry_for
from delineate.specification import explained

CHECKPOINT = "model.pt"

Digits = Annotated[str, Field(pattern=r"^\d{1,3}$")]


class _Read(BaseModel):
    """Part of the metadata: the fields that matter, whatever else there is."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)


class _Format(_Read):
    channel_def: Annotated[dict[Digits, Short], Field(max_length=1024)] = Field(default_factory=dict)


class _Formats(_Read):
    inputs: Annotated[dict[Short, dict[str, Any]], Field(max_length=64)] = Field(default_factory=dict)
    outputs: Annotated[dict[Short, dict[str, Any]], Field(max_length=64)] = Field(default_factory=dict)


class _Metadata(_Read):
    network_data_format: _Formats = _Formats()


@dataclass(frozen=True)
class Imported:
    """What became of a bundle of MONAI's: its network, and the bundle."""

    network: str
    bundle: Bundle


def import_model(
    folder: Path,
    out: Path,
    changes: Sequence[str] = (),
    *,
    targets: Targets | None = None,
    checkpoint: str = CHECKPOINT,
) -> Imported:
    """Write the bundle of a bundle of MONAI's.

    ``changes`` to its configuration, as ``ID=VALUE``, replace what only an expression says. ``targets`` are the label
    values of structures that overlap, by their names in the metadata; later ones are written over earlier ones.
    Raises :class:`CannotImport` for whatever a bundle cannot hold, by name, and
    :class:`~delineate.errors.WeightsError` for weights that are damaged or hold code, which is never run.
    """
    metadata = _metadata(folder)
    config = Config.read(_configuration(folder), changes)
    file = _weights_file(folder, checkpoint)
    network = network_of(config)
    after = postprocessing(config, targets is not None)
    steps = tuple(preprocessing(config, network.inputs, after))
    decided = _targets(metadata, network.outputs, after, targets)
    recipe = _recipe(config, metadata, network, steps, after, decided)
    bundle = _bundle(recipe, decided.targets, network)
    weights = _weights(bundle, network, file, decided.order)
    bundle.save_anew(out, weights, {"imported": "MONAI", "network": network.name})
    return Imported(network.name, Bundle.load(out))


def _metadata(folder: Path) -> _Metadata:
    file = folder / "configs/metadata.json"
    content = read_json(file, CannotImport, fix="give the folder of a bundle of MONAI's, with all that is in it")
    try:
        return _Metadata.model_validate(content)
    except ValidationError as error:
        raise CannotImport(
            f"'{file}' is not as MONAI writes it:\n{explained(error, _Metadata)}", fix="correct it"
        ) from error


def _configuration(folder: Path) -> Path:
    files = [folder / f"configs/inference.{suffix}" for suffix in ("json", "yaml", "yml")]
    if not (there := [file for file in files if file.is_file()]):
        raise CannotImport(f"'{folder}' has no configs/inference.json or .yaml", fix="give a bundle that can predict")
    return there[0]


def _weights_file(folder: Path, checkpoint: str) -> Path:
    file = folder / "models" / checkpoint
    if file.is_file() and file.suffix != ".ts":
        return file
    scripts = [file.name for file in sorted(folder.glob("models/*.ts"))]
    if scripts:
        raise CannotImport(
            f"'{folder}' has its network as a TorchScript program ({printable(scripts[0])}), which would have to "
            "be run to be read",
            fix=f"add its weights as models/{CHECKPOINT}; where you trust the program: "
            f"torch.save(torch.jit.load('{printable(scripts[0])}').state_dict(), '{CHECKPOINT}')",
        )
    raise CannotImport(f"there is no '{file}'", fix="download the weights, which a bundle may list in large_files.yml")


@dataclass(frozen=True)
class _Decided:
    """The targets, and which of the network's outputs each of ours is."""

    targets: Targets
    order: tuple[int, ...]


def _names(formats: Mapping[str, Mapping[str, Any]], first: str, count: int, otherwise: str) -> list[str]:
    """Names of channels from the metadata, each once; numbered ones where it has none."""
    try:
        found = _Format.model_validate(formats.get(first) or next(iter(formats.values()), {})).channel_def
    except ValidationError as error:
        raise CannotImport(
            f"channel_def of metadata.json is not known:\n{explained(error, _Format)}", fix="correct it"
        ) from error
    if found and len(found) != count:
        raise CannotImport(
            f"metadata.json names {len(found)} channels of {first}, but the network has {count}",
            fix="correct channel_def in metadata.json",
        )
    names = [printable(found.get(str(i), "")).strip() or f"{otherwise}_{i}" for i in range(count)]
    return [f"{name}_{i}" if names.count(name) > 1 else name for i, name in enumerate(names)]


def _targets(metadata: _Metadata, outputs: int, after: After, given: Targets | None) -> _Decided:
    names = _names(metadata.network_data_format.outputs, "pred", outputs, "structure")
    if after.exclusive:
        if given is not None:
            raise CannotImport("--targets is for structures that overlap, and these exclude each other", fix="omit it")
        if outputs < 2:
            raise CannotImport("the largest of a single output is no structure", fix="correct the postprocessing")
        return _Decided(_checked({name: (i,) for i, name in enumerate(names) if i}, "exclusive"), tuple(range(outputs)))
    if given is None and outputs > 1:
        raise CannotImport(
            f"the structures {', '.join(names)} may overlap, and a label has one value a voxel",
            fix="give the values that belong to each with --targets, the largest structure first, such as "
            "'whole=1+2+4,core=1+4,enhancing=4'",
        )
    values = given.values if given is not None else {names[0]: (1,)}
    if sorted(values) != sorted(names):
        raise CannotImport(
            f"--targets names {', '.join(values)}, but the network's outputs are {', '.join(names)}",
            fix="give each of these names once",
        )
    return _Decided(_checked(values, "overlapping"), tuple(names.index(name) for name in values))


def _checked(values: Mapping[str, tuple[int, ...]], mode: Literal["exclusive", "overlapping"]) -> Targets:
    try:
        return Targets(values, mode)
    except DelineateError as error:
        raise CannotImport(f"the network's outputs cannot be targets: {error.message}", fix=error.fix) from error


class _Simple(Arguments):
    pass


class _Sliding(Arguments):
    roi_size: Annotated[tuple[Side, ...], Field(min_length=2, max_length=3)] | Side
    sw_batch_size: Any = None
    overlap: Annotated[float, Field(ge=0, le=0.95)] | Annotated[tuple[float, ...], Field(max_length=3)] = 0.25
    mode: Literal["constant", "gaussian"] = "constant"
    sigma_scale: Annotated[float, Field(ge=0.125, le=0.125)] = 0.125
    padding_mode: Literal["constant", "replicate"] = "constant"
    cval: Annotated[float, Field(ge=0, le=0)] = 0.0
    sw_device: Any = None
    device: Any = None
    progress: Any = None
    cache_roi_weight_map: Any = None
    cpu_thresh: Any = None
    buffer_steps: Any = None
    buffer_dim: Any = None
    with_coord: Literal[False] = False


class _SlicesOnly(_Sliding):
    spatial_dim: Literal[0, 1, 2] = 0


def _recipe(
    config: Config, metadata: _Metadata, network: Network, steps: Sequence[Step], after: After, decided: _Decided
) -> Recipe:
    tiles, inference = _tiling(config, network.spec.dimensions)
    names = decided.targets.names
    kept = names if after.largest is None else _kept(after.largest, names, after.exclusive)
    channels = _names(metadata.network_data_format.inputs, "image", network.inputs, "image")
    return recipe_from(
        {
            "name": f"monai_{network.name.lower()}",
            "description": f"Imported from MONAI: {network.name}.",
            "data": {"targets": TargetsSpec.of(decided.targets), "channels": channels},
            "preprocessing": list(steps),
            "tiles": tiles,
            "augmentation": {"spatial": {"mirror": ()}},
            "network": network.spec,
            "inference": {"average": after.average, **inference},
            "postprocessing": {"largest_component": kept},
        }
    )


def _kept(numbers: Sequence[int], names: Sequence[str], exclusive: bool) -> list[str]:
    """Names of the targets that keep their largest component."""
    if not {*numbers} <= {*range(1, len(names) + 1)} or (numbers and not exclusive and len(names) > 1):
        raise unknown("KeepLargestConnectedComponentd", f"applied_labels {list(numbers)} of {len(names)} structures")
    return [name for i, name in enumerate(names, start=1) if i in numbers]


def _tiling(config: Config, dimensions: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """The recipe's tiles and inference."""
    component = config.component(config.entries.get("inferer"), "inferer")
    name = "none" if component is None else component.name
    if component is not None and name == "SimpleInferer" and dimensions == 3:
        component.read(_Simple)
        return {"kind": "whole"}, {"weights": "uniform"}
    if component is None or (name, dimensions) not in (("SlidingWindowInferer", 3), ("SliceInferer", 2)):
        raise CannotImport(
            f"inferer '{printable(name)}' of a {dimensions}D network is not known",
            fix=f"{ITSELF}; known are SlidingWindowInferer and SimpleInferer in 3D, and SliceInferer in 2D",
        )
    read = component.read(_SlicesOnly if dimensions == 2 else _Sliding)
    sides = read.roi_size if isinstance(read.roi_size, tuple) else (read.roi_size,) * dimensions
    overlaps = {*read.overlap} if isinstance(read.overlap, tuple) else {read.overlap}
    if len(sides) != dimensions or len(overlaps) != 1:
        raise unknown(name, f"roi_size {list(sides)} and overlap {sorted(overlaps)}")
    outside = "edge" if read.padding_mode == "replicate" else "zero"
    inference = {
        "weights": "monai" if read.mode == "gaussian" else "uniform",
        "overlap": overlaps.pop(),
        "advance": "fixed",
    }
    if isinstance(read, _SlicesOnly):
        whole = all(side < 1 for side in sides)
        tiles = {"kind": "slices", "axis": AXES[read.spatial_dim], "shape": (None, None) if whole else sides}
    else:
        whole, tiles = False, {"kind": "patches", "shape": sides}
        if all(side < 1 for side in sides):
            return {"kind": "whole"}, {"weights": "uniform"}
    if not whole and min(sides) < 1:
        raise unknown(name, f"roi_size {list(sides)}, which follows the scan along some axes only")
    return {**tiles, "outside": outside}, inference


def _bundle(recipe: Recipe, targets: Targets, network: Network) -> Bundle:
    spacing: tuple[float | None, ...] = (None, None, None)
    for step in recipe.preprocessing:
        if isinstance(step, Resample):
            spacing = step.spacing_mm
    a, b, c = (side or 1.0 for side in spacing)
    tiles = recipe.tiles
    shape = _shape(tiles, network.spec)
    geometry = geometry_for(tiles, shape, (a, b, c), network.spec)
    if geometry.shape != shape:
        raise CannotImport(
            f"the network takes sides that are multiples of {network.spec.divisor}, not tiles of {shape}",
            fix="correct roi_size of the inferer",
        )
    assert recipe.data.channels is not None
    return Bundle(
        recipe=recipe,
        pipeline=recipe.pipeline,
        targets=targets,
        channels=recipe.data.channels,
        geometry=geometry,
        spacing_mm=(a, b, c),
        provenance=Provenance(layout="monai"),
    )


def _shape(tiles: Patches | Slices | Whole, spec: Architecture) -> Shape3:
    """The tiles' shape; of whole scans and slices, which differ, the smallest that the network takes."""
    sides = list(spec.smallest)
    if not isinstance(tiles, Whole) and None not in tiles.shape:
        sides = [side or 1 for side in tiles.shape]
    if isinstance(tiles, Slices):
        sides.insert(AXES.index(tiles.axis), 1)
    x, y, z = sides
    return x, y, z


def _weights(bundle: Bundle, network: Network, file: Path, order: Sequence[int]) -> dict[str, Tensor]:
    """The tensors by our names, the outputs in ``order``. Raises :class:`CannotImport` for another network's."""
    read = read_tensors(file)
    given = {name.removeprefix("module."): tensor for name, tensor in read.items()}
    found = network.renamed(given, network.spec)
    expected = expected_tensors(network.spec, network.inputs, network.outputs)
    for name, tensor in expected.items():
        if name not in found and re.fullmatch(network.absent, name):
            found[name] = (torch.ones if name.endswith(".weight") else torch.zeros)(tensor.shape, dtype=tensor.dtype)
    check_same(expected, found, file, f"the {network.name} of the configuration", "give the weights of this network")
    if list(order) != sorted(order):
        found = reordered(found, network, list(order))
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in found.items()}
