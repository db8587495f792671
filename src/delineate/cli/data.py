"""``delineate data``: look at a data set before training on it, and split it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from delineate.cli.commands import Commands
from delineate.cli.options import Images, Json, Labels, Layout, Overwrite, RulesFile, TargetsOption, layouts, phantoms

if TYPE_CHECKING:
    from delineate.core.targets import Targets
    from delineate.core.volume import LabelVolume
    from delineate.datasets.dicom_labels import Candidate
    from delineate.datasets.inspection import Inspection
    from delineate.io.dicom_series import Series

app = Commands(help="Inspect, split, convert and simulate data.")

Folder = Annotated[Path, typer.Argument(help="The data set; its layout is recognised.")]


@app.command("inspect")
def inspect(
    folder: Folder,
    layout: Layout = "auto",
    images: Images = None,
    labels: Labels = None,
    rules: RulesFile = None,
    targets: TargetsOption = None,
    repair: Annotated[
        Path | None,
        typer.Option("--repair", help="Write repaired copies to this new folder, with a list of what was done."),
    ] = None,
    orientation: Annotated[
        Literal["refuse", "sform", "qform"],
        typer.Option("--orientation", help="Use this orientation if a file has two that differ."),
    ] = "refuse",
    json: Json = False,
) -> None:
    """Read every subject and report every problem, with how to fix it."""
    from delineate.cli.parsing import parse_reading, parse_targets
    from delineate.cli.terminal import Terminal, print_json
    from delineate.datasets.inspection import inspect as run
    from delineate.datasets.layouts import open_dataset

    channels, label = parse_reading(images, labels, rules)
    dataset = open_dataset(folder, layout=layout, images=channels, labels=label, targets=parse_targets(targets))
    if repair is not None:
        from delineate.datasets.repair import check_new

        check_new(repair)
    with Terminal() as terminal:
        inspection = run(
            dataset,
            orientation=orientation,
            progress=lambda done, total: terminal.progress("inspecting", done, total),
        )
        if repair is not None:
            from delineate.datasets.repair import MANIFEST
            from delineate.datasets.repair import repair as write_repaired

            done = write_repaired(
                dataset,
                repair,
                orientation=orientation,
                progress=lambda done, total: terminal.progress("repairing", done, total),
            )
            for one in done:
                if one.done != "copied":
                    terminal.say(f"{one.subject}: {one.file} {one.done} ({one.why})")
            terminal.say(f"{sum(one.done == 'repaired' for one in done)} files repaired; {repair / MANIFEST} says how")
    if json:
        print_json(inspection.as_dict())
    else:
        _print(inspection)
    if inspection.broken:
        raise typer.Exit(1)


@app.command("split")
def split(
    folder: Folder,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Write this split file; an existing one is checked and kept.")
    ],
    folds: Annotated[
        int | None,
        typer.Option(
            "--folds",
            min=1,
            help="Make this many folds (default: 5); 1: train on everything except the test set.",
        ),
    ] = None,
    test_fraction: Annotated[
        float,
        typer.Option("--test-fraction", min=0, max=0.9, help="Lock this share of the patients away as a test set."),
    ] = 0.0,
    test_last: Annotated[
        int, typer.Option("--test-last", min=0, help="Lock away this many of the last subjects by name instead.")
    ] = 0,
    validation_fraction: Annotated[
        float,
        typer.Option(
            "--validation-fraction", min=0, max=0.9, help="Set aside this share of the patients for validation."
        ),
    ] = 0.0,
    always_train: Annotated[
        list[str] | None,
        typer.Option(
            "--always-train",
            help="Train on this subject whichever fold is held out; never validate on it. Can be repeated.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Draw the folds with this seed.")] = 0,
    layout: Layout = "auto",
    images: Images = None,
    labels: Labels = None,
    rules: RulesFile = None,
    json: Json = False,
) -> None:
    """Split a data set into folds by patient, balanced over sites, with a locked test set if you ask for one."""
    from delineate.cli.parsing import parse_reading
    from delineate.cli.terminal import print_json
    from delineate.datasets.layouts import open_dataset
    from delineate.datasets.splits import load_or_make_split

    channels, label = parse_reading(images, labels, rules)
    dataset = open_dataset(folder, layout=layout, images=channels, labels=label)
    made = load_or_make_split(
        out,
        dataset,
        folds=folds,
        test_fraction=test_fraction,
        seed=seed,
        test_last=test_last,
        validation_fraction=validation_fraction,
        always_train=always_train or (),
    )
    if json:
        print_json(asdict(made) | {"file": str(out)})
        return
    for index, fold in enumerate(made.folds):
        typer.echo(f"{'training' if made.fixed else f'fold {index}'}: {len(fold)} subjects")
    for what, part in (("validation", made.validation), ("always trained on", made.always_train)):
        if part:
            typer.echo(f"{what}: {len(part)} subjects")
    typer.echo(f"{'test set' if made.fixed else 'locked test set'}: {len(made.test)} subjects\nwritten to {out}")


@app.command("series")
def series(
    path: Annotated[Path, typer.Argument(help="A folder, a zip, or any file of a series.")],
    rules: Annotated[
        Path | None,
        typer.Option(
            "--rules", help="Show which series the rules in this YAML file pick of each study, and which not."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """List the DICOM series in a folder or zip, with the details that tell them apart."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.io.dicom_series import find_objects, find_series

    found = find_series(path) and find_objects(path)
    if rules is not None:
        _print_picked(path, rules, json=json)
        return
    if json:
        print_json([_details(s) for s in found])
        return
    rows = [
        [
            s.description or "–", s.modality, str(s.number), s.protocol, s.date, _by((*s.shape, s.slices)),
            _by(s.spacing_mm or ()), str(s.folder),
        ]
        for s in found
    ]  # fmt: skip
    columns = ["description", "modality", "number", "protocol", "date", "voxels", "in plane, mm", "where"]
    print_table("", columns, rows)


def _details(series: Series) -> dict[str, object]:
    return {
        "uid": series.uid, "study": series.study, "modality": series.modality, "description": series.description,
        "protocol": series.protocol, "number": series.number, "date": series.date, "shape": series.shape,
        "slices": series.slices, "spacing_mm": series.spacing_mm, "folder": str(series.folder),
    }  # fmt: skip


def _print_picked(path: Path, rules: Path, *, json: bool) -> None:
    """What rules pick of every study. Exits with 1 where that is ambiguous, or nothing anywhere."""
    from delineate.cli.terminal import print_json, print_table
    from delineate.datasets.dicom_studies import find_studies
    from delineate.datasets.series_rules import LABEL, read_rules

    read = read_rules(rules)
    studies, notes = find_studies(path, read.images, read.label)
    several = {study.name: study.ambiguous for study in studies}
    if json:
        picked = [
            {
                "study": study.name,
                **study.when,
                "picked": {name: [_details(series) for series in found] for name, found in study.channels.items()},
                LABEL: [str(one) for one in study.label],
                "ambiguous": [*several[study.name]],
                "left": [_details(series) for series in study.left],
            }
            for study in studies
        ]
        print_json({"studies": picked, "notes": notes})
    else:
        rows = []
        for study in studies:
            named: dict[str, Sequence[Series | Candidate]] = {**study.channels, LABEL: study.label}
            for name, found in named.items():
                picks = f"{name}: several" if name in several[study.name] else name
                rows += [[study.name, picks, str(one), str(one.folder)] for one in found]
                rows += [] if found else [[study.name, name, "none", ""]]
            rows += [[study.name, "left", str(series), str(series.folder)] for series in study.left]
        print_table("", ["study", "rule", "series", "where"], rows)
        for note in notes:
            typer.echo(note)
    if any(several.values()) or not any(study.scans for study in studies):
        raise typer.Exit(1)


@app.command("convert")
def convert(
    path: Annotated[Path, typer.Argument(help="A scan or label: a file, or a DICOM folder or zip.")],
    out: Annotated[
        Path,
        typer.Argument(
            help="The new file: .nii.gz .mha .nrrd .vtk .vti .png .tif; labels also .seg.nrrd .dcm .rtstruct.dcm."
        ),
    ],
    label: Annotated[
        bool, typer.Option("--label", help="Convert a label: write whole numbers in the smallest type.")
    ] = False,
    pick: Annotated[
        str | None, typer.Option("--series", help="Choose among several series by this pattern of their description.")
    ] = None,
    source: Annotated[Path | None, typer.Option("--source", help="Refer the DICOM-SEG to this DICOM series.")] = None,
    kind: Annotated[
        Literal["BINARY", "LABELMAP"],
        typer.Option("--kind", help="Write DICOM-SEG frames per target (BINARY) or one for all (LABELMAP)."),
    ] = "BINARY",
    targets: TargetsOption = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert one scan or label to another format; every voxel keeps its place in the patient."""
    from delineate.cli.parsing import parse_targets
    from delineate.core.targets import Targets
    from delineate.datasets.dataset import numbered_targets, read_numbered
    from delineate.io.dicom_series import check_together, file_of, the_series
    from delineate.io.exports import check_installed, export_label, exported_files
    from delineate.io.formats import check_writable, read_volume, write_volume
    from delineate.io.overwriting import check_outputs
    from delineate.io.segments import segments_in
    from delineate.io.suffixes import DICOM_SUFFIXES

    check_installed(out.suffix.lower())
    segmentation = label or out.suffix.lower() in DICOM_SUFFIXES
    check_outputs(
        exported_files(out) if segmentation else [out], [path, *([source] if source else [])], overwrite=overwrite
    )
    check_writable(out, segments=segmentation)
    check_together(path)
    place = path if pick is None else file_of(the_series(path, pick))
    if segmentation:
        named, segments = parse_targets(targets), segments_in(place)
        if named is None and segments is not None and segments.names:
            own = dict(zip(segments.names, ((value,) for value in segments.values), strict=False))
            named = Targets(own) if own else numbered_targets(segments.names)
        read = read_numbered(place, named, str(path))
        named = named or _by_value(read)
        of = source if source is not None or out.suffix.lower() in DICOM_SUFFIXES else place
        written = export_label(out, read, named, source=of, kind=kind)
    else:
        write_volume(out, read_volume(place), like=place)
        written = [out]
    typer.echo("\n".join(map(str, written)))


def _by_value(label: LabelVolume) -> Targets | None:
    """A target for each value of a label; None where there are none, or some that cannot be targets."""
    import numpy as np

    from delineate.core.targets import Targets
    from delineate.errors import RecipeError

    with suppress(RecipeError):
        return Targets({f"label {value}": (int(value),) for value in np.unique(label.voxels) if value})
    return None


@app.command("consensus")
def make_consensus(
    annotators: Annotated[list[Path], typer.Argument(help="Two or more folders of labels, one per annotator.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Write the labels that they agree on to this folder.")],
    method: Annotated[
        Literal["majority", "staple"], typer.Option("--method", help="Combine labels by this method.")
    ] = "majority",
    overwrite: Overwrite = False,
) -> None:
    """Combine the labels of several annotators into one per subject, and say how well each pair agrees."""
    from itertools import combinations

    from delineate.cli.terminal import print_table
    from delineate.core.subject import paths_of
    from delineate.datasets.consensus import consensus
    from delineate.datasets.dataset import read_numbered
    from delineate.errors import MissingFile
    from delineate.evaluation.measure import evaluate
    from delineate.evaluation.pairs import Pair, labels_in, targets_in
    from delineate.io.formats import write_label
    from delineate.io.overwriting import check_outputs

    files = [labels_in(folder) for folder in annotators]
    subjects = sorted(set.intersection(*(set(found) for found in files)))
    if len(annotators) < 2 or not subjects:
        raise MissingFile("no subject has labels of two annotators", fix="give folders with the same file names")
    inputs = [file for found in files for label in found.values() for file in paths_of(label)]
    check_outputs([out / f"{subject}.nii.gz" for subject in subjects], inputs, overwrite=overwrite)
    targets = targets_in(Pair(s, files[0][s], found[s]) for found in files[1:] for s in subjects)
    for subject in subjects:
        labels = [read_numbered(found[subject], targets, subject) for found in files]
        agreed = consensus(labels, method, subject=subject)
        write_label(out / f"{subject}.nii.gz", agreed, like=paths_of(files[0][subject])[0])
    rows = []
    for (a, first), (b, second) in combinations(zip(annotators, files, strict=True), 2):
        pairs = [Pair(s, first[s], second[s]) for s in subjects]
        evaluation = evaluate(pairs, targets_in(pairs))
        summary = evaluation.summary()
        for target in evaluation.targets:
            dice = summary[target]["dice"]
            rows.append([f"{a} – {b}", target, f"{dice.mean:.3f} ± {dice.sd:.3f}", str(dice.n)])
    print_table("", ["annotators", "target", "Dice ± SD", "n"], rows)
    typer.echo(f"{len(subjects)} labels in {out}")


@app.command("phantom")
def phantom(
    kind: Annotated[
        str,
        typer.Argument(
            help="abdomen, liver, liver-tumour, liver-ct, liver-fat, liver-fat-fraction, ct-slice-liver, "
            "ct-slice-abdomen, ct-slice-thigh, brain-tumour, white-matter or prostate.",
            autocompletion=phantoms,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            "-o",
            help="Write the data set to this new folder, or complete one of the same kind, seed, sites and --coarse.",
        ),
    ],
    n: Annotated[int, typer.Option("--n", "-n", min=1, help="Simulate this many patients.")] = 20,
    layout: Annotated[
        str | None,
        typer.Option(
            "--layout",
            help="Write this layout: msd, nnunet, promise12, wmh2017, lits, brats or cases (default: the kind's own).",
            autocompletion=layouts,
        ),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Simulate with this seed.")] = 0,
    sites: Annotated[
        str | None,
        typer.Option(
            "--sites",
            help="Simulate the patients of these sites alone, such as site1,site2 (default: all; sets of different "
            "sites have no patient in common).",
        ),
    ] = None,
    coarse: Annotated[
        float,
        typer.Option(
            "--coarse",
            min=1,
            max=16,
            help="Simulate with this many times fewer voxels along each axis, for quick trials.",
        ),
    ] = 1.0,
) -> None:
    """Simulate scans with known truth, in the layout of their challenge."""
    from delineate.cli.terminal import Terminal
    from delineate.datasets.phantoms.kinds import kind_named
    from delineate.datasets.phantoms.writing import write_phantoms

    with Terminal() as terminal:
        dataset = write_phantoms(
            out,
            n,
            kind,
            seed=seed,
            layout=layout,
            sites=None if sites is None else [site.strip() for site in sites.split(",")],
            coarse=coarse,
            progress=lambda done, n: terminal.progress("simulating", done, n),
        )
    chosen = kind_named(kind)
    typer.echo(f"{len(dataset.subjects)} simulated patients in {out}, layout {dataset.layout}: {chosen.description}")
    if dataset.layout == "patterns":
        typer.echo(f"open it with --images '*/{chosen.channels[0]}.nii' --labels '*/label.nii'")


def _print(inspection: Inspection) -> None:
    """Print the table of subjects, then the problems; only the first few of many similar ones."""
    from delineate.cli.terminal import print_table

    rows = []
    told = any(row.acquisition for row in inspection.rows)
    for row in inspection.rows:
        ranges = " ".join(f"{channel}: {i.min:.4g} … {i.max:.4g}" for channel, i in row.intensities.items())
        volumes = " ".join(f"{name} {ml:.3g}" for name, ml in row.volume_ml.items())
        cells = [row.subject, row.site, _by(row.shape), _by(row.spacing_mm), row.orientation, ranges, volumes]
        rows.append([*cells, row.scanned_with] if told else cells)
    columns = ["subject", "site", "voxels", "spacing, mm", "axes", "intensities", "targets, ml"]
    columns += ["scanned with"] if told else []
    typer.echo(f"layout {inspection.layout}: {inspection.reason}")
    print_table(inspection.dataset, columns, rows)
    if inspection.class_fractions:
        shares = ", ".join(f"{name} {share:.3%}" for name, share in inspection.class_fractions.items())
        typer.echo(f"\nshare of all voxels: {shares}")
    for problem in inspection.problems:
        where = f"{problem.subject}: " if problem.subject else ""
        typer.echo(f"{problem.severity} {problem.code} {where}{problem.message}; {problem.fix}")
    found = f"{len(inspection.errors)} errors, {len(inspection.warnings)} warnings"
    typer.echo(f"\n{len(inspection.rows)} subjects read, {found}" + ("" if inspection.problems else ": nothing to fix"))


def _by(numbers: Sequence[float]) -> str:
    return " × ".join(f"{n:.4g}" for n in numbers)
