"""The documentation keeps its word: links resolve, commands and options exist, every code is explained."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import typer

from delineate import errors
from delineate.cli.app import app
from delineate.recipe import packaged_recipes

ROOT = Path(__file__).parents[1]
PAGES = [
    *ROOT.glob("*.md"),
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "studies").glob("*.md"),
    *ROOT.glob("*/README.md"),
    *ROOT.glob("examples/*/README.md"),
    *ROOT.glob("models/*/README.md"),
]
COMMANDS = typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_options_exist(page) -> None:
    for line in re.findall(r"^(?:    |`{0,3})?delineate ([^`\n]+)", page.read_text(encoding="utf-8"), re.MULTILINE):
        words = line.split("  ")[0].split()
        command = COMMANDS
        while words and hasattr(command, "commands") and words[0] in command.commands:
            command = command.commands[words.pop(0)]
        of_all = bool(words) and words[0].startswith("-")  # an option of the program itself
        assert of_all or not hasattr(command, "commands"), f"no such command: delineate {line}"
        known = {option for parameter in command.params for option in parameter.opts}
        used = {word.partition("=")[0] for word in words if word.startswith("-")}
        assert used <= known, line
        if command.name == "train":
            assert words[0] in {"auto", "RECIPE", *packaged_recipes()} or words[0].endswith(".yaml"), line


def test_every_code_is_explained() -> None:
    explained = (ROOT / "docs/errors.md").read_text(encoding="utf-8")
    leaves = [e for e in vars(errors).values() if isinstance(e, type) and not e.__subclasses__()]
    assert leaves
    assert all(f"`{error.code}`" in explained for error in leaves)
    assert all(f"{error.__name__} " in (errors.__doc__ or "") for error in leaves)


def test_every_verb_state_and_format_of_the_protocol_is_explained() -> None:
    from typing import get_args

    from delineate.serving.protocol import FORMATS, OUTPUTS, VERBS, State

    explained = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    for word in [*(verb.decode() for verb in VERBS), *get_args(State), *FORMATS, *(f".{format}" for format in OUTPUTS)]:
        assert f"`{word}" in explained, word


def test_every_packaged_recipe_group_is_explained() -> None:
    from delineate.recipe import Recipe

    explained = (ROOT / "docs/recipes.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in explained for name in Recipe.model_fields if name not in ("name", "description"))


def commands(page: str) -> list[list[str]]:
    """The page's commands as a shell would split them, without their comments."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    lines = [line for _, block in blocks for line in block.splitlines() if line.startswith("delineate ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def run_command(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "delineate", *arguments],
        cwd=folder, env={**os.environ, "DELINEATE_HOME": str(folder / "home")}, capture_output=True,
        encoding="utf-8", timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
    return done.stdout


def test_the_five_commands_of_the_readme_run_as_typed(tmp_path) -> None:
    typed = commands("README.md")
    assert len(typed) == 5
    assert typed[2][-2:] == ["--minutes", "0.5"]
    typed[2][-1] = "0.1"  # the one thing that takes too long for a test
    said = [run_command(arguments, tmp_path) for arguments in typed]
    assert "liver" in said[-1]
    assert "Dice" in said[-1]
    assert list((tmp_path / "predictions").glob("*.nii.gz"))
    assert (tmp_path / "run/report.html").is_file()
    assert (tmp_path / "page.html").is_file()


def test_the_ten_lines_of_the_readme_run_as_typed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELINEATE_HOME", str(tmp_path / "home"))
    [block] = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert sum(bool(re.match(r"[^#]", line)) for line in block.splitlines()) == 10
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert (tmp_path / "segmentation.nii.gz").is_file()


def test_the_python_page_runs_as_it_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/python.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) > 10
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "docs/python.md", "exec"), names)


def test_the_totalsegmentator_page_reads_its_data_set(tmp_path, monkeypatch) -> None:
    import delineate

    monkeypatch.chdir(tmp_path)
    for i, subject in enumerate(delineate.simulate("abdomen", "simulated", patients=2).subjects):
        case, label = tmp_path / f"dataset/s{i:04}", delineate.read(subject, label=True)
        delineate.write(case / "ct.nii.gz", delineate.read(subject))
        for name, inside in (("liver", label.voxels == 1), ("spleen", label.voxels == 2), ("colon", label.voxels > 2)):
            mask = delineate.LabelVolume(inside.astype("uint8"), label.grid)
            delineate.write(case / f"segmentations/{name}.nii.gz", mask)
    inspect, _ = commands("docs/from-totalsegmentator.md")
    shown = run_command(inspect, tmp_path)
    assert "layout masks" in shown
    assert "0 errors, 0 warnings" in shown
    targets = delineate.Targets({"liver": (1,), "spleen": (2,)})
    subject = delineate.open_dataset("dataset", targets=targets).subjects[1]
    known = delineate.read("simulated/labelsTr/abdomen_001.nii.gz", label=True).voxels
    assert (delineate.read(subject, label=True, targets=targets).voxels == known).all()


def check_usage(words: list[str]) -> None:
    """The command line takes these words."""
    command = COMMANDS
    while words and hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    if words:
        command.make_context("delineate", [*words], resilient_parsing=False).close()


@pytest.mark.parametrize("file", ["container/Dockerfile", "serving/Containerfile"])
def test_a_container_installs_what_is_there_and_runs_without_privileges(file: str) -> None:
    path = ROOT / "examples" / file
    steps = path.read_text(encoding="utf-8").replace("\\\n", "").splitlines()
    ignored = path.with_name(f"{path.name}.dockerignore").read_text(encoding="utf-8").splitlines()
    allowed = [line[1:] for line in ignored if line[0] == "!"]
    copied = [name for step in steps if step.startswith("COPY ") for name in step.split()[1:-1]]
    assert sorted(copied) == sorted(allowed)
    assert all((ROOT / name).exists() for name in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {project["readme"], *project["license-files"], "pyproject.toml", "constraints.txt", "src"}
    assert needed == set(copied)
    [extras] = re.findall(r"'\.\[([\w,]+)\]'", "\n".join(steps))
    assert set(extras.split(",")) <= {*project["optional-dependencies"]}
    [entry] = [json.loads(step.removeprefix("ENTRYPOINT ")) for step in steps if step.startswith("ENTRYPOINT")]
    more = [json.loads(step.removeprefix("CMD ")) for step in steps if step.startswith("CMD")]
    assert entry[0] in project["scripts"]
    check_usage([*entry[1:], *(more[0] if more else [])])
    user = next(i for i, step in enumerate(steps) if step.startswith("USER "))
    assert steps[user] != "USER root"
    assert not any(step.startswith("RUN ") for step in steps[user:])
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert sum(pin.startswith("torch==") for pin in pins) == 1, "what the Dockerfile's grep finds"


def test_the_service_may_do_what_the_server_does_and_no_more(tmp_path: Path) -> None:
    unit = (ROOT / "examples/serving/delineate.service").read_text(encoding="utf-8")
    settings = dict(line.split("=", 1) for line in unit.splitlines() if re.match(r"[A-Z]\w+=", line))
    executable, *words = shlex.split(settings["ExecStart"])
    check_usage(words)
    assert Path(words[words.index("--state") + 1]) == Path("/var/lib") / settings["StateDirectory"]
    assert int(settings["TimeoutStopSec"]) > 60 + 15, "longer than --drain-s, and what is left to end then"
    for name in ("NoNewPrivileges", "PrivateTmp", "ProtectHome", "RestrictNamespaces"):
        assert settings[name] == "yes"
    assert settings["User"] != "root"
    if (verify := shutil.which("systemd-analyze")) is not None:
        (tmp_path / "delineate.service").write_text(unit.replace(executable, sys.executable), encoding="utf-8")
        done = subprocess.run(
            [verify, "verify", "--man=no", tmp_path / "delineate.service"], capture_output=True, encoding="utf-8"
        )
        assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_dashboard_and_its_page_refer_to_what_is_measured(tmp_path: Path) -> None:
    from prometheus_client import CollectorRegistry, generate_latest

    from delineate.serving.http.desk import Desk, Limits
    from delineate.serving.http.figures import FrontDoorFigures
    from delineate.serving.protocol import Figures
    from delineate.serving.settings import Settings

    counted = (
        "jobs queued", "workers", "connections", "spool bytes", "disk used", "disk limit", "received bytes",
        "sent bytes", "refused E_BUSY", "dropped: unknown key", "done", "stage infer 1", "stage infer inf",
        "stage infer sum",
    )  # fmt: skip
    registry = CollectorRegistry()
    registry.register(FrontDoorFigures(Figures(figures=dict.fromkeys(counted, 1.0), ready=True)))
    desk = Desk(Settings(tmp_path), Limits())
    desk.requests.labels("readyz", "200").inc()
    text = (generate_latest(registry) + generate_latest(desk.registry)).decode()
    measured = {re.split(r"[{ ]", line)[0]: line for line in text.splitlines() if line[0] != "#"}
    board = json.loads((ROOT / "examples/serving/grafana.json").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    assert len(asked) > 10
    for query in asked:
        [(name, labels)] = re.findall(r"(delineate_\w+)(?:\{(\w+)=)?", query)
        assert name in measured, query
        by = re.findall(r"by \(([^)]*)\)", query)
        for label in [*filter(None, [labels]), *(", ".join(by).split(", ") if by else [])]:
            assert f"{label}=" in measured[name], query
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    page = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
    named = {*re.findall(r"`(delineate_\w+)", page)}
    assert {name for name in named if name not in measured} <= {"delineate_stage_seconds"}
    exported = {re.sub(r"_(bucket|sum|count)$", "", name) for name in measured if not name.endswith("_created")}
    assert {name for name in exported if not name.startswith("delineate_models")} <= named


def test_the_extending_page_runs_as_it_stands(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DELINEATE_PLUGINS", "")
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs/extending.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 9
    session = types.ModuleType("documented_session")
    monkeypatch.setitem(sys.modules, session.__name__, session)
    for block in blocks:
        exec(compile(block, "docs/extending.md", "exec"), session.__dict__)
