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
