"""Options that several commands share, so that each is named and explained once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

Data = Annotated[Path, typer.Option("--data", help="Folder of the data set; its layout is recognised.")]
Layout = Annotated[str, typer.Option("--layout", help="Layout of the data set, or auto.")]
Images = Annotated[
    str | None, typer.Option("--images", help="Pattern of the images below the folder, such as '*/artery.nii'.")
]
Labels = Annotated[str | None, typer.Option("--labels", help="Pattern of the labels, such as '*/label.nii'.")]
TargetsOption = Annotated[
    str | None,
    typer.Option("--targets", help="Targets and their label values, such as 'liver=1,tumour=2' or 'whole=1+2+4'."),
]
Json = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 or mps.")]
Precision = Annotated[Literal["auto", "fp32", "bf16", "fp16"], typer.Option("--precision", help="Of convolutions.")]
Compile = Annotated[Literal["auto", "on", "off"], typer.Option("--compile", help="Whether to compile the network.")]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="CPU threads; default: every usable core. Another number changes the weights' last digits.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that exist; inputs never.")]
