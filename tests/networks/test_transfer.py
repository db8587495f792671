from __future__ import annotations

import pytest
import torch

from delineate.errors import RecipeError
from delineate.networks.minicube import MinicubeNetSpec
from delineate.networks.monai_unet import MonaiUNetSpec
from delineate.networks.residual_unet import ResidualUNetSpec
from delineate.networks.transfer import freeze, hold_frozen_norms, load_what_fits, output_axes
from delineate.networks.unet import UNetSpec
from delineate.networks.vnet import VNetSpec
from delineate.testing.networks import image_for

SPEC = ResidualUNetSpec(widths=(4, 8))


@pytest.fixture
def source():
    torch.manual_seed(1)
    return SPEC.build(1, 2)


def test_everything_fits_its_own_kind(source) -> None:
    network = SPEC.build(1, 2)
    report = load_what_fits(network, source.state_dict())
    assert len(report.matched) == len(source.state_dict())
    assert [*report.adapted, *report.missing, *report.unexpected, *report.reshaped] == []
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), source.parameters(), strict=True))


def test_what_does_not_fit_is_named_and_stays() -> None:
    source, network = ResidualUNetSpec(widths=(4, 8, 16)).build(1, 2), SPEC.build(1, 3)
    before = network.head.weight.clone()
    report = load_what_fits(network, source.state_dict())
    assert "head.weight" in report.reshaped
    assert any(key.startswith("encoder.2.") for key in report.unexpected)
    assert report.missing == []
    assert "encoder.0.layers.1.weight" in report.matched
    assert torch.equal(network.head.weight, before)
    assert "reshaped" in str(report)


def test_the_head_s_rows_are_chosen(source) -> None:
    """A network with one output starts as the second of two."""
    network = SPEC.build(1, 1)
    report = load_what_fits(network, source.state_dict(), rows=[1], axes=output_axes(SPEC, 1))
    assert sorted(report.adapted) == ["head.bias", "head.weight"]
    assert torch.equal(network.head.weight, source.head.weight[1:])
    assert torch.equal(network.head.bias, source.head.bias[1:])


def test_rows_in_another_order_and_fresh_ones(source) -> None:
    network = SPEC.build(1, 2)
    fresh = network.head.weight[1].clone()
    load_what_fits(network, source.state_dict(), rows=[1, None], axes=output_axes(SPEC, 2))
    assert torch.equal(network.head.weight[0], source.head.weight[1])
    assert torch.equal(network.head.weight[1], fresh)


@pytest.mark.parametrize(
    ("spec", "rows"),
    [
        (UNetSpec(dimensions=2, widths=(4, 8, 16), activation="prelu", deep_supervision=1), [2, 0, 3, 1]),
        (UNetSpec(dimensions=2, widths=(4, 8), activation="prelu"), [3]),
        (UNetSpec(dimensions=2, widths=(2, 4), members=2), [1, 3]),
        (MinicubeNetSpec(), [2, 0, 3, 1]),
        (MonaiUNetSpec(dimensions=2, widths=(4, 8), norm="batch"), [2, 0, 3, 1]),
        (VNetSpec(dimensions=2, first_filters=4, stages=(1, 1), decoder_stages=(1,)), [2, 0, 3, 1]),
    ],
    ids=lambda value: getattr(value, "kind", str(value)),
)
def test_chosen_outputs_are_the_source_s_whatever_the_widths_of_hidden_layers(spec, rows) -> None:
    """Hidden layers have as many channels as the source has outputs, and one slope is as long as one output."""
    source, network, image = spec.build(1, 4).double(), spec.build(1, len(rows)).double(), image_for(spec, 1).double()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.normal_()
        source.train()(image)  # moves the statistics of BatchNorms
        report = load_what_fits(network, source.state_dict(), rows=rows, axes=output_axes(spec, len(rows)))
        torch.testing.assert_close(network.eval()(image), source.eval()(image)[:, rows])
    assert [*report.missing, *report.unexpected, *report.reshaped] == []


@pytest.mark.parametrize(("have", "want"), [(1, 3), (3, 1), (2, 5), (6, 2)])
@pytest.mark.parametrize("channels", ["repeat", "mean"])
def test_other_numbers_of_channels_keep_the_answer_to_equal_ones(have, want, channels) -> None:
    source, network = SPEC.build(have, 2).eval(), SPEC.build(want, 2).eval()
    if channels == "repeat" and want < have:
        with torch.no_grad():  # those left out must be like those kept
            for kernel in (source.encoder[0].layers[1].weight, source.encoder[0].shortcut[0].weight):
                kernel.copy_(kernel.mean(1, keepdim=True).expand_as(kernel))
    report = load_what_fits(network, source.state_dict(), channels=channels)
    assert "encoder.0.layers.1.weight" in report.adapted
    scan = torch.randn(1, 1, 8, 8)
    found, expected = network(scan.expand(-1, want, -1, -1)), source(scan.expand(-1, have, -1, -1))
    if channels == "repeat" and want % have and have % want:
        assert not torch.allclose(found, expected), "taken in turn, some channels weigh more"
    else:
        torch.testing.assert_close(found, expected)


def test_patterns_choose(source) -> None:
    network = SPEC.build(1, 2)
    report = load_what_fits(network, source.state_dict(), include=["encoder.*"], exclude=["encoder.1.*"])
    assert report.matched
    assert all(key.startswith("encoder.0.") for key in report.matched)
    assert "head.weight" in report.left_out


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(RecipeError, match="none of 1 tensors fits"):
        load_what_fits(SPEC.build(1, 2), {"some.other": torch.zeros(3)})


def test_frozen_parts_keep_weights_and_statistics() -> None:
    network = SPEC.build(1, 2).train()
    assert freeze(network, ["encoder.0.*"])
    before = {key: value.clone() for key, value in network.state_dict().items()}
    optimiser = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], weight_decay=0.1)
    for _ in range(3):
        hold_frozen_norms(network.train())
        network(torch.randn(4, 1, 8, 8) * 3 + 5).square().mean().backward()
        optimiser.step()
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key]) is key.startswith("encoder.0."), key


def test_a_pattern_that_freezes_nothing_is_refused() -> None:
    with pytest.raises(RecipeError, match="no parameter matches 'encodr"):
        freeze(SPEC.build(1, 2), ["encodr.*"])


def test_projected_inputs_begin_where_the_source_stood() -> None:
    """Weights for one channel, met by three through a learned projection: their mean at first."""
    source = SPEC.build(1, 2).eval()
    network = SPEC.model_copy(update={"project_inputs_to": 1}).build(3, 2).eval()
    report = load_what_fits(network, source.state_dict())
    assert report.missing == ["project.weight", "project.bias"]
    image = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(network(image), source(image.mean(1, keepdim=True)))
