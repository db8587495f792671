"""A prediction together with its scan, which can save and display itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delineate.core.legend import Legend
from delineate.core.tables import html_table, html_text
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.datasets.dataset import check_grids
from delineate.errors import BadShape, MissingFile
from delineate.inference import predictor
from delineate.inference.measurements import measure_label
from delineate.interop import Image, volume_of
from delineate.io.exports import export_label, exported_files
from delineate.io.formats import read_volume
from delineate.io.overwriting import check_outputs
from delineate.io.surfaces import WRITERS, check_surface_format, surface_files, write_surfaces
from delineate.io.voxels import check_finite
from delineate.metrics.quantities import Measurement, QuantityMap


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction(predictor.Prediction):
    """A bundle's prediction for one scan.

    ``label`` is on the scan's own grid; ``confidence`` holds, by target, the volume in ml, the expected Dice
    and the agreement of averaged variants. ``unusual`` lists what sets the scan apart from the training scans.
    ``probabilities`` (T, X, Y, Z) of the targets are kept if they were requested.
    """

    scan: Volume
    targets: Targets
    channels: tuple[str, ...] = ()
    """The scan's, by name."""
    unusual: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """The files of the scan, if it was read from files."""
    legend: Legend = field(default_factory=Legend)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def volume_ml(self) -> dict[str, float]:
        """Predicted volume in ml by target."""
        return {name: confidence.volume_ml for name, confidence in self.confidence.items()}

    @property
    def expected_dice(self) -> dict[str, float]:
        """Expected Dice by target; NaN where nothing was found."""
        return {name: confidence.expected_dice for name, confidence in self.confidence.items()}

    def measure(
        self,
        quantity: str,
        values: str | Path | Volume | Image | None = None,
        *,
        margin_mm: float = 0.0,
        threshold: float | None = None,
    ) -> dict[str, Measurement]:
        """Each target's volume in ml, and the mean, median and SD of a quantity within it.

        ``quantity`` is a channel of the scan, or what ``values``, a map on the scan's grid, hold: ``fat_fraction``
        is in percent. It is read ``margin_mm`` or more inside the surface; ``above_threshold_percent`` is how much
        of what is read has the ``threshold`` or more, 5.56 for a fat fraction unless another is given. An empty
        target has 0 ml, and NaN for the rest.

        Raises :class:`~delineate.errors.MissingFile` for a channel that the scan lacks,
        :class:`~delineate.errors.GridMismatch` for a map on another grid, and
        :class:`~delineate.errors.BadVoxels` for one with voxels that are not finite.
        """
        if values is not None:
            found = read_volume(Path(values)) if isinstance(values, str | Path) else volume_of(values)
            check_grids("the scan", quantity, found.grid, "it", self.scan.grid)
        elif quantity in self.channels:
            found = Volume(self.scan.voxels[[self.channels.index(quantity)]], self.scan.grid)
        else:
            raise MissingFile(
                f"the scan has channels {list(self.channels)}, lacks {quantity}", fix="give the map as values="
            )
        if found.channels != 1:
            raise BadShape(f"the map of {quantity} has {found.channels} channels", fix="give the one that is meant")
        check_finite(f"the map of {quantity}", found.voxels)
        read_within = QuantityMap(quantity, margin_mm, threshold)
        read_within.check(found.voxels, "the scan")
        measured = measure_label(self.label, self.targets, {read_within: found.voxels[0]})
        return {target: measurement for target, _, measurement in measured}

    def save(self, path: str | Path) -> list[Path]:
        """Write the label in the format of the suffix; returns the files written, labels with ``path`` first.

        ``.dcm`` is a DICOM-SEG that refers to the DICOM series the scan was read from, ``.rtstruct.dcm`` an RT
        Structure Set that does, ``.seg.nrrd`` names its segments, ``.vtk`` and ``.vti`` are for viewers. Surfaces are
        ``.stl``, ``.obj`` and ``.vtp``, a file for each target (``case/liver.stl`` for ``case.stl``), or ``.glb``, one
        for all. An existing file is overwritten, except for the scan, for which
        :class:`~delineate.errors.OutputError` is raised.
        """
        path = Path(path)
        if (format := path.suffix.lower()[1:]) in WRITERS:
            check_surface_format(format)
            files = surface_files(path.with_suffix(""), self.targets.names, format)
            check_outputs(files.values(), self.files, overwrite=True)
            write_surfaces(files, self.targets.masks(self.label.voxels), self.label.grid, self.legend)
            return list(dict.fromkeys(files.values()))
        check_outputs(exported_files(path), self.files, overwrite=True)
        source = self.files[0] if self.files else None
        return export_label(path, self.label, self.targets, source=source, about=self.about, legend=self.legend)

    def __repr__(self) -> str:
        found = ", ".join(
            f"{name} {one.volume_ml:.4g} ml (expected Dice {_number(one.expected_dice)})"
            for name, one in self.confidence.items()
        )
        return f"Prediction({found})"

    def _repr_html_(self) -> str:
        from delineate.reporting.overlays import picture_of_label  # draws with matplotlib, slow to import

        picture = b64encode(picture_of_label(self.scan, self.label, self.targets, self.legend)).decode()
        rows = [
            (name, f"{one.volume_ml:.4g}", _number(one.expected_dice), _number(one.mutual_dice))
            for name, one in self.confidence.items()
        ]
        unusual = "; ".join(self.unusual)
        return (
            f'<img alt="three views of the prediction" src="data:image/png;base64,{picture}">'
            + html_table("", ("target", "ml", "expected Dice", "mutual Dice"), rows)
            + (f"<p>Unlike the training scans: {html_text(unusual)}</p>" if unusual else "")
            + "<p>Not for diagnosis.</p>"
        )


def _number(value: float) -> str:
    return "–" if value != value else f"{value:.3f}"
