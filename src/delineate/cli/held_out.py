"""``delineate test``."""

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
    LesionOverlap,
    MarginMm,
    Overwrite,
    Precision,
    Quantity,
    RulesFile,
    TargetsOption,
    Threads,
    Threshold,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from delineate.bundle import Bundle
    from delineate.cli.terminal import Terminal
    from delineate.datasets.dataset import Dataset
    from delineate.evaluation.held_out import HeldOut
    from delineate.evaluation.measure import Measuring
    from delineate.evaluation.pairs import Pair
    from delineate.evaluation.table import Evaluation
    from delineate.inference.batch import Outcome
    from delineate.inference.outputs import Outputs, Planned
    from delineate.inference.predictor import Predictor


def measure_held_out(
    bundle: BundlePlace,
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write predictions, tables and the report to this folder.")],
    split: Annotated[
        Path | None,
        typer.Option(
            "--split", help="Measure a held-out fold of this split file (default: all subjects not seen in training)."
        ),
    ] = None,
    fold: Annotated[
        int | None,
        typer.Option(
            "--fold", min=0, help="Measure this fold of --split (default: 0; for a split without folds, its test set)."
        ),
    ] = None,
    all_unseen: AllUnseen = False,
    set: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change inference.* or postprocessing.* of the bundle's recipe. Can be repeated."),
    ] = None,
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
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Measure these sets and single metrics, joined by commas (default: the recipe's).",
            autocompletion=options.metrics,
        ),
    ] = None,
    lesion_overlap: LesionOverlap = 0.0,
    quantity: Quantity = None,
    margin_mm: MarginMm = 0.0,
    threshold: Threshold = None,
    card: Annotated[
        str | None,
        typer.Option(
            "--card",
            help="Add the results to the bundle's card, with this as the name of the data. Do not name a person.",
        ),
    ] = None,
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    engine: Engine = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Predict labelled scans that a bundle has not seen, measure the predictions and write a report.

    Labels are matched with the bundle's targets by name. Subjects that it was trained on are never measured. Run the
    same command again to resume: scans that were predicted are skipped.
    """
    from delineate.bundle import Bundle, bundle_folder
    from delineate.cli.evaluate import print_details, print_evaluation
    from delineate.cli.parsing import parse_quantity, parse_targets
    from delineate.cli.terminal import Terminal, print_json
    from delineate.compute import check_device
    from delineate.core.text import printable
    from delineate.evaluation.card import check_card, write_card
    from delineate.evaluation.card_facts import CardFacts, Result
    from delineate.evaluation.held_out import CONFIDENCE, HeldOut, PlannedTest, write_confidence
    from delineate.evaluation.measure import Measuring
    from delineate.evaluation.table import FILES
    from delineate.inference.outputs import Outputs
    from delineate.inference.review import read_confidences
    from delineate.io.overwriting import check_outputs
    from delineate.metrics.catalogue import targets_of
    from delineate.reporting.evaluation import write_held_out_report

    # Report what cannot work before anything is predicted.
    check_device(device)
    if fold is not None and split is None:
        raise typer.BadParameter("--fold needs a split; name its file with --split")
    asked, read_within = parse_targets(targets), parse_quantity(quantity, margin_mm, threshold)
    folder, probabilities = bundle_folder(bundle), out / "predictions" / "probabilities"
    trained = Bundle.load(folder)
    if card is not None:
        if not 0 < len(card) <= 200:
            raise typer.BadParameter("--card takes a name of up to 200 characters")
        check_card(folder)
    changed = trained.with_settings(set or [])
    wanted = ",".join(trained.recipe.metrics) if metrics is None else metrics
    measuring = Measuring(wanted, lesion_overlap, read_within, probabilities)
    dataset = opened(trained, data, layout, images, labels, rules)
    held_out = HeldOut.of(trained, dataset, split_file=split, fold=fold or 0, targets=asked, all_unseen=all_unseen)
    held_out.check(measuring)
    chosen = [subject.with_channels(trained.channels) for subject in held_out.subjects]
    inputs = [file for subject in dataset.subjects for file in subject.files]
    inputs += [*folder.iterdir(), *filter(None, (split, None if read_within is None else read_within.maps))]
    test = PlannedTest.of(changed, dataset, held_out, measuring)
    results = [out / "evaluation" / name for name in (*FILES, CONFIDENCE)]
    results += [out / "report.html", out / "test.json"]
    check_outputs(results, inputs, overwrite=overwrite or test.begun(out / "test.json"))
    outputs = Outputs(out / "predictions", probabilities=probabilities, bundles=[changed])
    planned = outputs.plan(chosen, inputs, overwrite=overwrite)
    settings = [
        f"{name} is {_value(now)} here; the recipe has {_value(before)}."
        for name, (now, before) in changed.differing_settings(trained).items()
    ]
    notes = [*settings, *held_out.notes]
    with Terminal() as terminal:
        for note in notes:
            terminal.say(printable(note))
        test.write(out / "test.json")
        evaluation, pairs = predict_and_measure(
            terminal, changed, outputs, planned, held_out, measuring, simulated=dataset.simulated,
            device=device, precision=precision, compile=compile, engine=engine, threads=threads,
        )  # fmt: skip
        evaluation.write(out / "evaluation")
        known = read_confidences(outputs.review)
        write_confidence(out / "evaluation", {subject.id: known.get(subject.id, {}) for subject in chosen})
        if card is not None:
            result = Result.of("test", trained, evaluation, name=card, notes=notes)
            write_card(folder, CardFacts.of(trained).with_result(result))
        shown = targets_of(measuring.wanted, held_out.shared.targets) or held_out.shared.targets
        title = f"{trained.recipe.name} on {dataset.name}"
        write_held_out_report(
            out / "report.html", evaluation, pairs, shown, title=title, channels=trained.channels, notes=notes
        )
    if json:
        print_json(evaluation.as_dict())
        return
    print_evaluation(evaluation, subjects=True)
    print_details(evaluation)
    typer.echo(f"report  {printable(str(out / 'report.html'))}")


def opened(
    bundle: Bundle, data: Path, layout: str | None, images: list[str] | None, labels: str | None, rules: Path | None
) -> Dataset:
    """The data set, read as the recipe says, or as the options say if any is given."""
    from delineate.cli.parsing import parse_reading
    from delineate.datasets.layouts import open_dataset

    spec = bundle.recipe.data
    if layout is None and images is None and labels is None and rules is None:
        return open_dataset(data, layout=spec.layout, images=spec.images, labels=spec.labels)
    channels, label = parse_reading(images, labels, rules)
    return open_dataset(data, layout=layout or "auto", images=channels, labels=label)


def predict_and_measure(
    terminal: Terminal,
    bundle: Bundle,
    outputs: Outputs,
    planned: Planned,
    held_out: HeldOut,
    measuring: Measuring,
    *,
    simulated: bool,
    device: str,
    precision: Precision,
    compile: Compile,
    engine: Engine,
    threads: int | None,
) -> tuple[Evaluation, list[Pair]]:
    """Predict what is planned, and measure that and what was predicted before, saying how far it is."""
    from delineate.compute import plan_compute, torch_threads
    from delineate.core.text import printable
    from delineate.evaluation.held_out import measure_outcomes
    from delineate.inference.predictor import Predictor

    chosen = held_out.subjects
    terminal.say(f"{len(chosen)} subjects, of which {len(planned.done)} are predicted already")
    plan = plan_compute(
        device=device,
        precision=precision,
        compile=compile,
        threads=threads,
        expected_seconds=planned.expected_seconds,
        engine=engine,
    )

    def load() -> Predictor:
        return Predictor([bundle], plan, probabilities=outputs.probabilities is not None, told=terminal.say_choice)

    def watch(outcome: Outcome, done: int) -> None:
        if outcome.error is not None:
            terminal.say_failure(f"{printable(outcome.subject.id)}: {printable(str(outcome.error))}")
        terminal.progress("predicting", done, len(chosen))

    with torch_threads(plan.threads):
        evaluation, pairs, _ = measure_outcomes(
            _outcomes(planned, outputs, load), chosen, held_out.shared, measuring, simulated=simulated, on_outcome=watch
        )
    return evaluation, pairs


def _outcomes(planned: Planned, outputs: Outputs, load: Callable[[], Predictor]) -> Iterator[Outcome]:
    """Predictions that were there already, then the others as they are made."""
    from delineate.inference.batch import Outcome, carry_out

    for subject in planned.done:
        yield Outcome(subject, outputs.label(subject), {})
    yield from carry_out(planned, outputs, load)


def _value(setting: object) -> str:
    import json

    return json.dumps(setting, ensure_ascii=False)
