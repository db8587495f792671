"""The same scans over HTTP: what comes back is what ``delineate predict`` writes, and what is broken gets its code."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path

import httpx
import pytest

from delineate.io.formats import read_volume

FORMATS = ("nii.gz", "nii", "mha", "nrrd")


def outcome(http: httpx.Client, job: str) -> dict:
    """A job once it is over."""
    deadline = time.monotonic() + 60
    while (told := http.get(f"/v1/jobs/{job}").json())["state"] not in ("done", "failed"):
        assert time.monotonic() < deadline, told
        time.sleep(0.02)
    return told


def send(http: httpx.Client, path: Path, **query: str) -> str:
    format = next(format for format in FORMATS if path.name.endswith(format))
    answer = http.post("/v1/jobs", params={"input": format, **query}, content=path.read_bytes())
    assert answer.status_code == 201, answer.text
    return answer.json()["id"]


@pytest.fixture
def http(drivers, bundles):
    server = drivers.serve({"one": bundles.folders["one"]}, bind="", http="127.0.0.1:0", limits={"queue": 100})
    with httpx.Client(base_url=f"http://{server.about['http']}", timeout=60) as http:
        yield http
    assert server.end() == 0


def test_http_gives_what_predict_writes_and_says_what_is_broken(http, bundles, broken_files, scan, tmp_path) -> None:
    scans = [scan(tmp_path / f"a{number}.{format}", number) for number, format in enumerate(FORMATS)]
    expected = {path.name: path.read_bytes() for path in bundles.predicted("one", *scans)}
    jobs = {f"a{number}.nii.gz": send(http, path) for number, path in enumerate(scans)}
    broken = {}
    for number, (name, case) in enumerate(broken_files.items()):
        (tmp_path / str(number)).mkdir()
        path = case.make(tmp_path / str(number))
        if case.use is read_volume and path.name.endswith(FORMATS) and path.stat().st_size:
            broken[name] = case.code, send(http, path)
    assert len(broken) > 15
    for name, job in jobs.items():
        told = outcome(http, job)
        assert told["state"] == "done", told
        label = http.get(f"/v1/jobs/{job}/outputs/label.nii.gz").content
        assert label == expected[name]
        assert {"label.nii.gz", "label.json"} == {output["name"] for output in told["outputs"]}
        assert hashlib.sha256(label).hexdigest() in [output["sha256"] for output in told["outputs"]]
    for name, (code, job) in broken.items():
        problem = outcome(http, job)["problem"]
        assert (name, problem and problem["code"]) == (name, code)
    assert http.get("/readyz").status_code == 200
