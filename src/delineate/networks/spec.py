"""The networks by kind. To add one to Delineate takes a file and a word here; others are found by entry points."""

from __future__ import annotations

from typing import Annotated

from delineate.networks.base import Architecture
from delineate.networks.buda import BudaUNetSpec
from delineate.networks.deeplab import DeepLabSpec
from delineate.networks.dense_unet import DenseUNetSpec
from delineate.networks.minicube import ContextUNetSpec, MinicubeNetSpec
from delineate.networks.monai import MonaiSpec
from delineate.networks.monai_unet import MonaiUNetSpec
from delineate.networks.prostate_unet import ProstateUNetSpec
from delineate.networks.recurrent_unet import RecurrentUNetSpec
from delineate.networks.residual_unet import ResidualUNetSpec
from delineate.networks.segresnet import SegResNetSpec
from delineate.networks.tiramisu import TiramisuSpec
from delineate.networks.unet import UNetSpec
from delineate.networks.vgg_unet import VGGUNetSpec
from delineate.networks.vnet import VNetSpec
from delineate.specification import Kinds

NETWORKS: Kinds[Architecture] = Kinds(
    "networks",
    "network",
    Architecture,
    (
        UNetSpec,
        ProstateUNetSpec,
        TiramisuSpec,
        DeepLabSpec,
        BudaUNetSpec,
        ContextUNetSpec,
        MinicubeNetSpec,
        VGGUNetSpec,
        ResidualUNetSpec,
        DenseUNetSpec,
        VNetSpec,
        RecurrentUNetSpec,
        MonaiUNetSpec,
        SegResNetSpec,
        MonaiSpec,
    ),
)
NetworkSpec = Annotated[Architecture, NETWORKS]
