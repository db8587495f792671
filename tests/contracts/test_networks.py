"""Every network keeps the laws of ``delineate.testing``; a new one is a line in ``SPECS``."""

from __future__ import annotations

import os
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from delineate.bundle import Bundle
from delineate.compute import plan_compute
from delineate.core.targets import Targets
from delineate.exporting.onnx import export_onnx
from delineate.inference.engines import OpenVino
from delineate.networks.buda import BudaUNetSpec
from delineate.networks.deeplab import DeepLabSpec
from delineate.networks.dense_unet import DenseUNetSpec
from delineate.networks.minicube import ContextUNetSpec, MinicubeNetSpec
from delineate.networks.monai import MonaiSpec
from delineate.networks.monai_unet import MonaiUNetSpec
from delineate.networks.prostate_unet import ProstateUNetSpec
from delineate.networks.receptive_field import LENGTH, receptive_field
from delineate.networks.recurrent_unet import RecurrentUNetSpec
from delineate.networks.residual_unet import ResidualUNetSpec
from delineate.networks.segresnet import SegResNetSpec
from delineate.networks.tiramisu import TiramisuSpec
from delineate.networks.unet import UNetSpec
from delineate.networks.vgg_unet import VGGUNetSpec
from delineate.networks.vnet import VNetSpec
from delineate.recipe import recipe_from
from delineate.sampling.tiles import geometry_for
from delineate.testing import check_network
from delineate.testing.networks import NETWORK_LAWS, finest, image_for, sides_for

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
    "U-Net 3D, residual encoder": UNetSpec(
        dimensions=3, widths=(4, 6, 8), strides=((1, 2, 2), (2, 2, 2)), residual_blocks=(1, 2, 1)
    ),
    "U-Net 2D, three of them": UNetSpec(dimensions=2, widths=(4, 6, 8), residual_blocks=(1, 1, 1), members=3),
    "prostate": ProstateUNetSpec(widths=(4, 6, 8)),
    "Tiramisu": TIRAMISU,
    "Tiramisu, BatchNorm, recomputed": TIRAMISU.model_copy(update={"norm": "batch", "recompute": True}),
    "DeepLabv3+": DeepLabSpec(),
    "Buda": BudaUNetSpec(first_filters=4),
    "context": ContextUNetSpec(first_filters=4),
    "without context": ContextUNetSpec(first_filters=4, context=False),
    "minicube": MinicubeNetSpec(),
    "VGG": VGGUNetSpec(),
    "VGG, short skips": VGGUNetSpec(short_skips="encoder"),
    "residual": ResidualUNetSpec(widths=(4, 8, 12)),
    "dense": DenseUNetSpec(first_filters=4, pools=2),
    "dense, VGG input": DenseUNetSpec(first_filters=4, pools=2, batch_norm="keras", vgg_input="caffe"),
    "V-Net": VNetSpec(first_filters=4, stages=(1, 2, 1), decoder_stages=(1, 1)),
    "V-Net 2D": VNetSpec(dimensions=2, first_filters=4, stages=(1, 2, 1), decoder_stages=(1, 1)),
    "recurrent": RecurrentUNetSpec(dimensions=3, widths=(4, 6, 8)),
    "MONAI's U-Net": MonaiUNetSpec(
        dimensions=3, widths=(4, 6, 8), strides=((2, 2, 1), (2, 2, 2)), kernel=(3, 3, 1), norm="batch", dropout=0.1
    ),
    "MONAI's U-Net 2D, no sums": MonaiUNetSpec(dimensions=2, widths=(4, 6, 8), residual_units=0, activation="relu"),
    "SegResNet": SegResNetSpec(dimensions=3, first_filters=8, blocks=(1, 2, 1), decoder_blocks=(1, 1), dropout=0.2),
    "SegResNet 2D": SegResNetSpec(
        dimensions=2, first_filters=4, blocks=(1, 1), decoder_blocks=(2,), norm="instance", activation="prelu"
    ),
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


def all_but(*names: str) -> pytest.MarkDecorator:
    """Every network except for those with these names."""
    assert {*names} <= {*SPECS}
    chosen = {name: spec for name, spec in SPECS.items() if name not in names}
    return pytest.mark.parametrize("spec", chosen.values(), ids=chosen.keys())


# Another library's network breaks graphs where it likes.
SKIPPED = {MonaiSpec: {"it_traces_into_one_graph"}}
KEPT = [
    pytest.param(spec, law, id=f"{name}-{law.__name__}")
    for name, spec in SPECS.items()
    for law in NETWORK_LAWS
    if law.__name__ not in SKIPPED.get(type(spec), ())
]


@pytest.mark.parametrize(("spec", "law"), KEPT)
def test_it_keeps(spec, law) -> None:
    law(spec)


def test_another_engine_gives_the_same_answer(spec) -> None:
    torch.manual_seed(0)
    network, image = spec.build(2, 3).eval(), image_for(spec)
    with torch.inference_mode():
        expected = finest(network(image))
        found = OpenVino.converted(network, image, plan_compute(device="cpu", precision="fp32", compile="off"))(image)
    torch.testing.assert_close(found, expected, atol=1e-3 * expected.abs().max().item(), rtol=1e-3)


@all_but("DeepLabv3+", "MONAI")  # these adapt by interpolation, padding
def test_no_smaller_divisor_would_do(spec) -> None:
    """Half a divisor more, or one voxel, fails, or answers at another size than the margin says."""
    network = spec.build(1, 2).eval()
    for axis, divisor in enumerate(spec.divisor):
        for smaller in {1, *(divisor // prime for prime in (2, 3, 5, 7) if divisor % prime == 0)} - {divisor}:
            sides = sides_for(spec)
            sides[axis] += divisor + smaller
            try:
                answered = network(torch.zeros(1, 1, *sides)).shape[2 + axis]
            except RuntimeError:
                continue
            assert answered != sides[axis] - 2 * spec.margin[axis]


THOROUGH = pytest.mark.skipif("DELINEATE_THOROUGH" not in os.environ, reason="takes minutes: set DELINEATE_THOROUGH=1")
QUICK = ("V-Net", "SegResNet 2D", "residual")


@pytest.mark.parametrize(
    "spec", [pytest.param(spec, id=name, marks=() if name in QUICK else THOROUGH) for name, spec in SPECS.items()]
)
def test_it_becomes_onnx_for_batches_and_scans_of_any_size(spec, tmp_path) -> None:
    """Exporting compares sizes other than those that it traced."""
    tiles = {"kind": "whole"} if spec.dimensions == 3 else {"kind": "slices"}
    recipe = recipe_from({"name": "x", "tiles": tiles, "network": spec.model_dump(mode="json")})
    geometry = geometry_for(recipe.tiles, (32, 32, 32), (1, 1, 1), spec)
    bundle = Bundle(recipe, recipe.pipeline, Targets({"organ": (1,)}), ("a", "b"), geometry, (1.0, 1.0, 1.0))
    torch.manual_seed(0)
    bundle.save(tmp_path / "bundle", bundle.network().state_dict(), {})
    exported = export_onnx([tmp_path / "bundle"], tmp_path / "m.onnx")
    assert all(isinstance(exported.input[axis + 2], str) for axis in range(spec.dimensions))


# Not all layers of another library's network are known; DeepLab sees the whole image; the others see too much for a
# test, through layers that smaller networks here have.
@all_but("MONAI", "DeepLabv3+", "Buda", "VGG", "VGG, short skips")
def test_the_receptive_field_is_true(spec) -> None:
    """Perturbing one voxel changes nothing outside the declared reach, and reaches its ends."""
    network = spec.build(1, 2).eval()
    field = receptive_field(network, 1, spec.divisor)
    for axis, (narrowest, widest) in enumerate(field):
        widths = measured_widths(network, spec, axis, widest)
        assert max(widths) <= widest
        assert min(widths) <= narrowest + 2 * spec.divisor[axis]
        assert max(widths) >= widest - spec.divisor[axis]


def test_what_pools_the_whole_image_sees_it() -> None:
    spec = DeepLabSpec()
    assert receptive_field(spec.build(1, 2), 1, spec.divisor) == ((LENGTH, LENGTH),) * 2


def measured_widths(network: nn.Module, spec, axis: int, widest: int) -> list[int]:
    """Input voxels along an axis that each of some middle output voxels depends on.

    Gradients of a network of positive weights without normalisation cannot cancel.
    """
    linear = without_statistics(network)
    divisor = spec.divisor[axis]
    sides = list(spec.smallest)
    sides[axis] = -(-(widest + 4 * divisor + 2 * spec.margin[axis]) // divisor) * divisor
    image = torch.ones(1, 1, *sides, requires_grad=True)
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


class Crooked(UNetSpec):
    """A U-Net that says something else of itself than is true."""

    kind: Literal["crooked"] = "crooked"
    claims: Literal["margin", "divisor", "idle"]

    @property
    def margin(self):
        return (1,) * self.dimensions if self.claims == "margin" else super().margin

    @property
    def divisor(self):
        return (1,) * self.dimensions if self.claims == "divisor" else super().divisor

    def body(self, inputs: int, outputs: int) -> nn.Module:
        network = super().body(inputs, outputs)
        if self.claims == "idle":
            network.idle = nn.Parameter(torch.zeros(1))
        return network


@pytest.mark.parametrize(
    ("claims", "law"),
    [
        ("margin", "output_has_the_inputs_size_less_the_margin"),
        ("divisor", "output_has_the_inputs_size_less_the_margin|the_smallest_input_is_taken"),
        ("idle", "every_parameter_and_input_channel_has_a_gradient.*idle"),
    ],
)
def test_a_network_that_breaks_a_promise_is_told_which(claims, law) -> None:
    with pytest.raises(AssertionError, match=law):
        check_network(Crooked(dimensions=2, widths=(4, 4, 8), claims=claims))
