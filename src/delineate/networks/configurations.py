"""The five reports' networks by name: as described there, as variants that the text allows, and peers they discuss."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from delineate.networks.base import Architecture
from delineate.networks.buda import BudaUNetSpec
from delineate.networks.cost import step_cost
from delineate.networks.deeplab import DeepLabSpec
from delineate.networks.dense_unet import DenseUNetSpec
from delineate.networks.minicube import ContextUNetSpec, MinicubeNetSpec
from delineate.networks.prostate_unet import ProstateUNetSpec
from delineate.networks.recurrent_unet import RecurrentUNetSpec
from delineate.networks.residual_unet import ResidualUNetSpec
from delineate.networks.spec import NETWORKS
from delineate.networks.tiramisu import TiramisuSpec
from delineate.networks.unet import UNetSpec
from delineate.networks.vgg_unet import VGGUNetSpec
from delineate.networks.vnet import VNetSpec


@dataclass(frozen=True)
class Configuration:
    """A network with the input that it is meant for; ``sides`` are what it reads, margins included.

    ``keras``: its report counts BatchNorm's moving statistics among the parameters.
    """

    spec: Architecture
    inputs: int
    outputs: int
    sides: tuple[int, ...]
    batch: int
    keras: bool = False


def _liver(short_skips: bool = False) -> UNetSpec:
    return UNetSpec(
        dimensions=2,
        widths=(64, 128, 256, 512, 1024),
        norm="none",
        activation="relu",
        downsample="max_pool",
        dropout=0.5,
        short_skips="encoder" if short_skips else "none",
    )


_TIRAMISU = {
    "p4a": {"encoder": (9, 10, 12, 15), "bottleneck": 17, "decoder": (20, 17, 15, 12)},
    "p3a": {"encoder": (7, 8, 9), "bottleneck": 12, "decoder": (15, 16, 17)},
    "p3b": {"encoder": (12, 12, 12), "bottleneck": 12, "decoder": (12, 12, 12)},
}
_PADDED_TWIN = UNetSpec(dimensions=3, widths=(16, 32, 64), norm="batch", activation="relu", downsample="max_pool")

CONFIGURATIONS: Mapping[str, Configuration] = MappingProxyType(
    {
        "prostate-unet-3d": Configuration(ProstateUNetSpec(), 1, 1, (256, 256, 16), 14, keras=True),
        **{
            f"prostate-tiramisu-{name}": Configuration(
                TiramisuSpec.model_validate(layers), 1, 1, (64, 64, 16), 2, keras=True
            )
            for name, layers in _TIRAMISU.items()
        },
        **{
            f"prostate-tiramisu-{name}-batchnorm": Configuration(
                TiramisuSpec.model_validate({**layers, "norm": "batch"}), 1, 1, (64, 64, 16), 2, keras=True
            )
            for name, layers in _TIRAMISU.items()
        },
        "prostate-deeplab": Configuration(DeepLabSpec(), 13, 1, (256, 256), 3, keras=True),
        "brain-2d": Configuration(BudaUNetSpec(), 4, 4, (192, 192), 8),
        "brain-3d": Configuration(ContextUNetSpec(context=False), 4, 4, (80, 96, 96), 2),
        "brain-3d-context": Configuration(ContextUNetSpec(), 4, 4, (100, 116, 116), 2),
        "brain-3d-small": Configuration(MinicubeNetSpec(), 4, 4, (80, 96, 96), 2),
        "brain-3d-padded": Configuration(_PADDED_TWIN, 4, 4, (80, 96, 96), 2),
        "liver-unet": Configuration(_liver(), 1, 2, (256, 256), 1),
        "liver-unet-v1": Configuration(_liver(), 3, 2, (256, 256), 1),
        "liver-unet-v4": Configuration(_liver(), 9, 2, (256, 256), 1),
        "liver-unet-r": Configuration(_liver(short_skips=True), 1, 2, (256, 256), 1),
        "liver-unet-t": Configuration(VGGUNetSpec(), 1, 2, (256, 256), 1),
        "liver-unet-tr": Configuration(VGGUNetSpec(short_skips="encoder"), 1, 2, (256, 256), 1),
        "liver-tumour": Configuration(ResidualUNetSpec(), 1, 2, (264, 320), 18),
        "liver-tumour-1": Configuration(ResidualUNetSpec(), 1, 1, (264, 320), 18),
        "wmh-dense": Configuration(DenseUNetSpec(batch_norm="keras", vgg_input="caffe"), 1, 1, (224, 224), 8),
        "vnet": Configuration(VNetSpec(), 1, 2, (128, 128, 64), 1),
        "recurrent-unet": Configuration(RecurrentUNetSpec(dimensions=2), 1, 2, (256, 256), 1),
    }
)


def described() -> list[dict[str, Any]]:
    """Every configuration with what it costs, as plain values.

    ``receptive_field``: smallest and largest width along the first axis, null if it is the whole image or unknown.
    """
    import torch

    from delineate.networks.receptive_field import LENGTH, receptive_field

    rows = []
    for name, c in {**CONFIGURATIONS, **others()}.items():
        cost = step_cost(c.spec, c.inputs, c.outputs, c.sides, c.batch)
        try:
            with torch.device("meta"):
                field = receptive_field(c.spec.build(c.inputs, c.outputs), c.inputs, c.spec.divisor)[0]
        except Exception:  # another package's layers may be unknown
            if name in CONFIGURATIONS:
                raise
            field = None
        rows.append(
            {
                "name": name,
                "kind": c.spec.model_dump()["kind"],
                "dimensions": c.spec.dimensions,
                "inputs": c.inputs,
                "outputs": c.outputs,
                "sides": list(c.sides),
                "batch": c.batch,
                "keras": c.keras,
                **asdict(cost),
                "divisor": list(c.spec.divisor),
                "margin": list(c.spec.margin),
                "receptive_field": None if field is None or field[1] == LENGTH else list(field),
            }
        )
    return rows


def others() -> dict[str, Configuration]:
    """The networks of other packages by kind, with their defaults and inputs of about 64 voxels per side.

    Any that cannot be built this way is left out with a warning.
    """
    found = {}
    for spec in NETWORKS.usable():
        kind = str(spec.model_fields["kind"].default)
        fixed = not spec.model_fields["dimensions"].is_required()
        try:
            network = spec.model_validate({} if fixed else {"dimensions": 3})
            sides = tuple(max(s, -(-64 // d) * d) for s, d in zip(network.smallest, network.divisor, strict=True))
            step_cost(network, 1, 2, sides, network.least_batch)
        except Exception as error:
            warnings.warn(f"network '{kind}' is not listed: its defaults cannot be built ({error})", stacklevel=3)
            continue
        found[kind] = Configuration(network, 1, 2, sides, network.least_batch)
    return found
