"""What every loss promises; a new one is a line in ``SPECS``."""

from __future__ import annotations

import pytest
import torch

from delineate.core.targets import IGNORED, Targets
from delineate.losses.content import SiameseContentSpec
from delineate.losses.overlap import DiceSpec, FocalTverskySpec, GeneralisedDiceSpec, TverskySpec
from delineate.losses.pixelwise import CrossEntropySpec, FocalSpec
from delineate.losses.spec import (
    DICE_AND_CROSS_ENTROPY,
    DeepSupervisionSpec,
    RegionSpec,
    SumSpec,
    WeightedLoss,
    build_loss,
)

SPECS = {
    "cross entropy": CrossEntropySpec(),
    "weighted cross entropy": CrossEntropySpec(weights={"a": 3, "background": 0.5}),
    "focal": FocalSpec(),
    "dice": DiceSpec(),
    "dice of each sample": DiceSpec(over_batch=False),
    "weighted dice with background": DiceSpec(include_background=True, weights={"background": 1, "a": 3, "b": 5}),
    "generalised dice": GeneralisedDiceSpec(),
    "tversky": TverskySpec(),
    "focal tversky": FocalTverskySpec(),
    "focal tversky, summed": FocalTverskySpec(gamma=3, reduction="sum"),
    "dice + cross entropy": DICE_AND_CROSS_ENTROPY,
    "dice near a region": RegionSpec(loss=DiceSpec(), within=("a", "b"), box=True, dilate_voxels=4),
    "siamese content": SiameseContentSpec(weights="random", soft_labels=None),
    "siamese content, trained": SiameseContentSpec(weights="random", soft_labels=None, trained=True, reduction="mean"),
}
# Their reference is never met exactly.
SOFT = {
    "soft cross entropy": CrossEntropySpec(soft_labels=(0.1, 0.9)),
    "soft dice": DiceSpec(soft_labels=(0.1, 0.9)),
    "soft generalised dice": GeneralisedDiceSpec(soft_labels=(0.1, 0.9)),
    "soft siamese content": SiameseContentSpec(weights="random"),
}
TARGETS = {
    mode: Targets({"a": (1,), "b": (2,), **({"c": (3,)} if mode == "overlapping" else {})}, mode)
    for mode in ("exclusive", "overlapping")
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


@pytest.fixture(params=[*SPECS.values(), *SOFT.values()], ids=[*SPECS, *SOFT])
def any_spec(request):
    return request.param


@pytest.fixture(params=TARGETS.values(), ids=TARGETS.keys())
def targets(request):
    return request.param


def built(spec, targets):
    torch.manual_seed(3)
    return build_loss(spec, targets)


@pytest.fixture
def image():
    torch.manual_seed(2)
    return torch.rand(2, 1, 8, 8)


def some_target(targets: Targets) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, 3 if targets.exclusive else 2, (2, 1 if targets.exclusive else 3, 8, 8), dtype=torch.uint8)


def perfect_logits(target: torch.Tensor, targets: Targets, sureness: float = 20.0) -> torch.Tensor:
    if not targets.exclusive:
        return (target.float() * 2 - 1) * sureness
    return (torch.nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1).float() * 2 - 1) * sureness


def test_perfection_is_the_minimum(spec, targets, image) -> None:
    target = some_target(targets)
    loss = built(spec, targets)
    best = loss(perfect_logits(target, targets), target, image)
    assert best.item() == pytest.approx(0, abs=1e-3)
    assert loss(torch.randn(2, 3, 8, 8), target, image) > best
    wrong = loss(-perfect_logits(target, targets), target, image)
    assert wrong > loss(perfect_logits(target, targets, 0.5), target, image) > best


def test_it_grows_with_every_wrong_row(spec, targets, image) -> None:
    target = some_target(targets)
    loss, logits = built(spec, targets), perfect_logits(target, targets, 3.0)
    values = [loss(logits, target, image).item()]
    for x in range(8):
        logits[:, :, x] *= -1
        values.append(loss(logits, target, image).item())
    if isinstance(spec, SiameseContentSpec):
        # Distances between features do not add up row by row; the ends are ordered.
        assert values[0] < min(values[1:])
        return
    assert values == sorted(values)
    assert len(set(values)) == 9


def test_gradients_are_right(any_spec, targets, image) -> None:
    """Slopes in float64 along random directions."""
    target, loss = some_target(targets), built(any_spec, targets)
    if isinstance(any_spec, SiameseContentSpec):
        pytest.skip("float32 on purpose; its slope is checked beside its values")
    logits = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, target, image), logits, fast_mode=True)


def test_ignored_voxels_weigh_nothing(any_spec, targets, image) -> None:
    target = some_target(targets)
    target[:, :, 4:] = IGNORED
    loss, logits = built(any_spec, targets), torch.randn(2, 3, 8, 8, requires_grad=True)
    value = loss(logits, target, image)
    value.backward()
    assert logits.grad[:, :, 4:].abs().sum() == 0
    assert logits.grad[:, :, :4].abs().sum() > 0
    other = logits.detach().clone()
    other[:, :, 4:] += 5
    assert loss(other, target, image).item() == pytest.approx(value.item(), rel=1e-5)


def test_nothing_to_judge_is_zero(any_spec, targets, image) -> None:
    target = torch.full_like(some_target(targets), IGNORED)
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    value = built(any_spec, targets)(logits, target, image)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert logits.grad.abs().sum() == 0


def test_an_absent_target_is_judged_too(spec, targets, image) -> None:
    """Nothing in the reference: finite, and predicting nothing is better than predicting something."""
    if isinstance(spec, RegionSpec):
        pytest.skip("without the region nothing counts")
    target = torch.zeros_like(some_target(targets))
    loss = built(spec, targets)
    right, wrong = perfect_logits(target, targets, 4.0), torch.randn(2, 3, 8, 8, requires_grad=True)
    value = loss(wrong, target, image)
    value.backward()
    assert torch.isfinite(wrong.grad).all()
    assert loss(right, target, image) < value


def test_half_precision_logits_are_judged_in_full(any_spec, targets, image) -> None:
    target, logits = some_target(targets), torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    loss = built(any_spec, targets)
    value = loss(logits, target, image)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(loss(logits.float(), target, image).item())


def test_volumes_are_judged_like_slices(any_spec, targets) -> None:
    torch.manual_seed(0)
    target, logits = some_target(targets)[..., None].repeat(1, 1, 1, 1, 4), torch.randn(2, 3, 8, 8, 4)
    assert torch.isfinite(built(any_spec, targets)(logits, target, torch.rand(2, 1, 8, 8, 4)))


@pytest.mark.parametrize("weights", [None, (1.0, 3.0)])
def test_answers_at_several_sizes_are_weighed(any_spec, targets, image, weights) -> None:
    target = some_target(targets)
    fine, coarse = perfect_logits(target, targets), torch.randn(2, 3, 4, 4)
    spec = DeepSupervisionSpec(loss=any_spec, weights=weights) if weights else any_spec
    loss, alone = built(spec, targets), built(any_spec, targets)
    share = weights[1] / sum(weights) if weights else 1 / 3
    small = alone(coarse, target[:, :, 1::2, 1::2], torch.nn.functional.avg_pool2d(image, 2))
    expected = (1 - share) * alone(fine, target, image) + share * small
    assert loss((fine, coarse), target, image).item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss(fine, target, image).item() == alone(fine, target, image).item()


def test_sums_add(any_spec, targets, image) -> None:
    target, logits = some_target(targets), torch.randn(2, 3, 8, 8)
    terms = (WeightedLoss(weight=2.0, loss=any_spec), WeightedLoss(weight=0.5, loss=DiceSpec()))
    expected = 2 * built(any_spec, targets)(logits, target, image) + 0.5 * built(DiceSpec(), targets)(
        logits, target, image
    )
    assert built(SumSpec(terms=terms), targets)(logits, target, image).item() == pytest.approx(
        expected.item(), rel=1e-6
    )
