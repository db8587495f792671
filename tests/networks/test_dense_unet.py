"""The dense generator: whose BatchNorm, and what its first convolution sees."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from delineate.errors import RecipeError
from delineate.networks.dense_unet import DenseUNetSpec

SMALL = {"first_filters": 4, "pools": 2}


@pytest.mark.parametrize(("constants", "expected"), [("pytorch", (1e-5, 0.1)), ("keras", (1e-3, 0.01))])
def test_batch_norm_has_the_constants_of_its_framework(constants, expected) -> None:
    network = DenseUNetSpec(batch_norm=constants, **SMALL).build(1, 1)
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {expected}
    assert {m.negative_slope for m in network.modules() if isinstance(m, nn.LeakyReLU)} == {0.1}


def test_without_fields_it_is_what_it_always_was() -> None:
    spec = DenseUNetSpec.model_validate({"kind": "dense_unet"})
    assert (spec.batch_norm, spec.vgg_input) == ("pytorch", None)


@pytest.mark.parametrize(
    ("preprocessing", "shift", "scale"),
    [
        ("torchvision", (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ("caffe", (103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255,) * 3),
    ],
)
@pytest.mark.parametrize(("channels", "rgb"), [(1, (0, 0, 0)), (2, (0, 1, 0)), (3, (0, 1, 2))])
def test_channels_are_shown_as_vgg_s_three(preprocessing, shift, scale, channels, rgb) -> None:
    """The weights of one fit the other: nothing but the input differs."""
    torch.manual_seed(0)
    plain = DenseUNetSpec(**SMALL).build(3, 1).eval()
    network = DenseUNetSpec(vgg_input=preprocessing, **SMALL).build(channels, 1).eval()
    network.load_state_dict(plain.state_dict())
    image = torch.rand(2, channels, 16, 24)
    order = rgb[::-1] if preprocessing == "caffe" else rgb
    seen = torch.stack([(image[:, c] - m) / s for c, m, s in zip(order, shift, scale, strict=True)], dim=1)
    torch.testing.assert_close(network(image), plain(seen), rtol=1e-4, atol=1e-4)


def test_more_channels_than_three_are_refused_unless_projected() -> None:
    with pytest.raises(RecipeError, match="of one to three channels, got 4; add project_inputs_to: 3"):
        DenseUNetSpec(vgg_input="caffe", **SMALL).build(4, 1)
    network = DenseUNetSpec(vgg_input="caffe", project_inputs_to=3, **SMALL).build(4, 1)
    assert network(torch.rand(2, 4, 16, 16)).shape == (2, 1, 16, 16)
