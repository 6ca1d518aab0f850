"""What can go wrong around `mel serve`, provoked by its real cause.

After each fault the server serves the next exam, and the exam that failed is in the spool and can be replayed.
"""

import json
import os
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from serving import (
    PATIENCE,
    Running,
    as_bytes,
    children_of,
    connect,
    exam_messages,
    images_of,
    script,
    send_exam,
    serving,
    talk,
    text_of,
    tiny_bundle,
    wait_for,
)
from test_server import attributes, recon_data

from gadgets.admission import Admission
from gadgets.exam_session import Parts
from gadgets.messages import Acquisition, Close, Error, HeaderXml, Message
from gadgets.server import Server
from gadgets.spool import Exam, Spool
from gadgets.warm_models import WarmModels
from melcore.cli import main
from melcore.io.images import read_images
from melcore.io.mrd import open_raw
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol

# Does what a file beside it says, instead of being BART.
_BART = """#!/bin/sh
case "$(cat "$0.mode" 2>/dev/null)" in
  die) kill -9 $$ ;;
  hang) sleep 1000 ;;
esac
exec {bart} "$@"
"""
CLIENT = script(pipeline="mel_cartesian_2d")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def exam(folder: Path) -> Path:
    path = folder / "exam.h5"
    write_exam(path, Protocol(shape=(1, 32, 26), coils=3, acceleration=1.4, calibration=(12, 14), oversampling=1))
    return path


@pytest.fixture(scope="module")
def bart(folder: Path) -> Path:
    """A BART that can be told to fail."""
    import shutil

    program = folder / "bart"
    program.write_text(_BART.format(bart=os.environ.get("MEL_BART") or shutil.which("bart")))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return program


@pytest.fixture(scope="module")
def server(folder: Path, bart: Path) -> Iterator[Running]:
    for name in ("tiny", "spare"):
        tiny_bundle(folder / "bundles" / f"{name}.safetensors")
    environment = {"MEL_BART": str(bart)}
    arguments = ("--bundles", str(folder / "bundles"), "--model", "tiny", "--log-format", "json")
    with serving(folder, *arguments, environment=environment) as running:
        yield running


@pytest.fixture
def told(bart: Path) -> Iterator[Callable[[str], None]]:
    """Tell BART what to do, for this test."""
    mode = bart.with_name("bart.mode")
    yield mode.write_text
    mode.unlink(missing_ok=True)


@pytest.fixture(autouse=True)
def serves_on(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each fault: the next exam is served, no child process is left, nothing is half-done."""
    if "server" not in request.fixturenames:
        yield
        return
    server, exam, bart = (request.getfixturevalue(name) for name in ("server", "exam", "bart"))
    server.seen = frozenset(found.record.id for found in server.exams())
    yield
    bart.with_name("bart.mode").unlink(missing_ok=True)
    assert server.process.poll() is None
    assert len(images_of(send_exam(server.port, exam, CLIENT))) == 1
    wait_for(lambda: not children_of(server.process.pid))
    wait_for(lambda: not server.exams("running"))


def latest(server: Running, state: str) -> Exam:
    """The exam that this test added."""

    def new() -> list[Exam]:
        return [found for found in server.exams(state) if found.record.id not in server.seen]

    wait_for(new)
    (found,) = new()
    return found


def check_replay(server: Running, exam: Exam, tmp_path: Path, *options: str, wanted: Path | None = None) -> None:
    """It can be reconstructed now, and is what the file itself gives."""
    target = tmp_path / "replayed.h5"
    arguments = ["replay", exam.record.id, "--spool", str(server.folder), "-o", str(target), *options]
    assert main([*arguments, "--model", "adjoint"]) == 0
    if wanted is not None:
        assert main(["recon", str(wanted), "--model", "adjoint", "-o", str(tmp_path / "recon.h5")]) == 0
        (series,), (others,) = read_images(target), read_images(tmp_path / "recon.h5")
        np.testing.assert_array_equal(series.data, others.data)


def raw_exam(exam: Path, *, until: int | None = None, config: Message = CLIENT) -> bytes:
    header, messages = exam_messages(exam)
    return as_bytes([config, header, *messages[:until], *([Close()] if until is None else [])])


# The other side.


@pytest.mark.parametrize("start", ["a peer's first bytes", "after the header", "within the data"])
def test_garbage(server, exam, start, tmp_path):
    generator = np.random.default_rng(3)
    garbage = generator.integers(0, 256, 1 << 20, np.uint8).tobytes()
    whole = {"a peer's first bytes": b"", "after the header": raw_exam(exam, until=0)}.get(
        start, raw_exam(exam, until=20)
    )
    answer = talk(server.port, whole + b"\xff\xff" + garbage)
    assert isinstance(answer[-2], Error)
    assert "message id 65535" in answer[-2].text
    if start == "within the data":
        found = latest(server, "interrupted")
        assert found.record.messages == 20
        check_replay(server, found, tmp_path, "--incomplete")


def test_a_message_that_announces_more_than_there_is_memory_for(server, exam):
    header, messages = exam_messages(exam)
    giant = struct.pack("<HQQ7Q", 1023, 1, 7, 1 << 20, 1 << 20, 1, 1, 1, 1, 1)
    answer = talk(server.port, as_bytes([CLIENT, header, *messages[:9]]) + giant)
    assert isinstance(answer[-2], Error)
    assert latest(server, "interrupted").record.messages == 9


@pytest.mark.parametrize("how", ["closed", "reset", "within a message"])
def test_a_client_that_goes_in_the_middle(server, exam, how, tmp_path):
    with connect(server.port) as connection:
        connection.sendall(raw_exam(exam, until=None if how == "closed" else 22)[: -2 if how == "closed" else -333])
        if how == "reset":
            # A reset takes along what was not read yet: all 21 whole messages must be in the spool.
            size = len(raw_exam(exam, until=21))
            running = lambda: [e for e in server.exams("running") if e.record.id not in server.seen]  # noqa: E731
            wait_for(lambda: any(e.size >= size for e in running()))
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    found = latest(server, "interrupted")
    assert found.record.complete is False
    if how == "closed":  # all of the data, but not the end
        check_replay(server, found, tmp_path, wanted=exam)
    else:
        assert found.record.messages == 21
        check_replay(server, found, tmp_path, "--incomplete")


def test_a_client_that_does_not_wait_for_its_images(server, exam, told, tmp_path):
    told("hang")
    with connect(server.port) as connection:
        connection.sendall(raw_exam(exam, config=script(pipeline="mel_cartesian_2d", deadline=1)))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        time.sleep(0.5)
    found = latest(server, "failed")
    assert found.record.complete
    assert "gone" in found.record.reason
    told("")
    check_replay(server, found, tmp_path, wanted=exam)


def test_silent_slow_and_deaf_peers_are_cut(tmp_path, exam):
    """With patience of tenths of a second; in this process, so that its threads can be seen."""
    admission = Admission(1 << 30)
    spool = Spool(tmp_path / "spool")
    parts = Parts(
        WarmModels(device="cpu", memory=1 << 30, admission=admission, model="adjoint"),
        admission,
        spool,
        handshake=0.6,
        idle=0.8,
    )
    server, stop = Server("127.0.0.1", 0, parts), threading.Event()
    before = threading.active_count()
    thread = threading.Thread(target=server.serve, args=(stop,))
    thread.start()
    try:
        with connect(server.port) as silent, connect(server.port) as slow, connect(server.port) as paused:
            paused.sendall(raw_exam(exam, until=20))

            def dribble() -> None:
                try:
                    for _ in range(100):
                        slow.send(b"\1")
                        time.sleep(0.1)
                except OSError:
                    pass

            threading.Thread(target=dribble).start()
            for connection in (silent, slow, paused):
                connection.settimeout(10)
                try:
                    while connection.recv(1 << 16):
                        pass
                except ConnectionResetError:
                    pass
        wait_for(lambda: [found.record.state for found in spool.exams()] == ["interrupted"])
        assert "sent no whole message for 0.8 s" in spool.exams()[0].record.reason
        # A server's node that takes nothing back: what it is sent fills the sockets' buffers.
        header, messages = exam_messages(exam)
        much = as_bytes([script(target="passthrough"), header, *messages[1:] * 400, Close()])
        with connect(server.port) as deaf:
            deaf.settimeout(10)
            with suppress(OSError):
                deaf.sendall(much)
            wait_for(lambda: len(spool.exams()) == 2 and spool.exams()[1].record.state != "running")
            assert "took no whole message for 0.8 s" in spool.exams()[1].record.reason
        wait_for(lambda: threading.active_count() <= before + 1)
        assert len(images_of(send_exam(server.port, exam, CLIENT))) == 1
    finally:
        stop.set()
        thread.join()
        assert server.shut_down(5)


# What the server needs.


def test_bart_is_killed(server, exam, told, tmp_path):
    told("die")
    text = text_of(send_exam(server.port, exam, CLIENT))
    assert "killed" in text
    told("")
    found = latest(server, "failed")
    assert f"mel replay {found.record.id}" in text
    check_replay(server, found, tmp_path, wanted=exam)
    assert server.spool.find(found.record.id).record.state == "replayed"


def test_bart_hangs(server, exam, told, tmp_path):
    told("hang")
    begin = time.monotonic()
    (image,) = images_of(send_exam(server.port, exam, script(pipeline="mel_cartesian_2d", deadline=1.5)))
    assert time.monotonic() - begin < 10
    assert attributes(image)["MEL_path_taken"] == "root-sum-of-squares"
    assert "coil maps were not ready" in attributes(image)["MEL_warning"]
    told("")
    found = latest(server, "fallback")
    assert f"mel replay {found.record.id}" in attributes(image)["MEL_warning"]
    # The learned image comes later.
    target = tmp_path / "later.h5"
    model = str(server.folder.parent / "bundles" / "tiny.safetensors")
    options = ["--spool", str(server.folder), "-o", str(target), "--model", model]
    assert main(["replay", found.record.id, *options]) == 0
    assert "MEL_path_taken</name><value>learned" in read_images(target)[0].metas[0]


def _command_line(process: Path) -> bytes:
    """What a process was started with; nothing if it is gone."""
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""


def test_bart_hangs_while_the_server_is_stopped(exam, bart, told, tmp_path):
    with serving(tmp_path, "--model", "cg-sense", "--grace", "0.5", environment={"MEL_BART": str(bart)}) as server:
        told("hang")
        answers: list = []
        thread = threading.Thread(target=lambda: answers.append(send_exam(server.port, exam, CLIENT)))
        thread.start()
        wait_for(lambda: children_of(server.process.pid))
        server.process.terminate()
        assert server.process.wait(PATIENCE) == 0
        thread.join(PATIENCE)
        assert "mel replay" in text_of(answers[0])
        (found,) = server.exams("failed")
        told("")
        check_replay(server, found, tmp_path, wanted=exam)
    running = b"".join(_command_line(process) for process in Path("/proc").glob("[0-9]*")).decode()
    assert str(bart) not in running


def test_a_deadline_gives_cg_sense(server, exam):
    (image,) = images_of(send_exam(server.port, exam, script(pipeline="mel_cartesian_2d", deadline=0.001)))
    meta = attributes(image)
    assert meta["MEL_path_taken"] in ("cg-sense", "adjoint", "root-sum-of-squares")
    assert "deadline" in meta["MEL_warning"] or "did not end within" in meta["MEL_warning"]
    latest(server, "fallback")


def test_too_little_memory_gives_cg_sense(server, exam):
    (image,) = images_of(send_exam(server.port, exam, script(pipeline="mel_cartesian_2d", memory="1000")))
    meta = attributes(image)
    assert meta["MEL_path_taken"] == "cg-sense"
    assert "the least that would do is" in meta["MEL_warning"]
    latest(server, "fallback")


def test_too_little_memory_without_fallback_is_an_error(server, exam, tmp_path):
    config = script(pipeline="mel_cartesian_2d", memory="1000", fallback="false")
    assert "the least that would do is" in text_of(send_exam(server.port, exam, config))
    check_replay(server, latest(server, "failed"), tmp_path, wanted=None)


def test_a_bundle_is_damaged_while_the_server_runs(server, exam, tmp_path):
    """One that is loaded is not touched by it; one that is not gives a clear error."""
    for name in ("tiny", "spare"):
        path = server.folder.parent / "bundles" / f"{name}.safetensors"
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        try:
            answer = send_exam(server.port, exam, script(pipeline="mel_cartesian_2d", model=name))
        finally:
            path.write_bytes(whole)
        if name == "tiny":
            assert attributes(images_of(answer)[0])["MEL_path_taken"] == "learned"
        else:
            assert "damaged" in text_of(answer)
            check_replay(server, latest(server, "failed"), tmp_path, wanted=exam)


def test_nan_in_the_data(server, exam, tmp_path):
    header, messages = exam_messages(exam)
    broken = messages[20]
    broken.data[1, 3] = np.nan
    assert "NaN" in text_of(talk(server.port, as_bytes([CLIENT, header, *messages, Close()])))
    found = latest(server, "failed")
    assert main(["replay", found.record.id, "--spool", str(server.folder), "-o", str(tmp_path / "i.h5")]) == 1
    # Not better by being tried again, but all that came is there.
    with open_raw(found.folder / "raw.h5") as raw:
        assert raw.count == len(messages)


@pytest.mark.parametrize("what", ["header", "coils", "empty"])
def test_data_that_cannot_be_used(server, exam, what):
    header, messages = exam_messages(exam)
    if what == "header":
        header = HeaderXml(header.xml.replace(b"<encoding>", b"<enkoding>").replace(b"</encoding>", b"</enkoding>"))
    elif what == "coils":
        head = messages[9].header.copy()
        head["active_channels"] = 2
        messages[9] = Acquisition(head, messages[9].trajectory, messages[9].data[:2])
    else:
        messages = messages[:1]  # the noise scan alone
    words = {"header": "header", "coils": "coils", "empty": "no complete image data"}[what]
    assert words in text_of(talk(server.port, as_bytes([CLIENT, header, *messages, Close()])))
    assert latest(server, "failed").record.messages == len(messages)


def test_a_node_is_told_too(server, exam, told):
    told("die")
    *_, error, last = talk(server.port, recon_data(exam, model="cg-sense"))
    assert last == Close()
    assert isinstance(error, Error)
    assert "killed" in error.text
    told("")
    found = latest(server, "failed")
    assert found.raw.name == "raw.log"
    target = server.folder.parent / "node.h5"
    assert main(["replay", found.record.id, "--spool", str(server.folder), "-o", str(target)]) == 0
    (answer, _) = talk(server.port, recon_data(exam, model="cg-sense"))
    np.testing.assert_array_equal(read_images(target)[0].data[0], answer.data)


def test_the_server_is_killed(exam, tmp_path):
    with serving(tmp_path, "--model", "adjoint") as server:
        with connect(server.port) as connection:
            connection.sendall(raw_exam(exam)[:-2])
            wait_for(lambda: server.exams("running") and server.exams()[0].size > len(raw_exam(exam)) - 10)
            server.kill()
        (found,) = server.exams()
        assert found.record.state == "interrupted"
        check_replay(server, found, tmp_path, wanted=exam)
    with serving(tmp_path, "--model", "adjoint") as server:
        assert len(images_of(send_exam(server.port, exam, "mel_cartesian_2d"))) == 1
        wait_for(lambda: [one.record.id for one in server.exams()] == [found.record.id])


def test_the_disk_is_full(exam, tmp_path):
    """Reconstruction goes on, and the operator is told: on the image, in the log, by a counter."""
    header, messages = exam_messages(exam)
    long = [*messages, *[m for _ in range(30) for m in messages[1:]]]
    size = len(as_bytes(messages))
    # In blocks of 1 KiB: more than BART's files and one exam need, less than a long one.
    with serving(tmp_path, "--model", "adjoint", "--metrics", "0", shell=f"ulimit -f {size * 3 // 1024};") as server:
        (image,) = images_of(send_exam(server.port, exam, "mel_cartesian_2d"))
        assert "MEL_warning" not in attributes(image)
        (image,) = images_of(talk(server.port, as_bytes([CLIENT, header, *long, Close()])))
        assert "the raw data of this exam are not kept" in attributes(image)["MEL_warning"]
        assert "File too large" in attributes(image)["MEL_warning"]
        wait_for(lambda: "the disk of the spool failed" in server.log.read_text())
        import urllib.request

        counters = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics").read().decode()
        assert "mel_unspooled_exams_total 1.0" in counters


def test_a_soak_of_random_faults_loses_no_exam(tmp_path):
    """The benchmark of the same name, shorter."""
    script_ = Path(__file__).parents[1] / "benchmarks" / "soak.py"
    command = [sys.executable, str(script_), "--exams", "40", "--seed", "1", "--folder", str(tmp_path), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert result.returncode == 0, result.stdout + result.stderr
    summary = json.loads(result.stdout.splitlines()[-1])
    assert summary["delivered"] + summary["spooled"] == summary["exams"] == 40
    assert summary["lost"] == 0
    assert summary["delivered"] > 5 < summary["spooled"]
