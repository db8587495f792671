"""A bundle's model card as people read it: ``card.md``, which may be edited, with the facts between two markers.

What stands outside the markers is the author's and is never changed. The facts are always those of the bundle's sealed
files, whatever ``card.md`` says there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import isfinite
from pathlib import Path
from textwrap import fill
from typing import Final

import torch

from delineate.bundle import CARD, CARD_FACTS, FORMAT, Bundle, Calibrated
from delineate.core.text import printable
from delineate.errors import BundleError
from delineate.evaluation.agreement import signed
from delineate.evaluation.card_facts import POOR_DICE, ByRole, CardFacts, Figure, Result
from delineate.evaluation.table import averaged
from delineate.fingerprint import PATIENT_AXES, TOLERATED, Range
from delineate.installed import name_of
from delineate.io.files import writing_beside
from delineate.io.overwriting import check_folder
from delineate.io.sealed import MANIFEST, Sealed, opened, read_json, read_small, replace_file
from delineate.metrics.catalogue import METRICS, formatted
from delineate.metrics.statistics import fewest_patients
from delineate.networks.cost import count_parameters
from delineate.specification import specifications_in, to_json

BEGIN: Final = "<!-- facts: written by Delineate, edits down to the end of facts are lost -->"
END: Final = "<!-- end of facts -->"
MOST_BYTES: Final = 2**18
"""Longest card that is read."""

_FACTS = re.compile(f"{re.escape(BEGIN)}(?:(?!{re.escape(BEGIN)}|{re.escape(END)}).)*{re.escape(END)}", re.DOTALL)
_LONGEST = 1000  # of a name or a description


def write_card(folder: Path, facts: CardFacts, *, like: Path | None = None) -> None:
    """Write both files of a bundle's card, and leave what the author wrote.

    A card that is not there yet begins with the author's text of the bundle ``like``, or says what is missing.
    Raises as :func:`check_card` does, and :class:`BundleError` for facts that could not be read back.
    """
    check_card(folder)
    begun = _author_text(folder) or (None if like is None else _author_text(like))
    text = to_json(facts) + "\n"
    CardFacts.of_bytes(text.encode(), folder / CARD_FACTS)
    replace_file(folder, CARD_FACTS, lambda path: path.write_text(text, encoding="utf-8"))
    bundle = Bundle.load(folder)
    content = with_facts(begun or _beginning(bundle), facts_of(bundle))
    with writing_beside(folder / CARD) as path:
        path.write_bytes(content.encode("utf-8", "surrogateescape"))


def check_card(folder: Path) -> None:
    """Raise an error where a bundle's card could not be written.

    :class:`BundleError` if ``card.md`` cannot be read, or the bundle is an installed model's or has format 1, whose
    files cannot be added to; :class:`OutputError` if nothing can be written to the folder.
    """
    if (name := name_of(folder)) is not None:
        raise BundleError(
            f"'{folder}' belongs to the installed model '{name}', whose card is its author's",
            fix=f"fetch a copy, and use that: delineate models fetch {name} -o FOLDER",
        )
    check_folder(folder)
    _author_text(folder)
    if read_json(read_small(folder / MANIFEST), folder / MANIFEST).get("format") != FORMAT:
        raise BundleError(f"'{folder}' has format 1, which keeps no card", fix="resume its run, which converts it")


def card_of(bundle: Bundle) -> str:
    """A bundle's card as Markdown: its author's text, with the facts as they are. Raises :class:`BundleError`."""
    text = "" if bundle.folder is None else _author_text(bundle.folder)
    return with_facts(text or _beginning(bundle), facts_of(bundle))


def with_facts(text: str, facts: str) -> str:
    """``text`` with these facts in place of those it has, or at its end; all else stays as it is."""
    replaced, times = _FACTS.subn(lambda _: facts, text)
    return replaced if times else f"{text.rstrip()}\n\n{facts}\n".lstrip()


def _author_text(folder: Path) -> str:
    """What ``card.md`` holds, bytes that are no text included; empty if there is none."""
    path = folder / CARD
    if path.is_symlink():  # the page, which is passed on, would show what it leads to
        raise BundleError(f"'{path}' is a link", fix="put a file in its place, or remove it")
    if not path.exists():
        return ""
    with opened(path) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise BundleError(f"'{path}' has more than {MOST_BYTES:,} bytes", fix="shorten it")
    return content.decode("utf-8", "surrogateescape")


def _beginning(bundle: Bundle) -> str:
    """The author's part before its author has written anything: honest about what nobody has said."""
    purpose = (
        "To try out software. The network was trained on simulated scans and was never meant for real ones."
        if bundle.provenance.simulated
        else "Research, on scans like those that it was trained on, which are described below."
    )
    sections = {
        "Intended use": f"{purpose} It is not a medical device, and not for diagnosis or treatment. Somebody who can "
        "judge a result has to look at it before it is used.",
        "Limits": "Nothing is known about scans unlike those it was trained on: another scanner, sequence, contrast "
        "agent, part of the body, age or disease. `delineate predict` reports a scan whose spacing, field of view or "
        "contrast is unusual; it notices nothing else.",
        "Where the data come from": "Not stated. Say who was scanned, where and with what, who drew the labels, and "
        "who allowed this use. Name no patient.",
        "Licence": "Not stated. Without a licence, nobody but the owner may use, change or pass on these weights.",
        "Contact": "Not stated.",
    }
    parts = (f"## {title}\n\n{fill(text, 100)}\n" for title, text in sections.items())
    return "\n".join((f"# Model card: {escaped(bundle.recipe.name)}\n", *parts))


def facts_of(bundle: Bundle) -> str:
    """What a bundle's sealed files say, as Markdown, with the markers around it."""
    facts = CardFacts.of(bundle)
    sections = {
        "Scans it was made for": _made_for(bundle),
        "Data": _data(bundle, facts),
        "Network and training": _training(bundle, facts),
        "How it was measured": _measured(facts),
        "Files": _files(bundle),
    }
    text = "\n\n".join(f"## {title}\n\n" + "\n\n".join(parts) for title, parts in sections.items())
    return f"{BEGIN}\n\n{text}\n\n{END}"


def escaped(text: str) -> str:
    """A name as one line of Markdown that shows it as it is, whatever it contains."""
    shown = printable(text)
    shown = shown if len(shown) <= _LONGEST else f"{shown[:_LONGEST]}…"
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", shown)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in Markdown; cells are already :func:`escaped`."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _pairs(values: Mapping[str, str]) -> str:
    return table(["", ""], ([name, value] for name, value in values.items() if value))


def _made_for(bundle: Bundle) -> Iterator[str]:
    fingerprint, targets = bundle.familiar, bundle.targets
    values = {name: ", ".join(map(str, numbers)) for name, numbers in targets.values.items()}
    yield _pairs(
        {
            "Channels, in this order": ", ".join(map(escaped, bundle.channels)),
            "Targets, with their label values": "; ".join(f"{escaped(name)}: {v}" for name, v in values.items())
            + ("" if targets.exclusive else " (they may overlap)"),
            "Spacing after preprocessing, mm": _by(bundle.spacing_mm),
        }
    )
    known = "training scan" if bundle.calibrated is None else "calibration scan"
    if not fingerprint.ranges:
        yield "What these scans look like was not recorded."
        return
    yield (
        f"Ranges over the {_counted(fingerprint.subjects, known)}. Out of range, and reported by "
        f"`delineate predict`, is a scan whose spacing or field of view lies beyond these by more than a factor of "
        f"{TOLERATED['spacing']:g}, or its contrast by more than {TOLERATED['contrast']:g}."
    )
    rows = ([_named(r), f"{r.min:.4g}", f"{r.median:.4g}", f"{r.max:.4g}"] for r in fingerprint.ranges)
    yield table(["Quantity", "Least", "Median", "Most"], rows)


def _named(known: Range) -> str:
    if known.quantity in ("spacing", "field_of_view"):
        title = known.quantity.replace("_", " ").capitalize()
        return f"{title}, {escaped(PATIENT_AXES.get(known.of, known.of))}, mm"
    if known.quantity == "contrast":
        return f"Contrast of {escaped(known.of)}"
    return f"Volume of {escaped(known.of)}, ml"


def _data(bundle: Bundle, facts: CardFacts) -> Iterator[str]:
    known = bundle.provenance
    fold = "" if known.fold is None else f" (fold {known.fold} of {bundle.recipe.training.folds})"
    subjects = ByRole(len(known.training), len(known.validation), len(known.held_out))
    numbered = enumerate(facts.sites, start=1)
    yield _pairs(
        {
            "Simulated": "yes: no patient was scanned" if known.simulated else "no",
            "Subjects": f"{_roles(subjects)}{fold if known.held_out else ''}",
            "Left out, since their files were broken": str(len(known.left_out) or ""),
            "Patients": "" if facts.patients is None else _roles(facts.patients),
            "Sites": f"{len(facts.sites)}" if facts.sites else "",
            **({f"Site {i}, subjects": _roles(site) for i, site in numbered} if len(facts.sites) > 1 else {}),
            "Adapted": "its subjects include those of the original, as far as they are known"
            if known.adapted_from
            else "",
        }
    )
    if bundle.calibrated is not None:
        yield _calibration(bundle.calibrated)
    if len(facts.sites) > 1:
        yield "Sites are numbered in the alphabetical order of their names, which the bundle does not hold."


def _calibration(known: Calibrated) -> str:
    seen = {
        "recorded": "by what the bundle records, its training has not seen them",
        "stated": "that its training has not seen them is the word of whoever calibrated it",
    }
    return (
        f"Calibrated: intervals of Dice and volume come from {_counted(len(known.subjects), 'subject')} of "
        f"{_counted(known.patients, 'patient')} at {_counted(known.sites, 'site')}, {escaped(known.name)}, on "
        f"{escaped(known.on)}; {seen[known.unseen]}. They hold for scans like these, and for no others."
    )


def _training(bundle: Bundle, facts: CardFacts) -> Iterator[str]:
    recipe, known, effort = bundle.recipe, bundle.provenance, facts.effort
    kinds = [str(part.kind) for part in specifications_in(recipe.loss) if hasattr(part, "kind")]
    with torch.device("meta"):
        parameters, _ = count_parameters(bundle.network())
    computed = dict(known.computed)
    kept = bundle.metadata if bundle.weights is not None else {}
    dice = kept.get("validation_dice")
    took = "" if effort is None else _counted(effort.steps, "step")
    if effort is not None and effort.minutes is not None:
        took += f" in {effort.minutes:.1f} minutes"
    if effort is not None and not effort.finished:
        took += "; stopped before the end, to be resumed"
    start = "adapted from other weights" if known.adapted_from else "weights of another training"
    yield _pairs(
        {
            "Recipe": escaped(recipe.name) + (f": {escaped(recipe.description)}" if recipe.description else ""),
            "Network": f"{escaped(recipe.network.kind)}, {_counted(parameters, 'trainable parameter')}",
            "Tiles, voxels": _by(bundle.geometry.shape),
            "Loss": escaped(" of ".join((kinds[0], ", ".join(kinds[1:])) if len(kinds) > 1 else kinds)),
            "Started from": start if known.adapted_from or recipe.start is not None else "random weights",
            "Training": took,
            "Weights kept": f"step {escaped(kept.get('step', '?'))}"
            + (f", Dice {_decimal(dice)} on validation subjects" if dice is not None else "")
            if kept
            else "none yet",
            "Seed": str(known.seed),
            "Started": escaped(known.started),
            "Computed on": ", ".join(f"{escaped(name)} {escaped(str(value))}" for name, value in computed.items()),
            "Versions": ", ".join(f"{escaped(name)} {escaped(value)}" for name, value in known.versions.items()),
            "Parts of other packages": ", ".join(map(escaped, known.requires)),
            "Adapted from weights with SHA-256": known.adapted_from or "",
        }
    )
    if recipe.deviates:
        yield "The recipe departs from the report that it is named after:"
        yield "\n".join(f"- {escaped(text)}" for text in recipe.deviates)


def _measured(facts: CardFacts) -> Iterator[str]:
    if not facts.results:
        yield "It was not: how well it does on subjects that it has not seen is unknown."
        return
    yield (
        "Means are over patients, ± SD, each patient's scans averaged first; intervals are of the mean, by bootstrap "
        "over patients. Failed scans (the target missed, or marked where there is none) are counted, never averaged."
    )
    for result in facts.results:
        yield from _of_result(result)


_TITLES = {
    "held out": "Subjects held out from training",
    "test": "A test after training",
    "adapted": "New scans, each predicted by a training without its patient, not by these very weights",
    "original": "Original scans that no training has seen",
    "calibration": "Subjects whose errors make the intervals of predictions",
}


def _of_result(result: Result) -> Iterator[str]:
    name = f": {escaped(result.name)}" if result.name else ""
    sites = f", {_counted(result.sites, 'site')}" if result.sites > 1 else ""
    yield f"### {_TITLES[result.kind]}{name}"
    yield (
        f"{_counted(result.subjects, 'subject')} of {_counted(result.patients, 'patient')}{sites}; "
        f"{'simulated scans; ' * result.simulated}measured {escaped(result.measured)}."
        + " So few patients say little about others." * (result.patients < fewest_patients())
        + "".join(f" {escaped(text)}" for text in result.notes)
    )
    columns = ["Metric", "Mean ± SD", "95 % interval", "n", "Failed", "Undefined"]
    whole, by_site = ([f for f in result.figures if bool(f.site) == sited] for sited in (False, True))
    yield table(["Target", *columns], ([escaped(f.target), *_cells(f)] for f in whole))
    if by_site:
        numbered = "as above" if result.kind == "held out" else "within these data"
        yield f"By site, numbered {numbered}, {escaped(by_site[0].target)}:"
        yield table(["Site", *columns], ([str(f.site), *_cells(f)] for f in by_site))
    if result.biases:
        yield "Bias, prediction minus reference, with the limits of agreement (bias ± 1.96 SD):"
        rows = (
            [
                escaped(b.target),
                escaped(", ".join(filter(None, (b.of, b.unit)))),
                f"{signed(b.bias)} ({signed(b.ci95[0])} to {signed(b.ci95[1])})",
                f"{signed(b.limits[0])} to {signed(b.limits[1])}",
                str(b.n),
            ]
            for b in result.biases
        )
        yield table(["Target", "Of", "Bias (95 % interval)", "Limits", "n"], rows)
    else:
        yield "Too few patients have a target to say how biased volumes are."
    if result.quantity:
        sides = "".join(
            f" {escaped(side.target)} is on the right side of the threshold in {side.right} of {side.n}."
            for side in result.sides
        )
        yield f"Measured within the targets: {escaped(result.quantity)}.{sides}"
    yield "Failures:"
    lines = []
    for f in result.failures:
        parts = [f"missed in {f.missed} of the {f.present} that have it"] if f.present else ["nobody has it"]
        if f.poor is not None and f.worst is not None:
            parts.append(f"Dice below {POOR_DICE:g} in {f.poor} of these, the lowest {_decimal(str(f.worst))}")
        if f.absent:
            parts.append(f"marked in {f.invented} of the {f.absent} that do not")
        lines.append(f"- {escaped(f.target)}: {'; '.join(parts)}")
    yield "\n".join(lines)


def _cells(figure: Figure) -> list[str]:
    estimate, known = figure.estimate, figure.metric in METRICS
    low, high = estimate.ci95
    ends = [formatted(figure.metric, end) if known else f"{end:.3g}" for end in (low, high)]
    return [
        escaped(figure.title),
        averaged(figure.metric, estimate) if known else f"{estimate.mean:.3g}",
        " to ".join(ends) if isfinite(low) else "–",
        estimate.count,
        estimate.failures,
        str(estimate.undefined or ""),
    ]


def _files(bundle: Bundle) -> Iterator[str]:
    if bundle.folder is None or bundle.weights is None:
        yield "There are no weights yet."
        return
    digests = {"weights.safetensors": bundle.weights.sha256}
    if read_json(read_small(bundle.folder / MANIFEST), bundle.folder / MANIFEST).get("format") == FORMAT:
        stamps = Sealed.open(bundle.folder).stamps
        digests = {name: known[-1].sha256 for name, known in stamps.items() if known and known[-1] is not None}
    digests.pop(CARD_FACTS, None)  # holds these very facts
    rows = ([f"`{escaped(name)}`", f"`{digest}`"] for name, digest in digests.items())
    yield table(["File", "SHA-256"], rows)
    yield "`card.md` can be changed without a trace; `delineate card` shows the facts as these files have them."


def _roles(found: ByRole) -> str:
    parts = {"for training": found.training, "for validation": found.validation, "held out": found.held_out}
    return ", ".join(f"{n} {role}" for role, n in parts.items() if n) or "none"


def _counted(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def _by(values: Sequence[float]) -> str:
    return " × ".join(f"{value:.4g}" for value in values)


def _decimal(text: str) -> str:
    try:
        return f"{float(text):.3f}"
    except ValueError:
        return escaped(text)
