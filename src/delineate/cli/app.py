"""The tree of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from delineate.cli import compare, data, demo, evaluate, forgetting, metrics, networks, predict, recipes, train, weights

app = typer.Typer(
    name="delineate",
    help="Train, compare and deploy networks that delineate organs and lesions in MR and CT volumes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def _version(
    version: Annotated[bool, typer.Option("--version", help="Print the version and end.")] = False,
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
app.command("train")(train.train)
app.command("predict")(predict.predict)
app.command("evaluate")(evaluate.evaluate)
app.command("compare")(compare.compare)
app.command("forgetting")(forgetting.forgetting)
app.add_typer(recipes.app, name="recipes")
app.add_typer(networks.app, name="networks")
app.add_typer(metrics.app, name="metrics")
app.add_typer(weights.app, name="weights")
