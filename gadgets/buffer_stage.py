"""Buckets of readouts to sorted k-space, as Gadgetron's BucketToBufferGadget does it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from gadgets.header import Encoding, Header
from gadgets.messages import (
    ACQUISITION_HEADER,
    COUNTERS,
    SAMPLING,
    Acquisition,
    AcquisitionBucket,
    Array,
    Message,
    ReconBit,
    ReconBuffer,
    ReconData,
    Statistics,
)
from gadgets.settings import Dimension
from melcore.errors import ConfigError, DataError
from melcore.io.mrd_types import IS_REVERSE
from melcore.io.placement import centre_offset

_KEY = ("average", "slice", "contrast", "phase", "repetition", "set", "segment")
_REVERSE = 1 << IS_REVERSE - 1
_NO_AXIS = (Dimension.KSPACE_ENCODE_STEP_1, Dimension.KSPACE_ENCODE_STEP_2, Dimension.SLICE)


@dataclass(frozen=True)
class BufferSettings:
    """Which counters become the axes N and S; slices become LOC, or separate messages."""

    N_dimension: Dimension = Dimension.NONE
    S_dimension: Dimension = Dimension.NONE
    split_slices: bool = False
    ignore_segment: bool = False
    verbose: bool = False

    def __post_init__(self) -> None:
        for name, dimension in (("N_dimension", self.N_dimension), ("S_dimension", self.S_dimension)):
            if dimension in _NO_AXIS:
                raise ConfigError(f"BucketToBufferGadget: {name} cannot be {str(dimension)!r}, whose axis is fixed.")


def bucket_to_buffer(messages: Iterator[Message], header: Header, settings: BufferSettings) -> Iterator[Message]:
    """Sort the readouts of each bucket onto the grid; calibration goes into a second buffer of the same grid.

    Index order is natural, the centre of k-space at ``N // 2``. Three defects of the server's gadget are not copied:
    the axes N and S start at the smallest counter that occurs (there, counters 1..6 leave the first entry empty and
    merge the last two), and the grid always is the encoded matrix (there, without `parallelImaging` it is as large as
    the range of the counters, discarded samples cut off, and what does not fit is dropped); and lines that come more
    than once are averaged, which the header's provenance records (there, the last one wins).

    Raises
    ------
    DataError
        If readouts do not fit the header: too many samples, lines outside the matrix, coil counts that change,
        calibration lines without `parallelImaging`.
    """
    for message in messages:
        if not isinstance(message, AcquisitionBucket):
            yield message
            continue
        groups = _groups(message, header, settings)
        statistics = {"data": message.data_statistics, "reference": message.reference_statistics}
        del message  # readouts are let go group by group, so that not all data are in memory twice
        while groups:
            yield _recon_data(groups.pop(min(groups)), statistics, header, settings)


#: Readouts of one ReconData: encoding space, then ``data`` and ``reference``.
_Group = dict[int, dict[str, list[Acquisition]]]


def _groups(bucket: AcquisitionBucket, header: Header, settings: BufferSettings) -> dict[tuple[int, ...], _Group]:
    groups: dict[tuple[int, ...], _Group] = {}
    for kind, readouts in (("reference", bucket.reference), ("data", bucket.data)):
        for readout in readouts:
            space = int(readout.header["encoding_space_ref"])
            if space >= len(header.encodings):
                raise DataError(f"a readout belongs to encoding {space}, but the header has {len(header.encodings)}.")
            group = groups.setdefault(_key(readout, settings), {}).setdefault(space, {"reference": [], "data": []})
            group[kind].append(readout)
    return groups


def _recon_data(
    spaces: _Group, statistics: dict[str, Statistics], header: Header, settings: BufferSettings
) -> ReconData:
    bits = []
    for space, kinds in sorted(spaces.items()):
        encoding = header.encodings[space]
        if not kinds["data"]:
            raise DataError(
                f"{len(kinds['reference'])} calibration readouts came without any image readout of their slice or "
                "phase: trigger and N dimension must keep them together."
            )
        data, repeated = _buffer(kinds["data"], statistics["data"][space], encoding, settings, reference=False)
        if repeated:
            header.provenance["lines"] = f"{repeated} lines were acquired more than once and averaged"
        reference = None
        if kinds["reference"]:
            of_space = statistics["reference"][space]
            reference, _ = _buffer(kinds["reference"], of_space, encoding, settings, reference=True)
        bits.append(ReconBit(data, reference))
    return ReconData(tuple(bits))


def _key(readout: Acquisition, settings: BufferSettings) -> tuple[int, ...]:
    merged = {settings.N_dimension, settings.S_dimension}
    if not settings.split_slices:
        merged.add(Dimension.SLICE)
    if settings.ignore_segment:
        merged.add(Dimension.SEGMENT)
    counters = readout.header["idx"]
    return tuple(0 if name in merged else int(counters[name]) for name in _KEY)


def _range(statistics: Statistics | tuple[Array, ...], dimension: str) -> tuple[int, int]:
    """Smallest counter, and how many there are up to the largest."""
    if not dimension:
        return 0, 1
    values = statistics[COUNTERS.index(dimension)]
    return int(values[0]), int(values[-1]) - int(values[0]) + 1


def _buffer(
    readouts: Sequence[Acquisition],
    statistics: tuple[Array, ...],
    encoding: Encoding,
    settings: BufferSettings,
    *,
    reference: bool,
) -> tuple[ReconBuffer, int]:
    """Sort readouts onto a grid; also says how many lines of it came more than once."""
    if reference and encoding.calibration_mode is None:
        raise DataError(
            "readouts are flagged as calibration, but the header has no parallelImaging: add it to the header."
        )
    first = readouts[0].header
    apart = reference and encoding.calibration_mode in ("separate", "external")
    starts, sizes = _grid(statistics, encoding, first, apart=apart)
    low_n, count_n = _range(statistics, settings.N_dimension)
    low_s, count_s = _range(statistics, settings.S_dimension)
    low_slice, count_slice = (0, 1) if settings.split_slices else _range(statistics, "slice")
    coils, dimensions = int(first["active_channels"]), int(first["trajectory_dimensions"])
    # C order of these axes is the Fortran order of Gadgetron's.
    outer = (count_slice, count_s, count_n)
    data = np.zeros((*outer, coils, *sizes[::-1]), np.complex64)
    headers = np.zeros((*outer, *sizes[:0:-1]), ACQUISITION_HEADER)
    for name in ("version", "available_channels", "active_channels"):
        headers[name] = 1  # the server's default-constructed header
    trajectory = np.zeros((*outer, *sizes[::-1], dimensions), np.float32) if dimensions else None
    sampling = _sampling(encoding, first, statistics, whole=not apart)
    center = int(sampling["limits"]["center"][0])
    counts = np.zeros((*outer, *sizes[:0:-1]), np.int32)
    for readout in readouts:
        head = readout.header
        counters = head["idx"]
        place = (
            0 if settings.split_slices else int(counters["slice"]) - low_slice,
            int(counters[settings.S_dimension]) - low_s if settings.S_dimension else 0,
            int(counters[settings.N_dimension]) - low_n if settings.N_dimension else 0,
        )
        line = tuple(int(counters[name]) - start for name, start in zip(COUNTERS[:2], starts, strict=True))
        if not (0 <= line[0] < sizes[1] and 0 <= line[1] < sizes[2]):
            raise DataError(
                f"a readout has k-space line ({int(counters[COUNTERS[0]])}, {int(counters[COUNTERS[1]])}), outside the "
                f"encoded matrix {encoding.encoded_matrix} (x, y, z) of the header."
            )
        if int(head["flags"]) & _REVERSE and encoding.cartesian:
            raise DataError(
                "readouts run in both directions (flag 22, reversed), as those of EPI: their phase correction is not "
                "known here; correct the data before."
            )
        if readout.data.shape[0] != coils:
            raise DataError(f"the coil count changes from {coils} to {readout.data.shape[0]} within the scan.")
        columns, taken = _columns(head, center, sizes[0], cartesian=encoding.cartesian)
        data[*place, :, line[1], line[0], columns] += readout.data[:, taken]
        counts[*place, line[1], line[0]] += 1
        headers[*place, line[1], line[0]] = head
        if trajectory is not None and readout.trajectory.size:
            trajectory[*place, line[1], line[0], columns] = readout.trajectory[taken]
    repeated = int(np.count_nonzero(counts > 1))
    if repeated:
        data /= np.maximum(counts, 1)[:, :, :, None, :, :, None]
    buffer = ReconBuffer(
        data.transpose(),
        # [E1, E2, N, S, LOC]
        headers.transpose(),
        sampling,
        None if trajectory is None else trajectory.transpose(),
    )
    return buffer, repeated


def _columns(head: np.void, center: int, size: int, *, cartesian: bool) -> tuple[slice, slice]:
    """Where along the readout the samples go, and which of them."""
    samples, before, after = (int(head[name]) for name in ("number_of_samples", "discard_pre", "discard_post"))
    count = samples - before - after
    offset = 0
    if cartesian:
        centered = samples == size and int(head["center_sample"]) == samples // 2
        offset = before if centered else center - int(head["center_sample"])
    if offset < 0 or count < 1 or offset + count > size:
        raise DataError(
            f"a readout of {samples} samples (centre {head['center_sample']}, {before} and {after} discarded) does not "
            f"fit into the {size} of the first one: readouts of one image must agree."
        )
    return slice(offset, offset + count), slice(before, before + count)


def center_offsets(encoding: Encoding) -> tuple[int, int]:
    """Array index minus counter, along E1 and E2: the centre of k-space belongs at N // 2."""
    offsets = [0, 0]
    for axis in (0, 1):
        size = encoding.encoded_matrix[axis + 1]
        limit = encoding.limits.get(f"kspace_encoding_step_{axis + 1}")
        if limit is not None and (axis == 0 or size > 1):
            offsets[axis] = centre_offset(size, limit.center, f"kspace_encoding_step_{axis + 1}")
    return offsets[0], offsets[1]


def _grid(
    statistics: tuple[Array, ...], encoding: Encoding, first: np.void, *, apart: bool
) -> tuple[tuple[int, int], tuple[int, int, int]]:
    """Counters of the first line along E1 and E2, and the sizes [RO, E1, E2]."""
    samples = int(first["number_of_samples"])
    if encoding.cartesian and not apart:
        offset_1, offset_2 = center_offsets(encoding)
        return (-offset_1, -offset_2), (samples, *encoding.encoded_matrix[1:])
    starts_1, size_1 = _range(statistics, COUNTERS[0])
    starts_2, size_2 = _range(statistics, COUNTERS[1])
    if apart:
        return (starts_1, starts_2), (samples, size_1, size_2)
    return (starts_1, starts_2), (samples - int(first["discard_pre"]) - int(first["discard_post"]), size_1, size_2)


def _sampling(encoding: Encoding, first: np.void, statistics: tuple[Array, ...], *, whole: bool) -> Array:
    record = np.zeros((), SAMPLING)
    record["encoded_fov"], record["recon_fov"] = encoding.encoded_fov, encoding.recon_fov
    record["encoded_matrix"], record["recon_matrix"] = encoding.encoded_matrix, encoding.recon_matrix
    limits = record["limits"]
    if encoding.cartesian:
        # Oversampling has been removed before; the gadget takes that for granted.
        record["encoded_fov"][0], record["encoded_matrix"][0] = encoding.recon_fov[0], encoding.recon_matrix[0]
        samples = int(first["number_of_samples"])
        limits[0] = (int(first["discard_pre"]), samples // 2, samples - int(first["discard_post"]) - 1)
    else:
        limits[0] = (0, encoding.encoded_matrix[0] // 2, encoding.encoded_matrix[0] - 1)
    for axis, offset in enumerate(center_offsets(encoding), 1):
        limit = encoding.limits.get(f"kspace_encoding_step_{axis}")
        if limit is None:
            values = statistics[axis - 1]
            limits[axis] = (int(values[0]), int(record["encoded_matrix"][axis]) // 2, int(values[-1]))
        elif whole and encoding.cartesian:
            center = int(record["encoded_matrix"][axis]) // 2
            limits[axis] = (limit.minimum + offset, center, limit.maximum + offset)
        else:
            limits[axis] = (limit.minimum, limit.center, limit.maximum)
    return record
