"""``delineate import``: models that other software trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Json, Overwrite

app = Commands(help="Convert models that other software trained into bundles.")


@app.command("nnunet")
def nnunet(
    model: Annotated[Path, typer.Argument(help="A folder that nnU-Net v2 trained: plans.json, dataset.json, fold_*.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the bundle to this folder.")],
    fold: Annotated[
        list[str] | None,
        typer.Option(
            "--fold",
            help="Import this fold, such as 0 or all (default: every numbered one, as an ensemble). Can be repeated.",
        ),
    ] = None,
    checkpoint: Annotated[
        str, typer.Option("--checkpoint", help="Read this file of each fold.")
    ] = "checkpoint_final.pth",
    any_trainer: Annotated[
        bool,
        typer.Option(
            "--any-trainer",
            help="Import with a trainer that nnU-Net does not come with, if it changed only how networks are trained.",
        ),
    ] = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a bundle that predicts what an nnU-Net model predicts. No code from the model's files runs.

    Several folds become one bundle, which averages their logits as nnU-Net does. Cascades, and networks other than
    nnU-Net's two U-Nets, are refused.
    """
    from delineate.bundle import FILES
    from delineate.cli.terminal import print_json
    from delineate.importing.nnunet import import_model
    from delineate.io.overwriting import check_outputs

    inside = [path for path in model.rglob("*") if path.is_file()] if model.is_dir() else []
    check_outputs([out / name for name in FILES], inside, overwrite=overwrite)
    found = import_model(model, out, fold or (), any_trainer=any_trainer, checkpoint=checkpoint)
    bundle = found.bundle
    if json:
        print_json(
            {
                "bundle": str(out),
                "configuration": found.configuration,
                "trainer": found.trainer,
                "folds": list(found.folds),
                "channels": list(bundle.channels),
                "targets": list(bundle.targets.names),
                "weights_sha256": bundle.weights_sha256,
            }
        )
        return
    folds = f"fold {found.folds[0]}" if len(found.folds) == 1 else f"folds {', '.join(found.folds)}"
    typer.echo(f"{found.configuration} of {found.trainer}, {folds}")
    typer.echo(f"channels  {', '.join(bundle.channels)}\ntargets   {', '.join(bundle.targets.names)}")
    typer.echo(f"bundle    {out}")


@app.command("monai")
def monai(
    model: Annotated[
        Path,
        typer.Argument(help="A bundle of MONAI's: configs/metadata.json, configs/inference.json, models/model.pt."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the bundle to this folder.")],
    targets: Annotated[
        str | None,
        typer.Option(
            "--targets",
            help="Write these label values for structures that overlap, the largest first, such as 'whole=1+2,core=2'.",
        ),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--entry",
            help="Change an entry of the configuration, such as pixdim=[1,1,2] or inferer::overlap=0.5: what only an "
            "expression says, since none is evaluated. Can be repeated.",
        ),
    ] = None,
    checkpoint: Annotated[str, typer.Option("--checkpoint", help="Read this file of models/.")] = "model.pt",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make a bundle that predicts what a bundle of MONAI's predicts. No code from its files runs.

    UNet, SegResNet and DynUNet are known, with the common transforms and sliding windows. Anything else is refused, by
    name. MONAI need not be installed.
    """
    from delineate.bundle import FILES
    from delineate.cli.parsing import parse_targets
    from delineate.cli.terminal import print_json
    from delineate.importing.monai import import_model
    from delineate.io.overwriting import check_outputs

    inside = [path for path in model.rglob("*") if path.is_file()] if model.is_dir() else []
    check_outputs([out / name for name in FILES], inside, overwrite=overwrite)
    found = import_model(model, out, changes or (), targets=parse_targets(targets), checkpoint=checkpoint)
    bundle = found.bundle
    if json:
        print_json(
            {
                "bundle": str(out),
                "network": found.network,
                "channels": list(bundle.channels),
                "targets": list(bundle.targets.names),
                "weights_sha256": bundle.weights_sha256,
            }
        )
        return
    typer.echo(f"{found.network} in {bundle.recipe.network.dimensions}D")
    typer.echo(f"channels  {', '.join(bundle.channels)}\ntargets   {', '.join(bundle.targets.names)}")
    typer.echo(f"bundle    {out}")
