"""What a training step takes, counted without running it: memory, operations, and how long that is on a named GPU."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from delineate.core.targets import Targets
from delineate.errors import DelineateError
from delineate.losses.spec import build_loss
from delineate.networks.base import Unfilled
from delineate.networks.blocks import Recomputing
from delineate.recipe import Recipe
from delineate.sampling.tiles import TileGeometry


@dataclass(frozen=True)
class Estimate:
    """A training step, counted on tensors that have shapes but no values.

    ``memory_gb``: the most that is held at a time by weights, gradients, the optimiser, averaged weights, activations
    and what is computed in between, uncompiled; not by the program, libraries' scratch space, and scans.
    ``network_gb``: the part that stays between steps. ``gflop``: multiplications and additions of convolutions,
    forward and backward. ``moved_gb``: what all operations together read and write.
    """

    memory_gb: float
    network_gb: float
    gflop: float
    moved_gb: float

    def taken_gb(self, *, compiled: bool) -> float:
        """The memory with what libraries and the allocator take beside it, on a CPU.

        One recipe's steps took 1.4 times what is counted of activations, and compiled, which fuses many, 0.9 times.
        """
        return self.network_gb + (1.0 if compiled else 1.4) * max(0.0, self.memory_gb - self.network_gb)


def estimate_step(
    recipe: Recipe,
    channels: int,
    targets: Targets,
    geometry: TileGeometry,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
) -> Estimate:
    """What a step of ``recipe`` takes on scans of so many ``channels``; within a second or two, whatever its size.

    Raises :class:`NotImplementedError` for a network or loss whose operations need values.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    spec, held = recipe.training, _Held()
    sides = [side for axis, side in enumerate(geometry.input_shape) if axis != geometry.slice_axis]
    inner = [side for axis, side in enumerate(geometry.shape) if axis != geometry.slice_axis]
    inputs, references = channels * geometry.slices, 1 if targets.exclusive else targets.outputs
    try:
        with (
            FakeTensorMode(allow_non_fake_inputs=True),
            FlopCounterMode(display=False) as counter,
            held,
            torch.device("cpu"),
        ):
            with Unfilled():
                network = recipe.network.body(recipe.network.project_inputs_to or inputs, targets.outputs).train()
                loss = build_loss(recipe.loss, targets)
            if recipe.training.checkpoint_activations:
                for module in network.modules():
                    if isinstance(module, Recomputing):
                        module.recompute = nullcontext
            weights = held.now
            batch = torch.empty(spec.batch_size, recipe.network.project_inputs_to or inputs, *sides)
            target = torch.empty(spec.batch_size, references, *inner, dtype=torch.uint8)
            for image, reference in zip(batch.chunk(spec.accumulate), target.chunk(spec.accumulate), strict=True):
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision != "fp32"):
                    value = loss(network(image), reference, image)
                value.backward()
                del value
    except DelineateError:
        raise
    except Exception as error:  # a network of another package may do anything with its tensors
        raise NotImplementedError(
            f"network '{recipe.network.kind}' or its loss cannot be counted without values: {str(error)[:200]}"
        ) from error
    moments = {"adamw": 2, "adam": 2, "sgd": 1}[spec.optimiser.kind]
    beside = weights * (moments + (spec.ema > 0))
    return Estimate(
        memory_gb=(held.most + beside) / 1e9,
        network_gb=(2 * weights + beside) / 1e9,
        gflop=counter.get_total_flops() / 1e9,
        moved_gb=held.moved / 1e9,
    )


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors hold while it is active: ``now``, and the ``most`` so far."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.moved = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_leaves

        answer = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(answer) if isinstance(leaf, Tensor)]
        fresh = False
        for tensor in made:
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key not in self._sizes:
                fresh = True
                self._sizes[key] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self._let_go, key)
        self.most = max(self.most, self.now)
        if fresh or func._schema.is_mutable:  # not a view
            read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
            self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*read, *made))
        return answer

    def _let_go(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


@dataclass(frozen=True)
class GPU:
    """Published figures of a GPU: its memory, dense tensor-core rate in 16 bits, and memory bandwidth."""

    memory_gb: float
    tflops: float
    gb_per_second: float


GPUS = {
    "GTX 1080 Ti 11GB": GPU(11, 11.3, 484),
    "RTX 2080 Ti 11GB": GPU(11, 53.8, 616),
    "RTX 3060 12GB": GPU(12, 25.6, 360),
    "RTX 3090 24GB": GPU(24, 71.0, 936),
    "RTX 4070 12GB": GPU(12, 58.3, 504),
    "RTX 4090 24GB": GPU(24, 165.2, 1008),
    "T4 16GB": GPU(16, 65.0, 320),
    "V100 16GB": GPU(16, 125.0, 900),
    "V100 32GB": GPU(32, 125.0, 900),
    "A10 24GB": GPU(24, 125.0, 600),
    "A40 48GB": GPU(48, 149.7, 696),
    "A100 40GB": GPU(40, 312.0, 1555),
    "A100 80GB": GPU(80, 312.0, 2039),
    "L4 24GB": GPU(24, 121.0, 300),
    "L40S 48GB": GPU(48, 362.0, 864),
    "H100 80GB": GPU(80, 989.0, 3350),
    "H200 141GB": GPU(141, 989.0, 4800),
}
"""By name, from the makers' data sheets: SXM where there are several forms, without sparsity, summing in float32."""

_RATE_SHARES = (0.5, 0.1)
"""The share of its published rates that a GPU reaches in 3D convolutions: at best, and at worst."""


def seconds_on(gpu: GPU, step: Estimate) -> tuple[float, float]:
    """From how many seconds to how many a step takes on a GPU, as far as its published rates can tell.

    Computing and moving overlap at best; at worst, one waits for the other.
    """
    computing, moving = step.gflop / (1e3 * gpu.tflops), step.moved_gb / gpu.gb_per_second
    best, worst = _RATE_SHARES
    return max(computing, moving) / best, (computing / worst) + moving / best


def gpu_named(name: str) -> GPU | None:
    """The GPU of a name such as ``RTX 3060 12GB``, whatever its case and spaces; None for another."""

    def plain(text: str) -> str:
        return "".join(text.lower().removeprefix("nvidia").split())

    return next((gpu for known, gpu in GPUS.items() if plain(known) == plain(name)), None)
