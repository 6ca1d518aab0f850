"""What can go wrong around an external node: each time a labelled image or an error that is heard, and nothing left."""

import contextlib
import os
import shutil
import signal
import socket
import struct
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from exams import arriving, recording, write
from peer import TARGET_TIMEOUT, Answer, messages, properties, receive_all, reset, run_target, started, with_config

from gadgets.messages import Close, Error, Image, Text
from melcore.io.scratch import temporary_folder

BOUND = 100.0  # s, on a busy machine; importing what is needed takes most of it
_MARK = "MEL_TEST_MARK"


@pytest.fixture(scope="module")
def exam(tmp_path_factory) -> bytes:
    """One slice, as a server sends it to the external node of a pipeline."""
    path = write(tmp_path_factory.mktemp("exam") / "exam.h5", "slice")
    return recording("<configuration/>", *arriving(path, "mel_cartesian_2d"))


@pytest.fixture(scope="module")
def readouts(tmp_path_factory) -> bytes:
    """The same, readout by readout, and many times."""
    path = write(tmp_path_factory.mktemp("exam") / "exam.h5", "slice")
    xml, messages = arriving(path)
    return recording("<configuration/>", xml, messages * 60)


@contextlib.contextmanager
def nothing_left() -> Iterator[dict[str, str]]:
    """An environment, of which no process is left in the end: also none that a process has started."""
    mark = str(uuid4())
    yield {_MARK: mark}
    end = time.monotonic() + 5
    while left := _marked(mark):
        assert time.monotonic() < end, f"still running: {left}"
        time.sleep(0.05)


def _marked(mark: str) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"{_MARK}={mark}".encode() in (place / "environ").read_bytes():
                found.append((place / "cmdline").read_text().replace("\0", " "))
    return found


def _all(*cases: Callable[[], None]) -> None:
    """Most of the time goes into imports: several at once."""
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(case) for case in cases]:
            done.result()


def _run(raw: bytes, target: str, environment: dict[str, str] | None = None, **options) -> Answer:
    begin = time.monotonic()
    with nothing_left() as mark:
        answer = run_target(raw, target, environment=mark | (environment or {}), **options)
    assert time.monotonic() - begin < BOUND
    # A server ends the chain over one of these.
    assert not any(isinstance(message, Text) for message in answer.messages)
    return answer


def _fails(answer: Answer, *words: str) -> None:
    """Heard once, in one line, after all input was taken."""
    assert answer.code == 1, answer.log
    assert answer.messages[-1] == Close()
    (error,) = (message for message in answer.messages if isinstance(message, Error))
    assert answer.messages[-2] is error
    assert any(word in error.text for word in words), error.text
    assert "\n" not in error.text
    assert not any(isinstance(message, Image) for message in answer.messages)


def _gives(answer: Answer, path_taken: str | tuple[str, ...], warning: str) -> None:
    """One image that says what it is, and why."""
    assert answer.code == 0, answer.log
    image, close = answer.messages
    assert close == Close()
    meta = {e.findtext("name"): e.findtext("value") for e in ElementTree.fromstring(image.meta.encode())}
    assert meta["MEL_path_taken"] in ((path_taken,) if isinstance(path_taken, str) else path_taken)
    assert warning in meta["MEL_warning"]
    assert np.isfinite(image.data).all()
    assert np.ptp(image.data) > 0


def _bart(folder: Path, script: str) -> dict[str, str]:
    """A program that is found instead of BART."""
    folder.mkdir()
    program = folder / "bart"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


# The other side.


def test_a_peer_that_is_slow_gets_everything(exam):
    with nothing_left() as mark, started("passthrough", environment=mark) as (connection, process):

        def dribble():
            for start in range(0, len(exam), 4001):
                connection.sendall(exam[start : start + 4001])
                time.sleep(0.02)

        sender = threading.Thread(target=dribble)
        sender.start()
        found = receive_all(connection)
        sender.join()
        assert process.wait(TARGET_TIMEOUT) == 0
    assert len(found) > len(exam) / 2
    assert exam.endswith(found)


def test_a_peer_that_sends_nonsense_is_told(exam):
    half = exam[: len(exam) // 2]
    announced = exam[:-2] + struct.pack("<HQ8Q", 1023, 1, 7, 1 << 14, 1 << 14, 1, 1, 1, 1, 1) + bytes(10_000)

    _all(
        lambda: _fails(_run(exam[:-2] + b"\xff" * 5000, "passthrough"), "message id 65535"),
        # The end of the stream within a message: of 2 GB that were announced, of half a message.
        lambda: _fails(_closing(announced), "gone"),
        lambda: _fails(_closing(half), "gone"),
    )


def _closing(raw: bytes) -> Answer:
    """The peer sends no more, but still listens."""
    answer = Answer()
    with nothing_left() as mark, started("passthrough", environment=mark) as (connection, process):

        def feed():
            connection.sendall(raw)
            connection.shutdown(socket.SHUT_WR)

        thread = threading.Thread(target=feed)
        thread.start()
        answer.raw = receive_all(connection)
        thread.join()
        answer.log = process.communicate(timeout=TARGET_TIMEOUT)[0].decode()
    answer.code = process.returncode
    # What was passed on before comes first.
    answer.messages = [message for message in messages(answer.raw) if isinstance(message, Error | Close)]
    return answer


def test_a_peer_that_goes_away_ends_the_process(exam, readouts):
    """In the middle of a message, of our sending, by closing and by reset."""

    def leave(raw: bytes, how: Callable[[socket.socket], None], read: int = 0) -> Callable[[], None]:
        def run() -> None:
            begin = time.monotonic()
            with nothing_left() as mark, started("passthrough", environment=mark) as (connection, process):
                sender = threading.Thread(target=_send, args=(connection, raw))
                sender.start()
                while read > 0 and connection.recv(read):
                    break
                if not read:
                    sender.join()
                    time.sleep(0.3)
                how(connection)
                log = process.communicate(timeout=TARGET_TIMEOUT)[0].decode()
                sender.join()
            assert process.returncode == 1, log
            assert "TransportError" in log
            assert time.monotonic() - begin < BOUND

        return run

    half = exam[: len(exam) // 2]
    _all(
        leave(half, reset),
        leave(half, socket.socket.close),
        leave(readouts, reset, read=10_000),
        leave(readouts, socket.socket.close, read=10_000),
    )


def _send(connection: socket.socket, raw: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(raw)


# Our side.


def test_a_module_that_is_killed_leaves_no_process_behind(exam, tmp_path):
    """While BART is at work: the server sees the end of the stream at once."""
    if shutil.which("setpriv") is None:
        pytest.skip("setpriv (util-linux) is absent: BART outlives its caller here")
    started_file = tmp_path / "started"
    # exec, as BART is one process.
    environment = _bart(tmp_path / "bin", f"touch {started_file}; exec sleep 1000")
    with nothing_left() as mark, started("reconstruct", environment=mark | environment) as (connection, process):
        _send(connection, with_config(exam, properties(model="none")))
        end = time.monotonic() + BOUND
        while not started_file.exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert receive_all(connection) == b""


def test_folders_of_killed_processes_are_removed_and_others_not(tmp_path):
    old = time.time() - 3600
    with temporary_folder(tmp_path) as mine:
        for name in ("abandoned", "new"):
            (tmp_path / mine.name.replace(mine.name.split("-")[-1], name)).mkdir()
        for folder in tmp_path.iterdir():
            if not folder.name.endswith("new"):
                os.utime(folder, (old, old))
        with temporary_folder(tmp_path) as other:
            assert {folder.name.split("-")[-1] for folder in tmp_path.iterdir()} == {
                "new",
                mine.name.split("-")[-1],
                other.name.split("-")[-1],
            }


def test_bart_that_dies_or_hangs_or_is_absent_is_told_or_survived(exam, tmp_path):
    nowhere = tmp_path / "nowhere"
    nowhere.mkdir()
    conventional, learned = properties(model="none"), properties(model="primal_dual_2d", deadline=2)
    hurried = properties(model="none", map_timeout=2)
    _all(
        lambda: _fails(
            _run(exam, "reconstruct", _bart(tmp_path / "dies", "kill -9 $$"), config=conventional), "killed"
        ),
        lambda: _fails(
            _run(exam, "reconstruct", _bart(tmp_path / "hangs", "exec sleep 1000"), config=hurried),
            "did not end within",
        ),
        lambda: _gives(
            _run(exam, "reconstruct", _bart(tmp_path / "slow", "exec sleep 1000"), config=learned),
            "root-sum-of-squares",
            "did not end within",
        ),
        lambda: _fails(_run(exam, "reconstruct", {"PATH": str(nowhere)}, config=conventional), "BART was not found"),
    )


def test_want_of_memory_disk_or_time_is_told_or_survived(exam):
    learned = {"model": "primal_dual_2d"}
    late = ("root-sum-of-squares", "cg-sense")  # whether BART is stopped in time or ends before
    _all(
        lambda: _gives(
            _run(exam, "reconstruct", config=properties(memory="64KiB", **learned)), "cg-sense", "does not fit"
        ),
        lambda: _gives(_run(exam, "reconstruct", config=properties(deadline=0.001, **learned)), late, "deadline"),
        # No file may be larger: all that can be done about full disks without filling one.
        lambda: _fails(
            _run(exam, "reconstruct", config=properties(model="none"), shell="ulimit -f 2;"), "cannot be written"
        ),
        lambda: _fails(_run(exam, "reconstruct", config=properties(model="none"), shell="ulimit -v 400000;"), "memory"),
    )


def test_a_bundle_or_data_that_are_damaged_are_told(exam, tmp_path):
    bundle = Path(__file__).parents[1] / "pipelines" / "bundles" / "primal_dual_2d.safetensors"
    cut, other = tmp_path / "cut.safetensors", tmp_path / "other.safetensors"
    cut.write_bytes(bundle.read_bytes()[:-1000])
    other.write_bytes(bytes(5000))
    place = exam.index(struct.pack("<2Q", 7, 28)) + 64 + 20_000
    broken = exam[:place] + np.full(2, np.nan, "<f4").tobytes() + exam[place + 8 :]
    _all(
        lambda: _fails(_run(exam, "reconstruct", config=properties(model=cut)), "cut.safetensors"),
        lambda: _fails(_run(exam, "reconstruct", config=properties(model=other)), "other.safetensors"),
        lambda: _fails(_run(broken, "reconstruct", config=properties(model="none")), "NaN"),
    )
