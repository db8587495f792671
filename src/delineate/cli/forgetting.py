"""``delineate forgetting``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import Compile, Data, Device, Json, Metrics, Overwrite, Precision, Threads


def forgetting(
    before: Annotated[
        Path, typer.Argument(help="The bundle before fine-tuning, its run, or an installed model's name.")
    ],
    after: Annotated[Path, typer.Argument(help="The bundle after fine-tuning, or its run.")],
    data: Data,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write predictions and evaluations to this folder.")],
    metrics: Metrics = "standard",
    device: Device = "auto",
    precision: Precision = "auto",
    compile: Compile = "auto",
    threads: Threads = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Measure what fine-tuning cost on the original data, using scans that neither bundle was trained on."""
    from delineate.bundle import Bundle, bundle_folder
    from delineate.cli.terminal import Terminal, print_json
    from delineate.compute import check_device, plan_compute, torch_threads
    from delineate.datasets.layouts import open_dataset
    from delineate.evaluation.forgetting import measure_forgetting, outputs_of_forgetting
    from delineate.evaluation.measure import Measuring
    from delineate.evaluation.methods import compare_methods
    from delineate.evaluation.table import averaged
    from delineate.io.overwriting import check_outputs
    from delineate.metrics.catalogue import METRICS

    check_device(device)
    bundles = Bundle.load(bundle_folder(before)), Bundle.load(bundle_folder(after))
    source = open_dataset(data)
    inputs = [file for subject in source.subjects for file in subject.files]
    check_outputs(outputs_of_forgetting(out, source), inputs, overwrite=overwrite)
    plan = plan_compute(
        device=device,
        precision=precision,
        compile=compile,
        threads=threads,
        expected_seconds=2.0 * len(source.subjects),
        engine="torch",
    )
    with Terminal() as terminal, torch_threads(plan.threads):
        found = measure_forgetting(
            *bundles,
            source,
            out,
            plan,
            Measuring(metrics),
            lambda done, total: terminal.progress("predicting", done, total),
        )
    differences = compare_methods(found)
    if json:
        print_json([d.as_dict() for d in differences])
        return
    first, then = (evaluation.summary() for evaluation in found.values())
    for target, estimates in first.items():
        for metric, estimate in estimates.items():
            if METRICS[metric].better:
                was, became = (
                    averaged(metric, e) + (f" (failed {e.failures})" if e.failed else "")
                    for e in (estimate, then[target][metric])
                )
                typer.echo(f"{target}: {METRICS[metric].title} {was} before, {became} after")
    for difference in differences:
        typer.echo(str(difference))
