"""Learned regularisers (torch only): complex image in, complex image of the same shape out."""

from melcore.networks.coupling import CouplingCNN
from melcore.networks.layers import SpatialConvolution, TemporalConvolution
from melcore.networks.regulariser import LocalRegulariser, Regulariser
from melcore.networks.resnet import ResidualCNN
from melcore.networks.spacetime import SpaceTimeCNN
from melcore.networks.unet import UNet

__all__ = [
    "CouplingCNN",
    "LocalRegulariser",
    "Regulariser",
    "ResidualCNN",
    "SpaceTimeCNN",
    "SpatialConvolution",
    "TemporalConvolution",
    "UNet",
]
