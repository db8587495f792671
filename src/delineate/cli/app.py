"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from delineate.cli import (
    adapt,
    calibrate,
    card,
    compare,
    data,
    demo,
    doctor,
    evaluate,
    export,
    forgetting,
    held_out,
    imports,
    jobs,
    keys,
    metrics,
    models,
    networks,
    plan,
    predict,
    recipes,
    send,
    serve,
    study,
    train,
    weights,
    worker,
)
from delineate.cli.commands import Commands
from delineate.cli.terminal import Loudness, speak

app = Commands(
    name="delineate",
    help="Train, compare and deploy networks that delineate organs and lesions in MR and CT volumes.",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _quiet(ctx: typer.Context, value: bool) -> None:
    _speak(ctx, Loudness.QUIET if value else None)


def _verbose(ctx: typer.Context, value: bool) -> None:
    _speak(ctx, Loudness.VERBOSE if value else None)


def _speak(ctx: typer.Context, asked: Loudness | None) -> None:
    """Set the loudness, whether asked for before the command's name or after it."""
    said = ctx.find_root().meta.setdefault("loudness", [])
    said += [] if asked is None else [asked]
    if len(set(said)) > 1:
        ctx.fail("--quiet and --verbose contradict each other; give only one")
    speak(said[0] if said else Loudness.NORMAL)


@app.callback(invoke_without_command=True)
def _everywhere(
    version: Annotated[bool, typer.Option("--version", is_eager=True, help="Print the version and exit.")] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", callback=_quiet, expose_value=False, help="Print only results and errors."),
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose", "-v", callback=_verbose, expose_value=False, help="Print where an error arose and its causes."
        ),
    ] = False,
    plugin: Annotated[
        list[str] | None,
        typer.Option("--plugin", help="Import a module with networks, losses or other parts of your own (repeatable)."),
    ] = None,
) -> None:
    if version:
        from delineate import __version__

        typer.echo(f"delineate {__version__}")
        raise typer.Exit
    if plugin:
        from delineate.plugins import use

        use(*plugin)


app.command("demo")(demo.demo)
app.add_typer(data.app, name="data")
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("adapt")(adapt.adapt)
app.command("calibrate")(calibrate.calibrate)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("test")(held_out.measure_held_out)
app.command("compare")(compare.compare)
app.command("forgetting")(forgetting.forgetting)
app.command("card")(card.card)
app.command("export")(export.export)
app.add_typer(study.app, name="study")
app.command("serve")(serve.serve)
app.command("worker")(worker.worker)
app.add_typer(keys.app, name="keys")
app.command("send")(send.send)
app.command("jobs")(jobs.jobs)
app.command("doctor")(doctor.doctor)
app.add_typer(recipes.app, name="recipes")
app.add_typer(networks.app, name="networks")
app.add_typer(metrics.app, name="metrics")
app.add_typer(weights.app, name="weights")
app.add_typer(models.app, name="models")
app.add_typer(imports.app, name="import")
