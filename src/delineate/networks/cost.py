"""What a network costs: its parameters, and the work and memory of one training step, without running it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from delineate.networks.base import Architecture
from delineate.networks.blocks import CONVOLUTIONS


@dataclass(frozen=True)
class Cost:
    """Counts for a network; ``gflop`` and ``memory_gb`` are for one training step in float32 with Adam."""

    parameters: int
    keras_parameters: int
    gflop: float
    memory_gb: float


def count_parameters(network: nn.Module) -> tuple[int, int]:
    """Trainable parameters, and their number with BatchNorm's moving mean and variance, which Keras counts too."""
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    moving = sum(b.numel() for name, b in network.named_buffers() if "running_" in name)
    return trainable, trainable + moving


def count_convolutions(spec: Architecture, inputs: int, outputs: int) -> int:
    """Number of convolutional layers, transposed ones included."""
    with torch.device("meta"):
        network = spec.build(inputs, outputs)
    return sum(isinstance(module, CONVOLUTIONS) for module in network.modules())


def step_cost(spec: Architecture, inputs: int, outputs: int, sides: Sequence[int], batch: int) -> Cost:
    """Cost of one training step on ``batch`` images (``inputs``, *``sides``).

    Counted on the meta device, where nothing is computed. Memory covers weights, gradients, both of Adam's
    moments and what the backward pass keeps, but not the framework itself or convolutions' scratch space.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        network = spec.build(inputs, outputs).train()
        image = torch.empty(batch, inputs, *sides)
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        alive.append(tensor)  # otherwise another tensor might reuse its address
        return tensor

    alive: list[Tensor] = []
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            answer = network(image)
            logits = answer if isinstance(answer, Tensor) else sum(a.sum() for a in answer)
        logits.sum().backward()
    trainable, keras = count_parameters(network)
    weights = sum(p.numel() * p.element_size() for p in network.parameters())
    own = {p.untyped_storage()._cdata for p in network.parameters()}
    activations = sum(size for address, size in kept.items() if address not in own)
    return Cost(trainable, keras, counter.get_total_flops() / 1e9, (4 * weights + activations) / 1e9)
