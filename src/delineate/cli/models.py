"""``delineate models``: trained networks to start from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import BundlePlace, Json, Overwrite

if TYPE_CHECKING:
    from delineate.evaluation.models import KnownModel

app = Commands(help="List, show, fetch and pack trained models.")


@app.command("list")
def list_models(json: Json = False) -> None:
    """List the models of installed packages; their names can be used wherever a bundle can."""
    from delineate.cli.terminal import Terminal, print_json, print_table
    from delineate.core.text import printable
    from delineate.errors import BundleError
    from delineate.evaluation.models import KnownModel
    from delineate.installed import installed_models

    known: list[KnownModel] = []
    with Terminal() as terminal:
        for name, offered in installed_models().items():
            if len(offered) > 1:
                by = " and ".join(f"{one.package} {one.version}" for one in offered)
                terminal.say_failure(f"{name} is offered by {printable(by)}: uninstall all but one")
            for one in offered:
                try:
                    known.append(KnownModel.of(one))
                except BundleError as error:
                    terminal.say_failure(f"{name}: {printable(str(error))}")
    if json:
        print_json([model.as_dict() for model in known])
    elif known:
        columns = ["model", "version", "targets", "channels", "modality", "trained on", "Dice (95 %)", "n", "licence"]
        print_table("", columns, [_cells(model) for model in known])
    else:
        typer.echo("no model is installed; one is in the sources: pip install ./models/hippocampus")


def _cells(model: KnownModel) -> list[str]:
    dice = model.dice
    of = [] if dice is None else [f"{dice.mean:.3f} ({dice.ci95[0]:.3f} – {dice.ci95[1]:.3f})", dice.count]
    return [
        model.name,
        model.version,
        ", ".join(model.targets),
        ", ".join(model.channels),
        model.modality or "–",
        str(model.trained_on or "not stated"),
        *(of or ["not measured", ""]),
        model.licence or "not stated",
    ]


@app.command("show")
def show(
    bundle: BundlePlace,
) -> None:
    """Show a model's card: what it is for, on whom it was trained, and how well it was measured to do."""
    from delineate.bundle import Bundle, bundle_folder
    from delineate.core.text import printable_lines
    from delineate.evaluation.card import card_of

    typer.echo(printable_lines(card_of(Bundle.load(bundle_folder(bundle)))))


@app.command("fetch")
def fetch_model(
    source: Annotated[
        str,
        typer.Argument(
            help="An installed model's name, a run, its bundle/ folder, a packed model, or the address of one."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the bundle to this folder.")],
    sha256: Annotated[
        str | None,
        typer.Option("--sha256", help="Refuse a file with another SHA-256. An address needs one."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a model's bundle to a folder, once it is checked. Nothing is left if it is not what it should be."""
    from delineate.cli.terminal import print_json
    from delineate.core.text import printable
    from delineate.packing import fetch

    bundle = fetch(source, out, sha256=sha256, overwrite=overwrite)
    if json:
        print_json({"bundle": str(out), "weights_sha256": bundle.weights_sha256})
        return
    typer.echo(f"bundle  {printable(str(out))}")


@app.command("pack")
def pack_model(
    bundle: BundlePlace,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write this file, such as model.zip.")],
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a bundle to one file, and print its SHA-256, with which others fetch it."""
    from delineate.bundle import bundle_folder
    from delineate.cli.terminal import print_json
    from delineate.core.text import printable
    from delineate.io.overwriting import check_outputs
    from delineate.packing import pack

    folder = bundle_folder(bundle)
    check_outputs([out], folder.iterdir() if folder.is_dir() else [], overwrite=overwrite)
    sha256 = pack(folder, out)
    if json:
        print_json({"file": str(out), "sha256": sha256, "bytes": out.stat().st_size})
        return
    typer.echo(f"file     {printable(str(out))}\nsha256   {sha256}")
