"""Coil maps, estimated with BART from the fully sampled centre of k-space."""

import os
import threading
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from melcore import layout
from melcore.data import CoilMaps, KSpace, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError, ToolError
from melcore.io.bart_cache import cached_run
from melcore.io.cfl import Complex
from melcore.io.ecalib import Plan, execute, plan_caldir, plan_espirit
from melcore.io.toolbox import executable
from melcore.preprocess.calibration import calibration_region

Method = Literal["espirit", "caldir"]
_GAUGES = {"espirit": "first principal component", "caldir": "phase of the low-resolution image"}

# ESPIRiT's cost grows with the number of samples in the kernel. Measured for 72x64x48 with 8 coils on one core: a 6x6x6
# kernel and a region of 24 take 37 s, and the maps miss 0.75 % of the noise-free signal; 4x4x4 and 20 take 2.8 s and
# miss 1.0 %.
_KERNEL = {2: 6, 3: 4}
_CALIBRATION_SIZE = {2: 24, 3: 20}


@dataclass(frozen=True)
class MapSettings:
    """How coil maps are estimated.

    Attributes
    ----------
    method
        ``"espirit"`` (`ecalib`; Uecker et al., MRM 71, 2014) or ``"caldir"`` (McKenzie et al., MRM 47, 2002; faster,
        one set, not cropped).
    sets
        Number of ESPIRiT map sets; at most the number of coils. One set suits anatomy that fits into the field of view.
        Where it does not, the first two eigenvalues come close, and BART's fixed number of iterations leaves one set a
        mixture of the first two eigenvectors (`melcore.io.ecalib`): two sets then span what one cannot.
    kernel
        ESPIRiT kernel size; by default 6 in 2D and 4 in 3D.
    calibration_size
        At most so much of the calibration region is used along each axis; by default 24 in 2D and 20 in 3D.
    crop
        Maps are zero where their eigenvalue is below this, between 0 (nowhere) and 1.
    grid
        ``"full"``: BART solves ESPIRiT's eigenvalue problem in every voxel. ``"reduced"``: on a coarse grid, from which
        the maps are interpolated (`melcore.preprocess.map_interpolation`); much faster and leaner, and the same for a
        reconstruction (`benchmarks/results/preprocess.md`). By default reduced for one set, full for several.
    """

    method: Method = "espirit"
    sets: int = 1
    kernel: int | None = None
    calibration_size: int | None = None
    crop: float = 0.8
    grid: Literal["full", "reduced"] | None = None

    def __post_init__(self) -> None:
        if self.method not in _GAUGES:
            raise ConfigError(f"coil maps can be estimated by {' or '.join(_GAUGES)}, not by {self.method!r}.")
        if self.sets < 1:
            raise ConfigError(f"the number of map sets must be between 1 and that of the coils, but is {self.sets}.")
        if not 0 <= self.crop <= 1:
            raise ConfigError(f"crop is an eigenvalue between 0 and 1, but is {self.crop}.")
        if self.grid not in (None, "full", "reduced"):
            raise ConfigError(f"the grid of coil maps is full or reduced, not {self.grid!r}.")
        if self.method == "caldir" and (self.sets != 1 or self.grid == "reduced"):
            raise ConfigError("caldir estimates one set of maps, on the full grid: use espirit for others.")


@dataclass(frozen=True)
class MapEstimate:
    """Coil maps, and how far they can be trusted.

    Attributes
    ----------
    eigenvalues
        float32 ``(batch, set, 1, z, y, x)``, before cropping: close to 1 where the calibration data are consistent with
        the maps, lower where there is no signal, or where the image is wider than the field of view. None for caldir.
    """

    coil_maps: CoilMaps
    eigenvalues: Tensor | None


def estimate_coil_maps(
    k_space: Tensor | KSpace,
    *,
    calibration: KSpace | None = None,
    method: Method = "espirit",
    sets: int = 1,
    kernel: int | None = None,
    calibration_size: int | None = None,
    crop: float = 0.8,
    grid: Literal["full", "reduced"] | None = None,
    timeout: float | None = None,
    threads: int = 1,
    cancel: threading.Event | None = None,
) -> CoilMaps:
    """Estimate coil maps: `estimate_maps` without the eigenvalues; see there, and `MapSettings`."""
    settings = MapSettings(method, sets, kernel, calibration_size, crop, grid)
    return estimate_maps(
        k_space, settings, calibration=calibration, timeout=timeout, threads=threads, cancel=cancel
    ).coil_maps


def estimate_maps(
    k_space: Tensor | KSpace,
    settings: MapSettings = MapSettings(),
    *,
    calibration: KSpace | None = None,
    timeout: float | None = None,
    threads: int = 1,
    cancel: threading.Event | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> MapEstimate:
    """Estimate coil maps from the fully sampled centre of k-space, with BART, for each element of the batch.

    Time frames are averaged first, each sample over the frames that took it. A single coil gets maps of 1 within the
    object. An element of the batch without signal (a slice of air), whose cropped maps would be empty, is not cropped,
    so that its reconstruction is noise instead of a failure.

    Parameters
    ----------
    k_space
        Complex ``(batch, coil, time, z, y, x)``. Of a plain tensor, samples that are zero in all coils count as not
        sampled.
    settings
        See `MapSettings`.
    calibration
        Separate calibration lines on the same grid; used unless `k_space` has the larger calibration region.
    timeout
        For all of it, in s.
    threads, cancel
        See `melcore.io.toolbox.run`.
    cache
        Folder in which BART's answers are kept under a digest of the data and the settings; ``MEL_CACHE`` by default,
        none if that is unset.

    Returns
    -------
    MapEstimate
        Maps are complex64 ``(batch, set, coil, 1, z, y, x)`` on the device of `k_space`.

    Raises
    ------
    DataError
        If there is no calibration region, if it is smaller than the kernel, or if it holds NaN or only zeros.
    ConfigError
        If a setting does not fit the data.
    ToolError
        If BART fails or takes too long.
    MissingDependencyError
        If BART is not installed.
    """
    executable()
    source, region = _choose(k_space, calibration)
    plan = _plan(settings, source, region)
    end = None if timeout is None else time.monotonic() + timeout

    def ask(command: list[str], array: Complex, outputs: int) -> list[Complex]:
        rest = None if end is None else max(end - time.monotonic(), 0.0)
        return cached_run(command, array, outputs, cache=cache, timeout=rest, threads=threads, cancel=cancel)

    batch, coils = source.data.shape[:2]
    data = source.data.new_empty((batch, plan.sets, coils, 1, *plan.shape), dtype=torch.complex64, device="cpu")
    eigenvalues = []
    for index in range(batch):
        try:
            # Into its place, for a volume of maps may not fit twice.
            found = execute(plan, _centre(source, index, plan.region), ask, out=data[index, :, :, 0])
        except (DataError, ToolError) as error:
            if batch == 1:
                raise
            raise type(error)(f"coil maps of slice {index} of {batch}: {error}") from None
        eigenvalues.append(found)
    how = "bart " + " ".join(plan.command)
    if plan.interpolated:
        how += f", interpolated from {'x'.join(map(str, plan.grid))}"
    weights = None if plan.command[0] == "caldir" else torch.stack([v for v in eigenvalues if v is not None])
    return MapEstimate(
        CoilMaps(data.to(source.data.device), how, _GAUGES[settings.method]),
        None if weights is None else weights.unsqueeze(2).to(source.data.device),
    )


def _plan(settings: MapSettings, source: KSpace, region: tuple[int, int, int]) -> Plan:
    grid = source.data.shape
    shape = (grid[3], grid[4], grid[5])
    dimensions = 3 if min(shape) > 1 else 2
    size = settings.calibration_size or _CALIBRATION_SIZE[dimensions]
    if settings.method == "caldir":
        return plan_caldir(shape, region, size=size)
    reduced = settings.grid == "reduced" or (settings.grid is None and settings.sets == 1)
    kernel = settings.kernel or _KERNEL[dimensions]
    return plan_espirit(
        shape,
        grid[1],
        region,
        sets=settings.sets,
        kernel=kernel,
        size=size,
        crop=settings.crop,
        reduced=reduced,
    )


def _choose(k_space: Tensor | KSpace, calibration: KSpace | None) -> tuple[KSpace, tuple[int, int, int]]:
    """What has the larger calibration region, and that region."""
    if isinstance(k_space, Tensor):
        layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "k-space")
        mask = (k_space != 0).any(dim=1, keepdim=True)
        if not mask.any():
            raise DataError("the k-space holds only zeros: no coil maps can be estimated from it.")
        matrix = (k_space.shape[-3], k_space.shape[-2], k_space.shape[-1])
        k_space = KSpace(k_space, mask, ScanInfo(matrix, matrix))
    region = calibration_region(k_space.mask, k_space.data.shape)
    if calibration is None:
        return k_space, region
    ours, theirs = ((*one.data.shape[:2], *one.data.shape[3:]) for one in (k_space, calibration))
    if ours != theirs:
        raise ShapeError(
            f"the calibration data {tuple(calibration.data.shape)} must have the batch, coils and grid of the k-space "
            f"{tuple(k_space.data.shape)} (all but time): treat both with the same steps."
        )
    other = calibration_region(calibration.mask, calibration.data.shape)
    return (k_space, region) if np.prod(region) > np.prod(other) else (calibration, other)


def _centre(source: KSpace, index: int, region: tuple[int, int, int]) -> Complex:
    """The middle of one element's k-space, averaged over the frames that took each sample, ``(coil, z, y, x)``."""
    data, mask = source.data[index].detach(), source.mask[min(index, len(source.mask) - 1)]
    mask = mask.expand(1, data.shape[1], *mask.shape[2:])
    for axis, (size, used) in enumerate(zip(data.shape[2:], region, strict=True), 2):
        start = size // 2 - used // 2
        data = data.narrow(axis, start, used)
        mask = mask if mask.shape[axis] == 1 else mask.narrow(axis, start, used)
    return (data.sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy().astype(np.complex64)
