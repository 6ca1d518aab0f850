"""How BART is asked for coil maps, and what is made of its answer.

Traps of BART 0.8 that are avoided here: it ends with a failed assertion where the calibration region is smaller than
the kernel; its eigenvalues are too small on axes of twice the kernel's size, and it aborts on shorter ones; it ignores
all frames but the first.

One that remains: eigenvectors come from a fixed number of iterations, which do not converge where the first two
eigenvalues are close. In 6 % of the voxels of a head that nearly fills its field of view (0.95 and 0.92 there), ``-m
1`` gave a mixture of the first two eigenvectors, and the first set of ``-m 2`` another one: CG-SENSE with it alone had
a 7 % lower error there, a 0 to 1 % higher one on another head, and the same on four measured slices. One set therefore
stays the default; ``-m 2``, both sets kept, is right for such data.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from melcore import layout
from melcore.errors import ConfigError, DataError
from melcore.io.cfl import Complex
from melcore.preprocess.map_interpolation import grid_positions, interpolated_planes

Size = tuple[int, int, int]

_LEAST_FOR_CALDIR = 6  # samples; smaller regions resolve no coil's sensitivity

# Samples of the reduced grid along an axis, for each of the kernel's: maps hold little detail beyond the kernel's.
_SAMPLES_PER_KERNEL = 8
_WORTHWHILE = 0.8  # of an axis; a larger reduced grid saves nothing


@dataclass(frozen=True)
class Plan:
    """A command of BART and the grids around it; sizes along z, y and x.

    Attributes
    ----------
    command
        With the sets and the crop that are wanted; what is really asked for is `asked`.
    region
        The part of the calibration region that is used.
    grid
        On which BART estimates the maps.
    shape
        The grid of the image.
    sets, crop
        Of the result.
    """

    command: tuple[str, ...]
    region: Size
    grid: Size
    shape: Size
    sets: int
    crop: float

    @property
    def interpolated(self) -> bool:
        """Whether voxels of the image lie between those of BART's grid."""
        positions = [grid_positions(size, n) for size, n in zip(self.shape, self.grid, strict=True)]
        return not all(bool((along == along.round()).all()) for along in positions)

    @property
    def asked(self) -> list[str]:
        """The command that is run: without cropping, and with the sets that interpolation needs."""
        command = list(self.command)
        if command[0] == "ecalib":
            command[command.index("-c") + 1] = "0"
            command[command.index("-m") + 1] = str(self.tracked)
        return command

    @property
    def tracked(self) -> int:
        """Sets that are interpolated.

        The last of several sets swaps places with the next one wherever their eigenvalues cross: that one is followed
        too, and dropped.
        """
        return self.sets + 1 if self.interpolated and self.sets > 1 else self.sets


def plan_espirit(
    shape: Size, coils: int, region: Size, *, sets: int, kernel: int, size: int, crop: float, reduced: bool
) -> Plan:
    """Plan ESPIRiT.

    Raises
    ------
    ConfigError
        If the kernel or the number of sets is impossible.
    DataError
        If the calibration region is too small for the kernel.
    """
    if not 1 <= sets <= coils:
        raise ConfigError(f"the number of map sets must be between 1 and the {coils} coils, but is {sets}.")
    if not 1 <= kernel <= size:
        raise ConfigError(f"the kernel ({kernel}) must be at least 1 and at most the calibration size ({size}).")
    # Along a thin slab, the kernel must leave itself room to move.
    kernels = [min(kernel, (n + 1) // 2) for n in shape]
    _check_region(region, kernels, "take a smaller kernel, ")
    used = [min(size, n) for n in region]
    # The last set cannot be followed where there is no next one.
    reduced = reduced and (sets == 1 or sets < coils)
    grid = [_grid(n, k, r, reduced=reduced) for n, k, r in zip(shape, kernels, used, strict=True)]
    command = ("ecalib", "-m", str(sets), "-k", _colons(kernels), "-r", _colons(used), "-c", f"{crop:g}")
    return Plan(command, _size(used), _size(grid), shape, sets, crop)


def plan_caldir(shape: Size, region: Size, *, size: int) -> Plan:
    """Plan the direct method; errors as `plan_espirit`."""
    _check_region(region, [min(_LEAST_FOR_CALDIR, n) for n in shape], "")
    used = _size([min(size, n) for n in region])
    return Plan(("caldir", str(size)), used, shape, shape, 1, 0.0)


def _check_region(region: Size, least: list[int], advice: str) -> None:
    if any(found < needed for found, needed in zip(region, least, strict=True)):
        found, needed = ("x".join(map(str, sizes)) for sizes in (region, least))
        what = f"a fully sampled centre of {found} (z, y, x)" if region[0] else "no fully sampled centre"
        raise DataError(
            f"coil maps need a fully sampled centre of k-space of at least {needed} samples (z, y, x), but these data "
            f"have {what}: give separate calibration data, {advice}or maps estimated elsewhere."
        )


def _grid(size: int, kernel: int, region: int, *, reduced: bool) -> int:
    """BART's grid along one axis: a coarser one, the image's, or a finer one where BART needs more than there is."""
    coarse = max(_SAMPLES_PER_KERNEL * kernel, region)
    if reduced and coarse <= _WORTHWHILE * size:
        return coarse
    # Odd factors leave no doubt about where the centre is.
    return size * ((2 * kernel // size + 1) | 1) if size > 1 else 1


def execute(
    plan: Plan, centre: Complex, ask: Callable[[list[str], Complex, int], list[Complex]], *, out: Tensor
) -> Tensor | None:
    """Maps of one element of the batch, written into `out`, and their eigenvalues ``(set, z, y, x)``.

    Parameters
    ----------
    centre
        The used part of its calibration region, ``(coil, z, y, x)``.
    ask
        Runs a command of BART on an array and returns so many outputs.
    out
        Complex64 ``(set, coil, z, y, x)``.

    Raises
    ------
    DataError
        If the region holds NaN or only zeros.
    """
    peak = np.abs(centre).max()
    if not np.isfinite(peak):
        raise DataError("the centre of k-space holds NaN or infinity: find out where they come from.")
    if peak == 0:
        raise DataError("the centre of k-space holds only zeros: no coil maps can be estimated from it.")
    # ESPIRiT is indifferent to scale, float32 is not: raw data with a peak of 5e13 exist.
    padding = [
        (n // 2 - used // 2, n - used - (n // 2 - used // 2)) for n, used in zip(plan.grid, plan.region, strict=True)
    ]
    array = layout.k_space_to_bart(np.pad(centre / peak, [(0, 0), *padding])[np.newaxis, :, np.newaxis])
    if plan.command[0] == "caldir":
        (found,) = ask(plan.asked, array, 1)
        out.copy_(_tensor(layout.coil_maps_from_bart(found)[0, :, :, 0]))
        return None
    answer = ask(plan.asked, array, 2)
    maps = _tensor(layout.coil_maps_from_bart(answer[0])[0, :, :, 0])
    eigenvalues = _tensor(layout.image_from_bart(answer[1])[0, :, 0].real)
    # A slice of air: nothing is cropped, so that its image is noise instead of a failure.
    cropped = plan.crop > 0 and bool((eigenvalues[0] > plan.crop).any())
    threshold = plan.crop if cropped else -1.0
    if plan.interpolated:
        reference = _principal_component(torch.from_numpy(centre), maps[0])
        fine = eigenvalues.new_empty(plan.sets, *plan.shape)
        planes = interpolated_planes(maps, eigenvalues, plan.shape, reference, threshold)
        for z, (plane, values) in enumerate(planes):
            out[:, :, z], fine[:, z] = plane[: plan.sets], values[: plan.sets]
        return fine
    for axis, (size, n) in enumerate(zip(plan.shape, plan.grid, strict=True), -3):
        if size != n:
            voxels = grid_positions(size, n).long()
            maps, eigenvalues = maps.index_select(axis, voxels), eigenvalues.index_select(axis, voxels)
    torch.mul(maps, (eigenvalues > threshold).unsqueeze(1), out=out)
    return eigenvalues


def _principal_component(centre: Tensor, maps: Tensor) -> Tensor:
    """The virtual coil in which BART makes maps real and positive: the first principal component of the region.

    Its own phase, which is arbitrary, is taken from BART's maps.
    """
    samples = centre.reshape(len(centre), -1).to(torch.complex128)
    component = torch.linalg.eigh(samples @ samples.mH).eigenvectors[:, -1].to(torch.complex64)
    mean = torch.einsum("c,czyx->", component.conj(), maps)
    return component * torch.polar(torch.ones(()), mean.angle())


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))


def _colons(sizes: list[int]) -> str:
    return ":".join(str(size) for size in reversed(sizes))


def _size(sizes: list[int]) -> Size:
    return sizes[0], sizes[1], sizes[2]
