"""``delineate compare``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import Json, Overwrite
from delineate.cli.options import metrics as metric_completions


def compare(
    evaluations: Annotated[
        list[Path], typer.Argument(help="Two or more evaluations or runs; write NAME=FOLDER to name one.")
    ],
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="Compare these sets and single metrics, joined by commas (default: all they share).",
            autocompletion=metric_completions,
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option("--report", help="Write a report to this file, such as page.html.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Compare methods on the same subjects, in pairs and corrected for multiple comparisons."""
    from delineate.cli.terminal import print_json
    from delineate.errors import MissingFile
    from delineate.evaluation.methods import compare_methods, on_common_subjects
    from delineate.evaluation.table import FILES, Evaluation
    from delineate.io.overwriting import check_outputs

    named: dict[str, Evaluation] = {}
    inputs: list[Path] = []
    for argument in evaluations:
        # An existing folder is one, whatever its name.
        name, equals, place = ("", "", "") if argument.exists() else str(argument).partition("=")
        folder = Path(place) if equals else argument
        inside = folder / "evaluation" if (folder / "evaluation" / "metrics.csv").exists() else folder
        if not (inside / "metrics.csv").exists():
            raise MissingFile(
                f"'{folder}' holds no metrics.csv", fix="give a run, or a folder written by `delineate evaluate -o`"
            )
        inputs += [inside / file for file in FILES]
        name = name if equals else folder.name
        if name in named:
            raise typer.BadParameter(f"two evaluations have the name '{name}'; name them, such as a=RUN1 b=RUN2")
        named[name] = Evaluation.read(inside)
    if len(named) < 2:
        raise typer.BadParameter("give at least two evaluations, such as a=RUN1 b=RUN2")
    check_outputs([report] if report is not None else [], inputs, overwrite=overwrite)
    wanted = None if metrics is None else [name.strip() for name in metrics.split(",")]
    found = compare_methods(named, wanted)
    if report is not None:
        from delineate.reporting.html import MethodsReport, write_report

        common = on_common_subjects(named)
        about = f"On the {len(next(iter(common.values())).subjects)} subjects that all of them measured."
        write_report(report, MethodsReport(", ".join(named) + " compared", about, common, found))
    if json:
        print_json([d.as_dict() for d in found])
        return
    for difference in found:
        typer.echo(str(difference))
