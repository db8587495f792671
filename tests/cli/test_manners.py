"""What holds for every command and every option: laws over the tree of commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer import TyperException
from typer.testing import CliRunner

from delineate.bundle import bundle_folder
from delineate.cli import options
from delineate.cli.app import app
from delineate.cli.commands import EVERYWHERE, adds_up, choices_of
from delineate.core.text import near
from delineate.datasets.layouts import LAYOUTS, open_dataset
from delineate.datasets.phantoms.kinds import KINDS, kind_named
from delineate.errors import BadFormat, DelineateError, RecipeError
from delineate.io.exports import check_label_format, label_formats
from delineate.io.formats import check_writable
from delineate.metrics.catalogue import METRICS, SETS, metric_names
from delineate.recipe import packaged_recipes
from delineate.training.options import RunOptions, check_possible

TREE = typer.main.get_command(app)
runner = CliRunner()


def walk(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        yield from walk(below, (*path, name))


COMMANDS = dict(walk(TREE))
OPTIONS = [
    (path, max(param.opts, key=len), param)
    for path, command in COMMANDS.items()
    for param in command.params
    if param.param_type_name == "option" and "completion" not in param.name  # these would write to the home folder
]


def named(value: Any) -> str:
    return " ".join(value) if isinstance(value, tuple) else value if isinstance(value, str) else "param"


def usage_error(*arguments: str) -> str:
    """How wrong usage is answered; empty where it is not wrong, or not of how it is used."""
    try:
        TREE.main(list(arguments), prog_name="delineate", standalone_mode=False)
    except TyperException as error:
        return error.format_message()
    return ""


def delineate(*arguments: str, code: int, **more: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "delineate", *arguments], capture_output=True, encoding="utf-8", timeout=300, **more
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


# An option that is given twice


@pytest.mark.parametrize(("path", "option", "param"), OPTIONS, ids=named)
def test_an_option_given_twice_is_refused_or_adds_up(
    monkeypatch: pytest.MonkeyPatch, path: tuple[str, ...], option: str, param: Any
) -> None:
    """``--flips x --flips y`` kept y, and said nothing."""
    # A plugin's name is that of a module, which is imported, and asked for from then on.
    monkeypatch.setenv("DELINEATE_PLUGINS", "")
    value = [] if param.is_flag else ["json" if param.name == "plugin" else "3"]
    refused = f"{option} is given 2 times" in usage_error(*path, option, *value, option, *value)
    assert refused != adds_up(param)


@pytest.mark.parametrize("path", [path for path in COMMANDS if path], ids=" ".join)
@pytest.mark.parametrize("option", EVERYWHERE)
def test_quiet_and_verbose_stand_before_a_command_or_after_it(path: tuple[str, ...], option: str) -> None:
    for place in ([f"--{option}", *path], [*path, f"--{option}"], [*path, f"-{option[0]}"]):
        assert usage_error(*place, "--help") == ""
    assert "contradict" in usage_error("-q", *path, "-v")


# Help


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_says_what_it_does(path: tuple[str, ...]) -> None:
    text = COMMANDS[path].help
    first = text.split()[0].rstrip(",")
    assert first in VERBS, first
    assert text.strip().endswith(".")


VERBS = {
    "Adapt", "Add", "Average", "Cancel", "Change", "Check", "Choose", "Colour", "Combine", "Compare", "Compile",
    "Compute", "Connect", "Convert", "Count", "Draw", "Explain", "Export", "Find", "Finish", "Hold", "Import",
    "Inspect", "Install", "Keep", "Let", "List", "Listen", "Lock", "Log", "Make", "Measure", "Name", "Offer",
    "Overlap", "Predict", "Prepare", "Print", "Read", "Refer", "Refuse", "Remove", "Replace", "Report", "Resume", "Run",
    "Segment", "Send", "Set", "Show", "Simulate", "Split", "Train", "Use", "Wait", "Write",
}  # fmt: skip


@pytest.mark.parametrize(("path", "option", "param"), OPTIONS, ids=named)
def test_every_option_is_explained_by_a_sentence_that_begins_with_a_verb(
    path: tuple[str, ...], option: str, param: Any
) -> None:
    assert param.help, f"{' '.join(path)} {option}"
    assert param.help.split()[0] in VERBS, param.help
    assert param.help.rstrip().endswith((".", ")")), param.help


# Near names


@pytest.mark.parametrize(
    ("path", "param"),
    [(path, param) for path, command in COMMANDS.items() for param in command.params if choices_of(param)],
    ids=named,
)
def test_a_choice_that_is_nearly_right_is_named(path: tuple[str, ...], param: Any) -> None:
    choice = max(choices_of(param), key=len)
    assert f"did you mean '{choice}'?" in usage_error(*path, max(param.opts, key=len), choice + "_")


def test_a_command_or_option_that_is_nearly_right_is_named() -> None:
    for path, command in COMMANDS.items():
        if path:
            assert repr(path[-1]) in usage_error(*path[:-1], path[-1] + "x")
        for option in (o for param in command.params for o in param.opts if o.startswith("--")):
            assert option in usage_error(*path, option + "x").partition(option + "x")[2]


@pytest.mark.parametrize(
    ("known", "refuse"),
    [
        (LAYOUTS, lambda name: open_dataset(Path(), layout=name)),
        ([*SETS, *METRICS], metric_names),
        (KINDS, kind_named),
        (["nii.gz", "mha", "nrrd", "png"], lambda suffix: check_writable(Path(f"scan.{suffix}"))),
        (label_formats(), lambda name: check_label_format(name)),
    ],
    ids=["layouts", "metrics", "phantoms", "formats", "label formats"],
)
def test_a_name_that_is_nearly_right_is_named(known: Any, refuse: Any) -> None:
    for name in known:
        with pytest.raises(DelineateError, match=f"did you mean '.?{name}'"):
            refuse(name + "_")


def test_nothing_is_suggested_for_what_is_like_nothing() -> None:
    assert near("xyzzy", ["liver", "brain"]) == ""
    assert near("LIVR", ["liver", "brain"]) == "; did you mean 'liver'?"


# What a shell completes


def completed(*words: str) -> list[str]:
    env = {"_DELINEATE_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(["delineate", *words])}
    done = runner.invoke(app, [], prog_name="delineate", env={**env, "COMP_CWORD": str(len(words))})
    return done.output.split()


def test_a_shell_completes_names() -> None:
    assert set(completed("train", "gen")) == {name for name in packaged_recipes() if name.startswith("gen")}
    assert completed("recipes", "show", "hippo") == ["hippocampus"]
    assert set(completed("predict", "--format", "v")) == {"vtk", "vti"}
    assert completed("data", "inspect", "--layout", "prom") == ["promise12"]
    assert completed("data", "phantom", "white") == ["white-matter"]
    assert "predict" in completed("pre")
    assert options.metrics("dice,wmh") == ["dice,wmh2017"]


def test_the_recipes_that_are_completed_are_those_that_are_packaged() -> None:
    assert options.packaged("") == sorted(packaged_recipes())


# What programs and pipes get


@pytest.mark.parametrize(
    ("arguments", "code", "status"),
    [
        (["recipes", "show", "hipocampus", "--json"], "E_RECIPE", 2),
        (["data", "inspect", "nowhere", "--json"], "E_MISSING", 1),
        (["predict", "--json"], "E_USAGE", 2),
        (["recipes", "list", "--json", "--jsno"], "E_USAGE", 2),
    ],
)
def test_an_error_is_json_for_whoever_wants_json(arguments: list[str], code: str, status: int, tmp_path: Path) -> None:
    done = delineate(*arguments, code=status, cwd=tmp_path)
    error = json.loads(done.stdout)["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["message"] in done.stderr


def test_details_are_said_where_they_are_wanted() -> None:
    assert "Traceback" in delineate("-v", "data", "inspect", "nowhere", code=1).stderr
    assert delineate("data", "inspect", "nowhere", code=1).stderr.startswith("error E_MISSING: ")


def test_a_reader_that_closes_the_pipe_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as closed:
        done = subprocess.run(
            [sys.executable, "-m", "delineate", "metrics", "list"], stdout=closed, stderr=subprocess.PIPE, timeout=300
        )
    assert done.stderr == b""
    assert done.returncode == 141


# What is missing


def test_a_device_or_package_that_is_missing_is_said_before_anything_is_read(tmp_path: Path) -> None:
    absent = "mps" if torch.cuda.is_available() else "cuda"
    for arguments in (
        ["train", "hippocampus", "--data", "nowhere", "--out", "run"],
        ["predict", "nowhere", "scan.nii.gz", "--out", "out"],
        ["test", "nowhere", "--data", "nowhere", "--out", "out"],
        ["calibrate", "nowhere", "--data", "nowhere", "--name", "ours", "--out", "out"],
        ["forgetting", "nowhere", "nowhere", "--data", "nowhere", "--out", "out"],
        ["adapt", "nowhere", "--data", "nowhere", "--out", "out"],
        ["demo", "--out", str(tmp_path / "demo")],
    ):
        refused = runner.invoke(app, [*arguments, "--device", absent])
        assert isinstance(refused.exception, RecipeError)
        assert absent in str(refused.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there are devices here")
def test_devices_that_can_be_counted_are_counted() -> None:
    check_possible(RunOptions(device="cpu", devices=64))
    with pytest.raises(RecipeError):
        check_possible(RunOptions(device="cuda:1"))


# A run stands for its bundle


def test_a_run_stands_for_its_bundle(tmp_path: Path) -> None:
    bundle = tmp_path / "run/bundle"
    bundle.mkdir(parents=True)
    assert bundle_folder(tmp_path / "run") == bundle
    assert bundle_folder(tmp_path / "elsewhere") == tmp_path / "elsewhere"
    (bundle / "bundle.json").touch()
    assert bundle_folder(bundle) == bundle


def test_a_suffix_is_said_to_be_unknown() -> None:
    with pytest.raises(BadFormat, match=r"did you mean '\.nii\.gz'"):
        check_writable(Path("scan.nii.gzz"))
