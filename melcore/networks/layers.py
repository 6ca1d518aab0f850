"""Local layers: a convolution along space or along time, then a pointwise activation.

Features are real, ``(batch, time, channel, z, y, x)``: spatial convolutions fold time into the batch without a copy,
and temporal ones are matrix products over the channels. `halo` tells how many neighbours a layer reads on either side
along (time, z, y, x), which is all that an executor needs to compute it piece by piece.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks.dropout import Noise

PaddingMode = Literal["zeros", "replicate", "reflect", "circular"]
Halo = tuple[int, int, int, int]

_PAD = {"replicate": "replicate", "reflect": "reflect", "circular": "circular"}


class LocalLayer(nn.Module, ABC):
    """Convolution and leaky ReLU, from features to features.

    Parameters
    ----------
    inputs, outputs
        Channels.
    kernel
        Sizes along (time, z, y, x), all odd.
    slope
        Negative slope of the leaky ReLU; 1 is no activation.
    padding
        How the volume is continued beyond its faces. ``"reflect"`` needs more than ``kernel // 2`` samples along each
        axis.
    """

    weight: nn.Parameter
    bias: nn.Parameter

    def __init__(
        self, inputs: int, outputs: int, kernel: tuple[int, int, int, int], slope: float, padding: PaddingMode
    ) -> None:
        super().__init__()
        if any(size % 2 == 0 for size in kernel):
            raise ConfigError(f"convolution kernels must have odd sizes, but got {kernel} along (time, z, y, x).")
        if padding not in ("zeros", *_PAD):
            raise ConfigError(f"padding must be one of zeros, {', '.join(_PAD)}, but is {padding!r}.")
        self.kernel, self.slope, self.padding = kernel, slope, padding
        self.weight = nn.Parameter(torch.empty(outputs, inputs, *kernel))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_normal_(self.weight, a=slope if slope < 1 else 1.0)

    @property
    def halo(self) -> Halo:
        """Neighbours read on either side along (time, z, y, x)."""
        time, z, y, x = (size // 2 for size in self.kernel)
        return time, z, y, x

    def forward(self, features: Tensor, noise: Noise | None = None) -> Tensor:
        """Apply the layer to whole features ``(batch, time, channel, z, y, x)``; only the channels change.

        With `noise` samples of the result are dropped. This is done before the activation, which makes no difference:
        leaky ReLU scales with its input. So one tensor waits for both of their backwards.
        """
        return self.finish(self.convolve(self.pad(features)), noise, ("b", "t", "c", "z", "y", "x"))

    def pad(self, features: Tensor, axes: Sequence[int] = (0, 1, 2, 3)) -> Tensor:
        """Continue the features by the halo along some of (time 0, z 1, y 2, x 3), as `padding` says."""
        widths = [self.halo[axis] if axis in axes else 0 for axis in range(4)]
        if not any(widths):
            return features
        if self.padding == "zeros":
            time, z, y, x = widths
            return F.pad(features, (x, x, y, y, z, z, 0, 0, time, time))
        for axis, dim in enumerate((1, 3, 4, 5)):
            features = _extend(features, dim, widths[axis], self.padding)
        return features

    @abstractmethod
    def convolve(self, padded: Tensor) -> Tensor:
        """Convolution without padding: every axis shrinks by twice the halo."""

    def finish(self, features: Tensor, noise: Noise | None, layout: Sequence[str]) -> Tensor:
        """Drop samples, and apply the pointwise activation, in place where its output tells the sign of its input."""
        if noise is not None:
            features = noise.drop(features, layout)
        return features if self.slope == 1 else F.leaky_relu(features, self.slope, inplace=self.slope >= 0)

    def extra_repr(self) -> str:
        """Channels, kernel and activation."""
        outputs, inputs = self.weight.shape[:2]
        return f"{inputs} -> {outputs}, kernel {self.kernel}, slope {self.slope}, padding {self.padding}"


def _extend(features: Tensor, dim: int, width: int, mode: str) -> Tensor:
    """Pad one axis by gathering its own samples, for the modes that F.pad lacks on six axes."""
    size = features.shape[dim]
    if width == 0:
        return features
    index = torch.arange(-width, size + width, device=features.device)
    if mode == "replicate":
        index = index.clamp(0, size - 1)
    elif mode == "circular":
        index = index % size
    else:
        if width >= size:
            raise ConfigError(f"reflect padding by {width} needs more than {width} samples, but an axis has {size}.")
        index = (size - 1) - ((size - 1) - index.abs()).abs()
    return features.index_select(dim, index)


class SpatialConvolution(LocalLayer):
    """Convolution over (z, y, x) or, with ``dimensions=2``, over (y, x); see `LocalLayer`."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        dimensions: int,
        kernel: int = 3,
        slope: float = 0.1,
        padding: PaddingMode = "zeros",
    ) -> None:
        if dimensions not in (2, 3):
            raise ConfigError(f"a spatial convolution has 2 or 3 dimensions, but {dimensions} were asked for.")
        super().__init__(inputs, outputs, (1, kernel if dimensions == 3 else 1, kernel, kernel), slope, padding)

    def forward(self, features: Tensor, noise: Noise | None = None) -> Tensor:
        """As `LocalLayer.forward`; symmetric zero padding is left to the convolution, for its fast kernels."""
        if self.padding == "zeros":
            return self._convolve(features, self.halo[1:], noise)
        return self._convolve(self.pad(features), (0, 0, 0), noise)

    def convolve(self, padded: Tensor) -> Tensor:
        """See `LocalLayer.convolve`."""
        return self._convolve(padded, (0, 0, 0), finished=False)

    def _convolve(
        self, features: Tensor, padding: tuple[int, ...], noise: Noise | None = None, *, finished: bool = True
    ) -> Tensor:
        batch, time, channels, z, y, x = features.shape
        folded = features.reshape(batch * time, channels, z, y, x)
        if self.kernel[1] == 1:  # one slice after another; most often there is one
            folded = folded.transpose(1, 2).reshape(batch * time * z, channels, y, x)
            result = F.conv2d(folded, self.weight[:, :, 0, 0], self.bias, padding=padding[1:])
            result = self.finish(result, noise, ("btz", "c", "y", "x")) if finished else result
            result = result.view(batch, time, z, -1, *result.shape[2:])
            return result.transpose(2, 3)
        result = F.conv3d(folded, self.weight[:, :, 0], self.bias, padding=padding)
        result = self.finish(result, noise, ("bt", "c", "z", "y", "x")) if finished else result
        return result.view(batch, time, -1, *result.shape[2:])


class TemporalConvolution(LocalLayer):
    """Convolution over time, which mixes channels and frames at every voxel; see `LocalLayer`."""

    def __init__(
        self, inputs: int, outputs: int, *, kernel: int = 3, slope: float = 0.1, padding: PaddingMode = "zeros"
    ) -> None:
        super().__init__(inputs, outputs, (kernel, 1, 1, 1), slope, padding)

    def forward(self, features: Tensor, noise: Noise | None = None) -> Tensor:
        """See `LocalLayer.forward`."""
        result = self.finish(self._convolve(self.pad(features)), noise, ("b", "t", "c", "zyx"))
        return result.view(*result.shape[:3], *features.shape[3:])

    def convolve(self, padded: Tensor) -> Tensor:
        """See `LocalLayer.convolve`."""
        result = self._convolve(padded)
        return result.view(*result.shape[:3], *padded.shape[3:])

    def _convolve(self, padded: Tensor) -> Tensor:
        """Frames with flat space, ``(batch, time, channel, voxel)``."""
        flat, frames = padded.flatten(3), padded.shape[1] - self.kernel[0] + 1
        result = self.bias[:, None].expand(padded.shape[0], frames, -1, flat.shape[-1])
        for tap in range(self.kernel[0]):
            result = result + torch.matmul(self.weight[:, :, tap, 0, 0, 0], flat[:, tap : tap + frames])
        return result
