from __future__ import annotations

import pytest
import torch

from delineate.sampling.augmentation import AugmentationSpec, IntensitySpec, SpatialSpec, augment, context_voxels

STRONG = SpatialSpec(probability=1, rotate_degrees=(40, 40, 40), elastic_mm=3, mirror=("x", "y", "z"))


def varied(image, target, spec, seed=0, spacing=(1.0, 1.0, 1.0), axes="xyz", shape=None):
    return augment(
        image,
        target,
        spec,
        shape=shape or image.shape[2:],
        spacing_mm=torch.tensor(spacing).expand(len(image), -1),
        generator=torch.Generator().manual_seed(seed),
        axes=axes,
    )


@pytest.mark.parametrize("d", [2, 3])
def test_no_label_is_invented(d) -> None:
    target = torch.randint(0, 2, (3, 1, *[16] * d), dtype=torch.uint8) * 5 + 2
    target[:, :, 0] = 255
    spec = AugmentationSpec(spatial=STRONG, intensity=None)
    moved = varied(torch.zeros(3, 1, *[16] * d), target, spec, spacing=(1.0,) * d, axes="xyz"[:d])[1]
    assert set(moved.unique().tolist()) <= {2, 7, 255}


def test_image_and_label_move_together() -> None:
    ball = ((torch.stack(torch.meshgrid(*[torch.arange(24.0)] * 3, indexing="ij")) - 9) ** 2).sum(0) < 36
    target = ball[None, None].to(torch.uint8).repeat(4, 1, 1, 1, 1)
    image, moved = varied(target.float(), target, AugmentationSpec(spatial=STRONG, intensity=None), seed=3)
    assert ((image > 0.5) == (moved == 1)).float().mean() > 0.99
    assert (moved != target).any()


def test_autocast_does_not_blur_places() -> None:
    image, target = torch.rand(2, 1, 24, 24, 24), torch.randint(0, 3, (2, 1, 24, 24, 24), dtype=torch.uint8)
    plain = varied(image, target, AugmentationSpec(spatial=STRONG))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        within = varied(image, target, AugmentationSpec(spatial=STRONG))
    assert torch.equal(plain[0], within[0])
    assert torch.equal(plain[1], within[1])


def test_a_displacement_in_voxels_is_one_in_millimetres_of_their_size() -> None:
    image, target = torch.rand(2, 1, 20, 20), torch.randint(0, 3, (2, 1, 20, 20), dtype=torch.uint8)
    plain = {"probability": 1, "rotate_degrees": (0, 0, 0), "scale": (1, 1)}
    spaced = {"spacing": (2.0, 2.0), "axes": "xy"}
    for voxels, mm in ((1.5, 3.0), (0.0, 0.0)):
        found, expected = (
            varied(image, target, AugmentationSpec(spatial=SpatialSpec(**plain, **elastic), intensity=None), **spaced)
            for elastic in ({"elastic_voxels": voxels}, {"elastic_mm": mm})
        )
        torch.testing.assert_close(found, expected)
        assert torch.allclose(found[0], image, atol=1e-4) == (mm == 0)
    with pytest.raises(ValueError, match="elastic_mm is 3 and elastic_voxels 1; give one"):
        SpatialSpec(elastic_mm=3, elastic_voxels=1)


def test_probability_zero_changes_nothing() -> None:
    image, target = torch.rand(2, 1, 8, 9, 10), torch.randint(0, 3, (2, 1, 8, 9, 10), dtype=torch.uint8)
    spec = AugmentationSpec(spatial=SpatialSpec(probability=0, elastic_mm=3), intensity=IntensitySpec(probability=0))
    varied_image, varied_target = varied(image, target, spec)
    torch.testing.assert_close(varied_image, image, atol=1e-4, rtol=0)
    assert torch.equal(varied_target, target)


def test_a_turn_keeps_millimetres_on_anisotropic_grids() -> None:
    """A cylinder stays where it is when it is turned about its axis in a plane of 1 × 3 mm voxels; in voxels, not."""
    x, _, z = torch.meshgrid(torch.arange(60.0) - 29.5, torch.arange(4.0), torch.arange(20.0) - 9.5, indexing="ij")
    disc = (x**2 + (3 * z) ** 2 < 144).to(torch.uint8)[None, None]
    kept = {}
    for unit in ("mm", "voxels"):
        turned = SpatialSpec(probability=1, rotate_degrees=(0, 90, 0), rotate_in=unit, scale=(1, 1))
        spec = AugmentationSpec(spatial=turned, intensity=None)
        moved = [varied(x[None, None], disc, spec, seed=seed, spacing=(1.0, 1.0, 3.0)) for seed in range(5)]
        assert any((image - x).abs().max() > 5 for image, _ in moved), "it is turned"
        kept[unit] = min(2 * int((label & disc).sum()) / int(label.sum() + disc.sum()) for _, label in moved)
    assert kept["mm"] > 0.95
    assert kept["voxels"] < 0.6


def test_a_turn_in_voxels_takes_no_heed_of_the_spacing() -> None:
    """A disc that is round in voxels stays where it is; in millimetres it would become an ellipse on its side."""
    x, y = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(40.0) - 19.5, indexing="ij")
    disc = (x**2 + y**2 < 144).to(torch.uint8)[None, None]
    for unit, least in (("voxels", 0.97), ("mm", 0)):
        turned = SpatialSpec(probability=1, rotate_degrees=(0, 0, 90), rotate_in=unit, scale=(1, 1))
        spec = AugmentationSpec(spatial=turned, intensity=None)
        moved = [varied(disc.float(), disc, spec, seed=i, spacing=(1.0, 3.0), axes="xy")[1] for i in range(5)]
        kept = min(int((m & disc).sum()) / int(disc.sum()) for m in moved)
        assert kept > least if unit == "voxels" else kept < 0.9


def test_context_is_cut_off() -> None:
    context = context_voxels(AugmentationSpec(), (20, 20, 1), slice_axis=2)
    assert context == (2, 2, 0)
    image = torch.rand(1, 1, 24, 24)
    target = torch.zeros(1, 1, 24, 24, dtype=torch.uint8)
    spec = AugmentationSpec(spatial=SpatialSpec(probability=0), intensity=None)
    cut = varied(image, target, spec, spacing=(1.0, 1.0), axes="xy", shape=(20, 20))[0]
    torch.testing.assert_close(cut, image[:, :, 2:-2, 2:-2], atol=1e-4, rtol=0)


def test_only_listed_axes_are_mirrored() -> None:
    ramp = torch.arange(8.0).view(1, 1, 8, 1, 1).expand(16, 1, 8, 8, 8).contiguous()
    target = torch.zeros(16, 1, 8, 8, 8, dtype=torch.uint8)
    for axes, flips in ((("y", "z"), False), (("x",), True)):
        spec = AugmentationSpec(spatial=SpatialSpec(probability=0, mirror=axes), intensity=None)
        turned = varied(ramp, target, spec)[0][:, 0, 0, 4, 4] > 3.5
        assert bool(turned.any()) is flips


def test_intensity_changes_keep_order_but_not_values() -> None:
    image = torch.linspace(-2, 3, 64).view(1, 1, 4, 4, 4).repeat(6, 1, 1, 1, 1)
    target = torch.zeros(6, 1, 4, 4, 4, dtype=torch.uint8)
    spec = IntensitySpec(probability=1, noise=(0, 0), bias_field=(0, 0))
    changed = varied(image, target, AugmentationSpec(spatial=None, intensity=spec))[0]
    assert (changed.flatten(1).diff() > 0).all()
    assert not torch.allclose(changed, image)
    assert changed.isfinite().all()
