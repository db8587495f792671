"""What every network promises; a new one is a line in ``SPECS``."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from delineate.core.targets import Targets
from delineate.networks.buda import BudaUNetSpec
from delineate.networks.deeplab import DeepLabSpec
from delineate.networks.dense_unet import DenseUNetSpec
from delineate.networks.minicube import ContextUNetSpec, MinicubeNetSpec
from delineate.networks.monai import MonaiSpec
from delineate.networks.prostate_unet import ProstateUNetSpec
from delineate.networks.receptive_field import LENGTH, receptive_field
from delineate.networks.recurrent_unet import RecurrentUNetSpec
from delineate.networks.residual_unet import ResidualUNetSpec
from delineate.networks.tiramisu import TiramisuSpec
from delineate.networks.unet import UNetSpec
from delineate.networks.vgg_unet import VGGUNetSpec
from delineate.networks.vnet import VNetSpec

TIRAMISU = TiramisuSpec(encoder=(1, 2), bottleneck=2, decoder=(2, 1), growth=4, first=6)
SPECS = {
    "U-Net 3D": UNetSpec(dimensions=3, widths=(8, 12, 16)),
    "U-Net 2D": UNetSpec(dimensions=2, widths=(8, 12, 16), norm="batch", downsample="max_pool"),
    "U-Net 3D, short skips, linear": UNetSpec(
        dimensions=3, widths=(8, 8, 16), short_skips="all", upsample="linear", norm="group"
    ),
    "U-Net 3D, thick slices": UNetSpec(
        dimensions=3, widths=(8, 12, 16), strides=((2, 2, 1), (2, 2, 2)), kernels=((3, 3, 1), (3, 3, 3), (3, 3, 3))
    ),
    "U-Net 3D, one convolution a decoder block": UNetSpec(dimensions=3, widths=(8, 12, 16), decoder_convolutions=1),
    "U-Net 2D, no norm, dropout": UNetSpec(dimensions=2, widths=(8, 12), norm="none", dropout=0.3, activation="relu"),
    "U-Net 2D, short skips in the encoder": UNetSpec(dimensions=2, widths=(8, 12), short_skips="encoder"),
    "U-Net 3D, inputs projected": UNetSpec(dimensions=3, widths=(8, 12), project_inputs_to=4),
    "prostate": ProstateUNetSpec(widths=(4, 6, 8)),
    "Tiramisu": TIRAMISU,
    "Tiramisu, BatchNorm, recomputed": TIRAMISU.model_copy(update={"norm": "batch", "recompute": True}),
    "DeepLabv3+": DeepLabSpec(),
    "Buda": BudaUNetSpec(first_filters=4),
    "context": ContextUNetSpec(first_filters=4),
    "minicube": MinicubeNetSpec(),
    "VGG": VGGUNetSpec(),
    "VGG, short skips": VGGUNetSpec(short_skips=True),
    "residual": ResidualUNetSpec(widths=(4, 8, 12)),
    "dense": DenseUNetSpec(first_filters=4, pools=2),
    "V-Net": VNetSpec(first_filters=4, stages=(1, 2, 1), decoder_stages=(1, 1)),
    "V-Net 2D": VNetSpec(dimensions=2, first_filters=4, stages=(1, 2, 1), decoder_stages=(1, 1)),
    "recurrent": RecurrentUNetSpec(dimensions=3, widths=(4, 6, 8)),
    "MONAI": MonaiSpec(
        dimensions=3,
        name="BasicUNet",
        arguments={"features": [4, 4, 8, 8, 8, 4]},
        sides_divide_by=(16, 16, 16),
    ),
}


@pytest.fixture(params=SPECS.values(), ids=SPECS.keys())
def spec(request):
    return request.param


def sides_for(spec, multiple=2):
    return [max(multiple * d, s) for d, s in zip(spec.divisor, spec.smallest, strict=True)]


def image_for(spec, channels=2, multiple=2, batch=2):
    torch.manual_seed(0)
    return torch.randn(batch, channels, *sides_for(spec, multiple))


def without_dropout(network: nn.Module) -> nn.Module:
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network


def test_output_has_the_input_s_size_less_the_margin(spec) -> None:
    image = image_for(spec)
    logits = spec.build(2, 3)(image)
    expected = [n - 2 * m for n, m in zip(image.shape[2:], spec.margin, strict=True)]
    assert logits.shape == (2, 3, *expected)


def test_the_smallest_input_is_taken(spec) -> None:
    image = torch.randn(2, 1, *spec.smallest)
    expected = [n - 2 * m for n, m in zip(spec.smallest, spec.margin, strict=True)]
    with torch.no_grad():
        assert spec.build(1, 2).eval()(image).shape[2:] == tuple(expected)


def test_every_parameter_and_input_channel_has_a_gradient(spec) -> None:
    network, image = without_dropout(spec.build(2, 3)).train(), image_for(spec, multiple=3).requires_grad_()
    network(image).square().sum().backward()
    dead = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert dead == []
    assert (image.grad.abs().sum(dim=(0, *range(2, image.ndim))) > 0).all()


def test_the_divisor_is_true(spec) -> None:
    """One divisor more passes. One voxel more fails, or answers at another size than the margin says."""
    network = spec.build(1, 2).eval()
    for axis, divisor in enumerate(spec.divisor):
        sides = sides_for(spec)
        sides[axis] += divisor
        with torch.no_grad():
            network(torch.zeros(1, 1, *sides))
        if divisor > 1 and not isinstance(spec, DeepLabSpec | MonaiSpec):  # these adapt by interpolation, padding
            sides[axis] += 1
            try:
                answered = network(torch.zeros(1, 1, *sides)).shape[2 + axis]
            except RuntimeError:
                continue
            assert answered != sides[axis] - 2 * spec.margin[axis]


def test_the_receptive_field_is_true(spec) -> None:
    """Perturbing one voxel changes nothing outside the declared reach, and reaches its ends."""
    if isinstance(spec, MonaiSpec):
        pytest.skip("another library's network: its layers are not all known")
    network = spec.build(1, 2).double().eval()
    field = receptive_field(network, 1, spec.divisor)
    if max(widest for _, widest in field) == LENGTH:
        pytest.skip("it sees the whole image")
    if spec.dimensions == 2 and field[0][1] > 200:
        pytest.skip("too wide for a test; its layers are those of smaller networks here")
    for axis, (narrowest, widest) in enumerate(field):
        widths = measured_widths(network, spec, axis, widest)
        assert max(widths) <= widest
        assert min(widths) <= narrowest + 2 * spec.divisor[axis]
        assert max(widths) >= widest - spec.divisor[axis]


def measured_widths(network: nn.Module, spec, axis: int, widest: int) -> list[int]:
    """Input voxels along an axis that each of some middle output voxels depends on.

    Gradients of a network of positive weights without normalisation cannot cancel.
    """
    linear = without_statistics(network)
    divisor = spec.divisor[axis]
    sides = list(spec.smallest)
    sides[axis] = -(-(widest + 4 * divisor + 2 * spec.margin[axis]) // divisor) * divisor
    image = torch.ones(1, 1, *sides, dtype=torch.float64, requires_grad=True)
    answer = linear(image).sum(dim=[d for d in range(answer_dimensions(spec)) if d != axis + 2])
    widths, middle = [], len(answer) // 2
    for place in range(middle, middle + divisor):
        (gradient,) = torch.autograd.grad(answer[place], image, retain_graph=True)
        others = [d for d in range(image.ndim) if d != axis + 2]
        seen = torch.nonzero(gradient.abs().sum(others)).flatten()
        widths.append(int(seen[-1] - seen[0] + 1))
    return widths


def answer_dimensions(spec) -> int:
    return spec.dimensions + 2


def without_statistics(network: nn.Module) -> nn.Module:
    """Positive weights, means instead of maxima, no normalisation and no activation."""
    names = {"InstanceNorm", "BatchNorm2d", "BatchNorm3d", "GroupNorm", "ReLU", "LeakyReLU", "ELU", "Dropout"}
    for name, module in list(network.named_modules()):
        *path, last = name.split(".")
        parent = network.get_submodule(".".join(path))
        if type(module).__name__ in names:
            setattr(parent, last, nn.Identity())
        elif isinstance(module, nn.MaxPool2d):
            setattr(parent, last, nn.AvgPool2d(module.kernel_size, module.stride))
        elif isinstance(module, nn.MaxPool3d):
            setattr(parent, last, nn.AvgPool3d(module.kernel_size, module.stride))
        elif isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
            nn.init.constant_(module.weight, 1 / np.prod(module.weight.shape[1:]))
    return network


def test_samples_do_not_mix_in_evaluation(spec) -> None:
    network, image = spec.build(2, 3).double().eval(), image_for(spec).double()
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


def test_it_runs_in_bfloat16(spec) -> None:
    network, image = spec.build(2, 3).eval(), image_for(spec)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(network(image)).all()


def test_it_traces_into_one_graph(spec) -> None:
    """Without breaks, so that compilation sees all of it."""
    if isinstance(spec, MonaiSpec):
        pytest.skip("another library's network")
    network, image = spec.build(2, 3), image_for(spec)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True, dynamic=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(image), network.eval()(image), rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_a_whole_prediction_of_an_odd_sized_scan(spec) -> None:
    """Tiles, margins and padding follow from what the network declares."""
    from delineate.compute import plan_compute
    from delineate.inference.sliding import Sliding
    from delineate.sampling.tiles import Patches, Slices, geometry_for

    three = spec.dimensions == 3
    tiles = Patches(shape=(16, 16, 16)) if three else Slices(shape=(32, 32))
    geometry = geometry_for(tiles, (19, 17, 5), (1, 1, 1), spec)
    targets = Targets({"organ": (1,)})
    sliding = Sliding(plan_compute(compile="off", precision="fp32"), targets.exclusive, 2, 0.25, "gaussian")
    image = np.random.default_rng(0).standard_normal((1, 19, 17, 5)).astype(np.float32)
    probability = sliding.probabilities(spec.build(1, 2).eval(), image, geometry)
    assert probability.shape[-3:] == (19, 17, 5)
    assert np.isfinite(np.asarray(probability)).all()
