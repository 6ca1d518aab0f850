"""Learned regularisers (torch only): what goes in comes out in the same shape, mostly a complex image."""

from melcore.networks.coupling import CouplingCNN
from melcore.networks.filter_bank import FilterBank
from melcore.networks.layers import SpatialConvolution, TemporalConvolution
from melcore.networks.regulariser import LocalRegulariser, Regulariser
from melcore.networks.resnet import ResidualCNN
from melcore.networks.shrinkage import Shrinkage, shrinkages
from melcore.networks.spacetime import SpaceTimeCNN
from melcore.networks.unet import UNet

__all__ = [
    "CouplingCNN",
    "FilterBank",
    "LocalRegulariser",
    "Regulariser",
    "ResidualCNN",
    "Shrinkage",
    "SpaceTimeCNN",
    "SpatialConvolution",
    "TemporalConvolution",
    "UNet",
    "shrinkages",
]
