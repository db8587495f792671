from __future__ import annotations

import pytest
import torch
from torch import nn

from delineate.networks.blocks import GroupNorm, InstanceNorm, KerasTransposed, LinearUpsample


@pytest.mark.parametrize("d", [2, 3])
def test_instance_norm_equals_torch_s(d) -> None:
    torch.manual_seed(0)
    ours = InstanceNorm(4)
    theirs = (nn.InstanceNorm3d if d == 3 else nn.InstanceNorm2d)(4, affine=True)
    for norm in (ours, theirs):
        nn.init.constant_(norm.weight, 1.7)
        nn.init.constant_(norm.bias, -0.3)
    x = torch.randn(3, 4, *[6] * d) * 5 + 40
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    torch.testing.assert_close(ours(a), theirs(b), rtol=1e-4, atol=1e-4)
    ours(a).cos().sum().backward()
    theirs(b).cos().sum().backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_instance_norm_keeps_precision_in_bfloat16() -> None:
    """A mean far from zero would drown the spread if moments were formed in bfloat16."""
    x = (torch.randn(1, 2, 16, 16, 16) * 2 + 60).to(torch.bfloat16)
    y = InstanceNorm(2)(x)
    assert y.dtype == torch.bfloat16
    assert y.float().std().item() == pytest.approx(1, abs=0.02)
    assert y.float().mean().item() == pytest.approx(0, abs=0.02)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("far", [0, 5, 1000])
def test_instance_norm_gives_a_compiler_and_others_the_same(samples, dtype, far) -> None:
    torch.manual_seed(0)
    norm = InstanceNorm(4)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (torch.randn(samples, 4, 6, 5, 4) + far).to(dtype, memory_format=torch.channels_last_3d)
    traced = torch.jit.trace(norm, (x,), check_trace=False)
    plain = norm(x)
    assert plain.dtype == dtype
    assert plain.is_contiguous(memory_format=torch.channels_last_3d)
    torch.testing.assert_close(plain, traced(x), rtol=0.02, atol=0.02 if dtype == torch.bfloat16 else 1e-3)
    assert "var_mean" in str(traced.graph)
    assert norm(x[..., :1, :1, :1]).isfinite().all()  # a single voxel


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_group_norm_is_right_where_the_mean_is_far_from_zero(dtype) -> None:
    torch.manual_seed(0)
    norm = GroupNorm(2, 4)
    x = (torch.randn(2, 4, 16, 16, 16) + 200).to(dtype, memory_format=torch.channels_last_3d)
    y = norm(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    exact = nn.GroupNorm(2, 4).double()(x.double().contiguous())
    torch.testing.assert_close(y.double(), exact, rtol=0.01, atol=0.02 if dtype == torch.bfloat16 else 1e-3)


def test_linear_upsampling_keeps_a_constant() -> None:
    up = LinearUpsample(3, 2, 2, (2, 2, 1))
    nn.init.eye_(up.project.weight[:, :, 0, 0, 0].data)
    nn.init.zeros_(up.project.bias)
    y = up(torch.full((1, 2, 3, 4, 5), 7.0))
    assert y.shape == (1, 2, 6, 8, 5)
    torch.testing.assert_close(y, torch.full_like(y, 7.0))


def test_keras_transposed_keeps_the_first_voxels() -> None:
    """A single one enlarged: its kernel begins at twice its place, as Keras' "same" has it."""
    up = KerasTransposed(2, 1, 1, bias=False)
    kernel = torch.arange(1.0, 10.0).view(1, 1, 3, 3)
    up.transposed.weight.data.copy_(kernel)
    x = torch.zeros(1, 1, 4, 4)
    x[0, 0, 1, 2] = 1
    y = up(x)
    assert y.shape == (1, 1, 8, 8)
    torch.testing.assert_close(y[:, :, 2:5, 4:7], kernel)
    assert y.sum() == kernel.sum()
