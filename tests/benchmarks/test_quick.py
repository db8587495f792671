from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

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


def test_plans_are_compared_with_trainings(tmp_path) -> None:
    command = [
        sys.executable,
        ROOT / "benchmarks/planning.py",
        "--quick",
        "--threads",
        "1",
        "-o",
        tmp_path / "table.md",
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    head, _, *rows = (tmp_path / "table.md").read_text(encoding="utf-8").splitlines()
    assert "memory, planned" in head
    assert [row.count("|") for row in rows] == [head.count("|")]
    assert rows[0].count("GB") == rows[0].count("min |") == 2
