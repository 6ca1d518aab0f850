"""Non-Cartesian trajectories ``(time, readout, sample, 2 or 3)``, in cycles per field of view, components x, y(, z)."""

import math

import torch
from torch import Tensor

_GOLDEN = math.pi * (math.sqrt(5) - 1) / 2  # rad, 111.2 degrees: Winkelmann et al., IEEE TMI 26:68 (2007)


def radial(size: int, spokes: int, *, time: int = 1, samples: int | None = None) -> Tensor:
    """Spokes through the centre, each rotated by the golden angle, on and on through the frames.

    Parameters
    ----------
    size
        Voxels of the image across; spokes reach ``size / 2``.
    spokes, time
        Spokes of a frame, and frames.
    samples
        Of a spoke; by default twice `size`, that is, with twofold readout oversampling.
    """
    angles = _GOLDEN * torch.arange(time * spokes, dtype=torch.float64).view(time, spokes, 1)
    radius = _along_spoke(size, samples)
    return torch.stack([radius * angles.cos(), radius * angles.sin()], dim=-1)


def spiral(size: int, interleaves: int, *, samples: int, time: int = 1, turns: float | None = None) -> Tensor:
    """Archimedean spirals from the centre to ``size / 2``, evenly rotated, and each frame by the golden angle.

    Parameters
    ----------
    size, time
        Voxels of the image across, and frames.
    interleaves, samples
        Spirals of a frame, and samples of each, evenly spaced in angle.
    turns
        Of each spiral; by default as many as sample k-space at the Nyquist rate.
    """
    progress = torch.linspace(0, 1, samples, dtype=torch.float64)
    start = 2 * math.pi * torch.arange(interleaves, dtype=torch.float64) / interleaves
    start = (start + _GOLDEN * torch.arange(time, dtype=torch.float64)[:, None])[..., None]
    angle = start + 2 * math.pi * (size / 2 / interleaves if turns is None else turns) * progress
    return size / 2 * torch.stack([progress * angle.cos(), progress * angle.sin()], dim=-1)


def stack(plane: Tensor, partitions: int) -> Tensor:
    """A trajectory in the plane, repeated at each of `partitions` equidistant kz: stack of stars, or of spirals."""
    time, readouts, samples, _ = plane.shape
    z = (torch.arange(partitions, dtype=plane.dtype, device=plane.device) - partitions // 2).view(1, -1, 1, 1, 1)
    z = z.expand(time, partitions, readouts, samples, 1)
    return torch.cat([plane[:, None].expand(-1, partitions, -1, -1, -1), z], dim=-1).flatten(1, 2)


def kooshball(size: int, spokes: int, *, time: int = 1, samples: int | None = None) -> Tensor:
    """Spokes through the centre in all directions of space, by the two-dimensional golden means.

    Chan et al., Magn Reson Med 61:354 (2009). Parameters as for `radial`.
    """
    index = torch.arange(1, time * spokes + 1, dtype=torch.float64).view(time, spokes, 1)
    height = (0.465571231876768 * index) % 1.0
    angle = 2 * math.pi * (0.682327803828019 * index) % (2 * math.pi)
    across, radius = (1 - height.square()).sqrt(), _along_spoke(size, samples)
    return torch.stack([radius * across * angle.cos(), radius * across * angle.sin(), radius * height], dim=-1)


def _along_spoke(size: int, samples: int | None) -> Tensor:
    count = samples or 2 * size
    return (torch.arange(count, dtype=torch.float64) - count // 2) * (size / count)
