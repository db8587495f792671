"""What imported weights must be: the tensors of the network that their settings describe."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from delineate.errors import CannotImport
from delineate.networks.base import Architecture


def expected_tensors(spec: Architecture, inputs: int, outputs: int) -> dict[str, Tensor]:
    """The network's tensors, without contents."""
    with torch.device("meta"):
        return dict(spec.build(inputs, outputs).state_dict())


def check_same(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], file: Path, network: str, fix: str) -> None:
    """Raise :class:`CannotImport`, naming a tensor, unless all names and sizes are those expected."""
    wrong = [name for name in {**expected, **found} if name not in found or name not in expected]
    wrong += [name for name in expected if name in found and expected[name].shape != found[name].shape]
    if wrong:
        raise CannotImport(
            f"'{file}' does not fit {network}: {len(wrong)} tensors differ, the first is {wrong[0][:100]}", fix=fix
        )
