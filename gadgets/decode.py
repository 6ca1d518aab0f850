"""Bytes of the Gadgetron protocol to messages.

Reading goes through a `Source`, so that the codec knows nothing of sockets. Small messages become views into the
source's block; large arrays get memory of their own.
"""

import struct
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from gadgets.layouts import BUCKET, COMPLEX, CONFIG_NAME, FLOAT, SIZES, U16, U32, U64, UINT16, UINT32
from gadgets.messages import (
    ACQUISITION_HEADER,
    COUNTERS,
    IMAGE_DTYPES,
    IMAGE_HEADER,
    SAMPLING,
    WAVEFORM_HEADER,
    Acquisition,
    AcquisitionBucket,
    Array,
    Close,
    ConfigFile,
    ConfigScript,
    Error,
    HeaderXml,
    Image,
    ImageArray,
    Message,
    ReconBit,
    ReconBuffer,
    ReconData,
    Statistics,
    Text,
    Waveform,
)
from melcore.errors import MelError

Bytes = memoryview

_HEADER_SIZE = ACQUISITION_HEADER.itemsize
_MAX_DIMENSIONS = 16


class TransportError(MelError, ConnectionError):
    """The other side broke the protocol, stopped half-way, reported an error, or is gone."""


class Source(Protocol):
    """Where bytes come from, in order. All methods raise `TransportError` where the stream ends too early."""

    def window(self, size: int) -> tuple[Bytes, int]:
        """Return a block that holds the next `size` bytes, and where in it they begin; stay before them."""

    def take(self, size: int) -> tuple[Bytes, int]:
        """As `window`, and move on. The bytes are writable, and stay as they are while anything refers to the block."""

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a fixed structure."""

    def array(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """Return an array of its own, aligned and writable, in Fortran order."""


def read_message(source: Source) -> Message:
    """Read one message.

    Raises
    ------
    TransportError
        If the id is unknown, a size is absurd, or the stream ends within the message.
    """
    block, start = source.take(2)
    identifier: int = U16.unpack_from(block, start)[0]
    reader = _READERS.get(identifier)
    if reader is None:
        raise TransportError(
            f"message id {identifier} is not one of {sorted(_READERS)}: the other side speaks another protocol, "
            "or the stream lost its place."
        )
    return reader(source)


def _bytes(source: Source, size: int) -> bytes:
    block, start = source.take(size)
    return block[start : start + size].tobytes()


def _flag(source: Source) -> bool:
    return _bytes(source, 1) != b"\0"


def _text(source: Source, length: struct.Struct) -> bytes:
    return _bytes(source, source.unpack(length)[0])


def _acquisition(source: Source) -> Acquisition:
    samples, channels, dimensions = SIZES.unpack_from(*source.window(_HEADER_SIZE))
    points = 4 * samples * dimensions
    block, start = source.take(_HEADER_SIZE + points + 8 * samples * channels)
    # Arrays over a buffer: slices and views of the same bytes take three times as long.
    return Acquisition(
        np.ndarray(1, ACQUISITION_HEADER, block, start)[0],
        np.ndarray((samples, dimensions), FLOAT, block, start + _HEADER_SIZE),
        np.ndarray((channels, samples), COMPLEX, block, start + _HEADER_SIZE + points),
    )


def _waveform(source: Source) -> Waveform:
    header = source.array(WAVEFORM_HEADER, (1,))[0]
    return Waveform(header, _rows(source, UINT32, int(header["channels"]), int(header["number_of_samples"])))


def _rows(source: Source, dtype: np.dtype[Any], rows: int, columns: int) -> Array:
    return source.array(dtype, (columns, rows)).T


def _image(source: Source) -> Image:
    header = source.array(IMAGE_HEADER, (1,))[0]
    meta = _text(source, U64).decode(errors="replace")
    number = int(header["data_type"])
    if number not in IMAGE_DTYPES:
        raise TransportError(f"an image says data_type {number}, but there are only {list(IMAGE_DTYPES)}.")
    dtype = IMAGE_DTYPES[number]
    x, y, z = (int(size) for size in header["matrix_size"])
    return Image(header, meta, source.array(dtype, (x, y, z, int(header["channels"]))).transpose(3, 2, 1, 0))


def _dimensions(source: Source) -> tuple[int, ...]:
    (count,) = source.unpack(U64)
    if count > _MAX_DIMENSIONS:
        raise TransportError(f"an array says that it has {count} dimensions: the stream lost its place.")
    return struct.unpack(f"<{count}Q", _bytes(source, 8 * count))


def _array(source: Source, dtype: np.dtype[Any]) -> Array:
    # An array without dimensions is empty to the server, where numpy takes it for one number.
    return source.array(dtype, _dimensions(source) or (0,))


def _optional(source: Source, dtype: np.dtype[Any]) -> Array | None:
    return _array(source, dtype) if _flag(source) else None


def _recon_buffer(source: Source) -> ReconBuffer:
    data = _array(source, COMPLEX)
    trajectory, density = _optional(source, FLOAT), _optional(source, FLOAT)
    headers = _array(source, ACQUISITION_HEADER)
    return ReconBuffer(data, headers, source.array(SAMPLING, ()), trajectory, density)


def _recon_data(source: Source) -> ReconData:
    bits = []
    for _ in range(_count(source)):
        data = _recon_buffer(source)
        bits.append(ReconBit(data, _recon_buffer(source) if _flag(source) else None))
    return ReconData(tuple(bits))


def _count(source: Source, limit: int = 1 << 24) -> int:
    (count,) = source.unpack(U64)
    if count > limit:
        raise TransportError(f"a list says that it has {count} elements: the stream lost its place.")
    return int(count)


def _image_array(source: Source) -> ImageArray:
    data, headers = _array(source, COMPLEX), _array(source, IMAGE_HEADER)
    meta = tuple(_text(source, U64).decode(errors="replace") for _ in range(_count(source)))
    waveforms = None
    if _flag(source):
        # Unlike a waveform message, these carry their dimensions [sample, channel].
        waveforms = tuple(
            Waveform(source.array(WAVEFORM_HEADER, (1,))[0], _array(source, UINT32).T) for _ in range(_count(source))
        )
    return ImageArray(data, headers, meta, waveforms, _optional(source, ACQUISITION_HEADER))


def _bundle(source: Source, count: int) -> list[Acquisition]:
    headers = source.array(ACQUISITION_HEADER, (count,))
    sizes = [SIZES.unpack_from(headers.data, index * _HEADER_SIZE) for index in range(count)]
    trajectories = [_rows(source, FLOAT, samples, dimensions) for samples, _, dimensions in sizes]
    data = [_rows(source, COMPLEX, channels, samples) for samples, channels, _ in sizes]
    return [Acquisition(*parts) for parts in zip(headers, trajectories, data, strict=True)]


def _statistics(source: Source) -> Statistics:
    return tuple(
        tuple(source.array(UINT16, (_count(source, 1 << 16),)) for _ in COUNTERS)
        for _ in range(_count(source, 1 << 16))
    )


def _bucket(source: Source) -> AcquisitionBucket:
    counts = source.unpack(BUCKET)
    if max(counts[0], counts[4], counts[10]) > 1 << 24:
        raise TransportError(
            f"a bucket says that it has {max(counts[0], counts[4])} readouts: the stream lost its place."
        )
    data, data_statistics = _bundle(source, counts[0]), _statistics(source)
    reference, reference_statistics = _bundle(source, counts[4]), _statistics(source)
    headers = source.array(WAVEFORM_HEADER, (counts[10],))
    waveforms = tuple(
        Waveform(header, _rows(source, UINT32, int(header["channels"]), int(header["number_of_samples"])))
        for header in headers
    )
    return AcquisitionBucket(data, reference, data_statistics, reference_statistics, waveforms)


_READERS: dict[int, Callable[[Source], Message]] = {
    1: lambda source: ConfigFile(_bytes(source, CONFIG_NAME).partition(b"\0")[0].decode(errors="replace")),
    2: lambda source: ConfigScript(_text(source, U32)),
    3: lambda source: HeaderXml(_text(source, U32)),
    4: lambda _: Close(),
    5: lambda source: Text(_text(source, U32).decode(errors="replace")),
    8: lambda source: Error(_text(source, U64).decode(errors="replace")),
    1008: _acquisition,
    1022: _image,
    1023: _recon_data,
    1024: _image_array,
    1026: _waveform,
    1050: _bucket,
}
