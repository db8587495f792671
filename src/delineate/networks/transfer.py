"""Starting from other weights: load what fits, report the rest, and freeze chosen parts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from itertools import product
from typing import Literal

import torch
from torch import Tensor, nn

from delineate.errors import RecipeError
from delineate.networks.base import Architecture, Unfilled

Channels = Literal["repeat", "mean"]
NORMS = (nn.BatchNorm2d, nn.BatchNorm3d)


@dataclass
class Transfer:
    """What was loaded, by key.

    ``adapted`` were converted or loaded in part: input channels, or chosen rows of the head.
    ``missing`` are in the network but not in the source, ``unexpected`` in the source but not in the
    network, ``reshaped`` in both with different shapes, and ``left_out`` were excluded by a pattern.
    """

    matched: list[str] = field(default_factory=list)
    adapted: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} tensors loaded"]
        for name in ("adapted", "missing", "unexpected", "reshaped", "left_out"):
            keys = getattr(self, name)
            if keys:
                more = f" and {len(keys) - 4} more" if len(keys) > 4 else ""
                parts.append(f"{len(keys)} {name.replace('_', ' ')} ({', '.join(keys[:4])}{more})")
        return ", ".join(parts)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Names that match any of the patterns, such as ``encoder.0.*``."""
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def load_what_fits(
    network: nn.Module,
    weights: Mapping[str, Tensor],
    *,
    rows: Sequence[int | None] = (),
    axes: Mapping[str, Sequence[int]] | None = None,
    channels: Channels | None = None,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
) -> Transfer:
    """Copy ``weights`` into ``network`` where keys and shapes fit.

    ``rows``: for each of the network's outputs, the source's output to start from, or None for a fresh one; applied
    along ``axes``, those of each tensor along which the outputs lie (:func:`output_axes`).
    ``channels`` converts kernels that differ only in their input channels: ``repeat`` takes the
    source's channels in turn, ``mean`` their mean; both keep the sum over channels.
    Raises :class:`RecipeError` where nothing fits.
    """
    result, own = Transfer(), network.state_dict()
    wanted = set(matching(own, include)) - set(matching(own, exclude))
    moved = list(rows) != list(range(len(rows)))
    with torch.no_grad():
        for key, tensor in own.items():
            along = (axes or {}).get(key, ()) if rows else ()
            if key not in wanted:
                result.left_out.append(key)
            elif key not in weights:
                result.missing.append(key)
            elif weights[key].shape == tensor.shape and not (along and moved):
                tensor.copy_(weights[key])
                result.matched.append(key)
            elif (
                _copy_rows(tensor, weights[key], rows, along)
                if along
                else _copy_channels(tensor, weights[key], channels)
            ):
                result.adapted.append(key)
            else:
                result.reshaped.append(key)
    result.unexpected = [key for key in weights if key not in own]
    if not result.matched and not result.adapted:
        raise RecipeError(
            f"none of {len(weights)} tensors fits the network: names are like '{next(iter(weights), '')}', not like "
            f"'{next(iter(own))}'",
            fix="start from weights of the same kind of network",
        )
    return result


def output_axes(spec: Architecture, outputs: int) -> dict[str, tuple[int, ...]]:
    """The axes of each tensor of a network along which its outputs lie; no entry for a tensor without such axes.

    They are those whose length changes with the number of outputs: a hidden layer may by chance have as many channels.
    """
    with torch.device("meta"), Unfilled():
        network, other = (spec.build(1, n).state_dict() for n in (outputs, 2 if outputs == 1 else 1))
    axes = {
        key: tuple(axis for axis, n in enumerate(tensor.shape) if n != other[key].shape[axis])
        for key, tensor in network.items()
        if key in other
    }
    return {key: found for key, found in axes.items() if found}


def _copy_rows(tensor: Tensor, source: Tensor, rows: Sequence[int | None], axes: Sequence[int]) -> bool:
    """Copy the chosen outputs, along all ``axes``; False if the shapes do not allow it."""
    known = [(place, row) for place, row in enumerate(rows) if row is not None]
    if tensor.ndim != source.ndim:
        return False
    for axis, (ours, theirs) in enumerate(zip(tensor.shape, source.shape, strict=True)):
        fits = ours == len(rows) and all(row < theirs for _, row in known) if axis in axes else ours == theirs
        if not fits:
            return False
    for chosen in product(known, repeat=len(axes)):
        part, whence = tensor, source
        # The last axis first: those before it keep their numbers.
        for axis, (place, row) in zip(reversed(axes), chosen, strict=True):
            part, whence = part.select(axis, place), whence.select(axis, row)
        part.copy_(whence)
    return True


def _copy_channels(tensor: Tensor, source: Tensor, channels: Channels | None) -> bool:
    if channels is None or tensor.ndim < 4 or tensor.ndim != source.ndim:
        return False
    if tensor.shape[0] != source.shape[0] or tensor.shape[2:] != source.shape[2:]:
        return False
    have, want = source.shape[1], tensor.shape[1]
    if channels == "mean":
        kernel = source.mean(1, keepdim=True).expand_as(tensor)
    else:
        kernel = source[:, [c % have for c in range(want)]]
    tensor.copy_(kernel * (have / want))
    return True


def freeze(network: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freeze the parameters whose names match; returns them. Raises :class:`RecipeError` if a pattern matches none."""
    names = dict(network.named_parameters())
    for pattern in patterns:
        if not matching(names, [pattern]):
            raise RecipeError(
                f"frozen: no parameter matches '{pattern}'", fix=f"use names such as '{next(iter(names))}'"
            )
    frozen = matching(names, patterns)
    for name in frozen:
        names[name].requires_grad_(False)
    return frozen


def free_norms(network: nn.Module) -> list[nn.BatchNorm2d | nn.BatchNorm3d]:
    """BatchNorms that are trained."""
    return [m for m in network.modules() if isinstance(m, NORMS) and any(p.requires_grad for p in m.parameters())]


def hold_frozen_norms(network: nn.Module) -> None:
    """Put BatchNorms whose parameters are all frozen into evaluation mode, so that their statistics stay fixed too."""
    free = set(free_norms(network))
    for module in network.modules():
        if isinstance(module, NORMS) and module not in free:
            module.eval()
