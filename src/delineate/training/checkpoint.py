"""The state of a training in one safetensors file: tensors as they are, everything else as JSON in its metadata.

Lightning's own checkpoints are pickles, which run code when read. This plugin stores the same
content without pickle, in a temporary file that is then renamed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.plugins.io import CheckpointIO
from torch import Tensor

from delineate.bundle import save_tensors
from delineate.errors import TrainingError
from delineate.io.files import open_file, parsing

_FIX = "delete it to start training from the beginning"
_TENSOR, _ITEMS, _TUPLE = "tensor:", "items:", "tuple:"


class SafeCheckpointIO(CheckpointIO):
    """Saves and loads nested dictionaries of tensors, numbers, strings, lists and tuples."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        tensors: dict[str, Tensor] = {}
        text = json.dumps(_encode(checkpoint, tensors))
        save_tensors(Path(path), tensors, {"state": text})

    def load_checkpoint(self, path: str | Path, map_location: Any = None, weights_only: bool | None = None) -> dict:
        from safetensors import safe_open

        with parsing(path, TrainingError, fix=_FIX):
            open_file(Path(path)).close()  # refuses a pipe, on which safetensors would block
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {})["state"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            state = _decode(json.loads(text), tensors)
            if not isinstance(state, dict):
                raise TrainingError(f"'{path}' holds {type(state).__name__}, not a training's state", fix=_FIX)
        return state

    def remove_checkpoint(self, path: str | Path) -> None:
        if os.path.exists(path):
            os.remove(path)


def _encode(value: Any, tensors: dict[str, Tensor]) -> Any:
    """JSON form of ``value``; tensors move to ``tensors``, where numbered copies share no memory."""
    if isinstance(value, Tensor):
        name = f"{len(tensors):06d}"
        tensors[name] = value.detach().to("cpu").contiguous().clone()
        return {_TENSOR: name}
    if isinstance(value, dict):
        # Optimisers number their parameters, and JSON has no integer keys.
        return {_ITEMS: [[_encode(k, tensors), _encode(v, tensors)] for k, v in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_encode(v, tensors) for v in value]}
    if isinstance(value, list):
        return [_encode(v, tensors) for v in value]
    if value is None or isinstance(value, str | int | float | bool):
        return value
    raise TrainingError(f"a checkpoint cannot hold {type(value).__name__}", fix="keep plain values and tensors in it")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_decode(v, tensors) for v in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_decode(v, tensors) for v in value[_TUPLE])
    return {_decode(k, tensors): _decode(v, tensors) for k, v in value[_ITEMS]}


def steps_done(path: Path) -> int:
    """Optimiser steps in a saved state; 0 if there is none."""
    if not path.exists():
        return 0
    steps = SafeCheckpointIO().load_checkpoint(path).get("global_step")
    if type(steps) is not int or steps < 0:
        raise TrainingError(f"'{path}' does not say how far training got", fix=_FIX)
    return steps
