from __future__ import annotations

import pytest
import torch

from delineate.errors import TrainingError
from delineate.training.checkpoint import SafeCheckpointIO


def test_nested_values_and_tensors_come_back_as_they_were(tmp_path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    state = {
        "optimiser": {0: {"step": torch.tensor(3.0), "mean": shared}, 1: {"mean": shared.t()}},
        "betas": (0.9, 0.999),
        "loops": [{"done": True, "best": None}],
        "name": "run",
    }
    io = SafeCheckpointIO()
    io.save_checkpoint(state, tmp_path / "state.safetensors")
    loaded = io.load_checkpoint(tmp_path / "state.safetensors")
    assert loaded["betas"] == (0.9, 0.999)
    assert loaded["loops"] == state["loops"]
    torch.testing.assert_close(loaded["optimiser"][1]["mean"], shared.t())
    assert loaded["optimiser"][0]["step"] == 3


def test_objects_that_would_need_a_pickle_are_refused(tmp_path) -> None:
    with pytest.raises(TrainingError, match="cannot hold object"):
        SafeCheckpointIO().save_checkpoint({"thing": object()}, tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_damaged_state_says_what_to_do(tmp_path) -> None:
    (tmp_path / "state").write_bytes(b"\x08\x00")
    with pytest.raises(TrainingError, match="delete it"):
        SafeCheckpointIO().load_checkpoint(tmp_path / "state")
