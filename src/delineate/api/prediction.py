"""A prediction together with its scan: it saves and shows itself."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from delineate.core.tables import html_table, html_text
from delineate.core.targets import Coding, Targets
from delineate.core.volume import Volume
from delineate.inference import predictor
from delineate.io.exports import export_label, exported_files
from delineate.io.overwriting import check_outputs


@dataclass(frozen=True, eq=False, kw_only=True)
class Prediction(predictor.Prediction):
    """What a bundle says of one scan.

    ``label`` lies on the scan's own grid; ``confidence`` has, by target, the volume in ml, the Dice that is expected
    and how well averaged variants agree. ``unusual`` says in what the scan is unlike those that were trained on.
    ``probabilities`` (T, X, Y, Z) of the targets are there where they were asked for.
    """

    scan: Volume
    targets: Targets
    unusual: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    """The scan's, where it was read from files."""
    codes: Mapping[str, Coding] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def volume_ml(self) -> dict[str, float]:
        """By target."""
        return {name: confidence.volume_ml for name, confidence in self.confidence.items()}

    @property
    def expected_dice(self) -> dict[str, float]:
        """By target; NaN where nothing was found."""
        return {name: confidence.expected_dice for name, confidence in self.confidence.items()}

    def save(self, path: str | Path) -> list[Path]:
        """Write the label in the format of the suffix; returns the files, that one first.

        ``.dcm`` is a DICOM-SEG that refers to the DICOM series the scan was read from, ``.seg.nrrd`` names its
        segments, ``.vtk`` and ``.vti`` are for viewers. A file that is there is replaced, but never the scan:
        :class:`~delineate.errors.OutputError`.
        """
        path = Path(path)
        check_outputs(exported_files(path), self.files, overwrite=True)
        source = self.files[0] if self.files else None
        return export_label(path, self.label, self.targets, source=source, about=self.about, codes=self.codes)

    def __repr__(self) -> str:
        found = ", ".join(
            f"{name} {one.volume_ml:.4g} ml (expected Dice {_number(one.expected_dice)})"
            for name, one in self.confidence.items()
        )
        return f"Prediction({found})"

    def _repr_html_(self) -> str:
        from delineate.reporting.overlays import picture_of_label  # draws with matplotlib, slow to import

        picture = b64encode(picture_of_label(self.scan, self.label, self.targets)).decode()
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
