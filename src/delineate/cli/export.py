"""``delineate export``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.options import BundlePlace, Json, Overwrite


def export(
    bundle: BundlePlace,
    out: Annotated[Path, typer.Option("--out", "-o", help="Write this file, such as liver.onnx.")],
    onnx: Annotated[
        bool, typer.Option("--onnx", help="Write ONNX, with preprocessing, tiles and targets as JSON in its metadata.")
    ],
    also: Annotated[
        list[Path] | None,
        typer.Option("--also", help="Average with this bundle, as `predict --also` does. Can be repeated."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Export a trained network for programs without Delineate or PyTorch.

    The file is then run by ONNX Runtime on random tiles, and refused if its answers differ from PyTorch's.
    examples/onnx/predict_onnx.py in the sources shows how to predict with it.
    """
    from dataclasses import asdict

    from delineate.bundle import bundle_folder
    from delineate.cli.terminal import print_json
    from delineate.exporting.onnx import check_installed, export_onnx
    from delineate.io.overwriting import check_outputs

    check_installed()
    folders = [bundle_folder(folder) for folder in (bundle, *(also or ()))]
    check_outputs(
        [out], [file for folder in folders if folder.is_dir() for file in folder.iterdir()], overwrite=overwrite
    )
    found = export_onnx(folders, out)
    if json:
        print_json(
            {
                "file": str(out),
                "input": list(found.input),
                "output": list(found.output),
                **asdict(found.agreement),
                "description": found.description.model_dump(mode="json"),
            }
        )
        return
    described = found.description
    sides = [" × ".join(map(str, shape)) for shape in (found.input, found.output)]
    averaged = f", the mean of {len(folders)} bundles" if len(folders) > 1 else ""
    typer.echo(f"input      tile: {sides[0]}, of {', '.join(described.channels)}")
    typer.echo(f"output     {described.average}: {sides[1]}, of {', '.join(described.outputs)}{averaged}")
    typer.echo(
        f"agreement  {found.agreement.same_labels:.4%} of random voxels have the same label as from PyTorch; "
        f"probabilities differ by at most {found.agreement.largest_difference:.1e}"
    )
    typer.echo(f"file       {out}")
