from __future__ import annotations

import torch

from delineate.networks.vnet import VNetSpec


def test_it_computes_what_monai_s_does() -> None:
    """With its weights, layer by layer; MONAI drops whole channels in training, hence evaluation."""
    from monai.networks.nets import VNet

    torch.manual_seed(0)
    theirs = VNet(spatial_dims=3, in_channels=1, out_channels=3).eval()
    ours = VNetSpec().build(1, 3).eval()
    for module in theirs.modules():
        if isinstance(module, torch.nn.BatchNorm3d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
            torch.nn.init.uniform_(module.bias, -0.2, 0.2)
            module.running_mean.uniform_(-0.1, 0.1)
    ours.load_state_dict(dict(zip(ours.state_dict(), reordered(theirs), strict=True)))
    image = torch.randn(1, 1, 32, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


def reordered(theirs) -> list[torch.Tensor]:
    """Their tensors in our order: the down-samplings before the stages, the up-samplings likewise."""
    downs = [theirs.down_tr32, theirs.down_tr64, theirs.down_tr128, theirs.down_tr256]
    ups = [theirs.up_tr256, theirs.up_tr128, theirs.up_tr64, theirs.up_tr32]
    parts = [
        theirs.in_tr,
        *[m for down in downs for m in (down.down_conv, down.bn1)],
        *[down.ops for down in downs],
        *[m for up in ups for m in (up.up_conv, up.bn1)],
        *[up.ops for up in ups],
        theirs.out_tr,
    ]
    return [tensor for part in parts for tensor in part.state_dict().values()]
