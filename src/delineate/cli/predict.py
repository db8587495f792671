"""``delineate predict``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from delineate.cli.commands import importing
from delineate.cli.options import (
    BundlePlace,
    ChannelImages,
    Compile,
    Device,
    Engine,
    Json,
    MarginMm,
    Overwrite,
    Precision,
    Quantity,
    RulesFile,
    Threads,
    label_formats,
)
from delineate.cli.started import STARTED

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from delineate.core.subject import Subject
    from delineate.errors import DelineateError
    from delineate.fingerprint import Oddity
    from delineate.inference.outputs import Picture
    from delineate.inference.review import Review
    from delineate.metrics.quantities import QuantityMap

Flips = Annotated[
    str | None,
    typer.Option(
        "--flips", help="Average over mirror images along these axes, such as xyz; '': none (default: the recipe's)."
    ),
]


def predict(
    bundle: BundlePlace,
    inputs: Annotated[list[Path], typer.Argument(help="Scans, or folders of them in any known layout.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write a label for each subject to this folder.")],
    format: Annotated[
        str,
        typer.Option(
            "--format",
            autocompletion=label_formats,
            help="Write labels as nii.gz, mha, nrrd, seg.nrrd (for 3D Slicer), vtk, vti, dcm (DICOM-SEG, for DICOM "
            "scans), rtstruct.dcm (RT Structure Set, likewise), or in a plugin's format.",
        ),
    ] = "nii.gz",
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", help="Average probabilities with those of this bundle. Can be repeated."),
    ] = None,
    unseen: Annotated[
        bool, typer.Option("--unseen", help="Predict only subjects that no bundle has seen in training.")
    ] = False,
    images: ChannelImages = None,
    rules: RulesFile = None,
    flips: Flips = None,
    mirrored: Annotated[
        bool,
        typer.Option(
            "--mirrored", help="Predict the mirror image too, if training mirrored, and report how well both agree."
        ),
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Write probabilities to OUT/probabilities, one channel per target.")
    ] = False,
    surfaces: Annotated[
        Literal["stl", "obj", "vtp", "glb"] | None,
        typer.Option(
            "--surfaces", help="Write the targets' surfaces to OUT/surfaces; glb is one file for all targets."
        ),
    ] = None,
    preview: Annotated[
        bool,
        typer.Option("--preview", help="Write a picture beside each label: three views of the scan with the targets."),
    ] = False,
    quantity: Quantity = None,
    margin_mm: MarginMm = 0.0,
    threshold: Annotated[
        float | None,
        typer.Option(
            "--threshold",
            help="Measure the share of a target at or above this value of the quantity (default: 5.56 for a fat "
            "fraction).",
        ),
    ] = None,
    overlap: Annotated[
        float | None,
        typer.Option("--overlap", min=0, max=0.9, help="Overlap tiles by this fraction (default: the recipe's)."),
    ] = None,
    memory_gb: Annotated[
        float,
        typer.Option(
            "--memory-gb", min=0.01, help="Use at most this many GB of memory for the probabilities of one scan."
        ),
    ] = 1.0,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    engine: Engine = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Segment scans, each on its own grid. Not for diagnosis.

    Run the same command again to resume: scans that the same bundle has predicted into OUT are skipped. What is in
    each label, corrected or not, is measured into OUT/measurements.csv and .json: ml, box, and every channel. With
    --surfaces and --preview, what was not yet drawn of these labels is.
    """
    with importing():
        from delineate.bundle import Bundle, bundle_folder
        from delineate.cli.parsing import parse_quantity, parse_reading
        from delineate.cli.terminal import Terminal, print_json, print_table
        from delineate.compute import check_device, plan_compute, torch_threads
        from delineate.core.text import printable
        from delineate.errors import OutputError
        from delineate.inference.batch import carry_out, find_subjects, unseen_by
        from delineate.inference.measurements import rows_of
        from delineate.inference.outputs import Outputs
        from delineate.inference.predictor import Predictor
        from delineate.io.exports import check_label_format
        from delineate.io.surfaces import check_surface_format

    stages = Stages(STARTED)
    stages.lap("start-up")
    # Report what cannot work before anything runs.
    check_device(device)
    read_within = parse_quantity(quantity, margin_mm, threshold)
    folders = [bundle_folder(folder) for folder in [bundle, *(also or [])]]
    bundles = [Bundle.load(folder) for folder in folders]
    check_label_format(format)
    if surfaces is not None:
        check_surface_format(surfaces)
    picture: Picture | None = None
    if preview:
        from delineate.reporting.overlays import picture_of_label  # draws with matplotlib, slow to import

        picture = picture_of_label
    found = find_subjects(inputs, bundles[0].channels, parse_reading(images, None, rules)[0], read_within)
    outputs = Outputs(
        out,
        f".{format}",
        out / "probabilities" if probabilities else None,
        bundles,
        {"overlap": overlap, "flips": flips, "mirrored": mirrored},
        read_within,
        surfaces or "",
        picture,
    )
    kept = [path for subject in found for path in subject.files]
    kept += [path for folder in folders for path in folder.iterdir()]
    planned = outputs.plan(unseen_by(bundles, found) if unseen else found, kept, overwrite=overwrite)
    if not planned.ahead and planned.failed and not planned.done:
        raise planned.failed[0][1]
    rows: list[dict[str, Any]] = []
    failed: list[dict[str, str]] = []
    measurements: list[dict[str, Any]] = []
    reviews: list[Review] = []
    full: OutputError | None = None
    with Terminal() as terminal:

        def fail(subject: Subject, error: DelineateError) -> None:
            failed.append({"subject": subject.id, "error": str(error), "code": error.code})
            terminal.say_failure(f"{printable(subject.id)}: {printable(str(error))}")

        def warn(subject: Subject, odd: Sequence[Oddity]) -> None:
            texts = "; ".join(oddity.text for oddity in odd)
            terminal.say(f"{printable(subject.id)}: unlike the scans it is meant for: {printable(texts)}")

        if planned.done:
            terminal.say(f"already predicted: {len(planned.done)} of the scans; --overwrite predicts them again")
        plan = plan_compute(
            device=device,
            precision=precision,
            compile=compile,
            threads=threads,
            expected_seconds=planned.expected_seconds,
            engine=engine,
        )

        def load() -> Predictor:
            predictor = Predictor(
                bundles,
                plan,
                overlap=overlap,
                flips=flips,
                budget_bytes=int(memory_gb * 1e9),
                mirrored=mirrored,
                probabilities=probabilities,
                told=terminal.say_choice,
            )
            stages.lap("loading")
            return predictor

        with torch_threads(plan.threads):
            try:
                outcomes = carry_out(planned, outputs, load, on_oddities=warn)
                for done, outcome in enumerate(outcomes, start=1):
                    terminal.progress("predicting", done, planned.total)
                    if outcome.error is not None:
                        fail(outcome.subject, outcome.error)
                        continue
                    measurements += rows_of(outcome.subject.id, outcome.measured)
                    if outcome.review is None:
                        continue
                    reviews.append(outcome.review)
                    rows.append(
                        {
                            "subject": outcome.subject.id,
                            "file": str(outcome.path),
                            "seconds": outcome.seconds,
                            "targets": outcome.review.targets,
                            "no_interval": outcome.review.no_interval,
                            "unusual": list(outcome.review.oddities),
                            "need": outcome.review.need,
                        }
                    )
            except OutputError as error:
                full = error  # nothing more can be written; what has been written stays
        stages.lap("reading and writing", beside=[row["seconds"] for row in rows])
    if json:
        skipped = [subject.id for subject in planned.done]
        stopped = (
            {}
            if full is None
            else {"error": {"code": full.code, "message": full.message, "fix": getattr(full, "fix", "")}}
        )
        print_json(
            {
                "predictions": rows,
                "skipped": skipped,
                "failed": failed,
                "seconds": stages.seconds,
                "measurements": measurements,
            }
            | stopped
        )
    else:
        _print_queue(reviews)
        if read_within is not None:
            asked = [row for row in measurements if row["quantity"] == read_within.channel]
            _print_measurements(asked, read_within)
        total = sum(stages.seconds.values())
        laps = {**stages.seconds, "total": total}
        print_table("", ["stage", "s", "%"], [[s, f"{t:.2f}", f"{100 * t / total:.0f}"] for s, t in laps.items()])
        seams = [t["seam"] for row in rows for t in row["targets"].values() if t["seam"] == t["seam"]]
        if seams:
            from statistics import median  # takes 50 ms to import

            typer.echo(
                f"probabilities change {median(seams):.2f} times as much across the borders of tiles as next to them"
            )
        counts = [f"{len(planned.done)} already there"] * bool(planned.done) + [f"{len(failed)} failed"] * bool(failed)
        predictions = "1 prediction" if len(rows) == 1 else f"{len(rows)} predictions"
        typer.echo(", ".join([f"{predictions} in {printable(str(out))}", *counts]))
    if full is not None:
        typer.echo(f"error {full}; run the same command again to resume", err=True)
    if failed or full is not None:
        raise typer.Exit(1)


class Stages:
    """Seconds by stage, which add up to the time since the command began."""

    def __init__(self, began: float) -> None:
        self.seconds: dict[str, float] = {}
        self._last = began

    def lap(self, stage: str, beside: Sequence[Mapping[str, float]] = ()) -> None:
        """Count the time since the last lap as ``stage``, except for the parts that ``beside`` gives to other stages.

        Scans are read and written while the network works: only time spent waiting for that is counted.
        """
        now = time.perf_counter()
        left = now - self._last
        for seconds in beside:
            for name, part in seconds.items():
                self.seconds[name] = self.seconds.get(name, 0.0) + part
                left -= part
        self.seconds[stage] = self.seconds.get(stage, 0.0) + left
        self._last = now


_SHOWN = 10


def _print_queue(reviews: list[Review]) -> None:
    """Print what to look at first, the most urgent on top: measured columns first, then calibrated ones."""
    from delineate.calibration import LEVEL
    from delineate.cli.terminal import print_table
    from delineate.core.text import printable
    from delineate.inference.review import queue

    first = queue(reviews)[:_SHOWN]
    rows = [
        [
            printable(one.subject),
            printable(target),
            _number(values["volume_ml"], ".2f"),
            _number(values["expected_dice"], ".3f"),
            _number(values["mutual_dice"], ".3f"),
            _range(values["volume_low_ml"], values["volume_high_ml"], ".2f"),
            _range(values["dice_low"], values["dice_high"], ".3f"),
            one.no_interval.get(target, ""),
            "yes" if one.oddities else "",
        ]
        for one in first
        for target, values in one.targets.items()
    ]
    if rows:
        calibrated = [f"volume, {LEVEL:.0%} interval", f"Dice, {LEVEL:.0%} interval", "no interval because"]
        columns = ["subject", "target", "volume, ml", "expected Dice", "mutual Dice", *calibrated, "unusual"]
        print_table("to look at first", columns, rows)
        if len(reviews) > _SHOWN:
            typer.echo(f"and {len(reviews) - _SHOWN} more, in review.csv")


def _print_measurements(measurements: list[dict[str, Any]], quantity: QuantityMap) -> None:
    """Print the first measurements, by subject and target."""
    from delineate.cli.terminal import print_table
    from delineate.core.text import printable

    rows = [
        [printable(row["subject"]), printable(row["target"]), _number(row["volume_ml"], ".2f")]
        + [_number(row[f"quantity_{name}"], ".2f") for name in ("mean", "median", "sd")]
        + [_number(row["above_threshold_percent"], ".1f")] * (quantity.threshold is not None)
        for row in measurements[:_SHOWN]
    ]
    limit = [] if quantity.threshold is None else [f"{quantity.with_unit(quantity.threshold)} or more, % of voxels"]
    if rows:
        typer.echo(str(quantity))
        print_table("", ["subject", "target", "volume, ml", "mean", "median", "SD", *limit], rows)
        if len(measurements) > _SHOWN:
            typer.echo(f"and {len(measurements) - _SHOWN} more, in measurements.csv")


def _number(value: float, spec: str) -> str:
    return "–" if value != value else f"{value:{spec}}"


def _range(low: float, high: float, spec: str) -> str:
    return "–" if low != low or high != high else f"{low:{spec}} – {high:{spec}}"
