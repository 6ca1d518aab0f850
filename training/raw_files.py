"""Reads fully sampled raw data: ISMRMRD, BART, fastMRI's HDF5 and numpy, whitened and without readout oversampling."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from melcore import layout
from melcore.data import KSpace, Noise, ScanInfo
from melcore.errors import DataError
from melcore.io.cfl import read_cfl
from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.noise_level import whitened_by_estimate
from melcore.preprocess.oversampling import remove_readout_oversampling
from training.image_files import Array, in_order, load_array

AXES = ("slice", "coil", "time", "z", "y", "x")

# Of each axis, at least, that must be sampled around the centre; what is outside (zero filling) is cut off.
_LEAST_SAMPLED = 0.5


@dataclass(frozen=True)
class Raw:
    """Fully sampled k-space ``(slice, coil, time, z, y, x)``, its noise white and of variance 2.

    Attributes
    ----------
    noise
        ``"scan"`` or ``"estimated"``: what the noise was known by.
    """

    k_space: Tensor
    noise: str


def is_fastmri(path: Path) -> bool:
    """Whether an HDF5 file is one of fastMRI's: k-space beside an ISMRMRD header."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "kspace" in file and "dataset" not in file
    except OSError:
        return False


def read_raw(path: Path, axes: Sequence[str] = ()) -> Raw:
    """Read one exam.

    Parameters
    ----------
    path
        ``.h5`` (ISMRMRD or fastMRI), ``.cfl`` or ``.npy``.
    axes
        Of numpy arrays, by the names in `AXES`.

    Raises
    ------
    DataError
        If it cannot be read, or is not fully sampled.
    """
    if path.suffix in (".h5", ".hdf5", ".mrd"):
        k_space = _read_fastmri(path) if is_fastmri(path) else _read_ismrmrd(path)
    elif path.suffix in (".cfl", ".hdr"):
        k_space = _plain(_from_bart(read_cfl(path)))
    else:
        k_space = _plain(in_order(load_array(path), axes, AXES, path))
    if not bool(torch.isfinite(torch.view_as_real(k_space.data)).all()):
        raise DataError(f"{path} holds NaN or infinity.")
    k_space = _sampled(k_space, path)
    known = "scan" if k_space.noise.whitened else "estimated"
    white = whitened_by_estimate(k_space)[0]
    levels = torch.tensor(white.noise.level).expand(len(white.data)).clone()
    factor = math.sqrt(2) / levels
    return Raw((white.data * factor.view(-1, 1, 1, 1, 1, 1)).contiguous(), known)


def _plain(data: Array) -> KSpace:
    values = torch.from_numpy(np.array(data, np.complex64))
    mask = (values != 0).any(dim=1, keepdim=True)
    return KSpace(values, mask, _info(values))


def _info(values: Tensor) -> ScanInfo:
    z, y, x = values.shape[-3:]
    return ScanInfo((z, y, x), (z, y, x))


def _from_bart(array: Array) -> Array:
    """BART's slices (dimension 13) become those of this layout, as its batch (15) does."""
    moved = np.moveaxis(array, 13, 15) if array.shape[13] > 1 and array.shape[15] == 1 else array
    return layout.k_space_from_bart(moved)


def _read_ismrmrd(path: Path) -> KSpace:
    from melcore.io.load import load_k_space

    k_space, _ = load_k_space(path)
    return k_space


def _read_fastmri(path: Path) -> KSpace:
    """(slice, coil, readout, phase), twofold oversampled along the readout; single-coil files have no coil axis."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            data = np.asarray(file["kspace"], np.complex64)
            shown = next(
                (file[name].shape for name in ("reconstruction_rss", "reconstruction_esc") if name in file), None
            )
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a fastMRI file: {' '.join(str(error).split())}.") from None
    if data.ndim == 3:
        data = data[:, None]
    if data.ndim != 4:
        raise DataError(
            f"the k-space of {path} has the shape {data.shape}, but (slice, coil, readout, phase) is expected."
        )
    values = torch.from_numpy(np.ascontiguousarray(data.swapaxes(2, 3)))[:, :, None, None]
    readout = values.shape[-1]
    kept = int(shown[-2]) if shown is not None and shown[-2] < readout else readout
    values = remove_readout_oversampling(values, kept)
    return KSpace(values, (values != 0).any(dim=1, keepdim=True), _info(values), Noise())


def _sampled(k_space: KSpace, path: Path) -> KSpace:
    """The middle of k-space that is fully sampled, in every frame of every slice that holds something."""
    data, mask = k_space.data, k_space.mask.expand(-1, -1, *k_space.data.shape[2:])
    alive = data.flatten(1).abs().amax(1) > 0
    if not bool(alive.any()):
        raise DataError(f"{path} holds only zeros.")
    data, mask = data[alive], mask[alive]
    # Every frame must have been sampled there: frames are taken for elements of a batch.
    every = mask.transpose(1, 2).flatten(0, 1).unsqueeze(1)
    region = calibration_region(every)
    sizes = tuple(data.shape[-3:])
    share = min(found / size for found, size in zip(region, sizes, strict=True))
    if share < _LEAST_SAMPLED:
        raise DataError(
            f"{path} is not fully sampled: of {'x'.join(map(str, sizes))} (z, y, x) only the central "
            f"{'x'.join(map(str, region))}; leave it out, or keep it for evaluation without a reference."
        )
    for axis, (size, found) in enumerate(zip(sizes, region, strict=True), -3):
        data = data.narrow(axis, size // 2 - found // 2, found)
    level = k_space.noise.level
    noise = (
        replace(k_space.noise, level=tuple(v for v, a in zip(level, alive.tolist(), strict=True) if a))
        if (len(level) == len(alive))
        else k_space.noise
    )
    full = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    return KSpace(data, full, _info(data), noise)
