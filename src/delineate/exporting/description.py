"""What an exported file says, beside its network, that a program needs to predict as Delineate does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal

from pydantic import Field

from delineate.bundle import Bundle, Positive
from delineate.core.grid import AXES
from delineate.core.targets import MOST_TARGETS
from delineate.errors import CannotExport
from delineate.inference.predictor import CERTAIN
from delineate.plugins import requirement_of
from delineate.preprocessing.pipeline import StepSpec
from delineate.recipe import Average, CodingSpec, Colour, LabelValue, PostprocessingSpec
from delineate.sampling.tiles import Margin, Outside, Slices, Weighting, Whole
from delineate.specification import Side, Specification, Text

ByAxis = tuple[Side, Side, Side]
Advances = Annotated[float, Field(ge=1, le=4096)]
AxisWeights = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1, max_length=4096)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ExportedTarget(Specification):
    """A target, in the order of the outputs: the ``value`` that it is written with, and all that belong to it."""

    name: Text
    value: LabelValue
    values: Annotated[tuple[LabelValue, ...], Field(max_length=256)]
    colour: Colour
    code: CodingSpec | None = None


class ExportedTiles(Specification):
    """How tiles lie in a prepared volume, and what is read for them; three numbers are for x, y and z.

    ``shape``: the voxels that a tile segments; ``null`` along an axis: the fewest that cover the volume, for which what
    is read, ``margin`` on either side included, is a multiple of ``divisor`` and at least ``smallest``. Tiles advance
    by ``step`` voxels at most. Beyond the volume its edge is repeated, or all is zero (``outside``). ``weights`` along
    each axis, whose product is that of a voxel where tiles overlap; a single 1 where they do not.
    """

    shape: tuple[Side | None, Side | None, Side | None]
    margin: tuple[Margin, Margin, Margin]
    divisor: ByAxis
    smallest: ByAxis
    overlap: Annotated[float, Field(ge=0, le=0.95)]
    step: tuple[Advances, Advances, Advances]
    outside: Outside
    weighting: Weighting
    weights: tuple[AxisWeights, AxisWeights, AxisWeights]


class Description(Specification):
    """All of it. ``preprocessing`` has the steps of the recipe, with what they learnt from training scans.

    ``outputs`` are in the order of ``targets``, of which later ones are written over earlier ones. ``average``: they
    are probabilities, or logits, and are averaged as such. ``flips``: the axes of the input, 2 for x, along which it is
    mirrored, once for each entry; the output is mirrored back, and all are averaged. ``outside``: each output's value
    where the preparation cut a scan off. ``threshold``: what overlapping targets must exceed; ``null`` where targets
    exclude each other and the largest output wins.
    """

    format: Literal[1] = 1
    name: Text
    channels: Annotated[tuple[Text, ...], Field(min_length=1, max_length=64)]
    resample_channels: bool
    preprocessing: Annotated[tuple[StepSpec, ...], Field(max_length=64)]
    spacing_mm: tuple[Positive, Positive, Positive]
    tiles: ExportedTiles
    flips: Annotated[tuple[Annotated[tuple[Literal[2, 3, 4], ...], Field(max_length=3)], ...], Field(max_length=8)]
    average: Average
    outputs: Annotated[tuple[Text, ...], Field(min_length=1, max_length=MOST_TARGETS + 1)]
    outside: Annotated[tuple[Annotated[float, Field(ge=-100, le=100)], ...], Field(max_length=MOST_TARGETS + 1)]
    threshold: Annotated[float, Field(ge=0, le=1)] | None
    targets: Annotated[tuple[ExportedTarget, ...], Field(max_length=MOST_TARGETS)]
    postprocessing: PostprocessingSpec
    weights_sha256: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=64)]
    versions: Annotated[dict[Text, Text], Field(max_length=64)]


def describe(bundles: Sequence[Bundle], versions: Mapping[str, str]) -> Description:
    """What the first bundle's recipe says, once the others' say the same.

    Raises :class:`CannotExport` for bundles whose tiles cannot be averaged one by one, for tiles as MONAI has them, and
    for preprocessing that another package provides.
    """
    first, *others = (_described(bundle, versions) for bundle in bundles)
    for bundle, other in zip(bundles[1:], others, strict=True):
        apart = {"name", "postprocessing", "weights_sha256"}  # of an ensemble, the first bundle's count
        here, there = first.model_dump(exclude=apart), other.model_dump(exclude=apart)
        if differing := [name for name in here if here[name] != there[name]]:
            raise CannotExport(
                f"'{bundle.folder}' differs from '{bundles[0].folder}' in {', '.join(differing)}, so that their tiles "
                "cannot be averaged one by one",
                fix="export each to a file of its own, and average what they predict on the scan's grid",
            )
    return first.model_copy(update={"weights_sha256": tuple(bundle.weights_sha256 for bundle in bundles)})


def free_axes(bundle: Bundle) -> tuple[int, ...]:
    """The axes along which a tile is as large as each scan, as :meth:`Bundle.geometry_of` has it."""
    tiles = bundle.recipe.tiles
    if isinstance(tiles, Whole) or (isinstance(tiles, Slices) and tiles.shape == (None, None)):
        return tuple(axis for axis in range(3) if axis != bundle.geometry.slice_axis)
    return ()


def _described(bundle: Bundle, versions: Mapping[str, str]) -> Description:
    recipe, targets = bundle.recipe, bundle.targets
    for step in bundle.pipeline.steps:
        if package := requirement_of(type(step)):
            raise CannotExport(
                f"preprocessing step '{step.kind}' is code of {package}, which no file can carry",
                fix="train with preprocessing steps of Delineate's own",
            )
    legend, inference, average = recipe.data.legend, recipe.inference, recipe.inference.average
    if average == "tile_logits" or inference.advance == "fixed" or inference.weights == "monai":
        raise CannotExport(
            "its tiles are laid, weighted or averaged as MONAI's, which the description in a file does not have",
            fix="export the network from MONAI, or predict with Delineate",
        )
    colours = legend.colours_of(targets.names)
    background = ("background",) if targets.exclusive else ()
    least, most = (0.0, 1.0) if average == "probabilities" else (-CERTAIN, CERTAIN)
    named = tuple(
        ExportedTarget(
            name=name,
            value=targets.written_value(name),
            values=targets.values[name],
            colour="#{:02x}{:02x}{:02x}".format(*colours[name]),
            code=recipe.data.codes.get(name),
        )
        for name in targets.outer_first
    )
    values: dict[str, Any] = {
        "name": recipe.name,
        "channels": bundle.channels,
        "resample_channels": recipe.data.resample_channels,
        "preprocessing": bundle.pipeline.steps,
        "spacing_mm": bundle.spacing_mm,
        "tiles": _tiles(bundle),
        "flips": _flips(bundle),
        "average": average,
        "outputs": (*background, *targets.outer_first),
        "outside": (*(most for _ in background), *(least for _ in targets.names)),
        "threshold": None if targets.exclusive else 0.5 if average == "probabilities" else 0.0,
        "targets": named,
        "postprocessing": recipe.postprocessing,
        "weights_sha256": (bundle.weights_sha256,),
        "versions": dict(versions),
    }
    return Description.model_validate(values)


def _tiles(bundle: Bundle) -> ExportedTiles:
    geometry, inference, free = bundle.geometry, bundle.recipe.inference, free_axes(bundle)
    in_plane = [axis for axis in range(3) if axis != geometry.slice_axis]
    divisor, smallest = [1, 1, 1], [1, 1, 1]
    for axis, step, least in zip(in_plane, bundle.recipe.network.divisor, bundle.recipe.network.smallest, strict=True):
        divisor[axis], smallest[axis] = step, least
    steps = geometry.steps(inference.overlap, inference.advance)
    weights = geometry.axis_weights(inference.weights)
    return ExportedTiles.model_validate(
        {
            "shape": [None if axis in free else side for axis, side in enumerate(geometry.shape)],
            "margin": geometry.margin,
            "divisor": divisor,
            "smallest": smallest,
            "overlap": inference.overlap,
            "step": [1 if axis in free else step for axis, step in enumerate(steps)],
            "outside": geometry.outside,
            "weighting": inference.weights,
            "weights": [[1.0] if axis in free else each.tolist() for axis, each in enumerate(weights)],
        }
    )


def _flips(bundle: Bundle) -> tuple[tuple[int, ...], ...]:
    """Every combination of the axes that are mirrored, none of them first, as axes of the input (N, C, x, y, z)."""
    axes = [AXES.index(axis) for axis in bundle.recipe.inference.flips]
    axes = [axis + 2 for axis in axes if axis != bundle.geometry.slice_axis]
    return tuple(some for count in range(len(axes) + 1) for some in combinations(axes, count))
