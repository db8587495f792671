from __future__ import annotations

import pytest
import torch

from delineate.compute import plan_compute, torch_threads
from delineate.errors import RecipeError


def test_every_choice_has_its_reason() -> None:
    plan = plan_compute()
    assert [row["what"] for row in plan.rows()] == ["device", "precision", "memory format", "compile", "threads"]
    assert all(row["choice"] and row["why"] for row in plan.rows())


def test_a_short_run_is_not_compiled_and_says_why() -> None:
    short, long = plan_compute(device="cpu", expected_seconds=10), plan_compute(device="cpu", compile="off")
    assert not short.compile
    assert "short" in {c.what: c.why for c in short.choices}["compile"]
    assert not long.compile


def test_without_a_compiler_it_falls_back_and_says_so(monkeypatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    plan = plan_compute(device="cpu", compile="on")
    assert not plan.compile
    assert "no C++ compiler" in plan.choices[3].why


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(RecipeError, match="auto, cpu, cuda"):
        plan_compute(device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(RecipeError, match="--device auto"):
            plan_compute(device="cuda")


def test_threads_are_given_back() -> None:
    before = torch.get_num_threads()
    with torch_threads(1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
