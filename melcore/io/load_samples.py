"""An ISMRMRD file of a radial, spiral or other non-Cartesian scan to its samples and where they lie in k-space."""

import os
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.data import Samples, ScanInfo
from melcore.errors import DataError
from melcore.io.mrd import RawFile, open_raw, scan_info
from melcore.io.mrd_types import IS_CALIBRATION, IS_CALIBRATION_AND_IMAGING, NOT_IMAGING, has_any_flag, has_flag
from melcore.io.noise_scan import Whitening, noise_record, whitening_of
from melcore.io.placement import TIME_COUNTERS
from melcore.physics.nonuniform import check_trajectory
from melcore.preprocess.whitening import whiten

# A trajectory in cycles per field of view that reaches less of k-space than this is in some other unit.
_LEAST_REACH = 0.25


def load_samples(
    path: str | os.PathLike[str], *, encoding: int = 0, noise: str | os.PathLike[str] | None = None
) -> list[Samples]:
    """Read a non-Cartesian scan.

    Each slice is an element of the list. Whichever of phase, repetition, contrast and set varies becomes time; if
    several do, each combination of the others is an element too. The readouts of a frame keep the order of acquisition.

    Parameters
    ----------
    path
        An ISMRMRD raw file whose readouts carry their trajectory. See `to_cycles` for its unit.
    encoding, noise
        As for `melcore.io.load.load_k_space`.

    Raises
    ------
    DataError
        If the file cannot be read, if readouts have no trajectory, differ in length, or lie outside k-space; if the
        noise scan is not that of its coils.
    """
    with open_raw(path) as raw:
        return [samples for samples, _ in read_samples(raw, encoding=encoding, noise=noise)]


def read_samples(
    raw: RawFile, *, encoding: int = 0, noise: str | os.PathLike[str] | None = None
) -> list[tuple[Samples, npt.NDArray[np.void]]]:
    """As `load_samples`, of an open file; with each element the header of each frame's first readout."""
    headers = raw.headers()
    info = scan_info(raw.header, encoding)
    usable = ~has_any_flag(headers, NOT_IMAGING) & (headers["encoding_space_ref"] == encoding)
    usable &= ~has_flag(headers, IS_CALIBRATION) | has_flag(headers, IS_CALIBRATION_AND_IMAGING)
    if not usable.any():
        raise DataError(f"of {len(headers)} acquisitions of {raw.path} none is a readout of the image.")
    _check_readouts(raw, headers[usable], info)
    whitening = whitening_of(raw, headers, noise)
    varying = [name for name in TIME_COUNTERS if np.ptp(headers["idx"][name][usable])]
    keys = np.stack([headers["idx"][name] for name in ("slice", *varying[1:])], axis=1)
    time = headers["idx"][varying[0]] if varying else np.zeros(len(headers), np.intp)
    elements = {}
    for key in np.unique(keys[usable], axis=0):
        elements[tuple(key)] = _Element(headers, usable & (keys == key).all(axis=1), time)
    centre = _centre(raw.header.encoding[encoding])
    for index, acquisition in enumerate(raw.acquisitions()):
        if usable[index]:
            elements[tuple(keys[index])].add(index, acquisition, whitening.matrix, centre)
    steps = {"source": raw.path.name, "whitening": whitening.words, "time": varying[0] if varying else "none"}
    steps |= noise_record(whitening.noise)
    return [
        (one.samples(scan_info(raw.header, encoding, one.heads[0]), steps, whitening), one.heads)
        for one in elements.values()
    ]


def to_cycles(trajectory: Tensor, matrix: tuple[int, int, int]) -> tuple[Tensor, str]:
    """Bring a trajectory to cycles per field of view; also says what unit it was taken for.

    ISMRMRD leaves the unit open. Numbers within 0.5 of zero are cycles per voxel (they are multiplied by the matrix),
    numbers that fill k-space are cycles per field of view already. Of three components in a plane, the third is no
    place in k-space (some converters put density weights there) and is left out.

    Parameters
    ----------
    trajectory
        Real ``(..., 2 or 3)``, components x, y(, z).
    matrix
        Encoded ``(z, y, x)``.

    Raises
    ------
    DataError
        If it is in neither of the two units, or not finite.
    """
    words = ""
    if trajectory.shape[-1] > 2 and matrix[0] == 1:
        if bool(trajectory[..., 2].any()):
            words = ", its third component left out"
        trajectory = trajectory[..., :2]
    sizes = torch.tensor(matrix[::-1][: trajectory.shape[-1]], dtype=trajectory.dtype)
    if not bool(torch.isfinite(trajectory).all()):
        raise DataError("the trajectory holds NaN or infinity: convert the file again.")
    reach = trajectory.abs().flatten(0, -2).amax(0)
    if float(reach.max()) <= 0.5 + 1e-3:
        trajectory, unit = trajectory * sizes, "cycles per voxel"
        if float((reach[:2] * 2).max()) < _LEAST_REACH:
            raise _unknown_unit(reach)
    else:
        unit = "cycles per field of view"
        if float((2 * reach / sizes)[:2].max()) < _LEAST_REACH or bool((reach > sizes / 2 + 1).any()):
            raise _unknown_unit(reach, sizes)
    return trajectory, unit + words


def _unknown_unit(reach: Tensor, sizes: Tensor | None = None) -> DataError:
    far = ", ".join(f"{value:.4g}" for value in reach.tolist())
    wanted = "" if sizes is None else f", here {', '.join(f'{size / 2:g}' for size in sizes.tolist())}"
    return DataError(
        f"the unit of the trajectory is unknown: it reaches ({far}) along x, y(, z), but should reach 0.5 (cycles per "
        f"voxel) or half of the encoded matrix (cycles per field of view{wanted}): convert it, or correct the matrix."
    )


def _check_readouts(raw: RawFile, headers: npt.NDArray[np.void], info: ScanInfo) -> None:
    layouts = np.unique(headers[["number_of_samples", "discard_pre", "discard_post", "trajectory_dimensions"]])
    if len(layouts) > 1:
        raise DataError(
            f"the readouts of {raw.path} differ in length, discarded samples or trajectory ({len(layouts)} kinds): "
            "expected one kind."
        )
    if int(layouts["trajectory_dimensions"][0]) not in (2, 3):
        raise DataError(
            f"the trajectory of {raw.path} is {info.trajectory}, but its readouts do not carry it "
            f"({int(layouts['trajectory_dimensions'][0])} dimensions, expected 2 or 3): convert the file with its "
            "trajectory."
        )


def _centre(space: Any) -> float | None:
    """Counter of the central partition of a stack of stars or spirals; None of a plane."""
    if space.encodedSpace.matrixSize.z == 1:
        return None
    limit = getattr(space.encodingLimits, "kspace_encoding_step_2", None)
    return float(space.encodedSpace.matrixSize.z // 2 if limit is None else limit.center)


class _Element:
    """The readouts of one slice."""

    def __init__(self, headers: npt.NDArray[np.void], chosen: npt.NDArray[np.bool_], time: npt.NDArray[Any]) -> None:
        indices = np.flatnonzero(chosen)
        frames, first, frame = np.unique(time[indices], return_index=True, return_inverse=True)
        self.heads = headers[indices[first]]
        counts = np.zeros(len(frames), np.intp)
        self.places = {}
        for index, one in zip(indices.tolist(), frame.reshape(-1).tolist(), strict=True):
            self.places[index] = (one, int(counts[one]))
            counts[one] += 1
        before, after = int(self.heads[0]["discard_pre"]), int(self.heads[0]["discard_post"])
        self.kept = slice(before, int(self.heads[0]["number_of_samples"]) - after)
        shape = (len(frames), int(counts.max()), self.kept.stop - self.kept.start)
        if shape[2] < 1:
            raise DataError(f"readouts of {self.heads[0]['number_of_samples']} samples are discarded as a whole.")
        self.data = torch.zeros(
            1, int(self.heads[0]["active_channels"]), shape[0], 1, *shape[1:], dtype=torch.complex64
        )
        self.trajectory = torch.zeros(*shape, int(self.heads[0]["trajectory_dimensions"]), dtype=torch.float64)
        self.partition = torch.zeros(shape[:2], dtype=torch.float64)
        self.taken = torch.arange(shape[1]) < torch.from_numpy(counts)[:, None]
        self.stacked = False

    def add(self, index: int, acquisition: Any, matrix: Tensor | None, centre: float | None) -> None:
        frame, readout = self.places[index]
        values = torch.from_numpy(acquisition.data)
        if acquisition.trajectory.shape[1] == 0:
            raise DataError(
                f"acquisition {index} announces a trajectory that it does not carry: convert the file again."
            )
        values = values if matrix is None else whiten(values, matrix)
        self.data[0, :, frame, 0, readout] = values[:, self.kept]
        self.trajectory[frame, readout] = torch.from_numpy(acquisition.trajectory[self.kept].astype(np.float64))
        if centre is not None:
            self.stacked = self.trajectory.shape[-1] == 2
            self.partition[frame, readout] = float(acquisition.header["idx"]["kspace_encode_step_2"]) - centre

    def samples(self, info: ScanInfo, steps: dict[str, str], whitening: Whitening) -> Samples:
        z, y, x = info.encoded_matrix
        trajectory, unit = to_cycles(self.trajectory, (1, y, x) if self.stacked else (z, y, x))
        if self.stacked:
            along_z = self.partition[:, :, None, None].expand(*trajectory.shape[:3], 1)
            trajectory, unit = torch.cat([trajectory, along_z], dim=-1), f"{unit}, stacked along z"
        trajectory = trajectory * self.taken[:, :, None, None]
        check_trajectory(trajectory, (z, y, x))
        taken = self.taken
        if bool((trajectory == trajectory[:1]).all()) and bool((taken == taken[:1]).all()):
            trajectory, taken = trajectory[:1], taken[:1]
        info = replace(info, provenance={**steps, "trajectory": f"{info.trajectory}, in {unit}"})
        return Samples(self.data, trajectory, taken, info, whitening.noise)
