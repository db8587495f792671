"""Pictures that show where a prediction agrees with its reference, in three views of one subject."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from delineate.core.grid import box_around, permute_axes
from delineate.core.legend import PLAIN, Legend
from delineate.core.targets import Targets
from delineate.core.text import printable
from delineate.core.volume import LabelVolume, Volume
from delineate.core.warning_filters import filtered_warnings
from delineate.datasets.dataset import check_grids
from delineate.evaluation.pairs import Pair
from delineate.evaluation.table import Evaluation
from delineate.io.files import writing_beside
from delineate.io.voxels import Orientation

MARKS = {1: "agree", 2: "missed", 3: "excess", 4: "other target"}
"""What each value of :func:`agreement` means."""

Palette = Literal["distinct", "purple"]

COLOURS: dict[Palette, dict[int, str]] = {
    "distinct": {1: "#56b4e9", 2: "#e8590c", 3: "#f0e442", 4: "#e377c2"},
    "purple": {1: "#8a2be2", 2: "#ff2020", 3: "#2040ff", 4: "#ffffff"},
}
"""Colours of the marks: colour-blind safe (Okabe & Ito 2008), or purple for agreement and red and blue for errors."""

UNFITTING = "Glyph .* missing|constrained_layout not applied"
"""Warnings of names with letters that the font lacks, or longer than what they are written beside is wide."""

MOST_PICTURES = 40
"""Most subjects that a page shows in pictures; of more, it shows the best, the median and the worst."""

# Axes of the displayed views: x to the left (so the patient's right is on the image's left, the
# radiological convention), y to the back, z to the feet.
_DISPLAY = "LPI"
# Plane, the axis it cuts, and the letters on its left, right, top and bottom.
_PLANES = (("axial", 2, "RLAP"), ("coronal", 1, "RLSI"), ("sagittal", 0, "APSI"))
_LEAST_SIDE_MM = 60.0
_OPACITY = 0.55
MOST_SLICES = 16
"""Most slices to scroll through."""
MOST_SLICE_BYTES = 140_000
"""Most bytes of all slices of one subject; embedded in a page, they take a third more."""
_VIEW_PIXELS, _SLICE_PIXELS = 380, 320
_PLACES = (0.04, 0.5), (0.96, 0.5), (0.5, 0.05), (0.5, 0.95)
"""Where the letters of a view stand: shares of its width, and of its height from the top."""
_PANELS_A_ROW = 4


@dataclass(frozen=True, eq=False)
class View:
    """A slice as displayed: ``image`` with grey values 0–255, and ``agreement``, both (rows, columns).

    ``size_mm`` is (height, width); ``edges`` are the directions on the left, right, top and bottom. ``depth_mm`` is
    the distance from the scan's first slice in this plane.
    """

    plane: str
    image: NDArray[np.uint8]
    agreement: NDArray[np.uint8]
    size_mm: tuple[float, float]
    edges: str
    depth_mm: float = 0.0


@dataclass(frozen=True, eq=False)
class Overlay:
    """Three orthogonal views of one subject; ``rank`` is best, median, worst or only, else empty.

    ``slices`` are parallel views through the segmentations, to scroll through.
    """

    subject: str
    rank: str
    dice: float
    views: tuple[View, ...]
    slices: tuple[View, ...] = ()


def overlays_of(
    evaluation: Evaluation,
    scans: Callable[[str], Volume],
    pairs: Sequence[Pair],
    targets: Targets,
    *,
    orientation: Orientation = "refuse",
) -> list[Overlay]:
    """Overlays of all subjects, best first; of more than :data:`MOST_PICTURES`, of those with the lowest Dice.

    Dice is the mean of targets. Best, median and worst are always included and ranked as such. Only these
    subjects are read; ``scans`` returns a subject's scan, whose first channel is shown. Raises
    :class:`GridMismatch` if a scan and its labels are not on the same grid, and any error of reading.
    """
    dice = evaluation.mean_of_targets("dice").sort_values(ascending=False, kind="stable")
    places = {0: "best", (len(dice) - 1) // 2: "median", len(dice) - 1: "worst"}
    if len(dice) < 3:
        places = dict(zip(range(len(dice)), ("best", "worst") if len(dice) > 1 else ("only",), strict=True))
    files = {pair.subject: pair for pair in pairs}
    overlays = []
    for place in sorted({*places, *range(max(0, len(dice) - MOST_PICTURES), len(dice))}):
        rank, subject = places.get(place, ""), str(dice.index[place])
        pair = files[subject]
        prediction, reference = pair.labels(targets, orientation=orientation)
        scan = scans(subject)
        views = views_of(scan, prediction, reference, targets, subject=subject)
        slices = slices_of(scan, prediction, reference, targets) if rank else ()
        overlays.append(Overlay(subject, rank, float(dice.iloc[place]), views, slices))
    return overlays


def views_of(
    scan: Volume, prediction: LabelVolume, reference: LabelVolume, targets: Targets, *, subject: str
) -> tuple[View, ...]:
    """Axial, coronal and sagittal slices where the reference (or, if it is empty, the prediction) is largest.

    All three show the same cube of at least 60 mm around the segmentations, in the same grey scale.
    """
    for what, label in (("prediction", prediction), ("reference", reference)):
        check_grids(subject, what, label.grid, "scan", scan.grid)
    marks = agreement(prediction.voxels, reference.voxels, targets)
    segmented = targets.foreground(reference.voxels)
    return _views(scan, marks, segmented if segmented.any() else marks > 0)


def slices_of(scan: Volume, prediction: LabelVolume, reference: LabelVolume, targets: Targets) -> tuple[View, ...]:
    """Up to :data:`MOST_SLICES` of the scan's slices through the segmentations, evenly spaced.

    They run from head to feet, front to back or right to left; all on one grid. Empty segmentations: through the scan.
    """
    marks = agreement(prediction.voxels, reference.voxels, targets)
    prepared = _Displayed.of(scan, marks, marks > 0)
    plane = next(plane for plane in _PLANES if plane[1] == prepared.across)
    places = np.flatnonzero(np.any(marks_of := prepared.marks > 0, axis=prepared.beside(prepared.across)))
    first, last = (places[0], places[-1]) if len(places) else (0, marks_of.shape[prepared.across] - 1)
    chosen = np.unique(np.linspace(first, last, min(MOST_SLICES, last - first + 1)).round().astype(int))
    return tuple(prepared.view(*plane, int(at)) for at in chosen)


def views_of_label(scan: Volume, label: LabelVolume, targets: Targets) -> tuple[View, ...]:
    """:func:`views_of` a label alone: ``agreement`` numbers the targets from 1, with inner ones on top."""
    check_grids("the scan", "label", label.grid, "scan", scan.grid)
    marks = np.zeros(label.voxels.shape, np.uint8)
    masks = targets.masks(label.voxels)
    for name in targets.outer_first:
        marks[masks[name]] = targets.names.index(name) + 1
    return _views(scan, marks, marks > 0)


def comparison_picture(
    scan: Volume, reference: LabelVolume, predictions: Mapping[str, LabelVolume], targets: Targets, subject: str
) -> bytes:
    """A WebP image: the axial slice where the reference is largest, alone, and under each prediction by name."""
    for name, label in (("reference", reference), *predictions.items()):
        check_grids(subject, name, label.grid, "scan", scan.grid)
    marks = [(name, agreement(label.voxels, reference.voxels, targets)) for name, label in predictions.items()]
    segmented = targets.foreground(reference.voxels)
    shown = np.logical_or.reduce([segmented, *(found > 0 for _, found in marks)])
    # Pairs: a method may be called "reference", too.
    panels = [("scan", np.zeros(segmented.shape, np.uint8)), ("reference", segmented.astype(np.uint8)), *marks]
    views = [(name, _views(scan, found, segmented if segmented.any() else shown, shown)[0]) for name, found in panels]
    columns = min(len(views), _PANELS_A_ROW)
    rows = -(-len(views) // columns)
    height, width = views[0][1].size_mm
    figure = Figure((2.6 * columns, (2.6 * height / width + 0.3) * rows), facecolor="black", layout="constrained")
    for axes, (name, view) in zip(figure.subplots(rows, columns, squeeze=False).flat, views, strict=False):
        _draw(axes, view, COLOURS["distinct"])
        axes.set_title(printable(name), color="white", fontsize=10, parse_math=False)
    for axes in figure.axes[len(views) :]:
        axes.set_axis_off()
    written = BytesIO()
    with filtered_warnings("ignore", UNFITTING):
        figure.savefig(written, format="webp", dpi=100, pil_kwargs={"quality": 82})
    return written.getvalue()


def _views(
    scan: Volume, marks: NDArray[np.uint8], segmented: NDArray[np.bool_], shown: NDArray[np.bool_] | None = None
) -> tuple[View, ...]:
    """Slices where ``segmented`` is largest, or in the middle if it is empty; all arrays are on the scan's grid.

    They are cut to a cube around ``shown``, by default the marks.
    """
    displayed = _Displayed.of(scan, marks, marks > 0 if shown is None else shown)
    order, flip = scan.grid.axes_to(_DISPLAY)
    largest = permute_axes(segmented, order, flip)

    def view(plane: str, axis: int, edges: str) -> View:
        area = np.count_nonzero(largest, axis=displayed.beside(axis))
        return displayed.view(plane, axis, edges, int(np.argmax(area)) if area.any() else len(area) // 2)

    return tuple(view(*plane) for plane in _PLANES)


@dataclass(frozen=True, eq=False)
class _Displayed:
    """A scan and its marks as displayed (left, back, feet), the box to cut them to, and what is black and white.

    ``across`` is the axis across the scan's slices.
    """

    image: NDArray
    marks: NDArray[np.uint8]
    window: tuple[float, float]
    box: tuple[slice, ...]
    spacing_mm: tuple[float, float, float]
    across: int

    @classmethod
    def of(cls, scan: Volume, marks: NDArray[np.uint8], shown: NDArray[np.bool_]) -> _Displayed:
        """``marks`` and ``shown``, around which is cut, are on the scan's grid."""
        order, flip = scan.grid.axes_to(_DISPLAY)
        grid = scan.grid.permute(order, flip)
        image, marks, shown = (permute_axes(voxels, order, flip) for voxels in (scan.voxels[0], marks, shown))
        black, white = np.percentile(image, [0.5, 99.5])
        box = _cube(shown, grid.spacing_mm)
        return cls(image, marks, (float(black), float(white)), box, grid.spacing_mm, grid.slice_axis)

    @staticmethod
    def beside(axis: int) -> tuple[int, int]:
        """The two axes of a slice across an axis."""
        first, second = (i for i in range(3) if i != axis)
        return first, second

    def view(self, plane: str, axis: int, edges: str, at: int) -> View:
        columns, rows = self.beside(axis)
        cut = tuple(at if i == axis else self.box[i] for i in range(3))
        black, white = self.window
        grey = np.clip((self.image[cut].T - black) / max(white - black, 1e-9), 0, 1)
        size_mm = grey.shape[0] * self.spacing_mm[rows], grey.shape[1] * self.spacing_mm[columns]
        return View(plane, (255 * grey).astype(np.uint8), self.marks[cut].T, size_mm, edges, at * self.spacing_mm[axis])


def agreement(prediction: NDArray, reference: NDArray, targets: Targets) -> NDArray[np.uint8]:
    """For each voxel, 0 if neither has a target, else a key of :data:`MARKS`.

    A voxel agrees if prediction and reference have the same targets. It is missed if the
    prediction lacks one, in excess if the prediction has one too many, and ``other target`` if both. Ignored
    voxels are 0.
    """
    predicted, wanted = targets.masks(prediction), targets.masks(reference)
    missed, excess, both = (np.zeros(reference.shape, bool) for _ in range(3))
    for name in targets.names:
        missed |= wanted[name] & ~predicted[name]
        excess |= predicted[name] & ~wanted[name]
        both |= wanted[name] & predicted[name]
    marks = np.select([missed & excess, missed, excess, both], [4, 2, 3, 1], 0).astype(np.uint8)
    return marks * targets.known(reference)


def save_overlay(path: Path, overlay: Overlay) -> None:
    """Write the three views side by side with a legend; the suffix (.png, .webp) sets the format."""
    figure = _side_by_side(overlay.views, COLOURS["distinct"], MARKS)
    with writing_beside(path) as beside:
        figure.savefig(beside, dpi=130)


def picture_of_label(scan: Volume, label: LabelVolume, targets: Targets, legend: Legend = PLAIN) -> bytes:
    """A PNG image of a label on its scan: three views side by side, a colour for each target."""
    names = dict(enumerate(map(printable, targets.names), start=1))
    shades = legend.colours_of(targets.names).values()
    colours = {number: "#{:02x}{:02x}{:02x}".format(*shade) for number, shade in enumerate(shades, start=1)}
    written = BytesIO()
    with filtered_warnings("ignore", UNFITTING):
        _side_by_side(views_of_label(scan, label, targets), colours, names).savefig(written, format="png", dpi=100)
    return written.getvalue()


def _side_by_side(views: Sequence[View], colours: Mapping[int, str], names: Mapping[int, str]) -> Figure:
    heights, widths = zip(*(view.size_mm for view in views), strict=True)
    scale = 3 / max(*heights, *widths)  # inches of a millimetre
    figure = Figure((scale * sum(widths), scale * max(heights) + 0.35), facecolor="black", layout="constrained")
    for axes, view in zip(figure.subplots(1, 3, width_ratios=widths), views, strict=True):
        _draw(axes, view, colours)
    shown = np.unique(np.concatenate([view.agreement.ravel() for view in views]))
    # Labels are passed explicitly, or those that begin with an underscore would be dropped.
    marks = {axes.scatter([], [], marker="s", color=colours[m]): name for m, name in names.items() if m in shown}
    if marks:
        legend = figure.legend(
            list(marks), list(marks.values()), loc="outside lower center", ncols=len(marks), labelcolor="white",
            frameon=False,
        )  # fmt: skip
        for text in legend.get_texts():
            text.set_parse_math(False)  # dollars in a name are not a formula
    return figure


def picture(view: View, palette: Palette = "distinct") -> bytes:
    """One view as a WebP image with its letters. By Pillow, a quarter of matplotlib's time: a page has 120 of them."""
    image = _blended(view, COLOURS[palette], _VIEW_PIXELS)
    draw = ImageDraw.Draw(image)
    for letter, (x, y) in zip(view.edges, _PLACES, strict=True):
        place = x * image.width, y * image.height
        draw.text(place, letter, "white", _font(), anchor="mm", stroke_width=1, stroke_fill="black")
    return _webp(image, 82)


@cache
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(findfont("DejaVu Sans"), 13)


def _webp(image: Image.Image, quality: int) -> bytes:
    written = BytesIO()
    image.save(written, "webp", quality=quality, method=2)  # a third of the usual time, a twentieth more bytes
    return written.getvalue()


def slice_pictures(slices: Sequence[View], palette: Palette = "distinct") -> list[tuple[View, bytes]]:
    """Slices as WebP images without letters, together within :data:`MOST_SLICE_BYTES`: coarser, then fewer, to fit."""
    while True:
        for quality in (75, 55, 35):
            drawn = [(view, _webp(_blended(view, COLOURS[palette], _SLICE_PIXELS), quality)) for view in slices]
            if sum(len(picture) for _, picture in drawn) <= MOST_SLICE_BYTES or len(slices) == 1:
                return drawn
        slices = slices[::2]


def _blended(view: View, colours: Mapping[int, str], pixels: int) -> Image.Image:
    """A view with its marks and without letters, its longer side so many pixels."""
    height, width = view.size_mm
    scale = pixels / max(height, width)
    size = max(1, round(scale * width)), max(1, round(scale * height))
    grey = np.asarray(Image.fromarray(view.image).resize(size, Image.Resampling.BILINEAR))
    marks = np.asarray(Image.fromarray(view.agreement).resize(size, Image.Resampling.NEAREST))
    shades = np.zeros((max(colours) + 1, 4), np.float32)
    for mark, colour in colours.items():
        shades[mark] = to_rgba(colour, _OPACITY)
    opacity = shades[:, 3:]
    mixed = grey[..., None] * (1 - opacity)[marks] + (255 * shades[:, :3] * opacity)[marks]
    return Image.fromarray(mixed.round().astype(np.uint8))


def _draw(axes: Axes, view: View, colours: Mapping[int, str]) -> None:
    height, width = view.size_mm
    extent = (0, width, height, 0)
    axes.imshow(view.image, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="bilinear")
    table = np.zeros((max(colours) + 1, 4))
    for mark, colour in colours.items():
        table[mark] = to_rgba(colour, _OPACITY)
    axes.imshow(table[view.agreement], extent=extent, interpolation="nearest")
    axes.set_axis_off()
    for letter, (x, y) in zip(view.edges, _PLACES, strict=True):
        axes.text(
            x, 1 - y, letter, color="white", fontsize=9, ha="center", va="center", transform=axes.transAxes,
            path_effects=[withStroke(linewidth=2, foreground="black")],
        )  # fmt: skip


def _cube(mask: NDArray[np.bool_], spacing_mm: Sequence[float]) -> tuple[slice, ...]:
    """A cube around a mask, 1.5 times its extent, clipped to the image; the whole image if the mask is empty."""
    around = box_around(mask)
    if around is None:
        return (slice(None),) * 3
    side_mm = max(1.5 * max((f.stop - f.start) * s for f, s in zip(around, spacing_mm, strict=True)), _LEAST_SIDE_MM)
    box = []
    for f, spacing, n in zip(around, spacing_mm, mask.shape, strict=True):
        count = min(n, round(side_mm / spacing))
        # Centred, then shifted inside.
        start = min(max((f.start + f.stop - count) // 2, 0), n - count)
        box.append(slice(int(start), int(start) + count))
    return tuple(box)
