"""A bundle calibrated on labelled subjects that it has not seen: their errors make the intervals of its predictions."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from delineate.bundle import Bundle, Calibrated, hidden
from delineate.calibration import LEVEL, Calibration, Confidence, Intervals, check_intervals
from delineate.core.subject import Subject
from delineate.datasets.dataset import Dataset
from delineate.datasets.inspection import Inspection, inspect
from delineate.errors import BrokenSubjects, TooFewSubjects
from delineate.evaluation.card import write_card
from delineate.evaluation.card_facts import CardFacts, Result
from delineate.evaluation.held_out import HeldOut, calibration_cases
from delineate.evaluation.table import Evaluation
from delineate.fingerprint import fingerprint_of
from delineate.io.pseudonyms import key_id, pseudonym
from delineate.metrics.conformal import Conformal

INTERVALS = "intervals.json"


def check_enough(subjects: Sequence[Subject]) -> None:
    """Raise :class:`TooFewSubjects` for fewer patients than an interval needs."""
    patients, needed = len({subject.patient for subject in subjects}), Conformal.fewest(LEVEL)
    if patients < needed:
        raise TooFewSubjects(
            f"{patients} patients with a label that the bundle has not seen are too few: an interval for "
            f"{LEVEL:.0%} of new scans needs {needed}",
            fix=f"add labelled scans of {needed - patients} more",
        )


def inspected(bundle: Bundle, dataset: Dataset, held_out: HeldOut) -> Inspection:
    """What the scans to calibrate on look like, in the bundle's channels.

    Raises :class:`BrokenSubjects` where one cannot be used, :class:`MissingFile` where one lacks a channel.
    """
    chosen = tuple(subject.with_channels(bundle.channels) for subject in held_out.subjects)
    found = inspect(replace(dataset, subjects=chosen), targets=held_out.shared.of_references)
    if found.broken:
        raise BrokenSubjects(
            f"{', '.join(found.broken)[:300]} cannot be used: {found.errors[0].message}",
            fix="repair them, or leave them out: `delineate data inspect` lists every problem",
        )
    return found


def calibrated(
    bundle: Bundle,
    held_out: HeldOut,
    inspection: Inspection,
    confidences: Mapping[str, Mapping[str, Confidence]],
    evaluation: Evaluation,
    folder: Path,
    name: str,
) -> tuple[Bundle, Intervals, tuple[str, ...]]:
    """Write a copy of ``bundle`` with the errors of these predictions into ``folder``; the weights stay as they are.

    Returns it with how its intervals do, and what a reader should know. ``name`` is what the user calls the data.
    Raises :class:`TooFewSubjects`, before anything is written, if no target was found in enough patients.
    """
    cases = calibration_cases(held_out.subjects, confidences, evaluation)
    made = Calibration.of(cases)
    needed = Conformal.fewest(LEVEL)
    found = {
        target: min(len(made.dice[target].errors), len(made.log_volume[target].errors)) if target in made.dice else 0
        for target in bundle.targets.names
    }
    if max(found.values()) < needed:
        raise TooFewSubjects(
            f"predictions found {', '.join(f'{target} in {n}' for target, n in found.items())} patients, and an "
            f"interval for {LEVEL:.0%} of new scans needs {needed}",
            fix="add labelled scans of other patients, or train on such scans",
        )
    notes = [
        *held_out.notes,
        *(f"No intervals for {t}: it was found in {n} patients, of {needed}." for t, n in found.items() if n < needed),
    ]
    files = sorted(value for row in inspection.rows for value in row.hashes.values())
    about = Calibrated(
        name=name,
        on=datetime.now(UTC).date().isoformat(),
        key=key_id(),
        subjects=hidden([subject.id for subject in held_out.subjects]),
        patients=len({subject.patient for subject in held_out.subjects}),
        sites=len({subject.site for subject in held_out.subjects}),
        files=pseudonym("files", hashlib.sha256("\n".join(files).encode()).hexdigest()),
        unseen="stated" if held_out.stated else "recorded",
        fingerprint=fingerprint_of(inspection.rows),
    )
    copy = replace(bundle, calibrated=about).save_copy(folder)
    made.save(folder)
    result = Result.of("calibration", copy, evaluation, name=name, notes=notes)
    write_card(folder, CardFacts.of(bundle).with_result(result), like=bundle.folder)
    return Bundle.load(folder), Intervals(level=LEVEL, rows=check_intervals(cases)), tuple(notes)
