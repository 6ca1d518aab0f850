"""The layers of a regulariser as bare kernels on planes: output, gradient of the input, gradient of the weights.

Planes are laid out as `Arrangement` says. The streamed axis is never padded here: the planes that come in reach as far
as the kernel does.
"""

from typing import Protocol

import torch
from torch import Tensor

from melcore.memory.plan import Way
from melcore.memory.protocols import LayerLike
from melcore.memory.streaming.arrangement import Arrangement
from melcore.memory.streaming.spatial import SpatialKernel
from melcore.memory.streaming.temporal import TemporalKernel


class Kernel(Protocol):
    """One layer, without its activation."""

    def forward(self, planes: Tensor) -> Tensor:
        """Output planes, fewer than came in by twice the halo along the streamed axis."""

    def input_gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of input planes from that of output planes, fewer by twice the halo along the streamed axis."""

    def add_weight_gradient(self, gradient: Tensor, planes: Tensor) -> None:
        """Add up the contribution of output planes, whose input planes reach further by the halo on either side."""

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The sums for weight and bias, shaped as the layer's."""


def make_kernel(layer: LayerLike, arrangement: Arrangement, dtype: torch.dtype, way: Way = "channels_last") -> Kernel:
    """The kernel for a layer, computing in `dtype`; gradients of weights are added up in float32 at least."""
    if layer.kernel[1:] == (1, 1, 1):
        return TemporalKernel(layer, arrangement, dtype)
    return SpatialKernel(layer, arrangement, dtype, way)
