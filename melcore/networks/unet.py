"""A small U-Net, for receptive fields that plain convolutions do not reach.

Ronneberger et al., U-Net, MICCAI 2015. Its strides make it opaque to executors that cut the volume; it runs under
`store` and `checkpoint`.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from melcore.errors import ConfigError, ShapeError
from melcore.networks.regulariser import LocalRegulariser, Regulariser


class UNet(Regulariser):
    """Residual U-Net over (y, x) or (z, y, x), of complex images as pairs of real channels.

    Parameters
    ----------
    dimensions
        2 (every slice and frame on its own) or 3.
    channels
        Width at full resolution; it doubles with every level.
    levels
        How often the resolution is halved. Axes are continued by their last sample to a multiple of ``2**levels``.
    sets, slope
        As for `melcore.networks.ResidualCNN`.
    """

    def __init__(
        self, dimensions: int, *, channels: int = 16, levels: int = 3, sets: int = 1, slope: float = 0.1
    ) -> None:
        super().__init__()
        if dimensions not in (2, 3) or levels < 1:
            raise ConfigError(f"a U-Net has 2 or 3 dimensions and at least 1 level, but got {dimensions} and {levels}.")
        self.dimensions, self.sets, self.levels, self.slope = f"{dimensions}d", sets, levels, slope
        convolution = nn.Conv3d if dimensions == 3 else nn.Conv2d
        transposed = nn.ConvTranspose3d if dimensions == 3 else nn.ConvTranspose2d
        widths = [channels * 2**level for level in range(levels + 1)]
        self.first = convolution(2 * sets, channels, 3, padding=1)
        self.down = nn.ModuleList(
            convolution(inputs, outputs, 3, stride=2, padding=1) for inputs, outputs in pairwise(widths)
        )
        self.up = nn.ModuleList(transposed(2 * width, width, 2, stride=2) for width in reversed(widths[:-1]))
        self.merge = nn.ModuleList(convolution(2 * width, width, 3, padding=1) for width in reversed(widths[:-1]))
        self.last = convolution(channels, 2 * sets, 3, padding=1)
        with torch.no_grad():
            self.last.weight.mul_(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """See `Regulariser.forward`."""
        if x.ndim != 6 or x.shape[1] != self.sets or not x.is_complex():
            raise ShapeError(
                f"UNet expects a complex image (batch, {self.sets}, time, z, y, x), but got {x.dtype} {tuple(x.shape)}."
            )
        features = LocalRegulariser.to_features(x)
        batch, time, channels, z, y, width = features.shape
        if self.dimensions == "2d":
            folded = features.transpose(2, 3).reshape(batch * time * z, channels, y, width)
        else:
            folded = features.reshape(batch * time, channels, z, y, width)
        result = self._network(folded).to(x.real.dtype)
        if self.dimensions == "2d":
            result = result.view(batch, time, z, channels, y, width).transpose(2, 3).contiguous()
        return x + LocalRegulariser.from_features(result.view(batch, time, channels, z, y, width))

    def _network(self, features: Tensor) -> Tensor:
        space = features.shape[2:]
        whole = 2**self.levels
        pads = [(0, -size % whole) for size in reversed(space)]
        features = F.pad(features, [width for pair in pads for width in pair], mode="replicate")
        features = F.leaky_relu(self.first(features), self.slope)
        skipped = []
        for down in self.down:
            skipped.append(features)
            features = F.leaky_relu(down(features), self.slope)
        for up, merge in zip(self.up, self.merge, strict=True):
            features = merge(torch.cat([up(features), skipped.pop()], dim=1))
            features = F.leaky_relu(features, self.slope)
        result: Tensor = self.last(features)
        for dim, size in enumerate(space, start=2):
            result = result.narrow(dim, 0, size)
        return result
