"""Options that several commands share, each named and explained once, and their shell completions."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Annotated, Literal

import typer


def packaged(incomplete: str) -> list[str]:
    """Packaged recipes that begin this way; found by their files, since reading them takes seconds."""
    folder = Path(str(resources.files("delineate") / "recipes"))
    return _beginning(incomplete, sorted(file.stem for file in folder.rglob("*.yaml")))


def studies(incomplete: str) -> list[str]:
    """Packaged studies that begin so."""
    folder = Path(str(resources.files("delineate") / "studies" / "packaged"))
    return _beginning(incomplete, sorted(file.stem for file in folder.glob("*.yaml")))


def trainable(incomplete: str) -> list[str]:
    """Names that ``delineate train`` accepts."""
    return _beginning(incomplete, ["auto", *packaged("")])


def layouts(incomplete: str) -> list[str]:
    """Data set layouts that begin this way."""
    from delineate.datasets.layouts import LAYOUTS

    return _beginning(incomplete, ["auto", *LAYOUTS])


def label_formats(incomplete: str) -> list[str]:
    """Label formats that begin this way."""
    from delineate.io.exports import label_formats as known

    return _beginning(incomplete, known())


def metrics(incomplete: str) -> list[str]:
    """Sets and single metrics that complete the last of several names joined by commas."""
    from delineate.metrics.catalogue import METRICS, SETS

    before, comma, last = incomplete.rpartition(",")
    return [before + comma + name for name in _beginning(last, [*SETS, *METRICS])]


def phantoms(incomplete: str) -> list[str]:
    """Kinds of simulated scans that begin this way."""
    from delineate.datasets.phantoms.kinds import KINDS

    return _beginning(incomplete, KINDS)


def _beginning(incomplete: str, names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith(incomplete)]


BundlePlace = Annotated[
    Path,
    typer.Argument(help="A run, its bundle/ folder, or an installed model's name."),
]
Data = Annotated[Path, typer.Option("--data", help="Read this data set; its layout is recognised.")]
AllUnseen = Annotated[
    bool,
    typer.Option(
        "--all-unseen",
        help="Let your word count that the bundle was trained on none of these subjects, where it cannot tell.",
    ),
]
Layout = Annotated[
    str,
    typer.Option("--layout", help="Read the data set in this layout (default: recognise it).", autocompletion=layouts),
]
Images = Annotated[
    str | None,
    typer.Option("--images", help="Find the images by this pattern below the folder, such as '*/artery.nii'."),
]
ChannelImages = Annotated[
    list[str] | None,
    typer.Option(
        "--images",
        help="Find a channel by this pattern, such as T1='*/t1.nii', or a DICOM series by its description. "
        "Can be repeated.",
    ),
]
RulesFile = Annotated[
    Path | None,
    typer.Option(
        "--rules",
        help="Choose DICOM series by the rules in this YAML file, for each channel and the label; "
        "`delineate data series --rules` shows what they pick.",
    ),
]
Labels = Annotated[
    str | None,
    typer.Option(
        "--labels",
        help="Find the labels by this pattern below the folder, such as '*/label.nii', or a mask for each target: "
        "'*/{target}_mask.nii'.",
    ),
]
TargetsOption = Annotated[
    str | None,
    typer.Option("--targets", help="Name the targets by label value, such as 'liver=1,tumour=2' or 'whole=1+2+4'."),
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="Change a setting of the recipe: path.to.field=value. Can be repeated."),
]
Metrics = Annotated[
    str,
    typer.Option(
        "--metrics",
        help="Measure these sets (standard, wmh2017, promise12, lits, brats) and single metrics, joined by commas; "
        "`delineate metrics list` explains them.",
        autocompletion=metrics,
    ),
]
LesionOverlap = Annotated[
    float,
    typer.Option(
        "--lesion-overlap",
        min=0,
        max=0.99,
        help="Count a lesion as detected if more than this share of it is covered.",
    ),
]
Quantity = Annotated[
    str | None,
    typer.Option(
        "--quantity",
        help="Measure this channel within each target, such as fat_fraction; fat_fraction=FOLDER for maps in "
        "a folder of their own, as <subject> files.",
    ),
]
MarginMm = Annotated[
    float,
    typer.Option("--margin-mm", min=0, help="Measure the quantity this far inside a target's surface, in mm."),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        help="Report subjects on the wrong side of this value of the quantity (default: 5.56 for a fat fraction).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text, for errors too.")]
Device = Annotated[
    str, typer.Option("--device", help="Compute on auto (a GPU if there is one), cpu, cuda, cuda:1 or mps.")
]
Precision = Annotated[
    Literal["auto", "fp32", "bf16", "fp16"],
    typer.Option("--precision", help="Set the numeric precision of convolutions (auto: what the device does fastest)."),
]
Compile = Annotated[
    Literal["auto", "on", "off"],
    typer.Option("--compile", help="Compile the network first (auto: if the run is long enough to gain from it)."),
]
Engine = Annotated[
    Literal["auto", "torch", "openvino"],
    typer.Option(
        "--engine",
        help="Run the network by this engine (auto: OpenVINO if a trial, now or earlier, shows it to be faster). "
        "OpenVINO is left out where it decides otherwise than PyTorch.",
    ),
]
Memory = Annotated[
    str | None, typer.Option("--memory", help="Keep within this, such as 8GB (default: what is free, or the GPU's).")
]
Cache = Annotated[
    Path | None,
    typer.Option("--cache", help="Keep prepared subjects in this folder, which runs can share (default: your cache)."),
]
CacheGb = Annotated[
    float | None,
    typer.Option(
        "--cache-gb",
        min=0.001,
        max=1_000_000,
        envvar="DELINEATE_CACHE_GB",
        help="Let prepared subjects take so many GB there; those used least recently go first (default: no limit).",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads",
        min=1,
        help="Use this many CPU threads (default: one per usable core). It changes the last digits of weights.",
    ),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace existing files, but never inputs.")]
