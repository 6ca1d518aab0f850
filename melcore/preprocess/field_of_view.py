"""From the grid that was encoded to the matrix and the field of view that were asked for."""

import math
from dataclasses import replace

import torch

from melcore.data import Image
from melcore.errors import ShapeError
from melcore.physics.fourier import fft, ifft


def to_recon_matrix(image: Image) -> Image:
    """Resample to the voxels of the reconstruction matrix, then crop or pad to its field of view.

    Voxels are made smaller or larger by padding or cropping k-space with zeros, which keeps intensities; the field of
    view is then cropped or padded about its centre. Along the readout the image may already be free of oversampling.
    Intensities, position and directions stay; afterwards the encoded matrix and field of view are the
    reconstructed ones, so that a second call changes nothing.

    Parameters
    ----------
    image
        Its ``info`` says what was encoded (`encoded_matrix`, `encoded_field_of_view`) and what was asked for
        (`recon_matrix`, and the field of view of its `geometry`).

    Raises
    ------
    ShapeError
        If the matrix sizes in ``info`` are not positive.
    """
    info = image.info
    if min(*info.recon_matrix, *info.encoded_matrix) < 1:
        raise ShapeError(f"matrix sizes must be positive: encoded {info.encoded_matrix}, recon {info.recon_matrix}.")
    data = image.data
    wanted_view = info.geometry[0].field_of_view
    for axis in range(3):  # z, y, x; lengths are listed along x, y, z
        size, wanted = data.shape[axis - 3], info.recon_matrix[axis]
        # Removing oversampling cuts the field of view, not the voxels.
        encoded_voxel = info.encoded_field_of_view[2 - axis] / info.encoded_matrix[axis]
        wanted_voxel = wanted_view[2 - axis] / wanted
        if size > 1 and encoded_voxel > 0 and 0 < wanted_voxel < math.inf:
            data = _resample(data, axis - 3, max(1, round(size * encoded_voxel / wanted_voxel)))
        data = _crop_or_pad(data, axis - 3, wanted)
    recon_info = replace(info, encoded_matrix=info.recon_matrix, encoded_field_of_view=wanted_view)
    return Image(data, recon_info)


def _resample(data: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    old = data.shape[axis]
    if size == old:
        return data
    k_space = _crop_or_pad(fft(data, (axis,)), axis, size)
    return ifft(k_space, (axis,)) * math.sqrt(size / old)


def _crop_or_pad(data: torch.Tensor, axis: int, size: int) -> torch.Tensor:
    """Centre to centre: index ``n // 2`` of the old axis becomes ``size // 2`` of the new one."""
    old = data.shape[axis]
    start = old // 2 - size // 2
    if size <= old:
        return data.narrow(axis, start, size)
    shape = list(data.shape)
    shape[axis] = size
    result = data.new_zeros(shape)
    result.narrow(axis, -start, old).copy_(data)
    return result
