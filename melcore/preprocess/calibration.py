"""Finds the fully sampled centre of k-space, from which coil maps are estimated."""

from collections.abc import Sequence

import numpy as np
import torch

from melcore import layout
from melcore.data import KSpace
from melcore.physics.fourier import ifft


def calibration_region(mask: torch.Tensor, shape: Sequence[int] | None = None) -> tuple[int, int, int]:
    """Size of the fully sampled box around the centre of k-space.

    The box grows from the centre (index ``size // 2``) by one sample along each axis in turn, as BART's does, for as
    long as every sample in it was taken, in any time frame, in each element of the batch.

    Parameters
    ----------
    mask
        Boolean ``(batch, 1, time, z, y, x)``.
    shape
        Of the k-space, where `mask` is broadcast along an axis; such an axis is fully sampled.

    Returns
    -------
    tuple of int
        Sizes ``(z, y, x)``; ``(0, 0, 0)`` if the centre itself was not sampled.

    Raises
    ------
    ShapeError
        If `mask` lacks an axis.
    """
    layout.check_axes(tuple(mask.shape), layout.K_SPACE_AXES, "the sampling mask")
    sampled = mask.any(dim=2).all(dim=0).all(dim=0).cpu().numpy()
    # Running sums along all axes give the number of samples in any box from its eight corners.
    sums = np.pad(sampled.astype(np.int64).cumsum(0).cumsum(1).cumsum(2), ((1, 0), (1, 0), (1, 0)))

    def full(sizes: Sequence[int]) -> bool:
        first = [n // 2 - size // 2 for n, size in zip(sampled.shape, sizes, strict=True)]
        corners = sums[np.ix_(*[(start, start + size) for start, size in zip(first, sizes, strict=True)])]
        return bool(np.diff(np.diff(np.diff(corners, axis=0), axis=1), axis=2).item() == np.prod(sizes))

    region = [1, 1, 1]
    if not full(region):
        return 0, 0, 0
    growing = [True, True, True]
    while any(growing):
        for axis in (2, 1, 0):
            larger = [*region[:axis], region[axis] + 1, *region[axis + 1 :]]
            growing[axis] = growing[axis] and larger[axis] <= sampled.shape[axis] and full(larger)
            region = larger if growing[axis] else region
    if shape is not None:
        region = [n if m == 1 else found for n, m, found in zip(shape[-3:], sampled.shape, region, strict=True)]
    return region[0], region[1], region[2]


def units_of_calibration(k_space: KSpace, calibration: KSpace, region: tuple[int, int, int]) -> torch.Tensor:
    """What separate calibration data are multiplied by to be as large as the k-space.

    Another sequence gives its data in units of its own. The samples that both took in the middle of k-space tell the
    ratio; where there are none, it is 1.

    Parameters
    ----------
    k_space, calibration
        Of the same coils, on the same grid.
    region
        Size ``(z, y, x)`` of the calibration region.

    Returns
    -------
    torch.Tensor
        ``(batch,)``, positive, for every element of the k-space.
    """
    energies, taken = [], []
    for one in (k_space, calibration):
        data, mask = one.data, one.mask.expand(-1, -1, one.data.shape[2], *one.data.shape[3:])
        for axis, (size, used) in enumerate(zip(data.shape[3:], region, strict=True), -3):
            data, mask = (part.narrow(axis, size // 2 - used // 2, used) for part in (data, mask))
        count = mask.sum((1, 2))  # (batch, z, y, x)
        energies.append((data * mask).abs().square().sum((1, 2)) / count.clamp(min=1))
        taken.append(count > 0)
    both = taken[0] & taken[1]
    wanted, found = ((energy * both).flatten(1).sum(1) for energy in energies)
    return torch.where((wanted > 0) & (found > 0), (wanted / found).sqrt(), torch.ones_like(wanted))


def signal_within(k_space: torch.Tensor, coil_maps: torch.Tensor, region: tuple[int, int, int]) -> tuple[float, float]:
    """How much of the signal the coil maps can show, at the resolution of the calibration region.

    Parameters
    ----------
    k_space
        Complex ``(batch, coil, time, z, y, x)``.
    coil_maps
        Complex ``(batch, set, coil, 1, z, y, x)``.
    region
        Size ``(z, y, x)`` of the calibration region.

    Returns
    -------
    covered
        Fraction of the energy that lies where the maps are not zero.
    explained
        Fraction of the energy of the coil images that is the maps' times an image: less than 1 for noise, and for maps
        of other coils. The sets are taken as orthogonal, which ESPIRiT's are.
    """
    centre, maps = k_space, coil_maps[:, :, :, 0]
    for axis, (size, used) in enumerate(zip(k_space.shape[3:], region, strict=True), -3):
        centre = centre.narrow(axis, size // 2 - used // 2, used)
        # A voxel of the small grid is covered if the voxel of the maps in its middle is.
        positions = ((torch.arange(used) - used // 2) * size / used).round().long() + size // 2
        maps = maps.index_select(axis, positions.clamp(0, size - 1).to(maps.device))
    coil_images = ifft(centre, (-3, -2, -1))
    energy = coil_images.abs().square().sum(1)
    tiny = torch.finfo(energy.dtype).tiny
    power = maps.abs().square().sum(2)  # (batch, set, z, y, x)
    along = sum(
        (maps[:, one].conj().unsqueeze(2) * coil_images).sum(1).abs().square()
        / power[:, one].unsqueeze(1).clamp(min=tiny)
        for one in range(maps.shape[1])
    )
    support = (power > 0).any(1).unsqueeze(1)
    total = energy.sum().clamp(min=tiny)
    return float((energy * support).sum() / total), float(torch.as_tensor(along).sum() / total)
