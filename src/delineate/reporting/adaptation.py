"""The page and the tables of an adaptation."""

from __future__ import annotations

import json
from pathlib import Path

from delineate.bundle import Bundle
from delineate.evaluation.change import Change
from delineate.evaluation.table import plain
from delineate.io.files import writing_beside
from delineate.io.tables import write_table
from delineate.reporting.card import card_beside
from delineate.reporting.html import AdaptationReport, write_report
from delineate.training.adapted import Adapted

NEW, ORIGINAL = "new scans", "original scans"
_COLUMNS = ("scans", "subject", "site", "target", "dice_before", "dice_after", "change")


def write_adaptation_report(found: Adapted) -> Path:
    """Write ``report.html`` with the card's page, ``result.json`` and ``subjects.csv`` of a finished adaptation.

    Returns the report's path.
    """
    changes = changes_of(found)
    rows = [{"scans": group, **row} for group, change in changes.items() for row in change.rows]
    write_table(found.folder / "subjects.csv", _COLUMNS, rows)
    with writing_beside(found.folder / "result.json") as beside:
        beside.write_text(json.dumps(plain(found.as_dict()), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    page = found.folder / "report.html"
    card, unreadable = card_beside(found.folder, Bundle.load(found.folder / "bundle"))
    write_report(
        page,
        AdaptationReport(
            title=found.plan.recipe.name,
            description=described(found),
            simulated=found.simulated,
            notes=[*unreadable, *found.notes],
            changes=changes,
            card=card,
        ),
    )
    return page


def changes_of(found: Adapted) -> dict[str, Change]:
    """What changed on each group of subjects that was measured."""
    both = {NEW: found.gain, ORIGINAL: found.forgetting}
    return {name: change for name, change in both.items() if change is not None}


def described(found: Adapted) -> str:
    """How the adapted bundle was made, in a sentence or two."""
    plan, share = found.plan, found.share or 0.0
    rehearsed = f", while rehearsing {len(plan.rehearsed)} original ones" if plan.rehearsed else ""
    subjects = "1 new subject" if len(plan.new) == 1 else f"{len(plan.new)} new subjects"
    mixture = (
        f"The weights are {share:.0%} fine-tuned and {1 - share:.0%} original."
        if share < 1
        else "All weights are the fine-tuned ones."
    )
    return f"Fine-tuned on {subjects} of {plan.data_set}{rehearsed}. {mixture}"
