"""What a step takes is counted by hand for a network of one layer, and falls where it should for others."""

from __future__ import annotations

from typing import Literal

import pytest
from torch import Tensor, nn

from delineate import plugins
from delineate.core.targets import Targets
from delineate.estimation import GPU, GPUS, Estimate, estimate_step, gpu_named, seconds_on
from delineate.networks.base import Architecture, Step
from delineate.networks.cost import step_cost
from delineate.recipe import Recipe, load_recipe, recipe_from
from delineate.sampling.tiles import geometry_for

TARGETS = Targets({"organ": (1,)})


def estimated(recipe: Recipe, precision: Literal["fp32", "bf16"] = "fp32") -> Estimate:
    geometry = geometry_for(recipe.tiles, (32, 32, 32), (1, 1, 1), recipe.network)
    return estimate_step(recipe, 1, TARGETS, geometry, precision)


def small(*changes: str) -> Recipe:
    return load_recipe("generic_3d", ["tiles.shape=[32, 32, 32]", "training.batch_size=4", *changes])


def test_it_counts_what_the_network_s_own_cost_counts_and_more() -> None:
    recipe = small()
    cost = step_cost(recipe.network, 1, 2, (32, 32, 32), 4)
    found = estimated(recipe)
    assert found.gflop == pytest.approx(cost.gflop)
    assert cost.memory_gb < found.memory_gb < 2 * cost.memory_gb
    # Weights, gradients, two moments and averaged weights.
    assert found.network_gb == pytest.approx(5 * 4 * cost.parameters / 1e9)


def test_parts_and_recomputing_take_less_memory_and_only_recomputing_more_work() -> None:
    large = "tiles.shape=[64, 64, 64]"
    whole, parts = estimated(small(large)), estimated(small(large, "training.accumulate=4"))
    again = estimated(small(large, "training.checkpoint_activations=true"))
    assert parts.memory_gb < 0.5 * whole.memory_gb
    assert parts.gflop == pytest.approx(whole.gflop)
    assert again.memory_gb < 0.9 * whole.memory_gb
    assert 1.2 * whole.gflop < again.gflop < 1.4 * whole.gflop
    assert estimated(small(), "bf16").memory_gb < whole.memory_gb


def test_nothing_is_allocated_whatever_the_size() -> None:
    recipe = load_recipe("generic_3d", ["tiles.shape=[512, 512, 512]", "training.batch_size=64"])
    assert estimated(recipe).memory_gb > 1000


class ByValue(Architecture):
    """A network that asks for a voxel's value."""

    kind: Literal["by_value"] = "by_value"
    dimensions: Literal[3] = 3

    @property
    def divisor(self) -> Step:
        return (1, 1, 1)

    def body(self, inputs: int, outputs: int) -> nn.Module:
        return _ByValue(inputs, outputs, 1)


class _ByValue(nn.Conv3d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.sum().item() > 0 else -x)


def test_a_network_that_depends_on_values_is_said_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(plugins.VARIABLE, __name__)
    recipe = recipe_from(small().as_dict() | {"network": {"kind": "by_value"}})
    with pytest.raises(NotImplementedError, match="by_value"):
        estimated(recipe)


def test_a_gpu_is_as_slow_as_the_slower_of_its_rates() -> None:
    gpu = GPU(10, tflops=100, gb_per_second=1000)
    least, most = seconds_on(gpu, Estimate(1, 1, gflop=100_000, moved_gb=1))
    assert 1 < least < most
    by_memory, _ = seconds_on(gpu, Estimate(1, 1, gflop=1, moved_gb=1000))
    assert by_memory > 1


def test_gpus_are_known_by_name_in_any_case() -> None:
    assert gpu_named("rtx 3060 12GB") is GPUS["RTX 3060 12GB"]
    assert gpu_named("NVIDIA A100 40GB") is GPUS["A100 40GB"]
    assert gpu_named("Voodoo 2") is None
    assert all(gpu.memory_gb == int(name.split()[-1].removesuffix("GB")) for name, gpu in GPUS.items())
