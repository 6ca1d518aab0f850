"""Analysis filters: a bank of small real convolutions, applied to the real and the imaginary part alike.

Complex magnitudes of what they find do not depend on the image's phase, so that whatever is built on magnitudes alone
is exactly equivariant to it.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from melcore.errors import ConfigError


class FilterBank(nn.Module):
    """Convolutions without bias from one channel to many, and their adjoint.

    Planes are convolved over (y, x); neighbours along time and z come in as further channels of a plane, which a CPU
    computes several times faster than a convolution over three axes. Beyond the faces the image is zero, along time it
    goes on circularly or with its last frame.

    Parameters
    ----------
    filters
        Number of filters; shared out evenly among the `scales`.
    kernel
        Sizes along (time, z, y, x), all odd.
    scales
        Filters of the second scale have holes of one sample between their taps, those of the third of three, ...
    circular
        Whether time is a cycle.
    """

    def __init__(
        self, filters: int, kernel: tuple[int, int, int, int], *, scales: int = 1, circular: bool = True
    ) -> None:
        super().__init__()
        if any(size % 2 == 0 for size in kernel) or filters < scales or filters % scales:
            raise ConfigError(
                f"a filter bank needs odd kernel sizes and as many filters at each of its scales, but got the kernel "
                f"{kernel} along (time, z, y, x), {filters} filters and {scales} scales."
            )
        self.filters, self.kernel, self.scales, self.circular = filters, kernel, scales, circular
        weights = cosine_filters(filters // scales, kernel) / math.sqrt(scales)
        self.weight = nn.Parameter(weights.repeat(scales, 1, 1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Real ``(row, time, z, 1, y, x)`` to ``(row, time, z, filter, y, x)``."""
        row, time, z, _, y, x = images.shape
        found = []
        for weight, hole in self._weights():
            planes = self._neighbours(images, hole).reshape(row * time * z, -1, y, x)
            found.append(F.conv2d(planes, weight, padding=self._padding(hole), dilation=hole))
        return torch.cat(found, dim=1).view(row, time, z, -1, y, x)

    def adjoint(self, features: Tensor) -> Tensor:
        """Adjoint of `forward`: real ``(row, time, z, filter, y, x)`` to ``(row, time, z, 1, y, x)``."""
        row, time, z, filters, y, x = features.shape
        parts = features.reshape(row * time * z, self.scales, filters // self.scales, y, x)
        total: Tensor | None = None
        for index, (weight, hole) in enumerate(self._weights()):
            planes = F.conv_transpose2d(parts[:, index], weight, padding=self._padding(hole), dilation=hole)
            image = self._gather(planes.view(row, time, z, -1, y, x), hole)
            total = image if total is None else total + image
        assert total is not None
        return total

    def _weights(self) -> list[tuple[Tensor, int]]:
        """Of each scale, ``(filter, neighbour, y, x)``, with the distance of its taps."""
        return [(part.flatten(1, 2), 1 << scale) for scale, part in enumerate(self.weight.chunk(self.scales))]

    def _padding(self, hole: int) -> tuple[int, int]:
        return hole * (self.kernel[2] // 2), hole * (self.kernel[3] // 2)

    def _offsets(self, hole: int) -> list[tuple[int, int]]:
        times, slices = ([hole * (tap - size // 2) for tap in range(size)] for size in self.kernel[:2])
        return list(itertools.product(times, slices))

    def _neighbours(self, images: Tensor, hole: int) -> Tensor:
        """Each plane with its neighbours along (time, z) as channels."""
        offsets = self._offsets(hole)
        if len(offsets) == 1:
            return images
        return torch.cat([self._shifted(images, time, z) for time, z in offsets], dim=3)

    def _gather(self, planes: Tensor, hole: int) -> Tensor:
        """Adjoint of `_neighbours`."""
        offsets = self._offsets(hole)
        if len(offsets) == 1:
            return planes
        total = torch.zeros_like(planes[:, :, :, :1])
        for index, (time, z) in enumerate(offsets):
            total = total + self._shifted_back(planes[:, :, :, index : index + 1], time, z)
        return total

    def _shifted(self, images: Tensor, time: int, z: int) -> Tensor:
        """``images[time + offset, z + offset]``."""
        if time:
            if self.circular:
                images = torch.roll(images, -time, dims=1)
            else:
                index = torch.arange(images.shape[1], device=images.device) + time
                images = images.index_select(1, index.clamp(0, images.shape[1] - 1))
        return _moved(images, -z) if z else images

    def _shifted_back(self, images: Tensor, time: int, z: int) -> Tensor:
        images = _moved(images, z) if z else images
        if not time:
            return images
        if self.circular:
            return torch.roll(images, time, dims=1)
        index = torch.arange(images.shape[1], device=images.device) + time
        return torch.zeros_like(images).index_add(1, index.clamp(0, images.shape[1] - 1), images)

    def extra_repr(self) -> str:
        """Filters, sizes and scales."""
        return f"{self.filters} filters {self.kernel}, {self.scales} scales"


def _moved(images: Tensor, by: int) -> Tensor:
    """Move along z (axis 2), zeros entering."""
    size = images.shape[2]
    if abs(by) >= size:
        return torch.zeros_like(images)
    kept = images[:, :, max(0, -by) : size - max(0, by)]
    return F.pad(kept, (0, 0, 0, 0, 0, 0, max(0, by), max(0, -by)))


def cosine_filters(count: int, kernel: tuple[int, int, int, int]) -> Tensor:
    """The first discrete cosine filters but the constant one, ``(count, time, z, y, x)``; the norm of all is at most 1.

    Ahmed, Natarajan, Rao, Discrete cosine transform, IEEE Trans Comput C-23:90 (1974). Filters beyond their number are
    small and random. The norm is that of the convolutions without faces: the largest sum of all power spectra.
    """
    axes = [_cosines(size) for size in kernel]
    orders = sorted(itertools.product(*(range(size) for size in kernel)), key=lambda o: (sum(q * q for q in o), o))
    atoms = [torch.einsum("a,b,c,d->abcd", *(axis[q] for axis, q in zip(axes, o, strict=True))) for o in orders[1:]]
    generator = torch.Generator().manual_seed(1)
    while len(atoms) < count:
        atom = torch.randn(kernel, generator=generator)
        atom = atom - atom.mean()
        atoms.append(0.1 * atom / atom.norm().clamp(min=1e-6))
    filters = torch.stack(atoms[:count]) / math.sqrt(math.prod(kernel))
    spectra = torch.fft.fftn(filters, [6 * size if size > 1 else 1 for size in kernel], dim=(1, 2, 3, 4))
    return filters / spectra.abs().square().sum(0).max().sqrt().clamp(min=1.0)


def _cosines(size: int) -> Tensor:
    place = torch.arange(size, dtype=torch.float64)
    rows = torch.cos(math.pi / size * (place + 0.5) * place[:, None])
    return (rows / rows.norm(dim=1, keepdim=True)).float()
