"""The network that training starts with."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from delineate.bundle import Bundle, bundle_folder
from delineate.errors import RecipeError
from delineate.networks.blocks import glorot_uniform, xavier_normal
from delineate.networks.transfer import freeze, load_what_fits, output_axes
from delineate.pretrained.weights import read_tensors
from delineate.recipe import StartSpec, TrainingSpec
from delineate.training.options import Reporter


def initialise(network: nn.Module, training: TrainingSpec) -> None:
    """Draw the kernels anew as the recipe says; by default they stay as the network has drawn them."""
    if training.initialisation != "default":
        network.apply({"xavier_normal": xavier_normal, "glorot_uniform": glorot_uniform}[training.initialisation])


def starting_network(bundle: Bundle, report: Reporter, *, resumed: bool) -> nn.Module:
    """The recipe's network: initialised from the seed, then from published or other weights, with parts frozen.

    The weights of a ``resumed`` run come from its state, so none are loaded here.
    """
    training = bundle.recipe.training
    torch.manual_seed(training.seed)
    network = bundle.network()
    if not resumed:
        initialise(network, training)
        said = bundle.recipe.network.start_from_published(network)
        if said is not None:
            report(said)
        if bundle.recipe.start is not None:
            _start_from(network, bundle.recipe.start, bundle, report)
    if training.frozen:
        frozen = freeze(network, training.frozen)
        report(f"{len(frozen)} tensors are frozen ({', '.join(training.frozen)})")
    return network


def _start_from(network: nn.Module, start: StartSpec, bundle: Bundle, report: Reporter) -> None:
    path = Path(start.weights).expanduser()
    folder = bundle_folder(path)
    rows: list[int | None] = []
    axes: dict[str, tuple[int, ...]] = {}
    if folder.is_dir():
        source = Bundle.load(folder)
        weights = source.trained_network().state_dict()
        theirs, ours = (_outputs(b) for b in (source, bundle))
        wanted = [start.rows.get(name, name) for name in ours]
        unknown = [name for name in start.rows.values() if name not in theirs]
        if unknown:
            raise RecipeError(
                f"start.rows: '{unknown[0]}' is not an output of {folder}", fix=f"it has {', '.join(theirs)}"
            )
        rows = [theirs.index(name) if name in theirs else None for name in wanted]
        axes = output_axes(bundle.recipe.network, len(ours))
    else:
        weights = read_tensors(path)
    loaded = load_what_fits(
        network, weights, rows=rows, axes=axes, channels=start.channels, include=start.include, exclude=start.exclude
    )
    report(f"starts from {start.weights}: {loaded}")


def _outputs(bundle: Bundle) -> list[str]:
    return [*(["background"] if bundle.targets.exclusive else []), *bundle.targets.names]
