"""The numbers that the reports print, or that their descriptions imply."""

from __future__ import annotations

import pytest
import torch

from delineate.networks.buda import BudaUNetSpec
from delineate.networks.configurations import CONFIGURATIONS
from delineate.networks.cost import count_parameters, step_cost
from delineate.networks.minicube import ContextUNetSpec
from delineate.networks.receptive_field import receptive_field
from delineate.networks.residual_unet import ResidualUNetSpec
from delineate.networks.unet import UNetSpec
from delineate.networks.vgg_unet import VGGUNetSpec


def count(spec, inputs: int, outputs: int) -> tuple[int, int]:
    with torch.device("meta"):
        return count_parameters(spec.build(inputs, outputs))


TRAINABLE = {
    "prostate-unet-3d": 1_604_707,
    "prostate-tiramisu-p4a": 49_382_353,
    "prostate-tiramisu-p3a": 22_962_289,
    "prostate-tiramisu-p3b": 23_487_169,
    "prostate-tiramisu-p4a-batchnorm": 49_571_249,
    "prostate-tiramisu-p3a-batchnorm": 23_048_977,
    "prostate-tiramisu-p3b-batchnorm": 23_581_729,
    "prostate-deeplab": 41_053_153,
    "brain-2d": 7_763_428,
    "brain-3d": 5_430_212,
    "brain-3d-context": 5_430_212,
    "brain-3d-small": 210_682,
    "brain-3d-padded": 340_916,
    "liver-unet": 31_030_658,
    "liver-unet-v1": 31_031_810,
    "liver-unet-v4": 31_035_266,
    "liver-unet-r": 31_729_026,
    "liver-unet-t": 22_927_432,
    "liver-unet-tr": 23_363_016,
    "liver-tumour": 2_013_922,
    "liver-tumour-1": 2_013_889,
    "wmh-dense": 10_900_289,
}
KERAS = {
    "prostate-unet-3d": 1_605_381,
    "prostate-tiramisu-p4a": 49_382_353,
    "prostate-tiramisu-p4a-batchnorm": 49_760_145,
    "prostate-tiramisu-p3a-batchnorm": 23_135_665,
    "prostate-tiramisu-p3b-batchnorm": 23_676_289,
    "prostate-deeplab": 41_255_953,
}


@pytest.mark.parametrize("name", TRAINABLE)
def test_trainable_parameters(name) -> None:
    configuration = CONFIGURATIONS[name]
    assert count(configuration.spec, configuration.inputs, configuration.outputs)[0] == TRAINABLE[name]


@pytest.mark.parametrize("name", KERAS)
def test_parameters_as_keras_counts_them(name) -> None:
    configuration = CONFIGURATIONS[name]
    assert configuration.keras
    assert count(configuration.spec, configuration.inputs, configuration.outputs)[1] == KERAS[name]


@pytest.mark.parametrize(
    ("spec", "inputs", "outputs", "expected"),
    [
        (BudaUNetSpec(), 3, 1, 7_763_041),
        (ContextUNetSpec(first_filters=32), 4, 4, 1_361_380),
        (ContextUNetSpec(first_filters=16), 4, 4, 342_260),
        (ContextUNetSpec(first_filters=8), 4, 4, 86_524),
        (VGGUNetSpec(), 3, 2, 22_927_438),
        (VGGUNetSpec(), 9, 2, 22_927_456),
        (VGGUNetSpec(short_skips="encoder"), 3, 2, 23_363_022),
        (VGGUNetSpec(short_skips="encoder"), 9, 2, 23_363_040),
        (ResidualUNetSpec(widths=(64, 128, 256, 512)), 1, 2, 8_046_018),
        (ResidualUNetSpec(widths=(16, 32, 64, 128)), 1, 2, 504_690),
    ],
)
def test_parameters_of_variants(spec, inputs, outputs, expected) -> None:
    assert count(spec, inputs, outputs)[0] == expected


@pytest.mark.parametrize(("inputs", "outputs", "expected"), [(3, 1, 41_253_073), (3, 21, 41_258_213)])
def test_deeplab_with_other_channels_and_classes(inputs, outputs, expected) -> None:
    assert count(CONFIGURATIONS["prostate-deeplab"].spec, inputs, outputs)[1] == expected


def test_the_context_network_turns_its_paper_s_cube_into_its_core() -> None:
    configuration = CONFIGURATIONS["brain-3d-context"]
    with torch.device("meta"):
        network = configuration.spec.build(4, 4)
        assert network(torch.empty(1, 4, 100, 116, 116)).shape == (1, 4, 80, 96, 96)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_it_answers_at_its_paper_s_size(name) -> None:
    configuration = CONFIGURATIONS[name]
    spec, sides = configuration.spec, configuration.sides
    with torch.device("meta"):
        logits = spec.build(configuration.inputs, configuration.outputs).eval()(
            torch.empty(2, configuration.inputs, *sides)
        )
    expected = [n - 2 * m for n, m in zip(sides, spec.margin, strict=True)]
    assert logits.shape == (2, configuration.outputs, *expected)


@pytest.mark.parametrize(
    ("name", "field"),
    [
        ("prostate-unet-3d", (100, 108)),
        ("prostate-tiramisu-p4a", (1500, 1516)),
        ("prostate-tiramisu-p3a", (544, 552)),
        ("prostate-tiramisu-p3b", (538, 546)),
    ],
)
def test_receptive_fields(name, field) -> None:
    configuration = CONFIGURATIONS[name]
    with torch.device("meta"):
        network = configuration.spec.build(1, 1)
    assert receptive_field(network, 1, configuration.spec.divisor)[0] == field


def test_the_cost_of_a_small_step_by_hand() -> None:
    """One level up and down in 2D, without norm: each convolution thrice, less the image's gradient."""
    spec = UNetSpec(dimensions=2, widths=(4, 8), convolutions=1, norm="none", activation="relu")
    cost = step_cost(spec, 1, 2, (16, 16), batch=3)
    fine, coarse = 3 * 16 * 16, 3 * 8 * 8
    first = 2 * fine * 9 * 1 * 4
    others = 2 * (coarse * 9 * 4 * 8 + coarse * 8 * 4 * 4 + fine * 9 * 8 * 4 + fine * 4 * 2)
    assert cost.gflop == pytest.approx((2 * first + 3 * others) / 1e9)
    assert cost.parameters == cost.keras_parameters
    weights = 4 * cost.parameters
    assert cost.memory_gb * 1e9 > 4 * weights + 4 * fine * (4 + 8 + 4)  # what the convolutions read
