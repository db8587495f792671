"""``delineate calibrate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delineate.cli import options
from delineate.cli.options import (
    AllUnseen,
    BundlePlace,
    ChannelImages,
    Compile,
    Data,
    Device,
    Engine,
    Json,
    Labels,
    Overwrite,
    Precision,
    RulesFile,
    TargetsOption,
    Threads,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from delineate.calibration import IntervalCheck


def calibrate(
    bundle: BundlePlace,
    data: Data,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Write the calibrated bundle, predictions and the report to this folder."),
    ],
    name: Annotated[
        str, typer.Option("--name", help="Name the data on the card, such as a hospital's. Do not name a person.")
    ],
    split: Annotated[
        Path | None,
        typer.Option("--split", help="Use a held-out fold of this split file (default: all subjects not seen)."),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            "--fold", min=0, help="Use this fold of --split (default: 0; for a split without folds, its test set)."
        ),
    ] = None,
    all_unseen: AllUnseen = False,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout", help="Read the data set in this layout (default: the recipe's).", autocompletion=options.layouts
        ),
    ] = None,
    images: ChannelImages = None,
    labels: Labels = None,
    rules: RulesFile = None,
    targets: TargetsOption = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    engine: Engine = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a bundle's intervals hold at your own site, from its errors on labelled scans that it has not seen.

    OUT/bundle is a copy of the bundle with these intervals, and OUT can be named wherever a bundle can. At least 19
    patients are needed. Run the same command again to resume: scans that were predicted are skipped.
    """
    from delineate.bundle import FILES, Bundle, bundle_folder
    from delineate.cli.held_out import opened, predict_and_measure
    from delineate.cli.parsing import parse_targets
    from delineate.cli.terminal import Terminal, print_json
    from delineate.compute import check_device
    from delineate.core.text import printable
    from delineate.evaluation.calibrating import INTERVALS, calibrated, check_enough, inspected
    from delineate.evaluation.held_out import CONFIDENCE, HeldOut, PlannedTest, write_confidence
    from delineate.evaluation.measure import STANDARD
    from delineate.evaluation.table import FILES as TABLES
    from delineate.inference.outputs import Outputs
    from delineate.inference.review import read_confidences
    from delineate.io.overwriting import check_outputs
    from delineate.reporting.card import CARD_PAGE, card_beside
    from delineate.reporting.evaluation import write_held_out_report

    # Report what cannot work before anything is predicted.
    check_device(device)
    if fold is not None and split is None:
        raise typer.BadParameter("--fold needs a split; name its file with --split")
    if not 0 < len(name) <= 200:
        raise typer.BadParameter("--name takes a name of up to 200 characters")
    asked, folder = parse_targets(targets), bundle_folder(bundle)
    trained = Bundle.load(folder)
    dataset = opened(trained, data, layout, images, labels, rules)
    held_out = HeldOut.of(trained, dataset, split_file=split, fold=fold or 0, targets=asked, all_unseen=all_unseen)
    chosen = [subject.with_channels(trained.channels) for subject in held_out.subjects]
    inputs = [file for subject in dataset.subjects for file in subject.files]
    inputs += [*folder.iterdir(), *filter(None, (split,))]
    test = PlannedTest.of(trained, dataset, held_out, STANDARD)
    results = [out / "evaluation" / one for one in (*TABLES, CONFIDENCE, INTERVALS)]
    results += [out / "bundle" / one for one in FILES]
    results += [out / "report.html", out / CARD_PAGE, out / "calibrate.json"]
    check_outputs(results, inputs, overwrite=overwrite or test.begun(out / "calibrate.json"))
    outputs = Outputs(out / "predictions", bundles=[trained])
    planned = outputs.plan(chosen, inputs, overwrite=overwrite)
    check_enough(held_out.subjects)
    with Terminal() as terminal:
        for note in held_out.notes:
            terminal.say(printable(note))
        inspection = inspected(trained, dataset, held_out)
        test.write(out / "calibrate.json")
        evaluation, pairs = predict_and_measure(
            terminal, trained, outputs, planned, held_out, STANDARD, simulated=dataset.simulated,
            device=device, precision=precision, compile=compile, engine=engine, threads=threads,
        )  # fmt: skip
        known = read_confidences(outputs.review)
        confidences = {subject.id: known.get(subject.id, {}) for subject in chosen}
        made, intervals, notes = calibrated(
            trained, held_out, inspection, confidences, evaluation, out / "bundle", name
        )
        evaluation.write(out / "evaluation")
        write_confidence(out / "evaluation", confidences)
        intervals.write(out / "evaluation" / INTERVALS)
        for note in notes[len(held_out.notes) :]:
            terminal.say(printable(note))
        write_held_out_report(
            out / "report.html",
            evaluation,
            pairs,
            held_out.shared.targets,
            title=f"{trained.recipe.name} on {dataset.name}",
            channels=trained.channels,
            notes=notes,
        )
        card_beside(out, made)
    if json:
        print_json({"bundle": str(out / "bundle"), "notes": list(notes), **intervals.model_dump(mode="json")})
        return
    _print(intervals.rows)
    typer.echo(f"bundle  {printable(str(out / 'bundle'))}\nreport  {printable(str(out / 'report.html'))}")


def _print(rows: Sequence[IntervalCheck]) -> None:
    from delineate.calibration import LEVEL
    from delineate.cli.terminal import print_table

    # Those of one site are made without it: how many of its scans they hold shows how far they carry.
    def share(value: float | None) -> str:
        return "–" if value is None else f"{value:.0%}"

    print_table(
        f"intervals for {LEVEL:.0%} of new scans",
        ["target", "site", "n", "width, Dice", "width, volume", "hold its Dice", "hold its volume"],
        [
            [
                row.target,
                row.site or "all",
                str(row.n),
                "–" if row.dice_width is None else f"{row.dice_width:.3f}",
                share(row.volume_width),
                share(row.dice_held),
                share(row.volume_held),
            ]
            for row in rows
        ],
    )
