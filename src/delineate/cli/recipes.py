"""``delineate recipes``: the packaged recipes and their contents."""

from __future__ import annotations

from typing import Annotated

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Json, Set, packaged

app = Commands(help="Show the packaged recipes.")


@app.command("list")
def list_recipes(json: Json = False) -> None:
    """List the packaged recipes."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.recipe import load_recipe, packaged_recipes

    found = {name: load_recipe(name).description for name in packaged_recipes()}
    if json:
        print_json(found)
    else:
        print_table("", ["recipe", "purpose"], [[name, text] for name, text in found.items()])


@app.command("show")
def show(
    recipe: Annotated[str, typer.Argument(help="A packaged recipe or a YAML file.", autocompletion=packaged)],
    set: Set = None,
    json: Json = False,
) -> None:
    """Print a recipe with every default written out, to save, change and train with."""
    from delineate.cli.terminal import print_json
    from delineate.recipe import load_recipe, to_yaml

    values = load_recipe(recipe, set or []).as_dict()
    if json:
        print_json(values)
    else:
        typer.echo(to_yaml(values), nl=False)
