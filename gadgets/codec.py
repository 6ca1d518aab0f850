"""Messages to and from the bytes of the Gadgetron protocol; little endian, as the server writes them.

Reading goes through a `Source`, so that the same code reads a socket and a recorded file. Writing gives a list of
buffers that a socket can send in one call, without copying the large ones.
"""

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

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
from melcore.errors import DataError, MelError

Bytes = npt.NDArray[np.uint8]
Part = bytes | memoryview

_U16, _U32, _U64 = struct.Struct("<H"), struct.Struct("<I"), struct.Struct("<Q")
_COMPLEX, _FLOAT, _UINT32, _UINT16 = (np.dtype(kind) for kind in ("<c8", "<f4", "<u4", "<u2"))
# The only three numbers needed of most acquisition headers; reading them this way is 10 times faster than by name.
_SIZES = struct.Struct("<34xH2xH136xH")  # number_of_samples, active_channels, trajectory_dimensions
# For each of the bundles: count, bytes of headers, data and trajectories; statistics' bytes; waveforms likewise.
_BUCKET = struct.Struct("<4Q4QQQ3Q")
_CONFIG_NAME = 1024
_MAX_DIMENSIONS = 16


class TransportError(MelError, ConnectionError):
    """The other side broke the protocol, stopped half-way, reported an error, or is gone."""


class Source(Protocol):
    """Where bytes come from, in order. All methods raise `TransportError` where the stream ends too early."""

    def take(self, size: int) -> Bytes:
        """Return the next `size` bytes, writable, perhaps shared with a larger block and not aligned."""

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a fixed structure."""

    def peek(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Read a fixed structure without moving on."""

    def array(self, dtype: np.dtype[Any], shape: Sequence[int]) -> Array:
        """Return an array of its own, aligned and writable, in Fortran order."""


def read_message(source: Source) -> Message:
    """Read one message.

    Raises
    ------
    TransportError
        If the id is unknown, a size is absurd, or the stream ends within the message.
    """
    (identifier,) = source.unpack(_U16)
    reader = _READERS.get(identifier)
    if reader is None:
        raise TransportError(
            f"message id {identifier} is not one of {sorted(_READERS)}: the other side speaks another protocol, "
            "or the stream lost its place."
        )
    return reader(source)


def _text(source: Source, length: struct.Struct) -> bytes:
    return source.take(source.unpack(length)[0]).tobytes()


def _acquisition(source: Source) -> Acquisition:
    samples, channels, dimensions = source.peek(_SIZES)
    header = source.take(ACQUISITION_HEADER.itemsize).view(ACQUISITION_HEADER)[0]
    trajectory = source.take(samples * dimensions * 4).view(_FLOAT).reshape(samples, dimensions)
    data = source.take(samples * channels * 8).view(_COMPLEX).reshape(channels, samples)
    return Acquisition(header, trajectory, data)


def _waveform(source: Source) -> Waveform:
    header = source.array(WAVEFORM_HEADER, (1,))[0]
    return Waveform(header, _rows(source, _UINT32, int(header["channels"]), int(header["number_of_samples"])))


def _rows(source: Source, dtype: np.dtype[Any], rows: int, columns: int) -> Array:
    return source.array(dtype, (columns, rows)).T


def _image(source: Source) -> Image:
    header = source.array(IMAGE_HEADER, (1,))[0]
    meta = _text(source, _U64).decode(errors="replace")
    number = int(header["data_type"])
    if number not in IMAGE_DTYPES:
        raise TransportError(f"an image says data_type {number}, but there are only {list(IMAGE_DTYPES)}.")
    dtype = IMAGE_DTYPES[number]
    x, y, z = (int(size) for size in header["matrix_size"])
    return Image(header, meta, source.array(dtype, (x, y, z, int(header["channels"]))).transpose(3, 2, 1, 0))


def _dimensions(source: Source) -> tuple[int, ...]:
    (count,) = source.unpack(_U64)
    if count > _MAX_DIMENSIONS:
        raise TransportError(f"an array says that it has {count} dimensions: the stream lost its place.")
    return struct.unpack(f"<{count}Q", source.take(8 * count).data)


def _array(source: Source, dtype: np.dtype[Any]) -> Array:
    # An array without dimensions is empty to the server, where numpy takes it for one number.
    return source.array(dtype, _dimensions(source) or (0,))


def _optional(source: Source, dtype: np.dtype[Any]) -> Array | None:
    return _array(source, dtype) if source.take(1)[0] else None


def _recon_buffer(source: Source) -> ReconBuffer:
    data = _array(source, _COMPLEX)
    trajectory, density = _optional(source, _FLOAT), _optional(source, _FLOAT)
    headers = _array(source, ACQUISITION_HEADER)
    return ReconBuffer(data, headers, source.array(SAMPLING, ()), trajectory, density)


def _recon_data(source: Source) -> ReconData:
    bits = []
    for _ in range(_count(source)):
        data = _recon_buffer(source)
        bits.append(ReconBit(data, _recon_buffer(source) if source.take(1)[0] else None))
    return ReconData(tuple(bits))


def _count(source: Source, limit: int = 1 << 24) -> int:
    (count,) = source.unpack(_U64)
    if count > limit:
        raise TransportError(f"a list says that it has {count} elements: the stream lost its place.")
    return int(count)


def _image_array(source: Source) -> ImageArray:
    data, headers = _array(source, _COMPLEX), _array(source, IMAGE_HEADER)
    meta = tuple(_text(source, _U64).decode(errors="replace") for _ in range(_count(source)))
    waveforms = None
    if source.take(1)[0]:
        # Unlike a waveform message, these carry their dimensions [sample, channel].
        waveforms = tuple(
            Waveform(source.array(WAVEFORM_HEADER, (1,))[0], _array(source, _UINT32).T) for _ in range(_count(source))
        )
    return ImageArray(data, headers, meta, waveforms, _optional(source, ACQUISITION_HEADER))


def _bundle(source: Source, count: int) -> list[Acquisition]:
    headers = source.array(ACQUISITION_HEADER, (count,))
    sizes = [_SIZES.unpack_from(headers[index : index + 1].view(np.uint8).data) for index in range(count)]
    trajectories = [_rows(source, _FLOAT, samples, dimensions) for samples, _, dimensions in sizes]
    data = [_rows(source, _COMPLEX, channels, samples) for samples, channels, _ in sizes]
    return [Acquisition(*parts) for parts in zip(headers, trajectories, data, strict=True)]


def _statistics(source: Source) -> Statistics:
    return tuple(
        tuple(source.array(_UINT16, (_count(source, 1 << 16),)) for _ in COUNTERS)
        for _ in range(_count(source, 1 << 16))
    )


def _bucket(source: Source) -> AcquisitionBucket:
    counts = source.unpack(_BUCKET)
    if max(counts[0], counts[4], counts[10]) > 1 << 24:
        raise TransportError(
            f"a bucket says that it has {max(counts[0], counts[4])} readouts: the stream lost its place."
        )
    data, data_statistics = _bundle(source, counts[0]), _statistics(source)
    reference, reference_statistics = _bundle(source, counts[4]), _statistics(source)
    headers = source.array(WAVEFORM_HEADER, (counts[10],))
    waveforms = tuple(
        Waveform(header, _rows(source, _UINT32, int(header["channels"]), int(header["number_of_samples"])))
        for header in headers
    )
    return AcquisitionBucket(data, reference, data_statistics, reference_statistics, waveforms)


_READERS: dict[int, Callable[[Source], Message]] = {
    1: lambda source: ConfigFile(source.take(_CONFIG_NAME).tobytes().partition(b"\0")[0].decode(errors="replace")),
    2: lambda source: ConfigScript(_text(source, _U32)),
    3: lambda source: HeaderXml(_text(source, _U32)),
    4: lambda _: Close(),
    5: lambda source: Text(_text(source, _U32).decode(errors="replace")),
    8: lambda source: Error(_text(source, _U64).decode(errors="replace")),
    1008: _acquisition,
    1022: _image,
    1023: _recon_data,
    1024: _image_array,
    1026: _waveform,
    1050: _bucket,
}


def message_parts(message: Message) -> list[Part]:
    """Buffers that make up a message on the wire, in order.

    Raises
    ------
    DataError
        If the message does not fit the protocol: shapes that contradict a header, numbers that a server cannot read.
    """
    writer = _WRITERS.get(type(message))
    if writer is None:
        raise DataError(f"a {type(message).__name__} cannot be sent: it is not a message of the Gadgetron protocol.")
    return writer(message)


def _corrupt(what: str) -> DataError:
    return DataError(f"{what}: it would corrupt the stream and is not sent.")


def _raw(array: Array, dtype: np.dtype[Any]) -> memoryview:
    """Bytes of an array in C order, without a copy where it is contiguous and of that type already."""
    return np.ascontiguousarray(array, dtype).reshape(-1).view(np.uint8).data


def _header_bytes(header: np.void | Array, dtype: np.dtype[Any]) -> bytes:
    # Comparing structured dtypes takes longer than sending an acquisition; mostly they are the same object.
    if header.dtype is not dtype and header.dtype != dtype:
        raise _corrupt(f"a header of {header.dtype} came where another belongs")
    return header.tobytes()


def _byte_string(text: bytes, length: struct.Struct) -> list[Part]:
    return [length.pack(len(text)), text]


def _acquisition_body(message: Acquisition) -> tuple[bytes, memoryview, memoryview]:
    header = _header_bytes(message.header, ACQUISITION_HEADER)
    samples, channels, dimensions = _SIZES.unpack_from(header)
    if message.data.shape != (channels, samples) or message.trajectory.size != samples * dimensions:
        raise _corrupt(
            f"an acquisition holds data {message.data.shape} and trajectory {message.trajectory.shape}, but its header "
            f"says {channels} channels, {samples} samples, {dimensions} trajectory dimensions"
        )
    return header, _raw(message.trajectory, _FLOAT), _raw(message.data, _COMPLEX)


def _write_acquisition(message: Acquisition) -> list[Part]:
    return [_U16.pack(1008), *_acquisition_body(message)]


def _waveform_body(message: Waveform) -> tuple[bytes, memoryview]:
    header = _header_bytes(message.header, WAVEFORM_HEADER)
    expected = (int(message.header["channels"]), int(message.header["number_of_samples"]))
    if message.data.shape != expected:
        raise _corrupt(f"a waveform holds data {message.data.shape}, but its header says {expected}")
    return header, _raw(message.data, _UINT32)


def _write_image(message: Image) -> list[Part]:
    header, data = message.header.copy(), message.data
    if data.dtype.kind == "i" and data.dtype.itemsize <= 2:
        # Peers know no signed integers; float32 holds these exactly.
        data = data.astype(_FLOAT)
    known = {dtype: number for number, dtype in IMAGE_DTYPES.items() if number not in (2, 4)}
    data_type = known.get(data.dtype.newbyteorder("<"))
    if data_type is None:
        raise _corrupt(f"an image of {data.dtype} cannot be read by a server, cast it to float32")
    if data.ndim != 4 or not data.size:
        raise _corrupt(f"an image must be (channel, z, y, x), none empty, but is {data.shape}")
    meta = message.meta.encode()
    header["data_type"] = data_type
    header["channels"] = data.shape[0]
    header["matrix_size"] = data.shape[:0:-1]
    header["attribute_string_len"] = len(meta)
    raw = _raw(data, data.dtype.newbyteorder("<"))
    return [_U16.pack(1022) + _header_bytes(header, IMAGE_HEADER), *_byte_string(meta, _U64), raw]


def _dimensioned(array: Array, dtype: np.dtype[Any]) -> list[Part]:
    if array.dtype.kind != dtype.kind:
        raise _corrupt(f"an array of {array.dtype} came where {dtype} belongs")
    if array.shape == (0,):
        return [_U64.pack(0)]
    # Fortran order on the wire is C order of the transpose.
    return [struct.pack(f"<{array.ndim + 1}Q", array.ndim, *array.shape), _raw(array.T, dtype)]


def _maybe(array: Array | None, dtype: np.dtype[Any]) -> list[Part]:
    return [b"\0"] if array is None else [b"\1", *_dimensioned(array, dtype)]


def _buffer_parts(buffer: ReconBuffer) -> list[Part]:
    return [
        *_dimensioned(buffer.data, _COMPLEX),
        *_maybe(buffer.trajectory, _FLOAT),
        *_maybe(buffer.density, _FLOAT),
        *_dimensioned(buffer.headers, ACQUISITION_HEADER),
        _header_bytes(buffer.sampling, SAMPLING),
    ]


def _write_recon_data(message: ReconData) -> list[Part]:
    parts: list[Part] = [_U16.pack(1023), _U64.pack(len(message.bits))]
    for bit in message.bits:
        parts += _buffer_parts(bit.data)
        parts += [b"\0"] if bit.reference is None else [b"\1", *_buffer_parts(bit.reference)]
    return parts


def _write_image_array(message: ImageArray) -> list[Part]:
    images = math.prod(message.headers.shape)
    if message.data.ndim != 7 or message.headers.shape != message.data.shape[4:]:
        raise _corrupt(f"an ImageArray holds data {message.data.shape} and headers {message.headers.shape}")
    # A server dies of an empty text where XML belongs: none at all is right then.
    if len(message.meta) not in (0, images) or not all(message.meta):
        raise _corrupt(f"an ImageArray has {len(message.meta)} meta texts, or empty ones, for {images} images")
    parts = [_U16.pack(1024), *_dimensioned(message.data, _COMPLEX), *_dimensioned(message.headers, IMAGE_HEADER)]
    parts.append(_U64.pack(len(message.meta)))
    for meta in message.meta:
        parts += _byte_string(meta.encode(), _U64)
    parts.append(b"\0" if message.waveforms is None else b"\1" + _U64.pack(len(message.waveforms)))
    for waveform in message.waveforms or ():
        header, _ = _waveform_body(waveform)
        parts += [header, *_dimensioned(waveform.data.T, _UINT32)]
    return parts + _maybe(message.acquisition_headers, ACQUISITION_HEADER)


def _bundle_parts(acquisitions: Sequence[Acquisition], statistics: Statistics) -> tuple[list[Part], list[int], int]:
    """Buffers, then (count, bytes of headers, data and trajectories), then the bytes of the statistics."""
    bodies = [_acquisition_body(acquisition) for acquisition in acquisitions]
    headers, trajectories, data = zip(*bodies, strict=True) if bodies else ((), (), ())
    lists = [_U64.pack(len(values)) + _raw(values, _UINT16).tobytes() for space in statistics for values in space]
    sizes = [len(bodies), _total(headers), _total(data), _total(trajectories)]
    stream: list[Part] = [*headers, *trajectories, *data, _U64.pack(len(statistics)), *lists]
    return stream, sizes, 8 + _total(lists)


def _total(parts: Iterable[Part]) -> int:
    return sum(len(part) for part in parts)


def _write_bucket(message: AcquisitionBucket) -> list[Part]:
    data, data_sizes, data_statistics = _bundle_parts(message.data, message.data_statistics)
    reference, reference_sizes, reference_statistics = _bundle_parts(message.reference, message.reference_statistics)
    bodies = [_waveform_body(waveform) for waveform in message.waveforms]
    headers, samples = [header for header, _ in bodies], [body for _, body in bodies]
    sizes = _BUCKET.pack(
        *data_sizes,
        *reference_sizes,
        data_statistics,
        reference_statistics,
        len(bodies),
        _total(headers),
        _total(samples),
    )
    return [_U16.pack(1050), sizes, *data, *reference, *headers, *samples]


_WRITERS: dict[type, Callable[[Any], list[Part]]] = {
    ConfigFile: lambda message: [_U16.pack(1), message.name.encode().ljust(_CONFIG_NAME, b"\0")],
    ConfigScript: lambda message: [_U16.pack(2), *_byte_string(message.xml, _U32)],
    HeaderXml: lambda message: [_U16.pack(3), *_byte_string(message.xml, _U32)],
    Close: lambda _: [_U16.pack(4)],
    Text: lambda message: [_U16.pack(5), *_byte_string(message.text.encode(), _U32)],
    Error: lambda message: [_U16.pack(8), *_byte_string(message.text.encode(), _U64)],
    Acquisition: _write_acquisition,
    Waveform: lambda message: [_U16.pack(1026), *_waveform_body(message)],
    Image: _write_image,
    ReconData: _write_recon_data,
    ImageArray: _write_image_array,
    AcquisitionBucket: _write_bucket,
}
