"""What is written down reads back equal: every specification, with every field at another value than its default."""

from __future__ import annotations

import importlib
import inspect
import json
import pkgutil
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from math import inf
from typing import Any

import pytest
from pydantic import ValidationError

import delineate
from delineate.bundle import Calibrated, Provenance, _Description
from delineate.calibration import CalibrationFile, IntervalCheck, Intervals
from delineate.compute import Choice, PlanFile
from delineate.core.targets import Targets
from delineate.datasets.examination import Problem, SubjectRow
from delineate.datasets.inspection import InspectionFile, Intensity
from delineate.datasets.splits import Split, SplitFile, load_split, save_split
from delineate.errors import RecipeError
from delineate.evaluation.card_facts import Bias, ByRole, CardFacts, Effort, Failures, Figure, Result, Sides
from delineate.evaluation.held_out import PlannedTest
from delineate.fingerprint import Fingerprint, Range
from delineate.io.documents import Document
from delineate.io.settings import parse_yaml
from delineate.metrics.statistics import Estimate
from delineate.pretrained.weights import Entry
from delineate.recipe import (
    InferenceSpec,
    PostprocessingSpec,
    Recipe,
    TargetsSpec,
    load_recipe,
    packaged_recipes,
    recipe_from,
    to_yaml,
)
from delineate.sampling.tiles import TileGeometry
from delineate.specification import Specification, from_json, to_json
from delineate.studies.designs import Entry as PlannedEntry
from delineate.studies.running import FinalTest, RunStatus, StudyPlan
from delineate.studies.specification import Study, load_study, packaged_studies
from delineate.training import events
from delineate.training.adapted import AdaptationPlan
from delineate.training.subjects import RunSubjects

NOW = datetime(2026, 1, 2, 3, 4, 5, 678, UTC)
PSEUDONYM = "0123456789abcdef" * 2


@cache
def classes() -> frozenset[type[Specification]]:
    """Every specification of the package that can be made; a class others build on is told by its underscore."""
    for module in pkgutil.walk_packages(delineate.__path__, "delineate."):
        if "__main__" not in module.name:
            importlib.import_module(module.name)
    found: set[type[Specification]] = set()
    waiting = [Specification]
    while waiting:
        below = waiting.pop().__subclasses__()
        found |= set(below)
        waiting += below
    return frozenset(
        kind
        for kind in found
        if kind.__module__.startswith("delineate.") and not inspect.isabstract(kind) and not kind.__subclasses__()
    )


def parts_of(value: Any) -> Iterator[Specification]:
    """A specification and all within it."""
    if isinstance(value, Specification):
        yield value
        for name in type(value).model_fields:
            yield from parts_of(getattr(value, name))
    elif isinstance(value, dict):
        yield from (part for each in value.values() for part in parts_of(each))
    elif isinstance(value, list | tuple):
        yield from (part for each in value for part in parts_of(each))


def others(value: Any) -> Iterator[Any]:
    """Values unlike ``value``, of which a field may take some."""
    if isinstance(value, bool):
        yield not value
    elif isinstance(value, int):
        yield from (value + 1, value * 2, value - 1)
    elif isinstance(value, float):
        yield from (value / 3, value * 3, value + 0.1, 0.1)
    elif isinstance(value, str):
        yield from ('another: "name" ü\n# 1', "b", "all", "dice", "x")
    elif isinstance(value, list | tuple):
        yield from (value[::-1], value[:1], [*value, *value], [])
        yield from ([*other_first, *value[1:]] for other_first in ([o] for v in value[:1] for o in others(v)))
    elif isinstance(value, dict):
        yield from ({**value, "another": next(iter(value.values()), 1)}, {}, {"a": 1})
    elif value is None:
        yield from (1, 0.25, "b", True, [1, 2, 3], ["b"], {"b": 1}, [0.5, 0.5], [1, 1, 1])


def variants(value: Specification) -> Iterator[Specification]:
    """``value``, and for each of its fields one that differs in it, where one is valid."""
    yield value
    plain = value.model_dump(mode="json")
    for name, now in plain.items():
        for other in others(now):
            try:
                changed = type(value).model_validate_json(json.dumps({**plain, name: other}))
            except ValidationError:
                continue
            if changed != value:
                yield changed
                break


@cache
def samples() -> dict[type[Specification], list[Specification]]:
    """Instances of every class: from the packaged recipes, and those that none uses from here."""
    found: dict[type[Specification], list[Specification]] = defaultdict(list)
    recipes = [load_recipe(name) for name in packaged_recipes()]
    code = {"value": "1", "meaning": "b"}
    made = [
        recipe_from(values)
        for values in (
            {
                "name": "x",
                "quantity": {"channel": "fat_fraction"},
                "tiles": {"kind": "whole"},
                "network": {"kind": "unet", "dimensions": 3},
                "start": {"weights": "w.pt", "rows": {"a": "b"}},
                "postprocessing": {"largest_component": ["a"]},
                "data": {"targets": {"values": {"a": 1}}, "codes": {"a": {"category": code, "type": code}}},
            },
        )
    ]
    described = _Description(
        channels=("T1",),
        targets={"values": {"a": (1, 2)}},
        tiles=TileGeometry((8, 8, 1), (1, 2, 0), 2, True),
        spacing_mm=(1.0, 1.5, 3.0),
        fingerprint=Fingerprint(2, (Range("spacing", "SI", 1.0, 1.5, 2.0), Range("contrast", "T1: ü", 0.1, 0.2, 1e9))),
        provenance=Provenance(
            "msd",
            True,
            1,
            2,
            "now",
            PSEUDONYM,
            versions={"a": "b"},
            computed={"threads": 2},
            adapted_from="0f" * 32,
            other_keys=(PSEUDONYM,),
        ),
        calibrated=Calibrated(
            "Ours", "2026-01-02", PSEUDONYM, (PSEUDONYM,), 1, 1, PSEUDONYM, "stated", Fingerprint(1, ())
        ),
    )
    happened = [
        events.Started(at=NOW, training=3, validation=1, held_out=1),
        events.Planned(at=NOW, items=7, batch_size=2, steps_an_epoch=4, steps=12),
        events.Resumed(at=NOW, step=4),
        events.Validated(at=NOW, step=4, minutes=0.1, dice=1 / 3, targets={"a: ü": 1 / 3}, best=True),
        events.Collapsed(at=NOW, step=4, predicts="background alone", fixes=("one; two",)),
        events.GaveUp(at=NOW, step=4, patience=2),
        events.Stopped(at=NOW, step=4, cause="Ctrl-C"),
        events.Trained(at=NOW, step=4, minutes=2.5, epochs=0.5),
        events.Finished(at=NOW, step=4, measured=2),
        events.Warned(at=NOW, message="two\nlines"),
        events.Divided(at=NOW, step=7, batch_size=8, parts=4, differing=("BatchNorm",)),
        events.Fitted(at=NOW, what="smaller tiles", changes=("tiles.shape=[8,8,8]",), needed_gb=9.5, memory_gb=8.0),
    ]
    studies = [load_study(name) for name in packaged_studies()]
    locked = {"name": "x", "design": {"kind": "locked_test"}, "best_of": "s"}
    searched = {
        "kind": "search",
        "parameters": {"a.b": {"low": 0.5, "high": 1, "log": True}, "c": {"low": 1, "high": 3}, "d": ["x", 1.5, True]},
    }
    factors = {"E": ["a=1"], "size": {"small": {"set": ["b=2"]}, "large": {}}}
    studies += [
        Study.model_validate({"name": "s", "question": "?", "recipe": "r.yaml", "sizes": {"quick": {}}, **more})
        for more in (
            {
                "arms": {"a": {"recipe": "x.yaml", "set": ["b.c=[1, 2]"]}, "b": {}},
                "design": {"kind": "cross_validation"},
                "sizes": {"quick": {"folds": [0], "arms": {"a": ["x=1"]}}},
                "data": {"d": {"phantom": {"kind": "liver"}, "locked": 0.1}},
                "claims": [{"text": "a: ü", "better": "a", "worse": "b"}],
                "published": [{"source": "s", "columns": ["a", "b"], "rows": [["1", ".9"]], "measures": [None]}],
            },
            {"stages": [{"name": "s", "factors": factors, "design": searched}, locked], "data": {"d": {"locked": 0.1}}},
            {"design": {"kind": "recipe_split"}, "arms": {"a": {}, "b": {"weights_of": "a"}}},
        )
    ]
    for whole in (*recipes, *made, *studies, *(recipe.pipeline for recipe in recipes), described, *happened):
        for part in parts_of(whole):
            if part not in found[type(part)]:
                found[type(part)].append(part)
    for document in DOCUMENTS:
        found[type(document)].append(document)
    for kind in classes() - set(found):
        for least in ({}, {"dimensions": 3}, {"dimensions": 2}, *LEAST.get(kind.__name__, ())):
            try:
                found[kind].append(kind.model_validate(least))
            except (ValidationError, NotImplementedError):
                continue
    return found


DICE = {"kind": "dice"}
TARGET = {"name": "a: ü", "value": 2, "values": [1, 2], "colour": "#102030"}
TILES = {
    "shape": [None, 8, 1], "margin": [0, 0, 2], "divisor": [4, 4, 1], "smallest": [4, 4, 1], "overlap": 0.5,
    "step": [1, 4.5, 1], "outside": "zero", "weighting": "uniform", "weights": [[1.0], [0.1, 1 / 3], [1.0]],
}  # fmt: skip
DESCRIPTION = {
    "name": "x", "channels": ["T1"], "resample_channels": False, "preprocessing": [{"kind": "normalise"}],
    "spacing_mm": [1, 0.5, 3], "tiles": TILES, "flips": [[], [2, 3]], "average": "logits", "outputs": ["a: ü"],
    "outside": [-30], "threshold": 0.0, "targets": [TARGET], "postprocessing": {}, "weights_sha256": ["0f" * 32],
    "versions": {"torch": "2"},
}  # fmt: skip
LEAST: dict[str, list[dict[str, Any]]] = {
    "Description": [DESCRIPTION],
    "ExportedTarget": [TARGET],
    "ExportedTiles": [TILES],
    "RegionSpec": [{"loss": DICE, "within": ["liver"]}],
    "DeepSupervisionSpec": [{"loss": DICE}],
    "_Head": [{"name": "0f" * 16, "batch": 2, "trial": {"alike": 1 / 3, "faster": 6.1}}],
    "MonaiSpec": [{"dimensions": 3, "name": "SegResNet", "arguments": {"init_filters": 8}}],
}
"""Fields of classes that no packaged recipe has and that are not made of defaults."""


def test_every_specification_class_has_an_instance() -> None:
    assert len(classes()) > 50
    assert sorted(kind.__name__ for kind in classes() if not samples().get(kind)) == []


def test_every_specification_reads_back_equal_from_json_and_from_yaml() -> None:
    changed = 0
    for kind, instances in samples().items():
        for instance in instances[:6]:
            for value in variants(instance):
                changed += value != instance
                assert from_json(kind, to_json(value)) == value
                text = to_yaml({"it": value.model_dump(mode="json")})
                again = parse_yaml(text, kind.__name__, RecipeError)["it"]
                assert kind.model_validate_json(json.dumps(again)) == value, text
    assert changed > 300


@pytest.mark.parametrize("name", packaged_recipes())
def test_a_packaged_recipe_reads_back_equal(name: str) -> None:
    recipe = load_recipe(name)
    assert from_json(Recipe, to_json(recipe)) == recipe
    assert recipe_from(parse_yaml(to_yaml(recipe.as_dict()), name, RecipeError)) == recipe


def test_events_are_told_apart_by_their_kind() -> None:
    kinds = {kind for kind in samples() if issubclass(kind, events._Event)}
    assert {kind.__name__ for kind in kinds} == {kind.__name__ for kind in events._Event.__subclasses__()}
    for kind in kinds:
        for event in samples()[kind]:
            assert events.from_line(events.to_line(event)) == event
            assert b"\n" not in events.to_line(event)[:-1]
            assert event.text


SUBJECTS = RunSubjects(
    data_set="d", fold=0, training=("a",), validation=("b",), held_out=("c",), left_out=("e",),
    file_hashes={"a": {"T1": "0f", "label": "1e"}},
)  # fmt: skip
SPLIT = Split((("a", "b"), ("c",)), ("d",), 7)
PROBLEM = Problem("E_SHAPE", "error", "a", "what; and more", "do this; or that")
ROW = SubjectRow(
    "a", "s", "p", (1, 2, 3), (0.5, 0.5, 3.0), "RAS", ("T1",), "int16", {"T1": Intensity(0, 1, 2, 3, 4, 5, 6, 7)},
    (1, 1, 1), {0: 5, 1: 6}, {"liver": 1.25}, (0, 0, 0), {"T1": "ab"},
)  # fmt: skip
VALUES = [
    SPLIT,
    PROBLEM,
    ROW,
    Choice("precision", "fp32", "no tensor cores"),
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_what_a_run_writes_down_reads_back_equal(value: Any) -> None:
    assert from_json(type(value), to_json(value)) == value


DOCUMENTS: list[Document] = [
    SUBJECTS,
    SUBJECTS.model_copy(update={"fold": None, "left_out": ()}),
    PlanFile(choices=(Choice("precision", "fp32", "no tensor cores"),)),
    InspectionFile(
        data_set="d", layout="msd", reason="dataset.json", targets=Targets({"a": (1, 2)}, "overlapping"),
        label_voxels={0: 5, 1: 6}, class_fractions={"background": 5 / 11, "a": 6 / 11}, broken=("x",),
        problems=(PROBLEM,), subjects=(ROW,),
    ),
    CalibrationFile(dice_errors={"a": ((0.1, -1 / 3), (-inf,))}, log_volume_errors={"a": ((inf,),), "b": ()}),
    Intervals(level=0.8, rows=(IntervalCheck("a", "A", 0.1, inf, None, 4, 3, 1 / 3, None),)),
    SplitFile.of(SPLIT),
    SplitFile.of(Split((("a",),), ("b",), 3, ("c",), ("d",))),
    RunStatus(state="failed", failure="a: ü", seconds=0.5, attempts=2),
    StudyPlan(
        study=load_study("hippocampus-cv"), size="quick", data_sets={"scans": "d"}, scores={"a": 0.5, "b": None},
        rankings={"a": ("x", "y")},
        runs=(
            PlannedEntry("a", "b", 3, 1, weights_of="c", changes=("inference.overlap=0.5",), order="c", ranks=True),
        ),
    ),
    FinalTest(began=datetime(2026, 2, 3, tzinfo=UTC), runs=("a",)),
    PlannedTest(
        weights_sha256="0f", inference=InferenceSpec(overlap=0.25, flips=("x",)),
        postprocessing=PostprocessingSpec(minimum_ml={"a": 0.5}), data_set="d", subjects=("x",),
        references=TargetsSpec(values={"a": (1, 2)}), metrics="dice", lesion_overlap=0.1, quantity="",
    ),
    AdaptationPlan(
        origin="0f" * 32, data_set="d", recipe=load_recipe("hippocampus"), folds=(("a", "b"), ("c",)), rehearsed=("d",)
    ),
    CardFacts(
        effort=Effort("0f" * 32, 10, 0.5, True), sites=(ByRole(1, 2, 3), ByRole()), patients=ByRole(4),
        results=(
            Result(
                "test", "0f" * 32, "2026-01-02", 4, 3, 2,
                (Figure("a: ü", "dice", "Dice", Estimate(inf, 0.1, (-inf, 1 / 3), 3, 1, 0, 3), 2),),
                (Bias("a", "volume", "ml", 0.1, (-1.5, 1 / 3), (-inf, inf), 3),), (Failures("a", 3, 1, 1, 0, 2, 0.25),),
                True, "B", "fat", (Sides("a", 3, 4),), ("x | y",),
            ),
        ),
    ),
    Entry(name="vgg11", source="f.pth", preprocessing="caffe", sha256="0f", tensors=16),
]  # fmt: skip


def test_every_document_has_an_instance() -> None:
    assert {type(document) for document in DOCUMENTS} == {kind for kind in classes() if issubclass(kind, Document)}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: type(document).__name__)
def test_a_file_reads_back_equal_and_refuses_what_it_does_not_know(document: Document, tmp_path) -> None:
    path = tmp_path / "file.json"
    document.write(path)
    assert type(document).read(path) == document
    contents = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert contents.pop("format") == 1
    path.write_text(json.dumps(contents), encoding="utf-8")
    assert type(document).read(path) == document, "files of before said no format"
    needed = next(name for name, field in type(document).model_fields.items() if field.is_required())
    lacking = {name: value for name, value in contents.items() if name != needed}
    for wrong in ({**contents, "format": 99}, {**contents, "more": 1}, lacking, [contents]):
        path.write_text(json.dumps(wrong), encoding="utf-8")
        with pytest.raises(type(document).error) as caught:
            type(document).read(path)
        assert ("update delineate" in caught.value.fix) == (wrong == {**contents, "format": 99})


def test_errors_of_scans_in_an_earlier_calibration_are_of_a_patient_each(tmp_path) -> None:
    found = CalibrationFile.of_bytes(b'{"dice_errors": {"a": [0.1, "-inf"]}, "log_volume_errors": {}}', tmp_path)
    assert found.dice_errors == {"a": ((0.1,), (-inf,))}


def test_files_of_a_run_read_back_equal(tmp_path) -> None:
    SUBJECTS.save(tmp_path)
    assert RunSubjects.load(tmp_path) == SUBJECTS
    save_split(tmp_path / "split.json", SPLIT)
    assert load_split(tmp_path / "split.json") == SPLIT
