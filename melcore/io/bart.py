"""BART: its files (`read_cfl`, `write_cfl`), its commands (`run`), and coil maps estimated with it."""

import threading
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from melcore import layout
from melcore.data import CoilMaps, KSpace, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError, ToolError
from melcore.io.cfl import Complex, read_cfl, write_cfl
from melcore.io.toolbox import EmptyOutputError, executable, run, scratch_folder, version
from melcore.preprocess.calibration import calibration_region

__all__ = [
    "EmptyOutputError",
    "estimate_coil_maps",
    "executable",
    "read_cfl",
    "run",
    "scratch_folder",
    "version",
    "write_cfl",
]

Method = Literal["espirit", "caldir"]
_GAUGES = {"espirit": "first principal component", "caldir": "phase of the low-resolution image"}

# ESPIRiT's cost grows with the number of samples in the kernel. Measured for 72x64x48 with 8 coils on one core: a 6x6x6
# kernel and a region of 24 take 37 s, and the maps miss 0.75 % of the noise-free signal; 4x4x4 and 20 take 2.8 s and
# miss 1.0 %.
_KERNEL = {2: 6, 3: 4}
_CALIBRATION_SIZE = {2: 24, 3: 20}
_LEAST_FOR_CALDIR = 6  # samples; smaller regions resolve no coil's sensitivity


@dataclass(frozen=True)
class _Averaged:
    """K-space averaged over time, and how much of its centre is sampled."""

    data: torch.Tensor  # (batch, coil, 1, z, y, x)
    region: tuple[int, int, int]

    @classmethod
    def of(cls, k_space: KSpace) -> "_Averaged":
        data, mask = k_space.data, k_space.mask
        counts = mask.expand(-1, -1, data.shape[2], -1, -1, -1).sum(dim=2, keepdim=True)
        mean = data.detach().sum(dim=2, keepdim=True) / counts.clamp(min=1)
        return cls(mean, calibration_region(mask, data.shape))


def estimate_coil_maps(
    k_space: torch.Tensor | KSpace,
    *,
    calibration: KSpace | None = None,
    method: Method = "espirit",
    sets: int = 1,
    kernel: int | None = None,
    calibration_size: int | None = None,
    crop: float = 0.8,
    timeout: float | None = None,
    threads: int = 1,
    cancel: threading.Event | None = None,
) -> CoilMaps:
    """Estimate coil maps from the fully sampled centre of k-space, with BART, for each element of the batch.

    Time frames are averaged first, each sample over the frames that took it. A single coil gets maps of 1 within the
    object. An element of the batch without signal (a slice of air), whose cropped maps are empty, is estimated again
    without cropping, so that its reconstruction is noise instead of a failure.

    Parameters
    ----------
    k_space
        Complex ``(batch, coil, time, z, y, x)``. Of a plain tensor, samples that are zero in all coils count as not
        sampled.
    calibration
        Separate calibration lines on the same grid; used unless `k_space` has the larger calibration region.
    method
        ``"espirit"`` (`ecalib`; Uecker et al., MRM 71, 2014) or ``"caldir"`` (McKenzie et al., MRM 47, 2002; faster,
        one set, not cropped).
    sets
        Number of ESPIRiT map sets; at most the number of coils.
    kernel
        ESPIRiT kernel size; by default 6 in 2D and 4 in 3D.
    calibration_size
        At most so much of the calibration region is used along each axis; by default 24 in 2D and 20 in 3D.
    crop
        Maps are zero where their eigenvalue is below this, between 0 (nowhere) and 1.
    timeout
        For all of it, in s.
    threads, cancel
        See `run`.

    Returns
    -------
    CoilMaps
        Complex64 ``(batch, set, coil, 1, z, y, x)`` on the device of `k_space`.

    Raises
    ------
    DataError
        If there is no calibration region, if it is smaller than the kernel, or if the data hold NaN or only zeros.
    ConfigError
        If a parameter is out of its range.
    ToolError
        If BART fails or takes too long.
    MissingDependencyError
        If BART is not installed.
    """
    executable()
    source = _choose(k_space, calibration)
    dimensions = 3 if min(source.data.shape[-3:]) > 1 else 2
    kernel = kernel or _KERNEL[dimensions]
    calibration_size = calibration_size or _CALIBRATION_SIZE[dimensions]
    _check_settings(method, sets, crop, kernel, calibration_size, coils=source.data.shape[1])
    command = _command(method, source, sets, kernel, calibration_size, crop)
    end = None if timeout is None else time.monotonic() + timeout
    maps = []
    for index, element in enumerate(source.data.cpu().numpy()):
        rest = None if end is None else max(end - time.monotonic(), 0.0)
        try:
            maps.append(_estimate(command, element[np.newaxis], rest, threads, cancel))
        except (DataError, ToolError) as error:
            if len(source.data) == 1:
                raise
            raise type(error)(f"coil maps of slice {index} of {len(source.data)}: {error}") from None
    data = torch.from_numpy(np.concatenate(maps)).to(source.data.device)
    return CoilMaps(data, "bart " + " ".join(command), _GAUGES[method])


def _choose(k_space: torch.Tensor | KSpace, calibration: KSpace | None) -> _Averaged:
    """Average what has the larger calibration region."""
    if isinstance(k_space, torch.Tensor):
        layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "k-space")
        mask = (k_space != 0).any(dim=1, keepdim=True)
        if not mask.any():
            raise DataError("the k-space holds only zeros: no coil maps can be estimated from it.")
        average = _Averaged.of(_with_mask(k_space, mask))
    else:
        average = _Averaged.of(k_space)
    if calibration is None:
        return average
    other = _Averaged.of(calibration)
    if average.data.shape != other.data.shape:
        raise ShapeError(
            f"the calibration data {tuple(other.data.shape)} must have the batch, coils and grid of the k-space "
            f"{tuple(average.data.shape)} (both averaged over time): treat both with the same steps."
        )
    return average if np.prod(average.region) > np.prod(other.region) else other


def _with_mask(data: torch.Tensor, mask: torch.Tensor) -> KSpace:
    grid = (data.shape[-3], data.shape[-2], data.shape[-1])
    return KSpace(data, mask, ScanInfo(grid, grid))


def _check_settings(method: str, sets: int, crop: float, kernel: int, calibration_size: int, coils: int) -> None:
    if method not in _GAUGES:
        raise ConfigError(f"coil maps can be estimated by {' or '.join(_GAUGES)}, not by {method!r}.")
    if not 1 <= sets <= coils:
        raise ConfigError(f"the number of map sets must be between 1 and the {coils} coils, but is {sets}.")
    if method == "caldir" and sets != 1:
        raise ConfigError(f"caldir estimates one set of maps, not {sets}: use espirit.")
    if not 0 <= crop <= 1:
        raise ConfigError(f"crop is an eigenvalue between 0 and 1, but is {crop}.")
    if not 1 <= kernel <= calibration_size:
        raise ConfigError(
            f"the kernel ({kernel}) must be at least 1 and at most the calibration size ({calibration_size})."
        )


def _command(method: Method, source: _Averaged, sets: int, kernel: int, size: int, crop: float) -> list[str]:
    """Compose the command; refuse regions that BART would end on with a failed assertion."""
    grid = source.data.shape[-3:]
    if method == "espirit":
        # Along a thin slab, the kernel must leave itself room to move.
        least = [min(kernel, (n + 1) // 2) for n in grid]
    else:
        least = [min(_LEAST_FOR_CALDIR, n) for n in grid]
    if any(found < needed for found, needed in zip(source.region, least, strict=True)):
        found, needed = ("x".join(map(str, sizes)) for sizes in (source.region, least))
        what = f"a fully sampled centre of {found} (z, y, x)" if source.region[0] else "no fully sampled centre"
        advice = ", take a smaller kernel" if method == "espirit" else ""
        raise DataError(
            f"coil maps need a fully sampled centre of k-space of at least {needed} samples (z, y, x), but these data "
            f"have {what}: give separate calibration data{advice}, or maps estimated elsewhere."
        )
    if method == "caldir":
        return ["caldir", str(size)]
    kernels = ":".join(str(n) for n in reversed(least))
    regions = ":".join(str(min(size, n)) for n in reversed(source.region))
    return ["ecalib", "-m", str(sets), "-k", kernels, "-r", regions, "-c", f"{crop:g}"]


def _estimate(
    command: list[str], element: Complex, timeout: float | None, threads: int, cancel: threading.Event | None
) -> Complex:
    """Maps of one element ``(1, coil, 1, z, y, x)`` of the batch."""
    peak = np.abs(element).max()
    if not np.isfinite(peak):
        raise DataError("the k-space holds NaN or infinity: find out where they come from.")
    if peak == 0:
        raise DataError("the k-space holds only zeros: no coil maps can be estimated from it.")
    # ESPIRiT is indifferent to scale, float32 is not: raw data with a peak of 5e13 exist.
    padded, voxels = _refine(element / peak, command)
    array = layout.k_space_to_bart(padded)
    try:
        result = run(command, [array], timeout=timeout, threads=threads, cancel=cancel)
    except EmptyOutputError:
        if "-c" not in command:
            raise
        uncropped = [*command[: command.index("-c")], "-c", "0"]
        result = run(uncropped, [array], timeout=timeout, threads=threads, cancel=cancel)
    z, y, x = voxels
    return np.ascontiguousarray(layout.coil_maps_from_bart(result[0])[..., z, y, x])


def _refine(element: Complex, command: list[str]) -> tuple[Complex, list[slice]]:
    """Zero-pad k-space, hence interpolate the maps, along axes that are too short for the kernel.

    BART 0.8 needs more than twice the kernel's size along each axis: at twice the size its eigenvalues are too small
    by that size (all maps are cropped away), below that it aborts.

    Returns
    -------
    padded : numpy.ndarray
    voxels : list of slice
        Along z, y and x, where the voxels of the original grid lie on the refined one.
    """
    if "-k" not in command:
        return element, [slice(None)] * 3
    kernels = [int(size) for size in reversed(command[command.index("-k") + 1].split(":"))]
    sizes = element.shape[-3:]
    # Odd factors leave no doubt about where the centre is.
    factors = [(2 * kernel // n + 1) | 1 if n > 1 else 1 for n, kernel in zip(sizes, kernels, strict=True)]
    padding, voxels = [(0, 0)] * 3, []
    for n, factor in zip(sizes, factors, strict=True):
        before = factor * n // 2 - n // 2
        padding.append((before, factor * n - n - before))
        voxels.append(slice(factor * n // 2 - factor * (n // 2), None, factor))
    return np.pad(element, padding), voxels
