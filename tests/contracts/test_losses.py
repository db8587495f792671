"""What every loss promises; a new one is a line in ``SPECS``."""

from __future__ import annotations

import pytest
import torch

from delineate.core.targets import IGNORED
from delineate.losses.overlap import DiceSpec
from delineate.losses.pixelwise import CrossEntropySpec
from delineate.losses.spec import DICE_AND_CROSS_ENTROPY

SPECS = {
    "cross entropy": CrossEntropySpec(),
    "dice": DiceSpec(),
    "dice of each sample": DiceSpec(over_batch=False),
    "dice + cross entropy": DICE_AND_CROSS_ENTROPY,
}
IMAGE = torch.zeros(2, 1, 4, 4)


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


@pytest.fixture(params=[True, False], ids=["exclusive", "overlapping"])
def exclusive(request):
    return request.param


def some_target(exclusive: bool) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 3 if exclusive else 2, (2, 1 if exclusive else 3, 4, 4), dtype=torch.uint8)


def perfect_logits(target: torch.Tensor, exclusive: bool, sureness: float = 20.0) -> torch.Tensor:
    if not exclusive:
        return (target.float() * 2 - 1) * sureness
    return (torch.nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1).float() * 2 - 1) * sureness


def test_perfection_is_the_minimum(spec, exclusive) -> None:
    target = some_target(exclusive)
    loss = spec.build(exclusive)
    best = loss(perfect_logits(target, exclusive), target, IMAGE)
    assert best == pytest.approx(0, abs=1e-3)
    assert loss(torch.randn(2, 3, 4, 4), target, IMAGE) > best
    assert loss(-perfect_logits(target, exclusive), target, IMAGE) > loss(torch.zeros(2, 3, 4, 4), target, IMAGE)


def test_it_grows_with_every_wrong_voxel(spec, exclusive) -> None:
    target = some_target(exclusive)
    loss, logits = spec.build(exclusive), perfect_logits(target, exclusive, 3.0)
    values = [loss(logits, target, IMAGE).item()]
    for x in range(4):
        logits[:, :, x] *= -1
        values.append(loss(logits, target, IMAGE).item())
    assert values == sorted(values)
    assert len(set(values)) == 5


def test_gradients_are_right(spec, exclusive) -> None:
    target = some_target(exclusive)
    logits = torch.randn(2, 3, 4, 4, requires_grad=True)
    loss = spec.build(exclusive)
    loss(logits, target, IMAGE).backward()
    direction, step = torch.randn_like(logits), 1e-2
    with torch.no_grad():
        ahead, behind = (loss(logits + s * step * direction, target, IMAGE) for s in (1, -1))
    slope = (logits.grad * direction).sum().item()
    assert ((ahead - behind) / (2 * step)).item() == pytest.approx(slope, rel=2e-2, abs=1e-4)


def test_ignored_voxels_weigh_nothing(spec, exclusive) -> None:
    target = some_target(exclusive)
    target[:, :, 2:] = IGNORED
    loss, logits = spec.build(exclusive), torch.randn(2, 3, 4, 4, requires_grad=True)
    value = loss(logits, target, IMAGE)
    value.backward()
    assert logits.grad[:, :, 2:].abs().sum() == 0
    other = logits.detach().clone()
    other[:, :, 2:] += 5
    assert loss(other, target, IMAGE).item() == pytest.approx(value.item(), rel=1e-6)


def test_nothing_to_judge_is_zero(spec, exclusive) -> None:
    target = torch.full_like(some_target(exclusive), IGNORED)
    assert spec.build(exclusive)(torch.randn(2, 3, 4, 4), target, IMAGE).item() == 0


def test_half_precision_logits_are_judged_in_full(spec, exclusive) -> None:
    target, logits = some_target(exclusive), torch.randn(2, 3, 4, 4).to(torch.bfloat16)
    value = spec.build(exclusive)(logits, target, IMAGE)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(spec.build(exclusive)(logits.float(), target, IMAGE).item())
