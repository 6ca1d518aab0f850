"""Learned regularisers (torch only): complex image in, complex image of the same shape out."""

from melcore.networks.layers import SpatialConvolution, TemporalConvolution
from melcore.networks.regulariser import LocalRegulariser, Regulariser
from melcore.networks.resnet import ResidualCNN
from melcore.networks.spacetime import SpaceTimeCNN

__all__ = [
    "LocalRegulariser",
    "Regulariser",
    "ResidualCNN",
    "SpaceTimeCNN",
    "SpatialConvolution",
    "TemporalConvolution",
]
