"""The report of a run, from the files in its folder and the scans of its held-out subjects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from io import StringIO
from pathlib import Path
from statistics import median

import pandas as pd

from delineate.bundle import Bundle
from delineate.calibration import Intervals
from delineate.compute import PlanFile
from delineate.core.subject import Subject
from delineate.core.volume import Volume
from delineate.datasets.dataset import Dataset, load_scan
from delineate.datasets.inspection import InspectionFile, Problem
from delineate.errors import BadFormat, TrainingError
from delineate.evaluation.pairs import Pair
from delineate.evaluation.table import Evaluation
from delineate.io.files import parsing, read_text
from delineate.io.tables import read_table
from delineate.recipe import TrainingSpec
from delineate.reporting.card import card_beside
from delineate.reporting.cautions import Training, cautions
from delineate.reporting.classes import class_rows
from delineate.reporting.composite import composite_picture
from delineate.reporting.html import RunReport, write_report
from delineate.reporting.overlays import Overlay, overlays_of
from delineate.training.events import Collapsed, Divided, Event, Fitted, Planned, Warned, read_events, without_undone
from delineate.training.subjects import RunSubjects


def write_run_report(folder: Path, dataset: Dataset) -> Path:
    """Write ``report.html`` for a finished run and return its path.

    ``dataset`` is the data set it was trained on; the scans of some held-out subjects are read for the pictures.
    """
    bundle, subjects = Bundle.load(folder / "bundle"), _subjects(folder)
    data = InspectionFile.read(folder / "data.json")
    evaluation = Evaluation.read(folder / "evaluation") if (folder / "evaluation" / "metrics.csv").exists() else None
    learning, validation = (_curve(folder / "logs" / f"{name}.csv") for name in ("training", "validation"))
    events = without_undone(read_events(folder / "logs"))
    planned = next((event for event in reversed(events) if isinstance(event, Planned)), None)
    steps_an_epoch = None if planned is None else planned.steps_an_epoch
    card, unreadable = card_beside(folder, bundle)
    warned = cautions(Training(bundle.recipe.training, learning, validation, steps_an_epoch), evaluation)
    content = RunReport(
        title=bundle.recipe.name,
        description=bundle.recipe.description,
        validated=_validated(bundle.recipe.training),
        simulated=bundle.provenance.simulated,
        data_rows=data.subjects,
        learning=learning,
        validation=validation,
        validation_loss=_curve(folder / "logs" / "validation_loss.csv"),
        evaluation=evaluation,
        overlays=[] if evaluation is None else held_out_overlays(folder, bundle, dataset, evaluation),
        recipe_yaml=(folder / "recipe.yaml").read_text(encoding="utf-8"),
        plan=PlanFile.read(folder / "plan.json").choices,
        provenance=_provenance(bundle, subjects) | _epochs(planned, _curve(folder / "logs" / "epochs.csv")),
        card=card,
        notes=[
            *unreadable,
            *warned,
            *(f"Deviates from the report that the recipe is named after: {text}" for text in bundle.recipe.deviates),
            *_notes(events, subjects, data.problems),
        ],
        intervals=_intervals(folder / "evaluation" / "intervals.json"),
        seams=_seams(folder / "evaluation" / "confidence.csv"),
        classes=class_rows(
            data.subjects,
            bundle.targets,
            {"training": subjects.training, "validation": subjects.validation, "held out": subjects.held_out},
        ),
        crop=composite_picture(bundle.pipeline, _trained_on(bundle, subjects, dataset), bundle.channels),
    )
    path = folder / "report.html"
    write_report(path, content)
    return path


def held_out_pairs(folder: Path, dataset: Dataset, evaluation: Evaluation) -> list[Pair]:
    """A run's predictions of its held-out subjects with their references."""
    subjects = {subject.id: subject for subject in dataset.subjects}
    return [
        Pair(name, folder / "predictions" / f"{name}.nii.gz", label, subjects[name])
        for name in evaluation.subjects
        if (label := subjects[name].label) is not None
    ]


def held_out_overlays(folder: Path, bundle: Bundle, dataset: Dataset, evaluation: Evaluation) -> list[Overlay]:
    """What the page shows of a run's held-out subjects."""
    subjects = {subject.id: subject for subject in dataset.subjects}

    def scan(name: str) -> Volume:
        # The pictures show the first channel.
        subject = subjects[name]
        first = bundle.channels[0] if bundle.channels[0] in subject.scans else subject.channels[0]
        return load_scan(subject, [first])

    return overlays_of(evaluation, scan, held_out_pairs(folder, dataset, evaluation), bundle.targets)


def _subjects(folder: Path) -> RunSubjects:
    found = RunSubjects.load(folder)
    if found is None:
        raise TrainingError(f"'{folder / 'subjects.json'}' is missing", fix="train again to write it")
    return found


def _trained_on(bundle: Bundle, subjects: RunSubjects, dataset: Dataset) -> list[Subject]:
    trained = set(subjects.training)
    resample = bundle.recipe.data.resample_channels
    return [
        replace(subject.with_channels(bundle.channels), resample=resample)
        for subject in dataset.subjects
        if subject.id in trained
    ]


def _intervals(path: Path) -> Intervals | None:
    """Width and coverage of the calibrated intervals; None if there are too few subjects for their level."""
    if not path.exists():
        return None
    found = Intervals.read(path)
    return found if found.rows else None


def _seams(path: Path) -> dict[str, tuple[float, int]]:
    """Median of each target's seam score over subjects, and their number; only volumes with several tiles count."""
    if not path.exists():
        return {}
    seams: dict[str, list[float]] = {}
    for row in read_table(path):
        if row["seam"]:
            seams.setdefault(row["target"], []).append(float(row["seam"]))
    return {target: (median(values), len(values)) for target, values in seams.items()}


def _curve(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    with parsing(path, BadFormat):
        return pd.read_csv(StringIO(read_text(path)))


def _provenance(bundle: Bundle, subjects: RunSubjects) -> dict[str, str]:
    p, training = bundle.provenance, bundle.recipe.training
    held_out = "none held out" if p.fold is None else f"{len(p.held_out)} held out (fold {p.fold})"
    return {
        "Data set": f"{subjects.data_set} ({p.layout} layout)",
        "Subjects": f"{len(p.training)} for training, {len(p.validation)} for validation, {held_out}",
        "Weights": f"{training.keep}, step {bundle.metadata.get('step', '?')}, "
        f"validation Dice {bundle.metadata.get('validation_dice', 'not measured')}",
        "Seed": str(p.seed),
        "Started": p.started,
        "Versions": ", ".join(f"{name} {version}" for name, version in p.versions.items()),
    }


def _validated(spec: TrainingSpec) -> str:
    """Which subjects the validation curves use, and what they decide."""
    if spec.validation.held_out:
        return "Validation uses the held-out subjects above and selects nothing: the last weights are kept."
    if spec.keep == "last":
        return "Validation subjects come from the training folds and select nothing: the last weights are kept."
    return (
        "The weights are selected on validation subjects, which come from the training folds, never on the held-out "
        "subjects above."
    )


def _epochs(planned: Planned | None, ended: pd.DataFrame | None) -> dict[str, str]:
    """The length of an epoch, and the minutes that each took; the median where there are many."""
    if planned is None:
        return {}
    facts = {"Epoch": f"{planned.steps_an_epoch} steps ({planned.items} items, {planned.batch_size} per step)"}
    if ended is not None and not ended.empty:
        minutes = ended["minutes"].diff().fillna(ended["minutes"].iloc[0]).tolist()
        shown = ", ".join(f"{m:.2f}" for m in minutes) if len(minutes) <= 10 else f"{median(minutes):.2f} (median)"
        facts |= {"Epochs": f"{len(minutes)} completed", "Minutes per epoch": shown}
    return facts


def _notes(events: Sequence[Event], subjects: RunSubjects, problems: Sequence[Problem]) -> list[str]:
    """What a reader should know before the numbers: a collapse, subjects left out, warnings about the data."""
    notes = [event.text for event in events if isinstance(event, Collapsed | Divided | Fitted | Warned)]
    if subjects.left_out:
        notes.append(f"Left out because of broken files: {', '.join(subjects.left_out)}.")
    counts: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity == "warning":
            counts.setdefault(problem.code, []).append(problem)
    for code, found in counts.items():
        said = found[0].message
        first = f"{found[0].subject}: {said}" if found[0].subject else said[:1].upper() + said[1:]
        more = f" (and {len(found) - 1} more like it)" if len(found) > 1 else ""
        notes.append(f"{first}{more} ({code}).")
    return notes
