"""``delineate weights``: the weights that networks and losses start from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import BundlePlace, Json, Overwrite

app = Commands(help="Import, list and export weights.")


@app.command("import")
def import_file(
    file: Annotated[Path, typer.Argument(help="A safetensors file or a PyTorch state dict.")],
    name: Annotated[
        Literal["vgg11", "vgg19"], typer.Option("--as", help="Name the network that the weights belong to.")
    ],
    caffe: Annotated[
        bool,
        typer.Option("--caffe", help="Prepare inputs as Caffe did, as BGR values up to 255 (default: as torchvision)."),
    ] = False,
) -> None:
    """Check a weights file and add it to the store, where `weights: imagenet` finds it."""
    from delineate.pretrained.weights import import_weights

    entry = import_weights(file, name, "caffe" if caffe else "torchvision")
    typer.echo(f"{entry.name}: {entry.tensors} tensors from {entry.source}, SHA-256 {entry.sha256[:12]}…")


@app.command("export")
def export(
    bundle: BundlePlace,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write this safetensors file.")],
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include", help="Export only tensors with names like 'encoder.*' (default: all). Can be repeated."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Export the weights of a trained network, or some of them, to a file that `start.weights` can read."""
    from delineate.bundle import bundle_folder, export_weights
    from delineate.io.overwriting import check_outputs

    bundle = bundle_folder(bundle)
    check_outputs([out], bundle.iterdir() if bundle.is_dir() else [], overwrite=overwrite)
    typer.echo(f"{export_weights(bundle, out, include or ['*'])} tensors in {out}")


@app.command("list")
def list_imported(json: Json = False) -> None:
    """List the imported weights."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.pretrained.weights import list_weights, store_folder

    entries = list_weights()
    if json:
        print_json([entry.model_dump() for entry in entries])
    elif entries:
        rows = [[e.name, e.source, e.preprocessing, str(e.tensors), e.sha256[:12]] for e in entries]
        print_table("", ["network", "from", "preprocessing", "tensors", "SHA-256"], rows)
    else:
        typer.echo(f"nothing imported yet ({store_folder()}); see `delineate weights import --help`")
