"""The protocol: recorded bytes of a real server both ways, every other message, and everything that can go wrong."""

import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from cases import shared
from peer import data_messages, feeding, messages

from gadgets.codec import TransportError, message_parts
from gadgets.messages import (
    ACQUISITION_HEADER,
    IMAGE_HEADER,
    SAMPLING,
    WAVEFORM_HEADER,
    Acquisition,
    AcquisitionBucket,
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
    Text,
    Waveform,
)
from gadgets.wire import Wire
from melcore.errors import DataError


def _bytes(message: Message) -> bytes:
    return b"".join(bytes(part) for part in message_parts(message))


def _random(rng: np.random.Generator, dtype: np.dtype, shape: tuple[int, ...] = ()) -> np.ndarray:
    """Any bytes at all are a valid element of these records."""
    return np.frombuffer(rng.bytes(dtype.itemsize * int(np.prod(shape, dtype=int))), dtype).reshape(shape).copy()


def _complex(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.standard_normal(shape) + 1j * rng.standard_normal(shape)).astype(np.complex64)


def _acquisition(rng: np.random.Generator, coils: int = 5, samples: int = 7, dimensions: int = 3) -> Acquisition:
    header = _random(rng, ACQUISITION_HEADER, (1,))
    header["active_channels"], header["number_of_samples"], header["trajectory_dimensions"] = coils, samples, dimensions
    trajectory = rng.standard_normal((samples, dimensions)).astype(np.float32)
    return Acquisition(header[0], trajectory, _complex(rng, coils, samples))


def _waveform(rng: np.random.Generator) -> Waveform:
    header = _random(rng, WAVEFORM_HEADER, (1,))
    header["channels"], header["number_of_samples"] = 3, 11
    return Waveform(header[0], rng.integers(0, 1 << 32, (3, 11), np.uint32))


def _image(rng: np.random.Generator, dtype: str = "<f4") -> Image:
    data = (rng.standard_normal((2, 3, 5, 7)) * 100).astype(dtype)
    return Image(_random(rng, IMAGE_HEADER, (1,))[0], "<ismrmrdMeta>é</ismrmrdMeta>", data)


def _buffer(rng: np.random.Generator, trajectory: bool = True) -> ReconBuffer:
    return ReconBuffer(
        np.asfortranarray(_complex(rng, 8, 3, 2, 5, 2, 1, 3)),
        np.asfortranarray(_random(rng, ACQUISITION_HEADER, (3, 2, 2, 1, 3))),
        _random(rng, SAMPLING),
        rng.standard_normal((2, 8, 3, 2, 2, 1, 3)).astype(np.float32) if trajectory else None,
        rng.standard_normal((8, 3, 2, 2, 1, 3)).astype(np.float32) if trajectory else None,
    )


def _statistics(rng: np.random.Generator, spaces: int) -> tuple:
    return tuple(tuple(rng.integers(0, 9, k, np.uint16) for k in range(9)) for _ in range(spaces))


def _every_kind(rng: np.random.Generator) -> list[Message]:
    array = ImageArray(
        _complex(rng, 7, 5, 3, 2, 2, 1, 2),
        _random(rng, IMAGE_HEADER, (2, 1, 2)),
        ("<a/>", "<b/>", "<c/>", "<d/>"),
        (_waveform(rng), _waveform(rng)),
        _random(rng, ACQUISITION_HEADER, (3, 2, 2, 1, 2)),
    )
    bucket = AcquisitionBucket(
        [_acquisition(rng), _acquisition(rng, 2, 3, 0)],
        [_acquisition(rng, 1, 1, 2)],
        _statistics(rng, 2),
        _statistics(rng, 1),
        (_waveform(rng),),
    )
    return [
        ConfigFile("mel_cartesian_3d.xml"),
        ConfigScript(b"<configuration/>"),
        HeaderXml("<ismrmrdHeader>é</ismrmrdHeader>".encode()),
        Text("hello"),
        Error("é went wrong"),
        _acquisition(rng),
        _acquisition(rng, 4, 64, 0),
        _waveform(rng),
        _image(rng),
        _image(rng, "<c8"),
        _image(rng, "<u2"),
        _image(rng, "<f8"),
        array,
        ImageArray(array.data, array.headers),
        ReconData((ReconBit(_buffer(rng), _buffer(rng, False)), ReconBit(_buffer(rng, False)))),
        bucket,
        AcquisitionBucket([], []),
        Close(),
    ]


@pytest.mark.parametrize(
    "name",
    [
        *["connect_a_acq_to_image", "connect_a_traj_acq_to_image", "connect_b_recondata_to_image"],
        *["connect_b_recondata_to_imagearray", "execute_a_acq_to_image", "execute_a_passthrough"],
        *["execute_a_waveforms_passthrough", "execute_b_bucket_to_image", "execute_b_bucket_with_waveforms"],
        *["execute_b_recondata_3d_to_image", "execute_b_recondata_accel2_to_image"],
        *["execute_b_recondata_cine_to_imagearray", "execute_b_recondata_multislice_loc_to_image"],
        *["execute_b_recondata_multislice_to_image", "execute_b_recondata_passthrough"],
        *["execute_b_recondata_to_complex_image", "execute_b_recondata_to_image", "execute_err_mid_continue"],
        *["execute_image_passthrough", "execute_imagearray_passthrough", "execute_raise_mid", "execute_raise_start"],
        "execute_safe_fail",
    ],
)
@pytest.mark.parametrize("direction", ["server_to_python", "python_to_server"])
def test_recorded_bytes_come_back_bit_by_bit(name, direction):
    raw = shared(f"gadgetron/traces/{name}.{direction}.bin").read_bytes()
    # Padding of C structures included: nothing of a record is lost.
    assert b"".join(map(_bytes, messages(raw))) == raw


def test_every_recording_is_tested():
    names = {path.name.split(".")[0] for path in shared("gadgetron/traces").glob("*.bin")}
    marks = test_recorded_bytes_come_back_bit_by_bit.pytestmark
    assert names == set(next(mark.args[1] for mark in marks if mark.args[0] == "name"))


def test_every_kind_survives_both_ways_also_in_small_pieces():
    rng = np.random.default_rng(3)
    sent = _every_kind(rng)
    raw = b"".join(map(_bytes, sent))
    sender, receiver = socket.socketpair()

    def dribble():
        for start in range(0, len(raw), 97):
            sender.sendall(raw[start : start + 97])

    thread = threading.Thread(target=dribble)
    thread.start()
    wire = Wire(receiver)
    found = [wire.read() for _ in sent]
    thread.join()
    sender.close()
    receiver.close()
    assert [type(message) for message in found] == [type(message) for message in sent]
    assert b"".join(map(_bytes, found)) == raw


def test_arrays_read_are_writable_and_native():
    rng = np.random.default_rng(4)
    raw = b"".join(map(_bytes, _every_kind(rng)))
    for message in messages(raw):
        arrays = []
        if isinstance(message, Acquisition | Waveform | Image):
            arrays = [message.data]
        elif isinstance(message, ReconData):
            arrays = [message.bits[0].data.data, message.bits[0].data.headers, message.bits[0].data.trajectory]
        elif isinstance(message, ImageArray):
            arrays = [message.data, message.headers]
        for array in arrays:
            assert array.flags.writeable
            assert array.dtype.isnative


def test_large_array_is_sent_and_received_whole_against_back_pressure():
    rng = np.random.default_rng(5)
    buffer = _buffer(rng, False)
    big = ReconBuffer(np.asfortranarray(_complex(rng, 129, 65, 3, 7, 2, 1, 3)), buffer.headers, buffer.sampling)
    left, right = socket.socketpair()
    sender, receiver = Wire(left), Wire(right)
    thread = threading.Thread(target=sender.send, args=(ReconData((ReconBit(big),)),))
    thread.start()
    time.sleep(0.05)
    found = receiver.read()
    thread.join()
    assert isinstance(found, ReconData)
    np.testing.assert_array_equal(found.bits[0].data.data, big.data)
    left.close()
    right.close()


def test_messages_kept_are_not_overwritten_by_later_ones():
    """Readouts are views into received blocks: several blocks' worth of them, all alive at once."""
    rng = np.random.default_rng(12)
    sent = [_acquisition(rng, 7, 199 + index % 5, index % 3) for index in range(300)]
    found = messages(b"".join(map(_bytes, sent)))
    for one, other in zip(found, sent, strict=True):
        assert one.header.tobytes() == other.header.tobytes()
        np.testing.assert_array_equal(one.trajectory, other.trajectory)
        np.testing.assert_array_equal(one.data, other.data)
        one.data[...] = 0  # writable, and of nobody else
    for one, other in zip(found, sent, strict=True):
        assert not one.data.any()
        assert one.header.tobytes() == other.header.tobytes()


def test_what_is_sent_soon_is_sent_before_waiting_and_in_order():
    rng = np.random.default_rng(13)
    left, right = socket.socketpair()
    peer, wire = Wire(left, message_timeout=5), Wire(right, message_timeout=5)

    def echo():
        for message in wire:
            wire.send_soon(message)
        wire.close()

    thread = threading.Thread(target=echo)
    thread.start()
    image, sent, found = _image(rng), [], []
    # Each round waits for the answer to the round before: whatever was held back would end it.
    for count in (1, 3, 40, 2):
        batch = [*(_acquisition(rng) for _ in range(count)), image, _acquisition(rng)]
        peer._send_parts([_bytes(message) for message in batch], count)
        found += [peer.read() for _ in batch]
        sent += batch
    peer._send(Close())
    assert peer.read() == Close()
    thread.join(10)
    assert not thread.is_alive()
    left.close()
    assert b"".join(map(_bytes, found)) == b"".join(map(_bytes, sent))


def test_what_is_sent_soon_is_sent_at_the_end_and_on_failure():
    rng = np.random.default_rng(14)
    for end, wanted in ((Wire.close, [Acquisition, Close]), (lambda w: w.fail("no"), [Acquisition, Error, Close])):
        left, right = socket.socketpair()
        peer, wire = Wire(left), Wire(right)
        wire.send_soon(_acquisition(rng))
        peer._send(Close())
        end(wire)
        assert [type(peer.read()) for _ in wanted] == wanted
        left.close()


@pytest.mark.parametrize("dtype", ["<i2", "i1"])
def test_small_signed_images_become_float_because_servers_know_no_signed_ones(dtype):
    image = _image(np.random.default_rng(6), dtype)
    (found,) = messages(_bytes(image))
    assert found.header["data_type"] == 5
    np.testing.assert_array_equal(found.data, image.data)


def test_messages_that_would_corrupt_the_stream_are_refused():
    rng = np.random.default_rng(7)
    good, image = _acquisition(rng), _image(rng)
    array = ImageArray(_complex(rng, 7, 5, 3, 2, 2, 1, 2), _random(rng, IMAGE_HEADER, (2, 1, 2)))
    bad = [
        Acquisition(good.header, good.trajectory, good.data[:-1]),
        Image(image.header, "", image.data.astype(np.int64)),
        Image(image.header, "", image.data[:, :0]),
        ImageArray(array.data, array.headers[:1]),
        ImageArray(array.data, array.headers, ("",) * 4),
        ImageArray(array.data, array.headers, ("<a/>",)),
        ImageArray(array.data.real, array.headers),
        "text",
    ]
    left, right = socket.socketpair()
    wire = Wire(left)
    for message in bad:
        with pytest.raises(DataError):
            wire.send(message)
    with pytest.raises(DataError, match="illegal from an external module"):
        wire.send(Text("hello"))
    wire.close()
    # Not a byte of them went out.
    assert right.recv(100) == struct.pack("<H", 4)
    right.close()


GARBAGE = [
    (struct.pack("<H", 1009) + b"x" * 500, "message id 1009"),
    (struct.pack("<HQ", 1023, 1 << 40), "elements"),
    (struct.pack("<HQQ", 1023, 1, 99), "99 dimensions"),
    (struct.pack("<HQQ3Q", 1023, 1, 3, 1 << 20, 1 << 20, 1 << 20), "GiB"),
    (struct.pack("<HQQ2Q", 1023, 1, 2, (1 << 64) - 1, (1 << 64) - 1), "GiB"),
    (struct.pack("<HQ", 8, 1 << 50), "more than is accepted"),
    (struct.pack("<HHH", 1022, 1, 99) + bytes(198 - 4) + bytes(8), "data_type 99"),
    (struct.pack("<H", 1050) + b"\xff" * 112, "readouts"),
]


@pytest.mark.parametrize(("raw", "words"), GARBAGE, ids=[words for _, words in GARBAGE])
def test_garbage_is_an_error_and_costs_no_memory(raw, words):
    with feeding(raw) as wire, pytest.raises(TransportError, match=words):
        wire.read()


def test_every_message_cut_anywhere_is_an_error():
    rng = np.random.default_rng(8)
    for message in _every_kind(rng):
        raw = _bytes(message)
        for cut in {1, 2, len(raw) // 2, len(raw) - 1} - {len(raw)}:
            if cut < len(raw):
                with feeding(raw[:cut]) as wire, pytest.raises(TransportError, match="without CLOSE"):
                    wire.read()


def test_silence_within_a_message_is_an_error_but_not_between_messages():
    left, right = socket.socketpair()
    wire = Wire(right, message_timeout=0.2)
    timer = threading.Timer(0.6, left.sendall, [_bytes(Error("late"))[:-1]])
    timer.start()
    with pytest.raises(TransportError, match=r"stopped within a message for 0\.2 s"):
        wire.read()
    timer.join()
    left.close()
    right.close()


def test_a_peer_that_takes_nothing_is_given_up():
    left, right = socket.socketpair()
    wire = Wire(left, message_timeout=0.2)
    buffer = _buffer(np.random.default_rng(9), False)
    big = ReconBuffer(np.zeros((1 << 20, 4, 1, 1, 1, 1, 1), np.complex64, "F"), buffer.headers, buffer.sampling)
    with pytest.raises(TransportError, match="took nothing"):
        wire.send(ReconData((ReconBit(big),)))
    # Half a message is on the wire: an error text would be read as its rest.
    wire.fail("too late", patience=0.2)
    right.close()


def test_an_error_of_the_other_side_is_raised_and_its_text_logged(caplog):
    raw = b"".join(map(_bytes, [Text("by the way"), Error("scanner on fire"), Close()]))
    with feeding(raw) as wire, caplog.at_level("INFO"), pytest.raises(TransportError, match="scanner on fire"):
        list(wire)
    assert "by the way" in caplog.text


def test_failing_takes_all_input_first_then_sends_error_and_close():
    rng = np.random.default_rng(10)
    left, right = socket.socketpair()
    peer, wire = Wire(left), Wire(right)
    buffer = _buffer(rng, False)
    big = ReconData((ReconBit(ReconBuffer(_complex(rng, 512, 65, 3, 2, 1, 1, 1), buffer.headers, buffer.sampling)),))

    def serve():
        # A real server dead-locks if it can neither send nor is read.
        for message in [*_every_kind(rng)[5:-1], big, big, Close()]:
            peer._send(message)

    thread = threading.Thread(target=serve)
    thread.start()
    wire.fail("no more memory")
    thread.join(10)
    assert not thread.is_alive()
    assert peer.read() == Error("no more memory")
    assert peer.read() == Close()
    wire.close()  # what gadgetron's launcher does at the end: not a second CLOSE
    with pytest.raises(TransportError, match="without CLOSE"):
        peer.read()
    left.close()


def test_failing_finds_the_end_of_large_buckets_too():
    """Their headers say how long the rest is: these must be read although nothing is kept."""
    rng = np.random.default_rng(15)
    readouts = [_acquisition(rng, 1, 3, index % 2) for index in range(900)]
    left, right = socket.socketpair()
    peer, wire = Wire(left), Wire(right)

    def serve():
        peer._send(AcquisitionBucket(readouts, readouts[:800]))
        peer._send(Close())

    thread = threading.Thread(target=serve)
    thread.start()
    wire.fail("enough", patience=0.1)
    assert wire.finished
    thread.join()
    assert peer.read() == Error("enough")
    left.close()


def test_a_message_too_large_for_the_memory_is_told_and_the_next_one_read():
    """In a process of its own, whose address space is limited."""
    program = """
import resource, socket, struct, sys, threading
import numpy as np
from gadgets.messages import Close, Error
from gadgets.wire import Wire
from melcore.errors import DataError
left, right = socket.socketpair()
wire, peer = Wire(left), Wire(right)
size = 96 << 20
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (64 << 20),) * 2)
def serve():
    dims = struct.pack("<8Q", 7, size // 8, 1, 1, 1, 1, 1, 1)
    right.sendall(struct.pack("<HQ", 1023, 1) + dims)
    for _ in range(size >> 20):
        right.sendall(bytes(1 << 20))
    right.sendall(bytes(2) + struct.pack("<Q", 0) + bytes(57))
    peer._send(Error("next"))
    peer._send(Close())
threading.stack_size(1 << 18)
thread = threading.Thread(target=serve); thread.start()
try:
    wire.read()
except DataError as error:
    print(error)
print(wire.read().text)
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert "no memory" in found.stdout, found.stderr
    assert found.stdout.endswith("next\n")


def test_failing_over_garbage_still_tells_why():
    left, right = socket.socketpair()
    wire = Wire(right)
    left.sendall(b"\xff" * 5000)
    with pytest.raises(TransportError):
        wire.read()
    begin = time.monotonic()
    wire.fail("not understood", patience=0.3)
    assert time.monotonic() - begin < 3
    assert Wire(left).read() == Error("not understood")
    left.close()


def test_failing_when_the_peer_is_gone_is_quiet():
    left, right = socket.socketpair()
    left.close()
    Wire(right).fail("nobody hears this")


@pytest.mark.filterwarnings("ignore:A builtin ctypes object:RuntimeWarning")  # its own reader
def test_stock_package_understands_what_we_send():
    """The package on the other end of the socket: it reads our acquisitions, images and k-space."""
    connection = pytest.importorskip("gadgetron.external.connection")
    readers = connection.Connection._default_readers()
    raw = shared("gadgetron/traces/execute_b_recondata_accel2_to_image.server_to_python.bin").read_bytes()
    rng = np.random.default_rng(11)
    acquisition = _acquisition(rng)
    recon, image = data_messages(raw)[0], _image(rng)
    left, right = socket.socketpair()
    thread = threading.Thread(target=lambda: [Wire(left).send(message) for message in (acquisition, image, recon)])
    thread.start()
    wrapper = connection.Connection.SocketWrapper(right)
    found = [readers[struct.unpack("<H", wrapper.read(2))[0]](wrapper) for _ in range(3)]
    thread.join()
    np.testing.assert_array_equal(found[0].data, acquisition.data)
    np.testing.assert_array_equal(found[1].data, image.data)
    np.testing.assert_array_equal(found[2].bits[0].data.data, recon.bits[0].data.data)
    left.close()
    right.close()
