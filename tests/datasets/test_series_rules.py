"""Rules that pick DICOM series, in YAML, in Python and in recipes; and what they would pick, shown beforehand."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from delineate.cli.app import app
from delineate.cli.parsing import data_changes, parse_patterns, parse_reading
from delineate.datasets.layouts import open_dataset
from delineate.datasets.series_rules import SeriesRule, read_rules
from delineate.errors import RecipeError, SeveralSeries, UnknownLayout
from delineate.io.dicom_series import the_series
from delineate.recipe import DataSpec, to_yaml
from delineate.studies.running import _reading

RULES = """\
T1: {description: "*t1*", protocol: "head*", modality: MR, number: 3}
FLAIR: "*flair*"
"""
ONE = np.arange(27).reshape(3, 3, 3)


@pytest.fixture
def archive(tmp_path: Path, save_series) -> Path:
    """Two series called t1, which differ in number and protocol; the second patient lacks one."""
    for patient in ("ann", "bob"):
        own = {"study": patient, "PatientID": patient}
        save_series(f"archive/{patient}/a", ONE, SeriesDescription="T1", ProtocolName="head", SeriesNumber=3, **own)
        save_series(f"archive/{patient}/b", ONE, SeriesDescription="T1", ProtocolName="neck", SeriesNumber=4, **own)
    save_series("archive/ann/c", ONE, study="ann", PatientID="ann", SeriesDescription="FLAIR dark", SeriesNumber=5)
    return tmp_path / "archive"


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("rule", "fits"),
    [
        ({}, True),
        ({"description": "t?"}, True),
        ({"description": "t1*", "number": 4}, False),
        ({"protocol": "HEAD"}, True),
        ({"protocol": "neck"}, False),
        ({"modality": "CT"}, False),
        ({"folder": "A"}, True),
        ({"folder": "ann/*"}, True),
        ({"folder": "bob/*"}, False),
        ({"folder": "*"}, True),
    ],
)
def test_every_field_of_a_rule_counts(rule: dict, fits: bool, archive: Path) -> None:
    assert SeriesRule.model_validate(rule).fits(the_series(archive / "ann/a")) is fits


def test_one_file_of_rules_says_what_every_way_to_give_them_says(archive: Path, tmp_path: Path) -> None:
    file = written(tmp_path / "rules.yaml", RULES)
    images, label = parse_reading(None, None, file)
    assert label is None
    by_options = parse_patterns(["T1={description: '*t1*', protocol: head*, modality: MR, number: 3}", "FLAIR=*flair*"])
    recipe = DataSpec.of_changes(data_changes("auto", None, None, None, file))
    reading = _reading(DataSpec.model_validate(recipe.model_dump()))
    again = parse_patterns([text for flag, text in pairwise(reading) if flag == "--images"])
    for asked in (images, by_options, recipe.images, again):
        ann, bob = open_dataset(archive, images=asked).subjects
        assert {name: path.name for name, path in ann.scans.items()} == {"T1": "a", "FLAIR": "c"}
        assert {name: path.name for name, path in bob.scans.items()} == {"T1": "a"}


def test_a_rule_that_picks_several_lists_them_and_none_is_chosen(archive: Path) -> None:
    with pytest.raises(
        SeveralSeries, match=r"T1 of 'ann' could be 'T1' \(MR 3, 3 slices\), 'T1' \(MR 4.*; T1 of 'bob'"
    ):
        open_dataset(archive, images={"T1": {"modality": "MR", "description": "T1"}})


def test_studies_of_which_nothing_is_picked_are_left_out_and_named(archive: Path) -> None:
    dataset = open_dataset(archive, images={"FLAIR": "*flair*"})
    assert [subject.id for subject in dataset.subjects] == ["ann"]
    assert dataset.notes == ("1 studies, of which FLAIR (description *flair*) picks no series, are left out: bob",)
    with pytest.raises(UnknownLayout, match=r"no series in .* matches 'x'"):
        open_dataset(archive, images="x")


def test_the_dry_run_shows_what_each_rule_picks_and_what_is_left(archive: Path, tmp_path: Path) -> None:
    def run(text: str, *options: str, code: int = 0) -> str:
        file = written(tmp_path / "rules.yaml", text)
        done = CliRunner().invoke(app, ["data", "series", str(archive), "--rules", str(file), *options])
        assert done.exit_code == code, done.output
        return done.output

    found = json.loads(run(RULES + "label: {modality: SEG}\n", "--json"))["studies"]
    picked = [
        {name: [series["number"] for series in some] for name, some in study["picked"].items()} for study in found
    ]
    assert [study["study"] for study in found] == ["ann", "bob"]
    assert picked == [{"T1": [3], "FLAIR": [5]}, {"T1": [3], "FLAIR": []}]
    assert [[series["number"] for series in study["left"]] for study in found] == [[4], [4]]
    text = run(RULES)
    rows = [line.split() for line in text.splitlines()]
    assert ["ann", "left", "'T1'", "(MR", "4,", "3", "slices)", str(archive / "ann/b")] in rows
    assert ["bob", "FLAIR", "none"] in rows
    several = json.loads(run('T1: "t1"\n', "--json", code=1))["studies"]
    assert [study["ambiguous"] for study in several] == [["T1"], ["T1"]]
    assert "T1: several" in run('T1: "t1"\n', code=1)
    run("T1: {number: 99}\n", code=1)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("T1: {descripton: x}", "T1.descripton: no such field; did you mean 'description'?"),
        ("T1: {number: three}\nT2: {modality: mr}", "T1.number: Input should be a valid integer"),
        ("T1: {number: three}\nT2: {modality: mr}", "T2.modality: String should match pattern"),
        ("T1: [x]", "T1: Input should be a valid dictionary"),
        ("T1: {number: -1}", "T1.number: Input should be greater than or equal to 0"),
        ("{}", "has no rule that picks a channel"),
        ("label: {modality: SEG}", "has no rule that picks a channel"),
        ("just text", "has no rule that picks a channel"),
        ("1: x", "1: not a name"),
        ("\n".join(f"a{i}: x" for i in range(65)), "has 65 rules; write 64 at most"),
    ],
)
def test_what_is_no_rule_is_refused_with_its_place(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as raised:
        read_rules(written(tmp_path / "rules.yaml", text))
    assert said in str(raised.value)


def test_rules_are_for_dicom_and_take_the_place_of_patterns(save_scan, tmp_path: Path) -> None:
    save_scan("a/t1.nii")
    with pytest.raises(UnknownLayout, match="rules for DICOM series, but no DICOM"):
        open_dataset(tmp_path, images={"T1": {"number": 3}})
    file = written(tmp_path / "rules.yaml", RULES)
    done = CliRunner().invoke(app, ["data", "inspect", str(tmp_path), "--rules", str(file), "--images", "x"])
    assert done.exit_code == 2
    assert "leave out --images" in done.output


def test_a_recipe_with_rules_survives_yaml() -> None:
    spec = DataSpec(images={"T1": SeriesRule(number=3), "T2": "*t2*"}, labels=SeriesRule(modality="SEG"))
    from delineate.io.settings import parse_yaml

    assert DataSpec.model_validate(parse_yaml(to_yaml(spec.model_dump(mode="json")), "x", RecipeError)) == spec
