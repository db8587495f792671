"""``delineate recipes``: the packaged recipes and their contents."""

from __future__ import annotations

from typing import Annotated

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Json, Set, packaged

app = Commands(help="Show the packaged recipes.")


@app.command("list")
def list_recipes(json: Json = False) -> None:
    """List the packaged recipes, and where those named after a report deviate from it."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.recipe import load_recipe, packaged_recipes

    found = {name: load_recipe(name) for name in packaged_recipes()}
    if json:
        print_json({name: {"purpose": r.description, "deviates": r.deviates} for name, r in found.items()})
        return
    print_table("", ["recipe", "purpose"], [[name, recipe.description] for name, recipe in found.items()])
    for name, recipe in found.items():
        if recipe.deviates:
            typer.echo("\n".join([f"\n{name} deviates from its report:", *(f"  {text}" for text in recipe.deviates)]))


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
