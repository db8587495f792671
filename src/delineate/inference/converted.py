"""Networks that OpenVINO has compiled, kept on the disk with what their trial found, for processes to come.

They are in ``engines`` in the home folder, which must be the user's alone, one file each. Its name is a digest of all
that the compiled network depends on. It holds the SHA-256 of the rest, a line of JSON, and what OpenVINO exported.
Files used least recently are removed when all together are too large. A file that is damaged, or not what its name
says, counts as missing, as does one that cannot be read or written: it only costs the time to convert again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Self

import torch
from pydantic import Field
from torch import nn

import delineate.networks
from delineate.compute import ComputePlan
from delineate.errors import DelineateError
from delineate.io.files import home_folder, read_bytes, writing_beside
from delineate.networks.base import Architecture
from delineate.specification import Specification, Text, from_json, to_json

MOST_BYTES = 2**30
"""All files together may take this much."""
_FORMAT = "1"
_DIGEST = 64  # characters of a SHA-256
_FILE = re.compile(r"(\.[0-9a-f]{8}-)?[0-9a-f]{32}")
"""A compiled network, or one that a killed process left half written."""


@dataclass(frozen=True)
class Trial:
    """What the trial of an engine found, on one input.

    ``alike`` is the share of voxels that it decides as PyTorch does, and ``faster`` how many times as fast it is,
    if that was measured.
    """

    alike: Annotated[float, Field(ge=0, le=1)]
    faster: Annotated[float, Field(gt=0, le=1e9)] | None = None


@dataclass(frozen=True)
class Kept:
    """What OpenVINO exported of a network compiled for ``batch`` inputs, and what the trial of it found."""

    exported: bytes
    batch: int
    trial: Trial


class _Head(Specification):
    name: Text
    batch: Annotated[int, Field(ge=1, le=2**31)]
    trial: Trial


class Converted:
    """The compiled networks of one trained network on the disk, by the shape of the input."""

    def __init__(self, folder: Path, about: Mapping[str, str]) -> None:
        self._folder, self._about = folder, about

    @classmethod
    def of(cls, network: nn.Module, built_by: Architecture, plan: ComputePlan, exclusive: bool) -> Self | None:
        """Those of ``network`` as ``built_by`` built it, for a plan and for how outputs decide.

        None for a network with parts of other packages, whose code may change while their version stays, and where
        OpenVINO's version cannot be told.
        """
        if not all(type(part).__module__.startswith(("torch.nn.", "delineate.")) for part in network.modules()):
            return None
        try:
            machine = _machine()
        except PackageNotFoundError:
            return None
        about = {
            "format": _FORMAT,
            "weights": _digest_of(network),
            "network": to_json(built_by, indent=None),
            "decision": "the largest output" if exclusive else "the sign of each output",
            "precision": plan.precision,
            "threads": str(plan.threads),
        }
        return cls(home_folder() / "engines", {**about, **machine})

    def find(self, shape: Sequence[int]) -> Kept | None:
        """The network compiled for inputs (C, *space) of ``shape``, if there is one."""
        path = self._path(shape)
        try:
            if not _own(self._folder):
                return None
            content = read_bytes(path, MOST_BYTES)
        except (OSError, DelineateError):
            return None
        kept = _kept(content, path.name)
        with suppress(OSError):
            if kept is None:
                path.unlink()
            else:
                os.utime(path)  # used just now
        return kept

    def keep(self, shape: Sequence[int], kept: Kept) -> None:
        """Write a network compiled for inputs (C, *space) of ``shape``, in place of an earlier one."""
        path = self._path(shape)
        head = to_json(_Head(name=path.name, batch=kept.batch, trial=kept.trial), indent=None).encode() + b"\n"
        digest = hashlib.sha256(head)
        digest.update(kept.exported)
        if _DIGEST + 1 + len(head) + len(kept.exported) > MOST_BYTES:
            return
        with suppress(OSError, DelineateError):
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _own(self._folder):
                return
            with writing_beside(path) as beside, beside.open("wb") as file:
                file.writelines([digest.hexdigest().encode(), b"\n", head, kept.exported])
            _trim(self._folder)

    def _path(self, shape: Sequence[int]) -> Path:
        about = json.dumps({**self._about, "shape": list(shape)}, sort_keys=True)
        return self._folder / hashlib.blake2b(about.encode(), digest_size=16).hexdigest()


def _kept(content: bytes, name: str) -> Kept | None:
    """What a file of this name holds, if it is whole and was written under it."""
    rest = memoryview(content)[_DIGEST + 1 :]
    if hashlib.sha256(rest).hexdigest().encode() + b"\n" != content[: _DIGEST + 1]:
        return None
    first, _, exported = content[_DIGEST + 1 :].partition(b"\n")
    try:
        head = from_json(_Head, first)
    except ValueError:
        return None
    return Kept(exported, head.batch, head.trial) if head.name == name else None


def _own(folder: Path) -> bool:
    """Whether a folder is the user's alone: what OpenVINO loads can do whatever a program can."""
    found = folder.lstat()
    alone = os.name != "posix" or (found.st_uid == os.getuid() and not found.st_mode & 0o077)
    return stat.S_ISDIR(found.st_mode) and alone


def _trim(folder: Path) -> None:
    """Remove the files used least recently, until the rest take no more than :data:`MOST_BYTES`."""
    found = [(path.stat(), path) for path in folder.iterdir() if _FILE.fullmatch(path.name)]
    total = 0
    for about, path in sorted(found, key=lambda one: one[0].st_mtime_ns, reverse=True):
        total += about.st_size
        if total > MOST_BYTES:
            path.unlink(missing_ok=True)


def _digest_of(network: nn.Module) -> str:
    """SHA-256 of a network's weights, in the order and under the names that it has them."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


@cache
def _machine() -> Mapping[str, str]:
    """The software and the processor that a compiled network depends on; OpenVINO is not imported to find out."""
    return {
        "openvino": version("openvino"),
        "torch": torch.__version__,
        "delineate": version("delineate"),
        "code": _digest_of_code(),
        "processor": str(sorted(torch.cpu.get_capabilities().items())),
    }


def _digest_of_code() -> str:
    """SHA-256 of the code that builds networks: in a checkout it changes while the version stays."""
    digest = hashlib.sha256()
    for folder in delineate.networks.__path__:
        for file in sorted(Path(folder).glob("*.py")):
            digest.update(file.read_bytes())
    return digest.hexdigest()
