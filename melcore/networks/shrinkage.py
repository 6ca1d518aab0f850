"""The dual step of a learned analysis prior: filters, and thresholds that follow noise, undersampling and place.

Learned filters: Hammernik et al., Learning a variational network for reconstruction of accelerated MRI data, Magn
Reson Med 79:3055 (2018). Thresholds that a network sets for every place: Kofler et al., Learning regularization
parameter maps for variational image reconstruction using deep neural networks and algorithm unrolling, SIAM J Imaging
Sci 16:2202 (2023).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from melcore.errors import ConfigError
from melcore.networks.filter_bank import FilterBank
from melcore.networks.noise_curve import NoiseCurve
from melcore.networks.regulariser import Regulariser

# What a place may change of the logarithm of a threshold. Unbounded maps extrapolate badly on anatomy never seen.
_BOUND = 2.5
_TINY = 1e-20  # keeps the derivative of a magnitude finite where there is nothing


class Thresholds(nn.Module):
    """Thresholds of filters as functions of noise level and acceleration, the same in all steps.

    ``log threshold = curve(log sigma) + rate * log(acceleration / 4)``, begun as `factor` times the noise in what a
    filter finds, where the noise is at least `least`: below it undersampling is what must be suppressed.
    """

    def __init__(self, filters: int, *, factor: float, least: float = 0.004) -> None:
        super().__init__()
        self.curve = NoiseCurve(filters, lambda sigma: factor * math.hypot(sigma, least))
        self.rate = nn.Parameter(torch.full((filters,), 0.3))

    def forward(self, log_sigma: Tensor, log_rate: Tensor) -> Tensor:
        """Logarithms ``(row, filter)``, from those of noise level and acceleration, ``(row,)`` each."""
        return self.curve(log_sigma) + self.rate * (log_rate - math.log(4.0))[:, None]


class PlaceNetwork(nn.Module):
    """A small CNN that sees what the filters found, in units of their thresholds, and where thresholds must change.

    What is found is averaged over time. Planes are convolved over (y, x), those of a volume with their neighbours.

    Parameters
    ----------
    filters, maps
        Channels of input and output.
    channels
        Width.
    volume
        Whether neighbours along z are seen.
    """

    def __init__(self, filters: int, maps: int, *, channels: int, volume: bool) -> None:
        super().__init__()
        self.taps = 3 if volume else 1
        widths = [(filters + 2, channels, 1, 1), *[(channels * self.taps, channels, 3, hole) for hole in (1, 2, 4)]]
        self.layers = nn.ModuleList(
            nn.Conv2d(i, o, size, padding=hole * (size // 2), dilation=hole) for i, o, size, hole in widths
        )
        self.last = nn.Conv2d(channels, maps, 3, padding=1)
        for layer in self.layers:
            nn.init.kaiming_normal_(layer.weight, a=0.1)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.last.weight, std=0.01)
        assert self.last.bias is not None
        nn.init.zeros_(self.last.bias)

    def forward(self, found: Tensor, constants: Tensor) -> Tensor:
        """Maps ``(image, z, map, y, x)`` from magnitudes ``(image, z, filter, y, x)`` and ``(image, 2)`` constants."""
        images, z, _, y, x = found.shape
        beside = constants[:, None, :, None, None].expand(images, z, 2, y, x)
        features = torch.cat([torch.log1p(found), beside], dim=2)
        for index, layer in enumerate(self.layers):
            if index and self.taps == 3:
                padded = F.pad(features, (0, 0, 0, 0, 0, 0, 1, 1))
                features = torch.cat([padded[:, tap : tap + z] for tap in range(3)], dim=2)
            features = F.leaky_relu(layer(features.flatten(0, 1)), 0.1).view(images, z, -1, y, x)
        maps: Tensor = self.last(features.flatten(0, 1))
        return maps.view(images, z, -1, y, x)


class Shrinkage(Regulariser):
    """``u = clip(u + step * W x, threshold)`` and ``W^H u``: the dual step of ``|threshold * W x|_1``.

    It acts on a stack of real channels: the image, the dual variable of each filter, maps of place, and two constants,
    the logarithms of noise level and acceleration. A stack is ``(row, time, z, channel, y, x)``; real and imaginary
    part of an image are rows that follow each other. The result is a stack too, with ``W^H u`` in the place of the
    image.

    Parameters
    ----------
    bank, thresholds
        Shared by all steps of a model.
    maps
        Number of maps of place, which every step combines to changes of its thresholds; 0 for none.
    place
        Computes the maps anew in this step, None hands them on.
    adapted
        Whether there are maps yet.
    """

    def __init__(
        self,
        bank: FilterBank,
        thresholds: Thresholds,
        *,
        dimensions: str,
        sets: int,
        maps: int,
        place: PlaceNetwork | None = None,
        adapted: bool = False,
    ) -> None:
        super().__init__()
        self.dimensions, self.sets, self.maps, self.adapted = dimensions, sets, maps, adapted
        self.bank, self.thresholds, self.place = bank, thresholds, place
        self.offset = nn.Parameter(torch.zeros(bank.filters))
        self.log_step = nn.Parameter(torch.tensor(math.log(0.5)))
        if adapted:
            self.mixture = nn.Parameter(torch.eye(bank.filters, maps) + 1.0 / maps)

    @property
    def channels(self) -> int:
        """Of a stack."""
        return 1 + self.bank.filters + self.maps + 2

    def sample(self, matrix: tuple[int, int, int, int], generator: torch.Generator) -> Tensor:
        """See `Regulariser.sample`; the constants are those of an everyday scan."""
        time, z, y, x = matrix
        shape = (2 * self.sets, time, z, self.channels, y, x)
        stack = torch.randn(shape, dtype=torch.float64, generator=generator)
        stack[:, :, :, -2:] = torch.tensor([math.log(0.02), math.log(4.0)], dtype=torch.float64).view(2, 1, 1)
        return stack

    def forward(self, x: Tensor) -> Tensor:
        """From stack to stack, real ``(row, time, z, channel, y, x)``."""
        filters = self.bank.filters
        image, dual, maps, constants = x.split([1, filters, self.maps, 2], dim=3)
        # In place where nothing is differentiated: these tensors are many times larger than the image.
        dual = self.bank(image).mul_(self.log_step.exp()).add_(dual)
        row, _, z, _, y, width = dual.shape
        pairs = dual.unflatten(0, (row // 2, 2))
        magnitude = torch.hypot(pairs[:, 0] + _TINY, pairs[:, 1])
        known = constants[::2, 0, 0, :, 0, 0]
        base = self.thresholds(known[:, 0], known[:, 1]) + self.offset
        level = base[:, None, None, :, None, None]
        if self.place is not None:
            found = self.place((magnitude / level.exp()).mean(1), known)
            maps = found[:, None, None].expand(row // 2, 2, x.shape[1], z, self.maps, y, width).flatten(0, 1)
        if self.adapted:
            # The same at every time and for both parts of a number.
            change = torch.einsum("nzmyx,km->nzkyx", maps[::2, 0], self.mixture)
            level = level + (_BOUND * torch.tanh(change / _BOUND))[:, None]
        ratio = level.exp() / magnitude
        ratio = ratio.clamp(max=1.0) if ratio.requires_grad else ratio.clamp_(max=1.0)
        dual = (pairs * ratio[:, None]).flatten(0, 1)
        return torch.cat([self.bank.adjoint(dual), dual, maps, constants], dim=3)


def shrinkages(
    count: int,
    *,
    dimensions: int,
    series: bool = False,
    filters: int = 24,
    kernel: int = 3,
    time_kernel: int = 3,
    scales: int = 1,
    sets: int = 1,
    maps: int = 8,
    channels: int = 16,
    place_at: Sequence[float] = (0.25, 0.6),
    factor: float = 1.0,
    circular: bool = True,
) -> list[Shrinkage]:
    """The dual steps of a model, which share filters and thresholds.

    Parameters
    ----------
    count
        Number of steps.
    dimensions, series
        Spatial dimensions, 2 or 3; whether filters reach over time.
    filters, kernel, time_kernel, scales, circular
        See `FilterBank`.
    sets
        Map sets of the images; each is regularised by itself.
    maps, channels
        Maps of place, and width of the network that makes them.
    place_at
        After which parts of the steps the maps are computed, and computed again.
    factor
        Of the first thresholds, in units of the noise; about 1 is a good classical reconstruction.

    Raises
    ------
    ConfigError
        If an option is out of range.
    """
    if dimensions not in (2, 3) or maps < 0 or channels < 1 or not all(0 <= part < 1 for part in place_at):
        raise ConfigError(
            f"shrinkage needs dimensions 2 or 3, maps >= 0, channels >= 1 and place_at within [0, 1), but got "
            f"dimensions={dimensions}, maps={maps}, channels={channels}, place_at={list(place_at)}."
        )
    sizes = (time_kernel if series else 1, kernel if dimensions == 3 else 1, kernel, kernel)
    bank = FilterBank(filters, sizes, scales=scales, circular=circular)
    gain = 1 / math.sqrt(math.prod(sizes) * scales)  # what an untrained filter lets through of white noise
    thresholds = Thresholds(filters, factor=factor * gain)
    places = sorted({min(count - 1, round(part * count)) for part in place_at}) if maps else []
    name = f"{dimensions}d" + ("+t" if series else "")
    return [
        Shrinkage(
            bank,
            thresholds,
            dimensions=name,
            sets=sets,
            maps=maps,
            place=PlaceNetwork(filters, maps, channels=channels, volume=dimensions == 3) if step in places else None,
            adapted=bool(places) and step >= places[0],
        )
        for step in range(count)
    ]
