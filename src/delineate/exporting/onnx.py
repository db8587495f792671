"""A bundle, or an ensemble, as one ONNX file: what a tile becomes, and a description of everything around it.

The file's network reads tiles of the prepared scan, (N, C, x, y, z) whatever its dimensions, and answers with what
:class:`~delineate.inference.sliding.Sliding` adds up: tiles are standardised, slices become channels, members are
averaged, all within the file. Preparation, tiling and the way back stand beside it as JSON, since they depend on each
scan's header and voxels.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from delineate.bundle import Bundle
from delineate.core.grid import Shape3
from delineate.core.warning_filters import filtered_warnings
from delineate.errors import CannotExport
from delineate.exporting.description import Description, describe, free_axes
from delineate.io.files import writing_beside
from delineate.networks.blocks import InstanceNorm
from delineate.sampling.tiles import standardised
from delineate.specification import from_json, to_json

OPSET: Final = 18
METADATA: Final = "delineate"
"""The key of the description among the file's metadata."""

LEAST_AGREEMENT: Final = 0.9999
MOST_DIFFERENCE: Final = 1e-3
"""Of a random tile's voxels, those that must get the same label from both engines; between their probabilities."""

_MOST_BYTES = 2**31 - 2**24
"""Of weights: a file is at most 2 GiB, with some room for what is not weights."""


@dataclass(frozen=True)
class Agreement:
    """Of the file, run by ONNX Runtime, with the bundle, run by PyTorch, on two random tiles."""

    same_labels: float
    largest_difference: float


@dataclass(frozen=True)
class Exported:
    """What was written, the names and sides of the network's input and output, and what was measured."""

    description: Description
    input: tuple[str | int, ...]
    output: tuple[str | int, ...]
    agreement: Agreement


def export_onnx(folders: Sequence[Path], path: Path) -> Exported:
    """Write the bundles in ``folders``, averaged, to ``path``.

    Raises :class:`CannotExport` where a package is missing, where the bundles cannot become one file, and where ONNX
    Runtime's answers differ from PyTorch's; then no file remains.
    """
    check_installed()
    bundles = [Bundle.load(folder) for folder in folders]
    described = describe(bundles, {name: version(name) for name in ("delineate", "torch", "onnx", "onnxscript")})
    tiles = Tiles(bundles, described)
    if (size := sum(4 * parameter.numel() for parameter in tiles.parameters())) > _MOST_BYTES:
        raise CannotExport(
            f"the weights have {size / 2**30:.1f} GiB, and an ONNX file holds 2",
            fix="export the bundles of an ensemble one by one, or train a narrower network",
        )
    noise = torch.randn(2, len(described.channels), *_sides(bundles[0], 4), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = tiles(noise).numpy()
    model = _converted(tiles, bundles[0], described)
    with writing_beside(path) as beside:
        beside.write_bytes(model)
        session = _session(beside)
        agreement = _agreement(session.run(None, {"tile": noise.numpy()})[0], expected, described)
        _check(agreement)
    [read], [answered] = session.get_inputs(), session.get_outputs()
    return Exported(described, tuple(read.shape), tuple(answered.shape), agreement)


def check_installed() -> None:
    """Raise :class:`CannotExport` where a package of the extra is missing."""
    if missing := [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]:
        raise CannotExport(f"ONNX needs {', '.join(missing)}, not installed here", fix="pip install 'delineate[onnx]'")


def read_description(path: Path) -> Description:
    """What an exported file says of itself."""
    found: dict[str, str] = _session(path).get_modelmeta().custom_metadata_map
    return from_json(Description, found[METADATA])


class Tiles(nn.Module):
    """What tiles of a prepared scan (N, C, x, y, z) become: probabilities or logits (N, K, x, y, z)."""

    def __init__(self, bundles: Sequence[Bundle], described: Description) -> None:
        super().__init__()
        self.networks = nn.ModuleList(bundle.trained_network() for bundle in bundles)
        self.orders = [[*map(bundle.targets.names.index, bundle.targets.outer_first)] for bundle in bundles]
        self.geometry, self.average = bundles[0].geometry, described.average
        self.exclusive = described.threshold is None

    def forward(self, tile: Tensor) -> Tensor:
        across = self.geometry.slice_axis
        image = tile if across is None else tile.movedim(across + 2, 2).flatten(1, 2)  # (N, C · slices, a, b)
        image = standardised(image, self.geometry.standardise)
        members = zip(self.networks, self.orders, strict=True)
        answers = [self._answer(network(image), order) for network, order in members]
        mean = reduce(torch.add, answers) / len(answers)
        return mean if across is None else mean.unsqueeze(across + 2)

    def _answer(self, logits: Tensor, order: list[int]) -> Tensor:
        if order != sorted(order):  # targets that overlap, an inner one listed first
            logits = torch.stack([logits[:, k] for k in order], 1)
        return logits if self.average == "logits" else _probabilities(logits, self.exclusive)


def _probabilities(logits: Tensor, exclusive: bool) -> Tensor:
    return torch.softmax(logits, 1) if exclusive else torch.sigmoid(logits)


class _Normalised(nn.Module):
    """:class:`InstanceNorm` as the one operation that ONNX has for it, instead of the ten that it is written as."""

    def __init__(self, norm: InstanceNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)


def _sides(bundle: Bundle, multiple: int) -> Shape3:
    """Sides of what is read for a tile; along free axes as many divisors as wanted, and not fewer than allowed."""
    geometry, network = bundle.geometry, bundle.recipe.network
    sides, in_plane = list(geometry.input_shape), [axis for axis in range(3) if axis != geometry.slice_axis]
    for axis, divisor, least in zip(in_plane, network.divisor, network.smallest, strict=True):
        if axis in free_axes(bundle):
            sides[axis] = least + multiple * divisor
    return sides[0], sides[1], sides[2]


def _converted(tiles: Tiles, bundle: Bundle, described: Description) -> bytes:
    """The file's content. Batches, and sides along free axes, may have any size that the network takes."""
    import onnx

    for name, module in list(tiles.named_modules()):
        if isinstance(module, InstanceNorm):
            tiles.set_submodule(name, _Normalised(module))
    geometry, network = bundle.geometry, bundle.recipe.network
    sizes: dict[int, Any] = {0: torch.export.Dim("batch")}
    in_plane = [axis for axis in range(3) if axis != geometry.slice_axis]
    for axis, divisor in zip(in_plane, network.divisor, strict=True):
        if axis in free_axes(bundle):
            sizes[axis + 2] = divisor * torch.export.Dim(f"n{axis}")
    # Not the sizes that are compared afterwards: those must not have got into the graph.
    example = torch.zeros(3, len(described.channels), *_sides(bundle, 2))
    try:
        with _quiet():
            program = torch.onnx.export(
                tiles, (example,), dynamo=True, dynamic_shapes=(sizes,), opset_version=OPSET, verbose=False,
                input_names=["tile"], output_names=[described.average],
            )  # fmt: skip
        assert program is not None
        model = program.model_proto
    except Exception as error:
        reason = str(error.__cause__ or error)
        raise CannotExport(
            f"network '{network.kind}' cannot be written as ONNX: {reason:.300}",
            fix="a network of your own needs a forward that torch.export takes; for any other, report this bug",
        ) from error
    _forget_where(model)
    onnx.helper.set_model_props(model, {METADATA: to_json(described, indent=None)})
    content: bytes = model.SerializeToString()
    return content


def _forget_where(model: Any) -> None:
    """Remove the exporter's notes about each operation, among which are paths of this machine."""
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.initializer, *model.functions):
        del part.metadata_props[:]
        part.doc_string = ""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says to its own developers."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with filtered_warnings("ignore"):
            yield
    finally:
        logger.setLevel(before)


def _session(path: Path) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def _agreement(found: NDArray[np.float32], expected: NDArray[np.float32], described: Description) -> Agreement:
    both = torch.from_numpy(np.stack([found, expected])).flatten(0, 1)
    if described.average == "logits":
        both = _probabilities(both, described.threshold is None)
    labels = both.argmax(1) if described.threshold is None else both > 0.5
    count = len(found)
    same = (labels[:count] == labels[count:]).double().mean()
    return Agreement(float(same), float((both[:count] - both[count:]).abs().max()))


def _check(agreement: Agreement) -> None:
    # Written so that NaN is refused.
    if not (agreement.same_labels >= LEAST_AGREEMENT and agreement.largest_difference <= MOST_DIFFERENCE):
        raise CannotExport(
            f"ONNX Runtime gives {agreement.same_labels:.4%} of random voxels the same label as PyTorch, with "
            f"probabilities up to {agreement.largest_difference:.2g} apart; {LEAST_AGREEMENT:.2%} and "
            f"{MOST_DIFFERENCE:g} are the limits",
            fix="try another version of onnxruntime, and report this bug with the recipe",
        )
