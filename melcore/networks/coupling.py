"""Additive coupling blocks: networks whose input can be computed back from their output, exactly but for rounding.

Dinh et al., NICE: non-linear independent components estimation, ICLR workshop 2015; as a way to save activations: Gomez
et al., The reversible residual network, NeurIPS 2017.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks.layers import Halo, LocalLayer, PaddingMode, SpatialConvolution
from melcore.networks.regulariser import Regulariser, soften_last


class CouplingBlock(nn.Module):
    """``re = re + f(im)``, then ``im = im + g(re)``, with small CNNs ``f`` and ``g`` of the two parts of an image."""

    def __init__(self, f: list[LocalLayer], g: list[LocalLayer]) -> None:
        super().__init__()
        self.f, self.g = nn.Sequential(*f), nn.Sequential(*g)

    @staticmethod
    def _apply_to(chain: nn.Sequential, part: Tensor) -> Tensor:
        features = part.transpose(1, 2)  # (batch, time, set, z, y, x)
        return chain(features).transpose(1, 2).to(part.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Complex ``(batch, set, time, z, y, x)`` to the same shape."""
        real = x.real + self._apply_to(self.f, x.imag)
        return torch.complex(real, x.imag + self._apply_to(self.g, real))

    def inverse(self, y: Tensor) -> Tensor:
        """The `x` of which `y` is the `forward`."""
        imag = y.imag - self._apply_to(self.g, y.real)
        return torch.complex(y.real - self._apply_to(self.f, imag), imag)


class CouplingCNN(Regulariser):
    """Coupling blocks in a row over (y, x) or (z, y, x). There is no dropout: undoing a block would ask for its noise.

    Parameters
    ----------
    dimensions
        2 or 3.
    channels, blocks, layers, kernel
        Width of the CNNs inside the blocks, number of blocks, convolutions in each CNN (at least 2), and their size.
    sets, slope, padding
        As for `melcore.networks.ResidualCNN`.
    """

    def __init__(
        self,
        dimensions: int,
        *,
        channels: int = 32,
        blocks: int = 4,
        layers: int = 3,
        kernel: int = 3,
        sets: int = 1,
        slope: float = 0.1,
        padding: PaddingMode = "zeros",
    ) -> None:
        super().__init__()
        if blocks < 1 or layers < 2:
            raise ConfigError(f"CouplingCNN needs a block and 2 layers in it, but got {blocks} and {layers}.")
        self.dimensions, self.sets = f"{dimensions}d", sets
        widths = [sets, *[channels] * (layers - 1), sets]
        slopes = [slope] * (layers - 1) + [1.0]

        def chain() -> list[LocalLayer]:
            made: list[LocalLayer] = [
                SpatialConvolution(
                    inputs, outputs, dimensions=dimensions, kernel=kernel, slope=layer_slope, padding=padding
                )
                for (inputs, outputs), layer_slope in zip(pairwise(widths), slopes, strict=True)
            ]
            soften_last(made)
            return made

        self.blocks = nn.ModuleList(CouplingBlock(chain(), chain()) for _ in range(blocks))

    @property
    def halo(self) -> Halo:  # type: ignore[override]
        """Sum of the halos of all layers; both CNNs of a block follow each other."""
        layers = [layer for layer in self.modules() if isinstance(layer, LocalLayer)]
        time, z, y, x = (sum(sizes) for sizes in zip(*(layer.halo for layer in layers), strict=True))
        return time, z, y, x

    def forward(self, x: Tensor) -> Tensor:
        """See `Regulariser.forward`."""
        for block in self.blocks:
            x = block(x)
        return x

    def inverse(self, y: Tensor) -> Tensor:
        """The image of which `y` is the `forward`."""
        for block in reversed(self.blocks):
            y = block.inverse(y)  # type: ignore[operator]
        return y
