"""Reads raw data: ISMRMRD, BART, fastMRI's HDF5 and numpy, whitened and without readout oversampling."""

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
from melcore.io.load import load_k_space
from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.noise_level import AirBeside, whitened_by_estimate
from melcore.preprocess.oversampling import remove_readout_oversampling
from training.image_files import Array, in_order, load_array

AXES = ("slice", "coil", "time", "z", "y", "x")

# Of each axis, at least, that must be sampled around the centre; what is outside (zero filling) is cut off.
_LEAST_SAMPLED = 0.5


@dataclass(frozen=True)
class Raw:
    """k-space ``(slice, coil, time, z, y, x)``, its noise white and of variance 2.

    Attributes
    ----------
    noise
        ``"scan"`` or ``"estimated"``: what the noise was known by.
    mask, calibration, calibration_mask
        Of undersampled data: what was sampled, ``(slice, 1, time, z, y, x or 1)``, and the same of separate
        calibration lines, if there are any.
    """

    k_space: Tensor
    noise: str
    mask: Tensor | None = None
    calibration: Tensor | None = None
    calibration_mask: Tensor | None = None


def is_fastmri(path: Path) -> bool:
    """Whether an HDF5 file is one of fastMRI's: k-space beside an ISMRMRD header."""
    import h5py

    try:
        with h5py.File(path, "r") as file:
            return "kspace" in file and "dataset" not in file
    except OSError:
        return False


def read_raw(path: Path, axes: Sequence[str] = (), *, undersampled: bool = False) -> Raw:
    """Read one exam.

    Parameters
    ----------
    path
        ``.h5`` (ISMRMRD or fastMRI), ``.cfl`` or ``.npy``.
    axes
        Of numpy arrays, by the names in `AXES`.
    undersampled
        Keep what was sampled as it is, for learning without a truth.

    Raises
    ------
    DataError
        If it cannot be read, or is not fully sampled and `undersampled` is false.
    """
    calibration = None
    if path.suffix in (".h5", ".hdf5", ".mrd"):
        if is_fastmri(path):
            k_space = _read_fastmri(path)
        else:
            k_space, calibration = load_k_space(path)
    elif path.suffix in (".cfl", ".hdr"):
        k_space = _plain(_from_bart(read_cfl(path)))
    else:
        k_space = _plain(in_order(load_array(path), axes, AXES, path))
    if not bool(torch.isfinite(torch.view_as_real(k_space.data)).all()):
        raise DataError(f"{path} holds NaN or infinity.")
    if not undersampled:
        k_space, calibration = _sampled(k_space, path), None
    known = "scan" if k_space.noise.whitened else "estimated"
    k_space, calibration, _ = whitened_by_estimate(k_space, calibration)
    factor = (math.sqrt(2) / torch.tensor(k_space.noise.level)).view(-1, 1, 1, 1, 1, 1)
    data = (k_space.data * factor).contiguous()
    if not undersampled:
        return Raw(data, known)
    mask = _compact(k_space.mask, data)
    if calibration is None:
        return Raw(data, known, mask)
    return Raw(
        data, known, mask, (calibration.data * factor).contiguous(), _compact(calibration.mask, calibration.data)
    )


def _compact(mask: Tensor, data: Tensor) -> Tensor:
    """A mask of every slice, without the readout where that is sampled entirely."""
    mask = mask[..., :1] if bool((mask.any(-1) == mask.all(-1)).all()) else mask
    return mask.expand(len(data), 1, *data.shape[2:5], mask.shape[-1]).contiguous()


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
    lines = values.movedim(1, -2).flatten(0, -3)
    beside = AirBeside()
    beside.add(lines[lines.abs().sum((1, 2)) > 0], kept)
    values = remove_readout_oversampling(values, kept)
    mask = (values != 0).any(dim=1, keepdim=True)
    return KSpace(values, mask, _info(values), Noise(), air=beside.samples)


def _sampled(k_space: KSpace, path: Path) -> KSpace:
    """The middle of k-space that is fully sampled, in every frame of every slice that holds something."""
    data, mask = k_space.data, k_space.mask.expand(len(k_space.data), -1, *k_space.data.shape[2:])
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
            f"{'x'.join(map(str, region))}; leave it out, or learn from it without a truth (--undersampled)."
        )
    for axis, (size, found) in enumerate(zip(sizes, region, strict=True), -3):
        data = data.narrow(axis, size // 2 - found // 2, found)
    noise = k_space.noise
    if len(noise.level) == len(alive):
        levels = torch.tensor(noise.level)[alive]
        noise = replace(noise, level=tuple(levels.tolist()))
    full = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
    return replace(k_space, data=data, mask=full, info=_info(data), noise=noise)
