"""What every network promises; a new one is a line in ``SPECS``."""

from __future__ import annotations

import pytest
import torch

from delineate.networks.unet import UNetSpec

SPECS = {
    "3D": UNetSpec(dimensions=3, widths=(8, 12, 16)),
    "2D": UNetSpec(dimensions=2, widths=(8, 12, 16), norm="batch", downsample="max_pool"),
    "3D, short skips, linear": UNetSpec(
        dimensions=3, widths=(8, 8, 16), short_skips=True, upsample="linear", norm="group"
    ),
    "3D, thick slices": UNetSpec(
        dimensions=3, widths=(8, 12, 16), strides=((2, 2, 1), (2, 2, 2)), kernels=((3, 3, 1), (3, 3, 3), (3, 3, 3))
    ),
    "3D, one convolution a decoder block": UNetSpec(dimensions=3, widths=(8, 12, 16), decoder_convolutions=1),
    "2D, no norm, dropout": UNetSpec(dimensions=2, widths=(8, 12), norm="none", dropout=0.3, activation="relu"),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


def image_for(spec, channels=2, multiple=2):
    torch.manual_seed(0)
    return torch.randn(2, channels, *(multiple * 2 * d for d in spec.divisor))


def test_output_has_the_input_s_size_less_the_margin(spec) -> None:
    image = image_for(spec)
    logits = spec.build(2, 3)(image)
    expected = [n - 2 * m for n, m in zip(image.shape[2:], spec.margin, strict=True)]
    assert logits.shape == (2, 3, *expected)


def test_every_parameter_and_input_channel_has_a_gradient(spec) -> None:
    network, image = spec.build(2, 3), image_for(spec).requires_grad_()
    network(image).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())
    assert (image.grad.abs().sum(dim=(0, *range(2, image.ndim))) > 0).all()


def test_the_divisor_is_true(spec) -> None:
    """One more voxel than the divisor allows along a halved axis does not pass unnoticed."""
    network = spec.build(1, 2).eval()
    for axis, divisor in enumerate(spec.divisor):
        sides = [2 * d for d in spec.divisor]
        sides[axis] += divisor  # still divides
        network(torch.zeros(1, 1, *sides))
        if divisor > 1:
            sides[axis] += 1
            with pytest.raises(RuntimeError):
                network(torch.zeros(1, 1, *sides))


def test_samples_do_not_mix_in_evaluation(spec) -> None:
    network, image = spec.build(2, 3).eval(), image_for(spec)
    with torch.no_grad():
        together, alone = network(image), network(image[:1])
    torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-5)


def test_weights_survive_saving(spec, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    network, twin, image = spec.build(2, 3).eval(), spec.build(2, 3).eval(), image_for(spec)
    save_file(network.state_dict(), tmp_path / "w.safetensors")
    twin.load_state_dict(load_file(tmp_path / "w.safetensors"))
    torch.testing.assert_close(network(image), twin(image), rtol=0, atol=0)


def test_memory_format_does_not_change_the_answer(spec) -> None:
    network, image = spec.build(2, 3).eval(), image_for(spec)
    plain = network(image)
    last = torch.channels_last_3d if spec.dimensions == 3 else torch.channels_last
    torch.testing.assert_close(
        network.to(memory_format=last)(image.contiguous(memory_format=last)), plain, rtol=1e-4, atol=1e-4
    )
