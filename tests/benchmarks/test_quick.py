from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_benchmark_runs(tmp_path) -> None:
    names = [
        "metrics", "prepare", "step", "pass", "data", "predict", "memory", "networks", "files", "cohort", "phantoms",
    ]  # fmt: skip
    command = [sys.executable, ROOT / "benchmarks/run.py", *names, "--quick", "--json", tmp_path / "rows.json"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert set(rows) == set(names)
    assert all(rows.values())


@pytest.fixture(scope="module")
def scripted(scripts):
    return scripts(ROOT / "benchmarks", "growth", "planning")


def test_growth_is_measured_kept_and_written(scripted, tmp_path, monkeypatch, capsys) -> None:
    page, place = tmp_path / "docs/growth.md", tmp_path / "out"
    (tmp_path / "docs/images").mkdir(parents=True)
    page.write_text((ROOT / "docs/growth.md").read_text(encoding="utf-8"), encoding="utf-8")
    for words in (["volume", "disk", "--quick"], ["volume", "--quick"], ["--write", str(page)]):
        monkeypatch.setattr(sys, "argv", ["growth.py", str(place), *words])
        assert scripted.growth.main() == 0
        printed = capsys.readouterr().out
        assert bool(printed) is ("disk" in words), "what is measured is not measured again"
    measured = json.loads((place / "growth.json").read_text(encoding="utf-8"))["parts"]
    assert set(measured["disk"]) == {"all prepared", "a third, 100 MB/s, 8 at a time", "a third, 100 MB/s, 1 at a time"}
    limited = measured["disk"]["a third, 100 MB/s, 8 at a time"]
    assert 0 < limited["GB"] <= 0.35 * measured["disk"]["all prepared"]["GB"]
    text = page.read_text(encoding="utf-8")
    assert "| 64×64×64 |" in text
    assert "| 512×512×600 |" not in text, "tables replace those that were there"
    assert (tmp_path / "docs/images/growth.webp").stat().st_size > 1000


def test_plans_are_compared_with_trainings(scripted, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(sys, "argv", ["planning.py", "--quick", "--threads", "1", "-o", str(tmp_path / "table.md")])
    scripted.planning.main()
    head, _, *rows = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert "memory, planned" in head
    assert [row.count("|") for row in rows] == [head.count("|")]
    assert rows[0].count("GB") == rows[0].count("min |") == 2
