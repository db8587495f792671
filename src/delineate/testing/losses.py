"""What every loss promises, for exclusive and overlapping targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from delineate.core.targets import IGNORED, Targets
from delineate.losses.base import LossSpecification
from delineate.losses.combined import DeepSupervision
from delineate.losses.spec import LOSSES, build_loss
from delineate.testing.laws import Law, close, hold, require, require_own_name, survives_writing

TARGETS: Mapping[str, Targets] = MappingProxyType(
    {
        "exclusive": Targets({"a": (1,), "b": (2,)}, "exclusive"),
        "overlapping": Targets({"a": (1,), "b": (2,), "c": (3,)}, "overlapping"),
    }
)


def check_loss(
    spec: LossSpecification, *, modes: Iterable[str] = ("exclusive", "overlapping"), skip: Iterable[str] = ()
) -> None:
    """Hold a loss to :data:`LOSS_LAWS`, for targets in each mode that it supports."""
    for mode in modes:
        hold(f"{spec!r} for {mode} targets", LOSS_LAWS, tuple(skip), spec, TARGETS[mode])


def built(spec: LossSpecification, targets: Targets) -> DeepSupervision:
    """The loss, seeded so that any random weights are always the same."""
    torch.manual_seed(3)
    return build_loss(spec, targets)


def some_image() -> Tensor:
    """(2, 1, 8, 8)."""
    torch.manual_seed(2)
    return torch.rand(2, 1, 8, 8)


def some_target(targets: Targets) -> Tensor:
    """A target (2, T, 8, 8) with every class in it."""
    torch.manual_seed(1)
    return torch.randint(0, 3 if targets.exclusive else 2, (2, 1 if targets.exclusive else 3, 8, 8), dtype=torch.uint8)


def perfect_logits(target: Tensor, targets: Targets, sureness: float = 20.0) -> Tensor:
    """Logits that predict the target exactly."""
    if not targets.exclusive:
        return (target.float() * 2 - 1) * sureness
    return (torch.nn.functional.one_hot(target[:, 0].long(), 3).movedim(-1, 1).float() * 2 - 1) * sureness


def fields_are_plain_and_the_kind_its_own(spec: LossSpecification, targets: Targets) -> None:
    require_own_name(LOSSES, spec.kind, type(spec))
    survives_writing(spec)


def perfection_is_the_minimum(spec: LossSpecification, targets: Targets) -> None:
    image, target = some_image(), some_target(targets)
    loss = built(spec, targets)
    best = loss(perfect_logits(target, targets), target, image)
    require(abs(best.item()) <= 1e-3, f"a perfect prediction costs {best:.4f}, not 0")
    chance = loss(torch.randn(2, 3, 8, 8), target, image)
    require(chance > best, f"chance costs {chance:.4f}, no more than a perfect prediction")
    wrong = loss(-perfect_logits(target, targets), target, image)
    unsure = loss(perfect_logits(target, targets, 0.5), target, image)
    require(wrong > unsure > best, f"wrong costs {wrong:.4f}, right but unsure {unsure:.4f}, right {best:.4f}")


def it_grows_with_every_wrong_row(spec: LossSpecification, targets: Targets) -> None:
    image, target = some_image(), some_target(targets)
    loss, logits = built(spec, targets), perfect_logits(target, targets, 3.0)
    values = [loss(logits, target, image).item()]
    for x in range(8):
        logits[:, :, x] *= -1
        values.append(loss(logits, target, image).item())
    require(values == sorted(values) and len(set(values)) == 9, f"for 0 to 8 wrong rows it is {values}")


def gradients_are_right(spec: LossSpecification, targets: Targets) -> None:
    """Compared in float64 with slopes along random directions."""
    image, target = some_image(), some_target(targets)
    loss = built(spec, targets)
    logits = torch.randn(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: loss(x, target, image), logits, fast_mode=True)


def ignored_voxels_weigh_nothing(spec: LossSpecification, targets: Targets) -> None:
    image, target = some_image(), some_target(targets)
    target[:, :, 4:] = IGNORED
    loss, logits = built(spec, targets), torch.randn(2, 3, 8, 8, requires_grad=True)
    value = loss(logits, target, image)
    value.backward()
    slope = _slope(logits)
    require(slope[:, :, 4:].abs().sum() == 0, "ignored voxels have a gradient")
    require(slope[:, :, :4].abs().sum() > 0, "the others have none")
    other = logits.detach().clone()
    other[:, :, 4:] += 5
    changed = loss(other, target, image).item()
    require(close(changed, value.item(), relative=1e-5), f"ignored logits change it from {value.item()} to {changed}")


def nothing_to_judge_is_zero(spec: LossSpecification, targets: Targets) -> None:
    image, target = some_image(), torch.full_like(some_target(targets), IGNORED)
    logits = torch.randn(2, 3, 8, 8, requires_grad=True)
    value = built(spec, targets)(logits, target, image)
    value.backward()
    require(abs(value.item()) <= 1e-6, f"with every voxel ignored it is {value.item()}, not 0")
    require(_slope(logits).abs().sum() == 0, "with every voxel ignored there is still a gradient")


def an_absent_target_is_judged_too(spec: LossSpecification, targets: Targets) -> None:
    """With an empty reference it is finite, and predicting nothing beats predicting something."""
    image, target = some_image(), torch.zeros_like(some_target(targets))
    loss = built(spec, targets)
    right, wrong = perfect_logits(target, targets, 4.0), torch.randn(2, 3, 8, 8, requires_grad=True)
    value = loss(wrong, target, image)
    value.backward()
    require(torch.isfinite(_slope(wrong)).all(), "without any target the gradient is not finite")
    nothing = loss(right, target, image)
    require(nothing < value, f"without any target, predicting nothing costs {nothing:.4f}, something {value:.4f}")


def half_precision_logits_are_judged_in_full(spec: LossSpecification, targets: Targets) -> None:
    image, target = some_image(), some_target(targets)
    logits = torch.randn(2, 3, 8, 8).to(torch.bfloat16)
    loss = built(spec, targets)
    value, full = loss(logits, target, image), loss(logits.float(), target, image)
    require(value.dtype == torch.float32, f"for bfloat16 logits it is {value.dtype}; use losses.base.full_precision")
    require(close(value.item(), full.item()), f"for bfloat16 logits it is {value.item()}, in float32 {full.item()}")


def volumes_are_judged_like_slices(spec: LossSpecification, targets: Targets) -> None:
    """Four equal slices cost what one of them does, up to smoothing terms, which weigh less in a volume."""
    image, target = some_image(), some_target(targets)
    loss, logits = built(spec, targets), torch.randn(2, 3, 8, 8)
    alone = loss(logits, target, image)
    four = loss(*(part[..., None].repeat(1, 1, 1, 1, 4) for part in (logits, target, image)))
    require(torch.isfinite(four), f"for a volume it is {four.item()}")
    same = close(four.item(), alone.item(), relative=0.05)
    require(same, f"a slice costs {alone.item()}, a volume of four such slices {four.item()}")


def a_batch_is_the_mean_of_its_samples_if_it_says_so(spec: LossSpecification, targets: Targets) -> None:
    """Recipes that accumulate gradients over the parts of a batch rely on it."""
    if not spec.mean_over_samples:
        return
    image, target = some_image(), some_target(targets)
    loss, logits = built(spec, targets), torch.randn(2, 3, 8, 8)
    together = loss(logits, target, image).item()
    apart = sum(loss(logits[i : i + 1], target[i : i + 1], image[i : i + 1]).item() for i in range(2)) / 2
    require(close(together, apart, relative=1e-5), f"two samples cost {together}, the mean of each alone is {apart}")


LOSS_LAWS: tuple[Law, ...] = (
    fields_are_plain_and_the_kind_its_own,
    perfection_is_the_minimum,
    it_grows_with_every_wrong_row,
    gradients_are_right,
    ignored_voxels_weigh_nothing,
    nothing_to_judge_is_zero,
    an_absent_target_is_judged_too,
    half_precision_logits_are_judged_in_full,
    volumes_are_judged_like_slices,
    a_batch_is_the_mean_of_its_samples_if_it_says_so,
)


def _slope(logits: Tensor) -> Tensor:
    require(logits.grad is not None, "no gradient reaches the logits")
    assert logits.grad is not None
    return logits.grad
