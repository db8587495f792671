"""A bundle's card: its facts are those of bundle and evaluation, and what its author wrote stays."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from delineate.bundle import Bundle, Provenance, hidden, save_weights
from delineate.core.targets import Targets
from delineate.errors import BundleError, OutputError
from delineate.evaluation.agreement import agreements
from delineate.evaluation.card import BEGIN, END, MOST_BYTES, card_of, escaped, table, with_facts, write_card
from delineate.evaluation.card_facts import ByRole, CardFacts, Effort, Failures, Result
from delineate.evaluation.table import Evaluation
from delineate.fingerprint import Fingerprint, Range
from delineate.metrics.catalogue import formatted
from delineate.recipe import recipe_from
from delineate.reporting.card import blocks_of, card_beside
from delineate.sampling.tiles import TileGeometry

FORMAT_1 = Path(__file__).parents[1] / "data/bundle_format_1"
SITES = ("Charité", "Umeå")
NAMES = [f"jones{i}" for i in range(8)]


def evaluation() -> Evaluation:
    """Eight subjects at two sites: the tumour is missed in one, and marked in one that has none."""
    rows = []
    for i, name in enumerate(NAMES):
        for target, dice in (("liver", 0.9 - i / 100), ("tumour", 0.4 + i / 20)):
            case, volumes = "both", (10.0 + i, 9.0)
            if target == "tumour" and i < 2:
                case, dice = (("prediction empty", 0.0), ("reference empty", 0.0))[i]
                volumes = ((0.0, 9.0), (9.0, 0.0))[i]
            common = {"subject": name, "site": SITES[i % 2], "patient": f"p-{name}", "target": target, "case": case}
            measured = {"dice": dice, "volume_ml": volumes[0], "reference_volume_ml": volumes[1]}
            rows.append({**common, **measured})
    return Evaluation(pd.DataFrame(rows))


@pytest.fixture
def bundle(tmp_path) -> Bundle:
    recipe = recipe_from(
        {
            "name": "liver <b>T1</b>",
            "description": "Livers.",
            "deviates": ["It has half of the channels."],
            "tiles": {"kind": "patches", "shape": [8, 8, 4]},
            "network": {"kind": "unet", "dimensions": 3, "widths": [2, 4]},
        }
    )
    made = Bundle(
        recipe,
        recipe.pipeline,
        Targets({"liver": (1, 2), "tumour": (2,)}, "overlapping"),
        ("T1", "fat_fraction"),
        TileGeometry((8, 8, 4)),
        (1.5, 1.5, 5.0),
        Fingerprint(17, (Range("spacing", "SI", 4.25, 5.5, 6.75), Range("contrast", "T1", 1.125, 2.5, 3.0))),
        Provenance(
            "cases",
            fold=1,
            seed=21,
            started="2026-01-02",
            training=hidden(NAMES[:3]),
            validation=hidden(NAMES[3:4]),
            held_out=hidden(NAMES[4:6]),
            left_out=hidden(NAMES[6:]),
            versions={"torch": "9.8.7"},
            computed={"device": "Abacus 5", "threads": 3},
        ),
    )
    torch.manual_seed(0)
    made.save(tmp_path / "bundle", made.network().state_dict(), {"step": 7, "validation_dice": 0.8125})
    return Bundle.load(tmp_path / "bundle")


def facts(bundle: Bundle) -> CardFacts:
    return CardFacts(
        effort=Effort(bundle.weights_sha256, 1234, 5.75, True),
        sites=(ByRole(2, 1, 1), ByRole(1, 0, 1)),
        patients=ByRole(3, 1, 2),
        results=(Result.of("held out", bundle, evaluation(), sites=SITES),),
    )


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of a section's tables."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ")[0]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in section.splitlines() if line.startswith("|")]


def test_every_fact_is_what_bundle_and_evaluation_say(bundle) -> None:
    assert bundle.folder is not None
    write_card(bundle.folder, facts(bundle))
    text, measured = card_of(bundle), evaluation()
    assert (bundle.folder / "card.md").read_text(encoding="utf-8") == text
    made_for = rows(text, "Scans it was made for")
    assert ["Channels, in this order", "T1, fat_fraction"] in made_for
    assert ["Targets, with their label values", "liver: 1, 2; tumour: 2 (they may overlap)"] in made_for
    assert ["Spacing, feet to head, mm", "4.25", "5.5", "6.75"] in made_for
    assert ["Contrast of T1", "1.125", "2.5", "3"] in made_for
    assert "17 training scans" in text
    data = dict(pair for pair in rows(text, "Data") if len(pair) == 2)
    assert data["Subjects"] == "3 for training, 1 for validation, 2 held out (fold 1 of 5)"
    assert data["Left out, since their files were broken"] == "2"
    assert data["Simulated"] == "no"
    assert data["Site 1, subjects"] == "2 for training, 1 for validation, 1 held out"
    made = dict(rows(text, "Network and training"))
    parameters = sum(p.numel() for p in bundle.network().parameters())
    assert made["Network"] == f"unet, {parameters:,} trainable parameters"
    assert made["Recipe"] == r"liver \<b\>T1\</b\>: Livers."
    assert made["Seed"] == "21"
    assert made["Training"] == "1,234 steps in 5.8 minutes"
    assert made["Weights kept"] == "step 7, Dice 0.812 on validation subjects"
    assert made["Computed on"] == "device Abacus 5, threads 3"
    assert made["Versions"] == "torch 9.8.7"
    assert "- It has half of the channels." in text
    found = rows(text, "How it was measured")
    for target, estimates in measured.summary().items():
        dice = estimates["dice"]
        low, high = (formatted("dice", end) for end in dice.ci95)
        assert [target, "Dice", f"{dice.mean:.3f} ± {dice.sd:.3f}", f"{low} to {high}", dice.count, "", ""] in found
    for number, site in enumerate(SITES, start=1):
        dice = measured.overall(site)["dice"]
        assert [str(number), "Dice", f"{dice.mean:.3f} ± {dice.sd:.3f}"] in [row[:3] for row in found]
    for agreeing in agreements(measured.table):
        bias = f"{agreeing.absolute.bias:+.2f}".replace("-", "−")
        assert [agreeing.target, "volume, ml", bias] in [[*row[:2], row[2].split(" ")[0]] for row in found]
    assert "- tumour: missed in 1 of the 7 that have it; Dice below 0.5 in 1 of these, the lowest 0.000; " in text
    assert "marked in 1 of the 1 that do not" in text
    digests = {name.strip("`"): digest.strip("`") for name, digest in rows(text, "Files")[2:]}
    for name, digest in digests.items():
        assert hashlib.sha256((bundle.folder / name).read_bytes()).hexdigest() == digest
    assert digests["weights.safetensors"] == bundle.weights_sha256


def test_failures_are_counted_among_those_who_have_the_target(bundle) -> None:
    liver, tumour = Result.of("held out", bundle, evaluation()).failures
    assert liver == Failures("liver", 8, 0, 0, 0, 0, pytest.approx(0.83))
    assert tumour == Failures("tumour", 7, 1, 1, 1, 1, 0.0)


def test_no_name_is_in_a_card(bundle) -> None:
    assert bundle.folder is not None
    write_card(bundle.folder, facts(bundle))
    for name in ("card.md", "card.json"):
        content = (bundle.folder / name).read_text(encoding="utf-8")
        assert not [one for one in (*NAMES, *SITES, "p-jones") if one in content]
        assert str(bundle.folder.parent) not in content


def test_what_its_author_wrote_stays_and_opens(bundle) -> None:
    assert bundle.folder is not None
    write_card(bundle.folder, CardFacts(results=()))
    path = bundle.folder / "card.md"
    assert "not measured" not in path.read_text(encoding="utf-8")
    edited = path.read_text(encoding="utf-8").replace("Not stated. Without a licence", "CC BY 4.0. With this licence")
    edited = edited.replace("How it was measured", "Forged") + "\n## Thanks\n\nTo all.\n"
    path.write_bytes(edited.encode() + b"\xff\xfe of another encoding\n")
    assert Bundle.load(bundle.folder) == bundle, "its text is not sealed"
    write_card(bundle.folder, facts(bundle))
    before, after = edited.encode() + b"\xff\xfe of another encoding\n", path.read_bytes()
    assert after.partition(BEGIN.encode())[0] == before.partition(BEGIN.encode())[0]
    assert after.partition(END.encode())[2] == before.partition(END.encode())[2]
    assert b"Forged" not in after
    assert b"Subjects held out" in after
    copy = bundle.folder.parent / "copy"
    shutil.copytree(bundle.folder, copy)
    assert card_of(Bundle.load(copy)) == card_of(bundle), "passed on with the folder"


PARTS = st.lists(st.sampled_from([BEGIN, END, "text", "\n", "<!--", "\n## Licence\n", "ü"]), max_size=8).map("".join)


@given(PARTS, PARTS)
def test_facts_are_replaced_and_nothing_else(before: str, after: str) -> None:
    one, two = (f"{BEGIN}\n{facts}\n{END}" for facts in ("old", "new"))
    text = with_facts(before + one + after, two)
    assert with_facts(text, two) == text
    assert two in text
    assert one not in text
    pair = re.compile(f"{BEGIN}(?:(?!{BEGIN}|{END}).)*{END}", re.DOTALL)
    assert pair.split(text) == pair.split(before + one + after), "whatever is outside"


@given(PARTS)
def test_facts_that_were_deleted_come_back_at_the_end(text: str) -> None:
    new = f"{BEGIN}\nnew\n{END}"
    found = with_facts(text.replace(END, ""), new)
    assert found.endswith(f"{new}\n")
    assert found.startswith(text.replace(END, "").strip())


def test_results_of_weights_that_were_replaced_are_not_shown(bundle) -> None:
    assert bundle.folder is not None
    write_card(bundle.folder, facts(bundle))
    save_weights(bundle.folder, {k: v + 1 for k, v in bundle.trained_network().state_dict().items()}, {"step": 9})
    text = card_of(Bundle.load(bundle.folder))
    assert "unknown" in rows_after(text, "How it was measured")
    assert "1,234 steps" not in text
    assert "2 for training, 1 for validation, 1 held out" in text, "who was trained on is still known"


def rows_after(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n", 1)[1]


def test_a_result_takes_the_place_of_one_with_its_name(bundle) -> None:
    tests = [
        Result.of("test", bundle, evaluation(), name=name, notes=notes) for name, notes in (("B", ()), ("B", ("!",)))
    ]
    found = CardFacts(results=()).with_result(tests[0]).with_result(tests[1]).with_result(replace(tests[0], name="C"))
    assert [(one.name, one.notes) for one in found.results] == [("B", ("!",)), ("C", ())]
    many = CardFacts(results=tuple(replace(tests[0], name=str(i)) for i in range(64)))
    with pytest.raises(BundleError, match="64 results"):
        many.with_result(tests[0])


def test_a_bundle_without_a_card_has_one_that_says_what_is_missing(bundle) -> None:
    for one in (bundle, Bundle.load(FORMAT_1)):
        text = card_of(one)
        assert "unknown" in rows_after(text, "How it was measured")
        assert rows_after(text, "Licence").lstrip().startswith("Not stated.")
        assert rows(text, "Files")[-1] == ["`weights.safetensors`", f"`{one.weights_sha256}`"] or one is bundle
    with pytest.raises(BundleError, match="format 1"):
        write_card(shutil.copytree(FORMAT_1, bundle.folder.parent / "old"), CardFacts(results=()))
    simulated = replace(bundle, provenance=replace(bundle.provenance, simulated=True))
    assert "never meant for real ones" in card_of(simulated)


def test_facts_that_would_not_read_back_are_not_written(bundle) -> None:
    assert bundle.folder is not None
    before = {path.name: path.read_bytes() for path in bundle.folder.iterdir()}
    result = Result.of("test", bundle, evaluation(), name="x" * 1001)
    with pytest.raises(BundleError, match="name"):
        write_card(bundle.folder, CardFacts(results=(result,)))
    assert {path.name: path.read_bytes() for path in bundle.folder.iterdir()} == before


STRANGE: dict[str, Callable[[Path], object]] = {
    "too long": lambda path: path.write_bytes(b"x" * (MOST_BYTES + 1)),
    "a folder": lambda path: path.mkdir(),
    "a pipe": os.mkfifo,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to itself": lambda path: path.symlink_to(path),
}


@pytest.mark.parametrize("what", STRANGE)
def test_a_strange_card_is_refused_and_nothing_else_is(what: str, bundle) -> None:
    assert bundle.folder is not None
    STRANGE[what](bundle.folder / "card.md")
    assert Bundle.load(bundle.folder) == bundle
    before = (bundle.folder / "bundle.json").read_bytes()
    for use in (lambda: card_of(bundle), lambda: write_card(bundle.folder, CardFacts(results=()))):
        with pytest.raises(BundleError, match=r"card\.md") as caught:
            use()
        assert caught.value.fix
    assert (bundle.folder / "bundle.json").read_bytes() == before
    page, notes = card_beside(bundle.folder.parent, bundle)
    assert (page, len(notes)) == ("", 1)


def test_a_bundle_that_cannot_be_written_says_so(bundle, no_file_beyond) -> None:
    before = {path.name: path.read_bytes() for path in bundle.folder.iterdir()}
    with no_file_beyond(0), pytest.raises(OutputError, match="cannot be written"):
        write_card(bundle.folder, CardFacts(results=()))
    assert {path.name: path.read_bytes() for path in bundle.folder.iterdir()} == before


EVIL = ["<script>x</script>", f"{END} <b>", "a | b", "`c`", "[d](e)", "\\", "**f**", "two\nlines", "\x1b[2J", "# g"]


@given(st.lists(st.sampled_from(EVIL) | st.text(max_size=20), min_size=2, max_size=6))
def test_a_name_is_one_cell_whatever_it_contains(names: list[str]) -> None:
    """The page shows what was meant, and no name ends the facts."""
    from delineate.core.text import printable

    shown = [printable(name) for name in names]
    text = table(["h"] * len(names), [[escaped(name) for name in names]])
    [(kind, content)] = blocks_of(f"{BEGIN}\n{text}\n{END}")
    assert kind == "table"
    assert [" ".join(cell.split()) for cell in content[-1]] == [" ".join(name.split()) for name in shown]
    assert with_facts(f"{BEGIN}\n{text}\n{END}", "x") == "x"


def test_a_page_is_made_of_headings_tables_lists_and_paragraphs() -> None:
    text = f"""# T

## A
x
y

- one
- `two`

| | |
|---|---|
| k | v |

{BEGIN}

### B

<i>z</i>
1. c
{END}
"""
    assert list(blocks_of(text)) == [
        ("heading", "A"),
        ("paragraph", "x y"),
        ("list", ["one", "two"]),
        ("facts", [["k", "v"]]),
        ("subheading", "B"),
        ("paragraph", "<i>z</i>"),
        ("list", ["c"]),
    ]
