"""What every network promises."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from delineate.core.targets import Targets
from delineate.networks.base import Architecture
from delineate.networks.blocks import Recomputing
from delineate.networks.spec import NETWORKS
from delineate.testing.laws import Law, hold, require, require_own_name, survives_writing


def check_network(spec: Architecture, *, skip: Iterable[str] = ()) -> None:
    """Hold a network to :data:`NETWORK_LAWS`, with the given fields; keep it small, since it is built and run often."""
    hold(repr(spec), NETWORK_LAWS, tuple(skip), spec)


def sides_for(spec: Architecture, multiple: int = 2) -> list[int]:
    """Sides that a network accepts, ``multiple`` divisors each."""
    return [max(multiple * d, s) for d, s in zip(spec.divisor, spec.smallest, strict=True)]


def image_for(spec: Architecture, channels: int = 2, multiple: int = 2, batch: int = 2) -> Tensor:
    """An image of noise that a network accepts."""
    torch.manual_seed(0)
    return torch.randn(batch, channels, *sides_for(spec, multiple))


def finest(answer: Any) -> Tensor:
    """The logits; if deeply supervised, the first ones."""
    logits: Tensor = answer[0] if isinstance(answer, tuple) else answer
    return logits


def fields_are_plain_and_the_kind_its_own(spec: Architecture) -> None:
    require_own_name(NETWORKS, spec.kind, type(spec))
    survives_writing(spec)


def output_has_the_inputs_size_less_the_margin(spec: Architecture) -> None:
    image = image_for(spec)
    logits = finest(spec.build(2, 3)(image))
    expected = (2, 3, *(n - 2 * m for n, m in zip(image.shape[2:], spec.margin, strict=True)))
    require(logits.shape == expected, f"an image {tuple(image.shape)} gives {tuple(logits.shape)}, not {expected}")


def the_smallest_input_is_taken(spec: Architecture) -> None:
    image = torch.randn(2, 1, *spec.smallest)
    expected = tuple(n - 2 * m for n, m in zip(spec.smallest, spec.margin, strict=True))
    with torch.no_grad():
        found = tuple(finest(spec.build(1, 2).eval()(image)).shape[2:])
    require(found == expected, f"sides {spec.smallest} give {found}, not {expected}")


def every_parameter_and_input_channel_has_a_gradient(spec: Architecture) -> None:
    network, image = _without_dropout(spec.build(2, 3)).train(), image_for(spec, multiple=3).requires_grad_()
    answer = network(image)
    torch.autograd.backward([a.square().sum() for a in (answer if isinstance(answer, tuple) else (answer,))])
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    require(not dead, f"no gradient reaches {', '.join(dead)}")
    assert image.grad is not None
    seen = (image.grad.abs().sum(dim=(0, *range(2, image.ndim))) > 0).all()
    require(seen, "no gradient reaches some channel of the image")


def a_divisor_more_is_taken_along_every_axis(spec: Architecture) -> None:
    network = spec.build(1, 2).eval()
    for axis, divisor in enumerate(spec.divisor):
        sides = sides_for(spec)
        sides[axis] += divisor
        with torch.no_grad():
            found = finest(network(torch.zeros(1, 1, *sides))).shape[2 + axis]
        expected = sides[axis] - 2 * spec.margin[axis]
        require(found == expected, f"sides {sides} give {found} along axis {axis}, not {expected}")


def samples_do_not_mix_in_evaluation(spec: Architecture) -> None:
    network, image = spec.build(2, 3).double().eval(), image_for(spec).double()
    with torch.no_grad():
        together, alone = finest(network(image)), finest(network(image[:1]))
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def weights_survive_saving(spec: Architecture) -> None:
    from safetensors.torch import load_file, save_file

    network, twin, image = spec.build(2, 3).eval(), spec.build(2, 3).eval(), image_for(spec)
    with tempfile.TemporaryDirectory() as folder:
        save_file(network.state_dict(), Path(folder) / "w.safetensors")
        twin.load_state_dict(load_file(Path(folder) / "w.safetensors"))
    torch.testing.assert_close(network(image), twin(image), rtol=0, atol=0)


def memory_format_does_not_change_the_answer(spec: Architecture) -> None:
    network, image = spec.build(2, 3).eval(), image_for(spec)
    plain = network(image)
    last = torch.channels_last_3d if spec.dimensions == 3 else torch.channels_last
    network.to(memory_format=last)  # type: ignore[call-overload]
    torch.testing.assert_close(network(image.contiguous(memory_format=last)), plain, rtol=1e-4, atol=1e-4)


def it_runs_in_bfloat16(spec: Architecture) -> None:
    network, image = spec.build(2, 3).eval(), image_for(spec)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        require(torch.isfinite(finest(network(image))).all(), "logits in bfloat16 are not finite")


def it_traces_into_one_graph(spec: Architecture) -> None:
    """Without graph breaks, so that compilation sees all of it."""
    network, image = spec.build(2, 3), image_for(spec)
    compiled: Any = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(image), network.eval()(image), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def recomputing_activations_changes_nothing(spec: Architecture) -> None:
    """If it says that it can: the same logits, gradients and statistics, bit for bit."""
    if not spec.recomputes:
        return
    torch.manual_seed(0)
    network, image = spec.build(2, 3).train(), image_for(spec)
    twin = copy.deepcopy(network)
    parts = [module for module in twin.modules() if isinstance(module, Recomputing)]
    require(parts, "it says that it recomputes activations, but no part of it is a blocks.Recomputing")
    again = 0

    @contextmanager
    def counted() -> Iterator[None]:
        nonlocal again
        again += 1
        yield

    for part in parts:
        part.recompute = counted
    found = []
    for one in (network, twin):
        torch.manual_seed(1)  # of any dropout
        answer = one(image)
        answers = answer if isinstance(answer, tuple) else (answer,)
        torch.autograd.backward([a.square().sum() for a in answers])
        state = dict(one.named_buffers()) | {f"gradient of {name}": p.grad for name, p in one.named_parameters()}
        found.append(state | {f"logits {i}": a.detach() for i, a in enumerate(answers)})
    require(again, "nothing was computed again")
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def an_odd_sized_scan_is_predicted_whole(spec: Architecture) -> None:
    """Tiles, margins and padding follow from what the network declares."""
    from delineate.compute import plan_compute
    from delineate.inference.sliding import Sliding
    from delineate.sampling.tiles import Patches, Slices, geometry_for

    tiles = Patches(shape=(16, 16, 16)) if spec.dimensions == 3 else Slices(shape=(32, 32))
    geometry = geometry_for(tiles, (19, 17, 5), (1, 1, 1), spec)
    targets = Targets({"organ": (1,)})
    sliding = Sliding(plan_compute(compile="off", precision="fp32"), targets.exclusive, 2, 0.25, "gaussian")
    image = np.random.default_rng(0).standard_normal((1, 19, 17, 5)).astype(np.float32)
    probability = sliding.probabilities(spec.build(1, 2).eval(), image, geometry)
    require(probability.shape[-3:] == (19, 17, 5), f"a scan of 19 × 17 × 5 voxels gives {probability.shape}")
    require(np.isfinite(np.asarray(probability)).all(), "probabilities are not finite")


NETWORK_LAWS: tuple[Law, ...] = (
    fields_are_plain_and_the_kind_its_own,
    output_has_the_inputs_size_less_the_margin,
    the_smallest_input_is_taken,
    every_parameter_and_input_channel_has_a_gradient,
    a_divisor_more_is_taken_along_every_axis,
    samples_do_not_mix_in_evaluation,
    weights_survive_saving,
    memory_format_does_not_change_the_answer,
    it_runs_in_bfloat16,
    it_traces_into_one_graph,
    recomputing_activations_changes_nothing,
    an_odd_sized_scan_is_predicted_whole,
)


def _without_dropout(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
            module.p = 0.0
    return network
