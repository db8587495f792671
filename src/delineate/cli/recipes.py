"""``delineate recipes``: what is packaged, and what is in it."""

from __future__ import annotations

from typing import Annotated

import typer

from delineate.cli.options import Json

app = typer.Typer(help="The packaged recipes.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_recipes(json: Json = False) -> None:
    """List the packaged recipes."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.recipe import load_recipe, packaged_recipes

    found = {name: load_recipe(name).description for name in packaged_recipes()}
    if json:
        print_json(found)
    else:
        print_table("", ["recipe", "what it is for"], [[name, text] for name, text in found.items()])


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="Name of a packaged recipe, or a YAML file.")],
    set: Annotated[list[str] | None, typer.Option("--set", help="path.to.field=value; may be repeated.")] = None,
    json: Json = False,
) -> None:
    """Print a recipe with every default written out; save it, change it, train with it."""
    from delineate.cli.terminal import print_json
    from delineate.recipe import load_recipe, to_yaml

    values = load_recipe(recipe, set or []).as_dict()
    if json:
        print_json(values)
    else:
        typer.echo(to_yaml(values), nl=False)
