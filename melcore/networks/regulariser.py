"""What a learned regulariser is, and the kind that is made of local layers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from melcore.errors import ShapeError
from melcore.networks.dropout import Noise, check_rate
from melcore.networks.layers import Halo, LocalLayer


class Regulariser(nn.Module, ABC):
    """Complex image ``(batch, set, time, z, y, x)`` to an image of the same shape.

    Attributes
    ----------
    dimensions
        ``"2d"``, ``"3d"``, ``"2d+t"`` or ``"3d+t"``: which data the regulariser is meant for.
    sets
        Map sets that it expects.
    halo
        Input samples on either side, along (time, z, y, x), that one output sample depends on; None: all of them.
    """

    dimensions: str
    sets: int
    halo: Halo | None = None

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """Regularise: complex ``(batch, set, time, z, y, x)`` to the same shape."""

    def sample(self, matrix: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """Random input in double precision, for images of a (time, z, y, x)."""
        return torch.randn((1, self.sets, *matrix), dtype=torch.complex128, generator=generator)


class LocalRegulariser(Regulariser):
    """``x + from_features(layers(to_features(x)))`` with local layers and pointwise activations.

    Being local makes it streamable: an executor may compute it plane by plane, with `layers` and their halos.

    Parameters
    ----------
    layers, dimensions, sets
        See the attributes.
    dropout
        Part of the activations of every layer but the last that is dropped in training; the others are scaled up. Each
        evaluation draws its noise anew, with one number of torch's global generator on the CPU: `torch.manual_seed`
        repeats it. See `melcore.networks.dropout`.
    """

    def __init__(self, layers: Sequence[LocalLayer], *, dimensions: str, sets: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.dimensions, self.sets, self.dropout = dimensions, sets, check_rate(dropout)
        self.layers = nn.ModuleList(layers)

    @property
    def halo(self) -> Halo:  # type: ignore[override]
        """Sum of the halos of the layers."""
        time, z, y, x = (sum(sizes) for sizes in zip(*(layer.halo for layer in self.layers), strict=True))
        return time, z, y, x

    @staticmethod
    def to_features(x: Tensor) -> Tensor:
        """Complex ``(batch, set, time, z, y, x)`` to real ``(batch, time, 2 set, z, y, x)``."""
        batch, sets, time, *space = x.shape
        parts = torch.view_as_real(x.resolve_conj()).permute(0, 2, 1, 6, 3, 4, 5)
        return parts.reshape(batch, time, 2 * sets, *space)

    @staticmethod
    def from_features(features: Tensor) -> Tensor:
        """Inverse of `to_features`."""
        batch, time, channels, *space = features.shape
        parts = features.view(batch, time, channels // 2, 2, *space).permute(0, 2, 1, 4, 5, 6, 3)
        return torch.view_as_complex(parts.contiguous())

    def draw_noise(self, x: Tensor) -> Noise | None:
        """The noise of one evaluation on `x`; None, and no random number is drawn, unless in training with dropout."""
        if not self.training or self.dropout == 0:
            return None
        layers: list[LocalLayer] = list(self.layers)  # type: ignore[arg-type]
        channels = max(layer.weight.shape[0] for layer in layers)
        batch, _, time, z, y, readout = x.shape
        sizes = {"b": batch, "t": time, "c": channels, "z": z, "y": y, "x": readout}
        return Noise.draw(self.dropout, sizes, x.device)

    def forward(self, x: Tensor, noise: Noise | None = None) -> Tensor:
        """See `Regulariser.forward`. `noise` is drawn here, unless `x` is a part of a volume and comes with its own."""
        if x.ndim != 6 or x.shape[1] != self.sets or not x.is_complex():
            raise ShapeError(
                f"{type(self).__name__} expects a complex image (batch, {self.sets}, time, z, y, x), "
                f"but got {x.dtype} {tuple(x.shape)}."
            )
        noise = self.draw_noise(x) if noise is None else noise
        features, last = self.to_features(x), len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            features = layer(features) if noise is None or number == last else layer(features, noise.layer(number))
        return x + self.from_features(features.to(x.real.dtype))


def soften_last(layers: Sequence[LocalLayer], factor: float = 0.1) -> None:
    """Scale the last layer's weights: an untrained regulariser is then nearly the identity, and training stable."""
    with torch.no_grad():
        layers[-1].weight.mul_(factor)
