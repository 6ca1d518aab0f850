"""Where on the k-space grid each acquisition of a Cartesian scan belongs; read from the headers alone.

As Gadgetron's BucketToBuffer places them: index order is natural and the centre of k-space lies at ``n // 2``, so that
partial Fourier lines are moved by ``n // 2 - centre``.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from melcore.errors import DataError
from melcore.io.mrd_types import (
    IS_CALIBRATION,
    IS_CALIBRATION_AND_IMAGING,
    IS_NOISE,
    IS_REVERSE,
    NOT_IMAGING,
    has_any_flag,
    has_flag,
)

#: The first of these counters that varies becomes the time axis; the others become elements of the batch, like slices.
TIME_COUNTERS = ("phase", "repetition", "contrast", "set")

Indices = npt.NDArray[np.intp]
Booleans = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Placement:
    """Positions of all acquisitions of a file; those of noise and the like are not meaningful.

    Attributes
    ----------
    noise, imaging, calibration
        Which acquisitions are noise, lines of the image, lines for calibration; a line may be both of the latter.
    batch, time, z, y
        Position of each acquisition.
    shape
        ``(batch, time, z, y)``.
    time_counter
        Name of the counter that became the time axis, or an empty string.
    first
        For each element of the batch, its first acquisition.
    readout
        Size of the readout's grid, oversampling included.
    columns
        Of this grid, what is sampled.
    kept
        Of the samples of each acquisition, what is not to be discarded.
    recon_readout
        Readout samples without oversampling.
    remarks
        What is odd about the lines and how it is treated: some missing, some repeated.
    """

    noise: Booleans
    imaging: Booleans
    calibration: Booleans
    batch: Indices
    time: Indices
    z: Indices
    y: Indices
    shape: tuple[int, int, int, int]
    time_counter: str
    first: Indices
    readout: int
    columns: slice
    kept: slice
    recon_readout: int
    remarks: tuple[str, ...] = ()

    def mask(self, lines: Booleans) -> Booleans:
        """Sampling mask ``(batch, 1, time, z, y, x)`` of some of the acquisitions; x is 1 if it is fully sampled."""
        mask = np.zeros(self.shape, bool)
        mask[self.batch[lines], self.time[lines], self.z[lines], self.y[lines]] = True
        batch, time, z, y = self.shape
        mask = mask.reshape(batch, 1, time, z, y, 1)
        if (self.columns.start, self.columns.stop) == (0, self.readout):
            return mask
        along_x = np.zeros(self.recon_readout, bool)
        ratio = self.readout / self.recon_readout
        along_x[int(np.ceil(self.columns.start / ratio)) : int(self.columns.stop / ratio)] = True
        return mask & along_x


def place(header: Any, headers: npt.NDArray[np.void], encoding: int = 0) -> Placement:
    """Find out where acquisitions belong.

    Parameters
    ----------
    header
        From `melcore.io.mrd.parse_header`.
    headers
        Of all acquisitions, `melcore.io.mrd.ACQUISITION_HEADER`.
    encoding
        Those of other encodings are left out.

    Raises
    ------
    DataError
        If the scan is not Cartesian, has no lines, or has lines outside the encoded matrix.
    """
    if not 0 <= encoding < len(header.encoding):
        raise DataError(f"the header has {len(header.encoding)} encodings, but the data refer to number {encoding}.")
    space = header.encoding[encoding]
    matrix, counters = space.encodedSpace.matrixSize, headers["idx"]
    calibration_only = has_flag(headers, IS_CALIBRATION)
    usable = ~has_any_flag(headers, NOT_IMAGING) & (headers["encoding_space_ref"] == encoding)
    calibration = usable & (calibration_only | has_flag(headers, IS_CALIBRATION_AND_IMAGING))
    imaging = usable & ~(calibration_only & ~has_flag(headers, IS_CALIBRATION_AND_IMAGING))
    if not imaging.any():
        raise DataError(f"of {len(headers)} acquisitions none is a line of the image: the scan was not completed.")
    trajectory = getattr(space.trajectory, "value", space.trajectory)
    if trajectory != "cartesian":
        raise DataError(
            f"only Cartesian scans can be placed on a grid, but the trajectory of this one is {trajectory}: "
            "melcore.io.load_samples reads those that carry their trajectory."
        )
    if has_flag(headers[imaging], IS_REVERSE).any():
        raise DataError(
            f"{np.count_nonzero(has_flag(headers[imaging], IS_REVERSE))} of {np.count_nonzero(imaging)} readouts run "
            "in the other direction (flag 22, reversed), as those of EPI: their phase correction is not known here; "
            "correct the data before."
        )
    limits = space.encodingLimits
    y = counters["kspace_encode_step_1"].astype(np.intp) + _offset(matrix.y, limits, "kspace_encoding_step_1")
    z = counters["kspace_encode_step_2"].astype(np.intp)
    if matrix.z > 1:
        z += _offset(matrix.z, limits, "kspace_encoding_step_2")
    outside = usable & ((y < 0) | (y >= matrix.y) | (z < 0) | (z >= matrix.z))
    if outside.any():
        index = int(np.flatnonzero(outside)[0])
        raise DataError(
            f"acquisition {index} belongs to line {y[index]} of {matrix.y} (y) and {z[index]} of {matrix.z} (z), "
            "outside the encoded matrix: the header's matrix or encoding limits are wrong."
        )
    varying = [name for name in TIME_COUNTERS if np.ptp(counters[name][imaging])]
    time_counter = varying[0] if varying else ""
    time = counters[time_counter].astype(np.intp) if time_counter else np.zeros(len(headers), np.intp)
    first_time = int(time[imaging].min())
    frames = int(time[imaging].max()) - first_time + 1
    time = np.clip(time - first_time, 0, frames - 1)
    batch, first = _batch(counters, imaging, usable, ("slice", *varying[1:]))
    readout, columns, kept = _readout(headers[usable], matrix.x)
    counts = np.zeros((len(first), frames, matrix.z, matrix.y), np.intp)
    np.add.at(counts, (batch[imaging], time[imaging], z[imaging], y[imaging]), 1)
    ratio = space.encodedSpace.fieldOfView_mm.x / max(space.reconSpace.fieldOfView_mm.x, 1e-9)
    return Placement(
        noise=np.asarray(has_flag(headers, IS_NOISE)),
        imaging=imaging,
        calibration=calibration,
        batch=batch,
        time=time,
        z=z,
        y=y,
        shape=(len(first), frames, matrix.z, matrix.y),
        time_counter=time_counter,
        first=first,
        readout=readout,
        columns=columns,
        kept=kept,
        recon_readout=int(readout / ratio) if ratio > 1 else readout,
        remarks=_remarks(space, counts),
    )


def centre_offset(size: int, centre: int, name: str) -> int:
    """Position on the grid minus counter, for a counter whose value at the centre of k-space is `centre`.

    Raises
    ------
    DataError
        If that is outside the matrix.
    """
    if not 0 <= centre < size:
        raise DataError(
            f"the header puts the centre of k-space at {name} = {centre}, outside the encoded matrix of {size}: "
            "correct its encodingLimits."
        )
    return size // 2 - centre


def _offset(size: int, limits: Any, name: str) -> int:
    limit = getattr(limits, name, None)
    return 0 if limit is None else centre_offset(size, int(limit.center), name)


def _remarks(space: Any, counts: Indices) -> tuple[str, ...]:
    """Compare how often each line was acquired, ``(batch, time, z, y)``, with what the header leads to expect."""
    remarks = []
    repeated = int(np.count_nonzero(counts > 1))
    if repeated:
        remarks.append(f"{repeated} lines were acquired more than once (up to {counts.max()} times) and averaged")
    factor = space.parallelImaging.accelerationFactor if space.parallelImaging is not None else None
    if factor is None or (factor.kspace_encoding_step_1 <= 1 and factor.kspace_encoding_step_2 <= 1):
        z, y = np.nonzero(counts.any(axis=(0, 1)))
        box = counts[:, :, z.min() : z.max() + 1, y.min() : y.max() + 1]
        if missing := int(np.count_nonzero(box == 0)):
            remarks.append(
                f"{missing} of {box.size} lines are missing though the header tells of no acceleration: "
                "taken for not sampled"
            )
    return tuple(remarks)


def _batch(counters: Any, imaging: Booleans, usable: Booleans, names: tuple[str, ...]) -> tuple[Indices, Indices]:
    """Number the combinations of counters, the first counter slowest; and find the first line of each."""
    keys = np.stack([counters[name] for name in names], axis=1)
    known, first, number = np.unique(keys[imaging], axis=0, return_index=True, return_inverse=True)
    batch = np.zeros(len(keys), np.intp)
    batch[imaging] = number.reshape(-1)
    numbers = {tuple(key): index for index, key in enumerate(known)}
    for index in np.flatnonzero(usable & ~imaging):
        if tuple(keys[index]) not in numbers:
            raise DataError(
                f"calibration acquisition {index} belongs to a slice or contrast that has no lines of the image."
            )
        batch[index] = numbers[tuple(keys[index])]
    return batch, np.flatnonzero(imaging)[first]


def _readout(headers: npt.NDArray[np.void], size: int) -> tuple[int, slice, slice]:
    """Size of the readout's grid, the part of it that is sampled, and the part of the samples that is kept."""
    layouts = np.unique(headers[["number_of_samples", "center_sample", "discard_pre", "discard_post"]])
    if len(layouts) > 1:
        raise DataError(
            f"the readouts differ in length, centre or discarded samples ({len(layouts)} kinds): expected one kind."
        )
    samples, centre, before, after = (int(value) for value in layouts[0])
    if centre == samples // 2:
        size = samples
    start = size // 2 - centre + before
    stop = start + samples - before - after
    if start < 0 or stop > size or stop <= start:
        raise DataError(
            f"readouts of {samples} samples (centre at {centre}, {before} and {after} discarded) do not fit into the "
            f"header's encoded matrix of {size}."
        )
    return size, slice(start, stop), slice(before, samples - after)
