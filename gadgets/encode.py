"""Messages to the bytes of the Gadgetron protocol, as a list of buffers that a socket can send without copying them."""

import math
import struct
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from gadgets.layouts import BUCKET, COMPLEX, CONFIG_NAME, FLOAT, SIZES, U16, U32, U64, UINT16, UINT32
from gadgets.messages import (
    ACQUISITION_HEADER,
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
    ReconBuffer,
    ReconData,
    Statistics,
    Text,
    Waveform,
)
from melcore.errors import DataError

Part = bytes | memoryview  #: contiguous, of any format

_ACQUISITION = U16.pack(1008)
_NOTHING = memoryview(b"")


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


def byte_count(parts: Iterable[Part]) -> int:
    """Bytes of some parts."""
    return sum([len(part) if isinstance(part, bytes) else part.nbytes for part in parts])


def _raw(array: Array, dtype: np.dtype[Any]) -> memoryview:
    """Numbers of an array in C order, without a copy where it is contiguous and of that type already."""
    if array.dtype == dtype and array.flags.c_contiguous:
        return array.data
    return np.ascontiguousarray(array, dtype).data


def _header(header: np.void | Array, dtype: np.dtype[Any]) -> bytes:
    # Comparing structured dtypes takes longer than sending an acquisition; mostly they are the same object.
    if header.dtype is not dtype and header.dtype != dtype:
        raise _corrupt(f"a header of {header.dtype} came where another belongs")
    return header.tobytes()


def _byte_string(text: bytes, length: struct.Struct) -> list[Part]:
    return [length.pack(len(text)), text]


def _acquisition_body(message: Acquisition) -> tuple[bytes, memoryview, memoryview]:
    record, trajectory, data = message
    header = _header(record, ACQUISITION_HEADER)
    samples, channels, dimensions = SIZES.unpack_from(header)
    if data.shape != (channels, samples) or trajectory.size != samples * dimensions:
        raise _corrupt(
            f"an acquisition holds data {data.shape} and trajectory {trajectory.shape}, but its header "
            f"says {channels} channels, {samples} samples, {dimensions} trajectory dimensions"
        )
    return header, _raw(trajectory, FLOAT) if dimensions else _NOTHING, _raw(data, COMPLEX)


def _write_acquisition(message: Acquisition) -> list[Part]:
    header, trajectory, data = _acquisition_body(message)
    return [_ACQUISITION, header, data] if trajectory is _NOTHING else [_ACQUISITION, header, trajectory, data]


def _waveform_body(message: Waveform) -> tuple[bytes, memoryview]:
    header = _header(message.header, WAVEFORM_HEADER)
    expected = (int(message.header["channels"]), int(message.header["number_of_samples"]))
    if message.data.shape != expected:
        raise _corrupt(f"a waveform holds data {message.data.shape}, but its header says {expected}")
    return header, _raw(message.data, UINT32)


def _write_image(message: Image) -> list[Part]:
    header, data = message.header.copy(), message.data
    if data.dtype.kind == "i" and data.dtype.itemsize <= 2:
        # Peers know no signed integers; float32 holds these exactly.
        data = data.astype(FLOAT)
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
    return [U16.pack(1022), _header(header, IMAGE_HEADER), *_byte_string(meta, U64), raw]


def _dimensioned(array: Array, dtype: np.dtype[Any]) -> list[Part]:
    if array.dtype.kind != dtype.kind:
        raise _corrupt(f"an array of {array.dtype} came where {dtype} belongs")
    if array.shape == (0,):
        return [U64.pack(0)]
    # Fortran order on the wire is C order of the transpose.
    return [struct.pack(f"<{array.ndim + 1}Q", array.ndim, *array.shape), _raw(array.T, dtype)]


def _maybe(array: Array | None, dtype: np.dtype[Any]) -> list[Part]:
    return [b"\0"] if array is None else [b"\1", *_dimensioned(array, dtype)]


def _buffer_parts(buffer: ReconBuffer) -> list[Part]:
    return [
        *_dimensioned(buffer.data, COMPLEX),
        *_maybe(buffer.trajectory, FLOAT),
        *_maybe(buffer.density, FLOAT),
        *_dimensioned(buffer.headers, ACQUISITION_HEADER),
        _header(buffer.sampling, SAMPLING),
    ]


def _write_recon_data(message: ReconData) -> list[Part]:
    parts: list[Part] = [U16.pack(1023), U64.pack(len(message.bits))]
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
    parts = [U16.pack(1024), *_dimensioned(message.data, COMPLEX), *_dimensioned(message.headers, IMAGE_HEADER)]
    parts.append(U64.pack(len(message.meta)))
    for meta in message.meta:
        parts += _byte_string(meta.encode(), U64)
    parts.append(b"\0" if message.waveforms is None else b"\1" + U64.pack(len(message.waveforms)))
    for waveform in message.waveforms or ():
        header, _ = _waveform_body(waveform)
        parts += [header, *_dimensioned(waveform.data.T, UINT32)]
    return parts + _maybe(message.acquisition_headers, ACQUISITION_HEADER)


def _bundle_parts(acquisitions: Sequence[Acquisition], statistics: Statistics) -> tuple[list[Part], list[int], int]:
    """Buffers, then (count, bytes of headers, data and trajectories), then the bytes of the statistics."""
    bodies = [_acquisition_body(acquisition) for acquisition in acquisitions]
    headers, trajectories, data = zip(*bodies, strict=True) if bodies else ((), (), ())
    lists = [U64.pack(len(values)) + _raw(values, UINT16).tobytes() for space in statistics for values in space]
    sizes = [len(bodies), byte_count(headers), byte_count(data), byte_count(trajectories)]
    stream: list[Part] = [*headers, *trajectories, *data, U64.pack(len(statistics)), *lists]
    return stream, sizes, 8 + byte_count(lists)


def _write_bucket(message: AcquisitionBucket) -> list[Part]:
    data, data_sizes, data_statistics = _bundle_parts(message.data, message.data_statistics)
    reference, reference_sizes, reference_statistics = _bundle_parts(message.reference, message.reference_statistics)
    bodies = [_waveform_body(waveform) for waveform in message.waveforms]
    headers, samples = [header for header, _ in bodies], [body for _, body in bodies]
    sizes = BUCKET.pack(
        *data_sizes,
        *reference_sizes,
        data_statistics,
        reference_statistics,
        len(bodies),
        byte_count(headers),
        byte_count(samples),
    )
    return [U16.pack(1050), sizes, *data, *reference, *headers, *samples]


_WRITERS: dict[type, Callable[[Any], list[Part]]] = {
    ConfigFile: lambda message: [U16.pack(1), message.name.encode().ljust(CONFIG_NAME, b"\0")],
    ConfigScript: lambda message: [U16.pack(2), *_byte_string(message.xml, U32)],
    HeaderXml: lambda message: [U16.pack(3), *_byte_string(message.xml, U32)],
    Close: lambda _: [U16.pack(4)],
    Text: lambda message: [U16.pack(5), *_byte_string(message.text.encode(), U32)],
    Error: lambda message: [U16.pack(8), *_byte_string(message.text.encode(), U64)],
    Acquisition: _write_acquisition,
    Waveform: lambda message: [U16.pack(1026), *_waveform_body(message)],
    Image: _write_image,
    ReconData: _write_recon_data,
    ImageArray: _write_image_array,
    AcquisitionBucket: _write_bucket,
}
