from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from delineate.networks.vgg_unet import VGGUNetSpec
from delineate.pretrained.vgg import expected_shapes


def test_its_encoder_starts_from_a_published_file(tmp_path) -> None:
    tensors = {key: torch.randn(shape) for key, shape in expected_shapes("vgg11").items()}
    save_file(tensors, tmp_path / "vgg11.safetensors")
    spec = VGGUNetSpec(weights=str(tmp_path / "vgg11.safetensors"), short_skips="encoder")
    network = spec.build(1, 2)
    said = spec.start_from_published(network)
    assert said is not None
    assert "16 tensors" in said
    state = network.state_dict()
    assert all(torch.equal(state[key], tensors[key]) for key in tensors)


def test_random_weights_stay_as_they_are_and_are_owned_up_to() -> None:
    spec = VGGUNetSpec(weights="random")
    network = spec.build(1, 2)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    assert "random" in spec.start_from_published(network)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())


@pytest.mark.parametrize(("channels", "expected"), [(1, [0, 0, 0]), (2, [0, 1, 0]), (3, [0, 1, 2])])
def test_channels_begin_by_the_rule(channels, expected) -> None:
    image = torch.randn(1, channels, 32, 32)
    adapted = VGGUNetSpec().build(channels, 2).adapt(image)
    torch.testing.assert_close(adapted, image[:, expected])


def test_many_channels_begin_with_equal_shares() -> None:
    image = torch.randn(1, 9, 32, 32)
    adapted = VGGUNetSpec().build(9, 2).adapt(image)
    torch.testing.assert_close(adapted, image.mean(1, keepdim=True).expand(-1, 3, -1, -1))


@pytest.mark.parametrize(("before", "now"), [(True, "encoder"), (False, "none"), ("encoder", "encoder")])
def test_short_skips_of_earlier_bundles_are_understood(before, now) -> None:
    assert VGGUNetSpec.model_validate({"short_skips": before}).short_skips == now
