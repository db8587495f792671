"""Values against an independent implementation, and the distinguishing cases."""

from __future__ import annotations

import pytest
import torch

from delineate.losses.overlap import DiceSpec
from delineate.losses.pixelwise import CrossEntropySpec
from delineate.losses.spec import SumSpec, WeightedLoss

IMAGE = torch.zeros(2, 1, 6, 6, 6)


@pytest.fixture
def case():
    torch.manual_seed(0)
    return torch.randn(2, 3, 6, 6, 6), torch.randint(0, 3, (2, 1, 6, 6, 6), dtype=torch.uint8)


@pytest.mark.parametrize("over_batch", [True, False])
def test_dice_equals_monai_s(case, over_batch) -> None:
    from monai.losses import DiceLoss

    logits, target = case
    oracle = DiceLoss(
        include_background=False, to_onehot_y=True, softmax=True, batch=over_batch, smooth_nr=1.0, smooth_dr=1.0
    )
    ours = DiceSpec(smooth=1.0, over_batch=over_batch).build(exclusive=True)
    torch.testing.assert_close(ours(logits, target, IMAGE), oracle(logits, target.long()), rtol=1e-5, atol=1e-6)


def test_cross_entropy_equals_torch_s(case) -> None:
    logits, target = case
    target[:, :, 0] = 255
    expected = torch.nn.functional.cross_entropy(logits, target[:, 0].long(), ignore_index=255)
    torch.testing.assert_close(CrossEntropySpec().build(True)(logits, target, IMAGE), expected)


def test_dice_over_the_batch_forgives_an_empty_sample() -> None:
    """One sample without the target and a few stray voxels: alone it loses nearly all, pooled very little."""
    target = torch.zeros(2, 1, 10, 10, dtype=torch.uint8)
    target[0, 0, :6] = 1
    logits = torch.stack([1 - target[:, 0].float(), target[:, 0].float()], 1) * 40 - 20
    logits[1, 1, 0, :6], logits[1, 0, 0, :6] = 20, -20
    pooled, alone = (DiceSpec(over_batch=b).build(True)(logits, target, logits).item() for b in (True, False))
    assert alone > 0.4
    assert pooled < 0.06


def test_terms_of_a_sum_are_weighted(case) -> None:
    dice, entropy = DiceSpec().build(True), CrossEntropySpec().build(True)
    spec = SumSpec(terms=(WeightedLoss(weight=2, loss=DiceSpec()), WeightedLoss(weight=0.25, loss=CrossEntropySpec())))
    expected = 2 * dice(*case, IMAGE) + 0.25 * entropy(*case, IMAGE)
    torch.testing.assert_close(spec.build(True)(*case, IMAGE), expected)
