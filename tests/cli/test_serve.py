"""The commands of serving, against a server that `delineate serve` started: what they print, write and return."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import delineate.serving
from delineate.bundle import Bundle
from delineate.cli.app import app
from delineate.core.grid import Grid
from delineate.core.targets import Targets
from delineate.core.volume import Volume
from delineate.errors import DelineateError
from delineate.io.formats import read_label, write_volume
from delineate.recipe import recipe_from
from delineate.sampling.tiles import TileGeometry
from delineate.serving.keys import read_key, read_server_keys
from delineate.serving.places import reachable, way_to_server
from delineate.serving.settings import read_address

GRID = Grid((10, 8, 6), np.array([[-1.0, 0, 0, 5], [0, -1, 0, 7], [0, 0, 3, -3], [0, 0, 0, 1]]))
TINY = {
    "name": "small",
    "tiles": {"kind": "patches", "shape": [8, 8, 4]},
    "network": {"kind": "unet", "dimensions": 3, "widths": [4, 8]},
}
ROOT = Path(__file__).parents[2]
MOST_S = 90.0
"""How long a process may take to do what a test waits for: much longer than it does, even on a busy machine."""


def environment(home: Path) -> dict[str, str]:
    """No server and no key but those under ``home``."""
    gone = ("DELINEATE_KEY_FILE",)
    kept = {name: value for name, value in os.environ.items() if name not in gone}
    return {**kept, "XDG_DATA_HOME": str(home / "d"), "XDG_CONFIG_HOME": str(home / "c"), "OMP_NUM_THREADS": "1"}


@dataclass(frozen=True)
class Said:
    """What a command printed, and its exit status."""

    stdout: str
    stderr: str
    code: int


def run(*words: object, env: dict[str, str]) -> Said:
    """Run a command in this process, which saves the start of another."""
    done = CliRunner().invoke(app, [*map(str, words)], env=env)
    if isinstance(done.exception, DelineateError):
        return Said(done.stdout, f"{done.stderr}error {done.exception}\n", 1)
    assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
    return Said(done.stdout, done.stderr, done.exit_code)


class Serving:
    """A server of its own, started by the command line."""

    def __init__(self, home: Path, bundle: Path, *options: str, disk_percent: int = 100) -> None:
        self.home, self.state = home, home / "d/delineate/server"
        self.env = environment(home)
        words = [f"organ={bundle}", "--bind", "tcp://127.0.0.1:*", f"--disk-percent={disk_percent}", *options]
        self.log = (home / "log").open("w+", encoding="utf-8")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "delineate", "serve", *words],
            env=self.env, stdout=subprocess.PIPE, stderr=self.log, encoding="utf-8", start_new_session=True,
        )  # fmt: skip
        assert self.process.stdout is not None
        self.said = []
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if "Ctrl-C" in line:
                break
        assert self.process.poll() is None, self.logged()

    def logged(self) -> str:
        return (self.home / "log").read_text(encoding="utf-8")

    def run(self, *words: object, code: int = 0) -> Said:
        """A command on the same machine, as its user."""
        said = run(*words, env=self.env)
        assert said.code == code, f"{said}\n{self.logged()}"
        return said

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Stop it, and say with which status and which last words it ended."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            self.process.wait(MOST_S)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.log.close()
        return self.process.returncode, self.logged()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network that has learnt nothing, which is enough to be sent scans."""
    folder = tmp_path_factory.mktemp("run") / "bundle"
    recipe = recipe_from(TINY)
    made = Bundle(recipe, recipe.pipeline, Targets({"organ": (1,)}), ("MR",), TileGeometry((8, 8, 4)), (1.0, 1.0, 3.0))
    made.save(folder, made.network().state_dict(), {})
    return folder


@pytest.fixture(scope="module")
def home() -> Iterator[Path]:
    """A short path: the name of a socket may have 100 characters."""
    with tempfile.TemporaryDirectory(prefix="dl", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server(home: Path, bundle: Path) -> Iterator[Serving]:
    started = Serving(home, bundle, "--http", "127.0.0.1:0", "--engine", "openvino", "--precision", "fp32")
    try:
        yield started
    finally:
        started.end()


@pytest.fixture(scope="module")
def unmanned(bundle: Path) -> Iterator[Serving]:
    """A server without workers. It is stopped as a service is."""
    with tempfile.TemporaryDirectory(prefix="dl", dir="/tmp") as home:
        started = Serving(Path(home), bundle, "--workers", "0")
        try:
            yield started
        finally:
            ended = started.end(signal.SIGTERM)
        check_ended(started, *ended)


def check_ended(server: Serving, status: int, logged: str) -> None:
    """It ended in good order, and no process of it is left."""
    assert status == 0
    assert logged.splitlines()[-1].startswith("stopped; ")
    deadline = time.monotonic() + MOST_S
    with suppress(ProcessLookupError):
        while True:  # multiprocessing's own helper ends last
            os.killpg(server.process.pid, 0)
            assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("scans"), np.random.default_rng(3)
    for name in ("a", "b"):
        write_volume(folder / f"{name}.nii.gz", Volume(rng.random((1, *GRID.shape), np.float32), GRID))
    (folder / "cut.nii.gz").write_bytes((folder / "a.nii.gz").read_bytes()[:-40])
    return folder


# A server


def test_a_server_says_what_to_type_and_that_works(server: Serving, scans: Path) -> None:
    assert re.fullmatch(r"serving organ at tcp://127\.0\.0\.1:\d+ and http://127\.0\.0\.1:\d+", server.said[0])
    assert "only this machine can connect" in "".join(server.said)
    assert server.said[-1] == "not for diagnosis; Ctrl-C stops"
    (server.home / "scan.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes())
    [typed] = [line.strip() for line in server.said if line.startswith("    delineate send")]
    assert typed == "delineate send scan.nii.gz -o segmentation.nii.gz", "the server is found without a key"
    done = subprocess.run(
        [sys.executable, "-m", *shlex.split(typed)],
        env=server.env, cwd=server.home, capture_output=True, encoding="utf-8", timeout=MOST_S,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "organ" in done.stdout
    assert done.stdout.splitlines()[-1] == "1 segmentation in segmentation.nii.gz"
    label = read_label(server.home / "segmentation.nii.gz")
    assert label.grid.shape == GRID.shape
    np.testing.assert_allclose(label.grid.affine, GRID.affine)
    about = json.loads((server.home / "segmentation.json").read_text(encoding="utf-8"))
    assert about["notice"] == "Not for diagnosis."
    assert set(about["volume_ml"]) == {"organ"}


def test_a_second_server_does_not_use_the_folder_of_the_first(server: Serving, bundle: Path) -> None:
    done = server.run("serve", bundle, "--bind", "tcp://127.0.0.1:*", code=1)
    assert "E_IN_USE" in done.stderr
    assert str(server.state) in done.stderr


def test_what_a_server_keeps_is_its_users_alone(server: Serving) -> None:
    assert stat.S_IMODE(server.state.stat().st_mode) == 0o700
    for name in ("server.json", "me.key"):
        assert stat.S_IMODE((server.state / name).stat().st_mode) == 0o600


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["@", "--bind", "tcp://0.0.0.0:7420", "--plain"], "open to everybody"),
        (["@", "--bind", "7420"], "tcp://0.0.0.0:7420"),
        (["@", "--http", "0.0.0.0:8420", "--plain"], "open to everybody"),
        (["my model=@"], "NAME=FOLDER"),
        (["a=@", "a=@"], "two bundles are called 'a'"),
        (["=@"], "NAME=FOLDER"),
        (["@", "--device", "abacus"], "unknown device"),
    ],
)
def test_what_cannot_be_served_is_said_before_anything_starts(
    words: list[str], said: str, bundle: Path, tmp_path: Path
) -> None:
    named = [word.replace("@", str(bundle)) for word in words]
    refused = CliRunner().invoke(app, ["serve", "--state", str(tmp_path / "s"), *named])
    assert refused.exit_code in (1, 2)
    assert said in refused.output + str(refused.exception)
    assert not (tmp_path / "s").exists()


# Sending


def test_several_scans_go_to_a_folder_and_a_broken_one_stops_none(server: Serving, scans: Path, tmp_path: Path) -> None:
    files = [scans / f"{name}.nii.gz" for name in ("a", "cut", "b")]
    done = server.run("send", *files, "-o", tmp_path / "out", "--also", "vtk", "--json", code=1)
    found = json.loads(done.stdout)
    assert [row["scan"] for row in found["results"]] == ["a", "b"]
    assert all(row["about"]["computed"]["engines"] == ["openvino"] for row in found["results"]), server.logged()
    assert [row["code"] for row in found["failed"]] == ["E_TRUNCATED"]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"{name}.{format}" for name in ("a", "b") for format in ("nii.gz", "vtk", "json")
    }
    assert done.stderr.startswith("cut: E_TRUNCATED: ")


def test_a_job_is_sent_now_and_fetched_later(server: Serving, scans: Path, tmp_path: Path) -> None:
    done = server.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.vtk", "--no-wait")
    assert not (tmp_path / "a.vtk").exists()
    typed = shlex.split(done.stdout.splitlines()[-1])
    assert typed[:3] == ["delineate", "jobs", "--fetch"]
    wrong = server.run("jobs", "--fetch", typed[3], "-o", tmp_path / "a.dcm", code=1)
    server.run(*typed[1:])
    assert {path.name for path in tmp_path.iterdir()} == {"a.vtk", "a.nii.gz", "a.json"}
    assert "has no .dcm, but" in wrong.stderr
    listed = json.loads(server.run("jobs", "--json").stdout)["jobs"]
    assert typed[3] in [job["job"] for job in listed]
    assert typed[3] in server.run("jobs").stdout
    assert "E_OUTPUT" in server.run(*typed[1:], code=1).stderr, "it is not written over"


def test_a_scan_is_sent_again_by_its_id(server: Serving, scans: Path, tmp_path: Path) -> None:
    id = "6f1d0a9e-3d5b-4c4f-9b8e-1f2e3d4c5b6a"
    server.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz", "--job", id)
    done = server.run("send", scans / "b.nii.gz", "-o", tmp_path / "b.nii.gz", "--job", id, code=1)
    assert "E_CONFLICT" in done.stderr
    assert (
        "E_PROTOCOL" in server.run("send", scans / "b.nii.gz", "-o", tmp_path / "b.nii.gz", "--job", "7", code=1).stderr
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-o", "out.nii.gz"], "nothing to send"),
        (["a.nii.gz", "b.nii.gz", "-o", "out.nii.gz"], "name a folder"),
        (["a.nii.gz", "-o", "out"], "end it in"),
        (["a.nii.gz", "x/a.nii.gz", "-o", "out"], "rename one"),
        (["a.nii.gz", "b.nii.gz", "-o", "out", "--job", "1"], "--job belongs to one scan"),
        (["a.nii.gz", "-o", "out.vtk", "--also", "seg.nrd"], "did you mean 'seg.nrrd'"),
        (["a.nii.gz", "-o", "out.vtk", "--channel", "T1"], "NAME=FILE"),
        (["--channel", "T1=a", "--channel", "T1=b", "-o", "out.vtk"], "given twice"),
        (["a.nii.gz", "-o", "out.vtk", "--margin-mm", "2"], "--quantity"),
    ],
)
def test_a_wrong_request_is_wrong_usage(words: list[str], said: str) -> None:
    refused = CliRunner().invoke(app, ["send", *words])
    assert refused.exit_code == 2
    assert said in " ".join(refused.output.split())


def test_what_was_typed_wrong_is_said_without_waiting(server: Serving, scans: Path, tmp_path: Path) -> None:
    began = time.monotonic()
    unknown = server.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz", "--model", "orgna", code=1)
    assert "did you mean 'organ'?" in unknown.stderr
    assert "E_UNKNOWN_MODEL" in unknown.stderr
    lost = server.run("send", tmp_path / "lost.nii.gz", "-o", tmp_path / "a.nii.gz", code=1)
    assert "E_MISSING" in lost.stderr
    assert time.monotonic() - began < MOST_S
    assert not list(tmp_path.iterdir())


# Keys


def test_a_key_lets_its_owner_in_until_it_is_removed(server: Serving, scans: Path, tmp_path: Path) -> None:
    file = tmp_path / "anna.key"
    said = server.run("keys", "add", "anna", "-o", file).stdout
    own = read_key(file)
    assert own.address == read_address(server.state).zmq
    assert own.http == f"http://{read_address(server.state).http}"
    assert f"{own.address} and {own.http}" in said
    assert own.secret not in said + server.run("keys", "list").stdout + (server.state / "server.json").read_text(
        encoding="utf-8"
    )
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    server.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz", "--key", file)
    own_jobs, others = (
        {job["job"] for job in json.loads(server.run("jobs", *words, "--json").stdout)["jobs"]}
        for words in (["--key", file], [])
    )
    assert len(own_jobs) == 1
    assert not own_jobs & others
    assert [key["name"] for key in json.loads(server.run("keys", "list", "--json").stdout)["keys"]] == ["me", "anna"]
    again = server.run("keys", "add", "anna", "-o", tmp_path / "second.key", code=1)
    assert "there is a key 'anna'" in again.stderr
    server.run("keys", "remove", "anna")
    refused = server.run("send", scans / "a.nii.gz", "-o", tmp_path / "b.nii.gz", "--key", file, code=1)
    assert "E_DENIED" in refused.stderr
    assert "keys add" in refused.stderr
    assert "E_KEY" in server.run("keys", "remove", "anna", code=1).stderr
    assert {path.name for path in tmp_path.iterdir()} == {"anna.key", "a.nii.gz", "a.json"}


def test_a_key_file_that_others_can_read_is_not_used(server: Serving, scans: Path, tmp_path: Path) -> None:
    server.run("keys", "add", "open", "-o", tmp_path / "open.key", "--role", "worker")
    (tmp_path / "open.key").chmod(0o644)
    refused = server.run(
        "send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz", "--key", tmp_path / "open.key", code=1
    )
    assert "chmod 600" in refused.stderr


@pytest.mark.parametrize("address", ["gpu:7420", "tcp://0.0.0.0:7420", "tcp://*:7420", "tcp://gpu", "tcp://:7420"])
def test_a_key_names_an_address_that_clients_can_connect_to(address: str, server: Serving, tmp_path: Path) -> None:
    env = server.env | {"COLUMNS": "200"}
    refused = CliRunner().invoke(
        app,
        ["keys", "add", "x", "-o", str(tmp_path / "x"), "--state", str(server.state), "--address", address],
        env=env,
    )
    assert refused.exception is not None
    assert "tcp://HOST:PORT" in str(refused.exception)
    assert not list(tmp_path.iterdir())
    assert "x" not in [key.name for key in read_server_keys(server.state / "server.json").allowed]


def test_keys_of_no_server_are_not_made(tmp_path: Path) -> None:
    refused = CliRunner().invoke(
        app, ["keys", "add", "x", "-o", str(tmp_path / "x"), "--state", str(tmp_path / "none")]
    )
    assert getattr(refused.exception, "code", "") == "E_MISSING"
    assert not list(tmp_path.iterdir())


def test_an_address_for_all_is_reached_by_that_of_this_machine() -> None:
    for everywhere in ("tcp://0.0.0.0:7420", "tcp://*:7420", "tcp://[::]:7420"):
        assert reachable(everywhere) == "tcp://127.0.0.1:7420"
    assert reachable("tcp://10.0.0.7:7420") == "tcp://10.0.0.7:7420"
    assert reachable("http://0.0.0.0:8420", "gpu") == "http://gpu:8420"


# A doctor


def test_a_doctor_finds_a_server_well(server: Serving) -> None:
    deadline = time.monotonic() + MOST_S
    while (said := run("doctor", "--json", env=server.env)).code:  # its worker may be starting
        assert time.monotonic() < deadline, said.stdout
    found = json.loads(said.stdout)["findings"]
    looked = {one["what"]: one["found"] for one in found}
    assert set(looked) >= {"libzmq", "state folder", "keys", "disk", "device", "server", "http", "key", "connection"}
    assert "CURVE" in looked["libzmq"]
    assert "models: organ" in looked["server"]


def test_where_the_disk_is_too_full_the_server_the_client_and_the_doctor_say_so(
    bundle: Path, scans: Path, tmp_path: Path
) -> None:
    with tempfile.TemporaryDirectory(prefix="dl", dir="/tmp") as home:
        server = Serving(Path(home), bundle, "--workers", "0", disk_percent=0)
        try:
            assert "scans are refused until it is emptied: see --disk-percent" in "".join(server.said)
            refused = server.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz", "--timeout", "3", code=1)
            waits = "the server's disk is nearly full; trying again in "
            assert refused.stderr.count(waits) == 1
            assert "E_BUSY" in refused.stderr.partition(waits)[2]
            assert "above 0% scans are refused" in run("doctor", env=server.env).stdout
        finally:
            server.end()
    assert not list(tmp_path.iterdir())


def test_a_doctor_says_what_is_wrong_and_what_to_do(tmp_path: Path) -> None:
    def ask() -> str:
        said = run("doctor", env=environment(tmp_path))
        assert (said.code, said.stderr) == (1, "")
        return said.stdout

    assert "wrong  key: there is none; ask who runs the server" in ask()
    state = tmp_path / "d/delineate/server"
    state.mkdir(parents=True, mode=0o755)
    (state / "server.json").write_text("{}", encoding="utf-8")
    (state / "me.key").write_text("{}", encoding="utf-8")
    said = ask()
    assert f"wrong  state folder: '{state}' is open to other users; chmod 700" in said
    assert "wrong  keys: " in said
    assert f"note   server: no server is running in '{state}'; start one: delineate serve BUNDLE" in said
    assert "wrong  key: " in said
    assert all(re.match(r"(ok|note|wrong) +[a-z ]+: ", line) for line in said.splitlines())


# The documents


def test_the_page_on_serving_runs_as_it_stands(
    server: Serving, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    server.run("keys", "add", "page", "-o", tmp_path / "anna.key")
    (tmp_path / "scan.nii.gz").write_bytes((scans / "a.nii.gz").read_bytes())
    (tmp_path / "other.nii.gz").write_bytes((scans / "b.nii.gz").read_bytes())
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```(\w+)\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    typed = [line for kind, block in blocks if kind == "bash" for line in block.splitlines()]
    commands = [shlex.split(line)[1:] for line in typed if re.match("delineate (send|jobs|doctor)", line)]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    commands += [shlex.split(line)[1:] for line in re.findall("`(delineate send [^`]*)`", readme)]
    assert len(commands) == 5
    for words in commands:
        server.run(*words, *["--overwrite"] * (words[0] == "send"))
    assert len([*(tmp_path / "segmentations").iterdir()]) == 6
    names: dict[str, object] = {}
    for block in [block for kind, block in blocks if kind == "python"]:
        exec(compile(block, "docs/serving.md", "exec"), names)
    assert (tmp_path / "python.vtk").is_file()
    [script] = [block for kind, block in blocks if kind == "bash" and "curl" in block]
    script = script.replace("127.0.0.1:8420", read_address(server.state).http)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], capture_output=True, encoding="utf-8", timeout=MOST_S
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_label(tmp_path / "http.nii.gz").grid.shape == GRID.shape


def test_a_worker_elsewhere_computes_what_a_server_hands_out(
    unmanned: Serving, bundle: Path, scans: Path, tmp_path: Path
) -> None:
    key = tmp_path / "gpu2.key"
    unmanned.run("keys", "add", "gpu2", "--role", "worker", "-o", key)
    refused = unmanned.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz", "--key", key, code=1)
    assert "E_DENIED" in refused.stderr
    wrong = unmanned.run("worker", "--key", unmanned.state / "me.key", bundle, code=1)
    assert "--role worker" in wrong.stderr
    words = ["worker", "--key", str(key), str(bundle), "--device", "cpu"]
    worker = subprocess.Popen(
        [sys.executable, "-m", "delineate", *words], env=unmanned.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        encoding="utf-8",
    )  # fmt: skip
    try:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready; Ctrl-C stops\n"
        unmanned.run("send", scans / "a.nii.gz", "-o", tmp_path / "a.nii.gz")
        about = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
        assert about["computed"]["engines"] == ["torch"], "so it is unless another is asked for"
        worker.send_signal(signal.SIGINT)
        _, said = worker.communicate(timeout=MOST_S)
        assert worker.returncode == 0
        assert "stopped; " in said
    finally:
        if worker.poll() is None:
            worker.kill()
        worker.communicate()


# How a server ends


def test_a_server_without_keys_is_used_without_one_and_ends_by_ctrl_c(bundle: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="dl", dir="/tmp") as home:
        server = Serving(Path(home), bundle, "--plain", "--workers", "0")
        try:
            assert "every user of this machine" in "".join(server.said)
            assert way_to_server(server.state / "me.key") == (None, read_address(server.state).zmq)
            assert json.loads(server.run("jobs", "--json").stdout) == {"jobs": []}
        finally:
            ended = server.end(signal.SIGINT)
        check_ended(server, *ended)
        assert f"no server is running in '{server.state}'" in server.run("jobs", code=1).stderr


def test_an_interrupted_client_says_how_to_fetch_what_it_sent(unmanned: Serving, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.nii.gz"
    client = subprocess.Popen(
        [sys.executable, "-m", "delineate", "send", str(scans / "a.nii.gz"), "-o", str(out)],
        env=unmanned.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    deadline = time.monotonic() + MOST_S
    while "queued" not in (listed := unmanned.run("jobs", "--json").stdout):
        assert time.monotonic() < deadline
    job = json.loads(listed)["jobs"][0]["job"]
    client.send_signal(signal.SIGINT)
    _, said = client.communicate(timeout=MOST_S)
    assert client.returncode == 130
    assert f"delineate jobs --fetch {job} -o {out}" in said
    assert "number 1 in the queue" in unmanned.run("jobs").stdout
    unmanned.run("jobs", "--cancel", job)
    assert "cancelled" in unmanned.run("jobs").stdout


# What a client's command needs


NEEDY = [["send", "a.nii.gz", "-o", "b.nii.gz"], ["jobs"], ["keys", "list"], ["serve", "run", "--bind", "x"]]


@pytest.mark.parametrize("words", NEEDY, ids=" ".join)
def test_a_clients_commands_start_without_what_computes(words: list[str], tmp_path: Path) -> None:
    code = (
        f"import sys; sys.argv = ['delineate', *{words!r}]\nfrom delineate.cli import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'lightning', 'scipy', 'nibabel', 'SimpleITK', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), cwd=tmp_path, capture_output=True, encoding="utf-8"
    )
    assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert "error E_" in done.stderr


@pytest.mark.parametrize("words", [*NEEDY, ["doctor"]], ids=" ".join)
def test_the_extra_is_named_where_it_is_missing(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delineate, "serving", delineate.serving)  # which imports below replace
    for name in [name for name in sys.modules if name.startswith("delineate.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "zmq", None)
    monkeypatch.chdir(tmp_path)
    refused = CliRunner().invoke(app, words)
    assert getattr(refused.exception, "code", "") == "E_SERVING"
    assert "pip install 'delineate[serve]'" in str(refused.exception)
