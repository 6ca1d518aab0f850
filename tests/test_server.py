"""`mel serve` as scanners and Gadgetrons meet it: a process of its own, real sockets, whole exams."""

import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from cases import shared
from peer import properties, run_target_here, with_config
from serving import (
    PATIENCE,
    Running,
    as_bytes,
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

from gadgets.exam_request import ExamRequest, kind_of, parse_request
from gadgets.header import parse_header
from gadgets.messages import Close, ConfigFile, ConfigScript, Error, Image, ReconData, Text
from gadgets.stages import STAGES
from melcore.cli import main
from melcore.cli.doctor import PORT
from melcore.errors import ConfigError
from melcore.io.images import read_images
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def exam(folder: Path) -> Path:
    """Two slices."""
    path = folder / "exam.h5"
    write_exam(path, Protocol(shape=(2, 34, 28), slices=True, coils=3, acceleration=1.4, calibration=(12, 14)))
    return path


@pytest.fixture(scope="module")
def bundles(folder: Path) -> Path:
    return tiny_bundle(folder / "bundles" / "tiny.safetensors").parent


@pytest.fixture(scope="module")
def server(folder: Path, bundles: Path) -> Iterator[Running]:
    arguments = ("--bundles", str(bundles), "--model", "tiny", "--metrics", "0", "--log-format", "json")
    with serving(folder, *arguments, "--at-a-time", "1") as running:
        yield running


def attributes(image: Image) -> dict[str, str]:
    root = ElementTree.fromstring(image.meta.encode())
    return {entry.findtext("name"): entry.findtext("value") for entry in root}


def lines(server: Running, exam: str) -> list[dict]:
    found = [json.loads(line) for line in server.log.read_text().splitlines()]
    return [line for line in found if line.get("exam") == exam]


def same_images(images: list[Image], path: Path) -> None:
    (series,) = read_images(path)
    assert len(images) == len(series.headers)
    for image, header, data in zip(images, series.headers, series.data, strict=True):
        np.testing.assert_array_equal(image.data, data)
        for field in header.dtype.names:
            if field not in ("attribute_string_len", "image_series_index"):
                np.testing.assert_array_equal(image.header[field], header[field], err_msg=field)


@pytest.mark.parametrize("name", ["mel_cartesian_2d", "mel_cartesian_2d.xml"])
def test_a_client_gets_the_images_of_mel_recon_bit_for_bit(server, exam, bundles, tmp_path, name):
    images = images_of(send_exam(server.port, exam, name))
    target = tmp_path / "images.h5"
    assert main(["recon", str(exam), "--model", str(bundles / "tiny.safetensors"), "-o", str(target)]) == 0
    same_images(images, target)
    meta = attributes(images[0])
    assert meta["MEL_path_taken"] == "learned"
    assert meta["MEL_model"].startswith("tiny@")
    assert "MEL_warning" not in meta
    # What was delivered is not kept.
    wait_for(lambda: not (server.folder / meta["MEL_exam"]).exists())


def test_a_client_may_choose_and_set(server, exam, tmp_path):
    images = images_of(send_exam(server.port, exam, script(pipeline="mel_cartesian_2d", model="adjoint", series=7)))
    target = tmp_path / "images.h5"
    assert main(["recon", str(exam), "--model", "adjoint", "-o", str(target)]) == 0
    same_images(images, target)
    assert {int(image.header["image_series_index"]) for image in images} == {7}


def recon_data(path: Path, **values: object) -> bytes:
    """What a server's connect node sends of an exam without oversampling."""
    header, messages = exam_messages(path)
    parsed = parse_header(header.xml)
    stream = iter(messages)
    for name, settings in (("noise_adjust", {}), ("accumulate_trigger", {}), ("bucket_to_buffer", {})):
        stream = STAGES[name].bind(settings, name)(stream, parsed)
    found = list(stream)
    assert all(isinstance(message, ReconData) for message in found)
    return as_bytes([ConfigScript(properties(**values).encode()), header, *found, Close()])


def test_a_node_gets_the_images_of_an_external_process(server, folder):
    path = folder / "plain.h5"
    write_exam(path, Protocol(shape=(1, 30, 26), coils=3, acceleration=1.4, calibration=(12, 14), oversampling=1))
    raw = recon_data(path, model="cg-sense", output="complex")
    answer = talk(server.port, raw)
    wanted = run_target_here(raw, "reconstruct").messages
    assert len(answer) == len(wanted) == 2
    np.testing.assert_array_equal(answer[0].data, wanted[0].data)
    assert answer[0].header.tobytes()[:190] == wanted[0].header.tobytes()[:190]
    assert attributes(answer[0])["MEL_path_taken"] == "cg-sense"


@pytest.mark.parametrize("name", ["connect_b_recondata_to_image", "execute_b_recondata_cine_to_imagearray"])
def test_recorded_nodes_are_answered(server, name):
    raw = with_config(shared(f"gadgetron/traces/{name}.server_to_python.bin").read_bytes(), properties(model="adjoint"))
    answer, wanted = talk(server.port, raw), run_target_here(raw, "reconstruct").messages
    assert len(answer) == len(wanted) > 1
    for ours, theirs in zip(answer[:-1], wanted[:-1], strict=True):
        np.testing.assert_array_equal(ours.data, theirs.data)


def test_a_node_may_name_another_target(server):
    raw = shared("gadgetron/traces/connect_a_acq_to_image.server_to_python.bin").read_bytes()
    raw = with_config(raw, properties(target="passthrough"))
    data = raw[raw.index(b"</ismrmrdHeader>") :].partition(b"</ismrmrdHeader>\n")[2]
    assert as_bytes(talk(server.port, raw)) == data


def test_two_at_once_wait_for_each_other_and_both_are_served(server, exam):
    config = script(pipeline="mel_cartesian_2d")
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda _: send_exam(server.port, exam, config), range(4)))
    first = images_of(answers[0])
    for answer in answers:
        for image, other in zip(images_of(answer), first, strict=True):
            np.testing.assert_array_equal(image.data, other.data)
    assert len({attributes(images_of(answer)[0])["MEL_exam"] for answer in answers}) == 4


def test_clients_of_other_makes_send_words_before_their_data(server, exam):
    header, messages = exam_messages(exam)
    words = Text('{"parameters": {"config": "something"}}')
    config = script(pipeline="mel_cartesian_2d", model="adjoint")
    assert len(images_of(talk(server.port, as_bytes([config, header, words, *messages, Close()])))) == 2


def test_a_client_that_only_looks_is_no_exam(server):
    def begun() -> int:
        return server.log.read_text().count("exam begins")

    before = begun()
    with connect(server.port):
        pass
    assert talk(server.port, as_bytes([Close()])) == [Close()]
    time.sleep(0.2)
    assert begun() == before


def test_what_a_server_counts_and_logs(server, exam):
    def count() -> dict[str, float]:
        text = urllib.request.urlopen(f"http://127.0.0.1:{server.metrics}/metrics").read().decode()
        pairs = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    before = count()
    images = images_of(send_exam(server.port, exam, "mel_cartesian_2d"))
    text_of(send_exam(server.port, exam, "no_such_pipeline"))
    delivered, failed = 'mel_exams_total{state="delivered"}', 'mel_exams_total{state="failed"}'
    wait_for(lambda: count().get(failed, 0) == before.get(failed, 0) + 1)
    after = count()
    assert after[delivered] == before.get(delivered, 0) + 1
    assert after["mel_spooled_bytes_total"] > before["mel_spooled_bytes_total"]
    wait_for(lambda: count()["mel_exams_running"] == 0)
    assert after["mel_reconstructions_queued"] == 0
    assert after["process_resident_memory_bytes"] > 1 << 26
    assert after['mel_exam_seconds_count{part="reconstruct"}'] > 0
    begins, ends = lines(server, attributes(images[0])["MEL_exam"])
    assert (begins["message"], ends["message"]) == ("exam begins", "exam ended")
    assert (ends["state"], ends["images"], ends["path"]) == ("delivered", 2, "learned")
    assert ends["seconds_total_exam"] >= ends["seconds_reconstruct"] >= 0


def test_a_port_that_is_taken_is_said(capsys, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        arguments = ["--port", port, "--spool", str(tmp_path), "--model", "adjoint"]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)
            assert main(["serve", *arguments]) == 1
    assert f"the port {port} of 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_wrong_arguments_are_said(capsys, tmp_path):
    folder = tmp_path / "spool"
    file = tmp_path / "file"
    file.touch()
    for arguments, words in (
        (["--model", "no_such"], "primal_dual_2d"),
        (["--bundles", str(folder / "no")], "no folder"),
        (["--memory", "lots"], "12GiB"),
        (["--deadline", "-1"], "deadline"),
        (["--at-a-time", "0"], "at-a-time"),
        (["--spool", str(file)], "--spool"),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(signal, "signal", lambda *_: None)
            assert main(["serve", "--port", "0", "--spool", str(folder), *arguments]) == 1
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1


def test_a_stopped_server_ends_what_runs_and_keeps_what_cannot_end(exam, tmp_path, capsys):
    header, messages = exam_messages(exam)
    with serving(tmp_path, "--model", "adjoint", "--grace", "1") as server:
        with connect(server.port) as half, connect(server.port):
            half.sendall(as_bytes([ConfigFile("mel_cartesian_2d"), header, *messages[:20]]))
            wait_for(lambda: server.exams("running"))
            begin = time.monotonic()
            server.process.terminate()
            with ThreadPoolExecutor(1) as pool:
                assert pool.submit(server.process.wait, PATIENCE).result() == 0
            assert time.monotonic() - begin < 10
        (found,) = server.exams()
        assert found.record.state == "interrupted"
        assert "being stopped" in found.record.reason
    assert main(["replay", "--list", "--spool", str(server.folder)]) == 0
    assert found.record.id in capsys.readouterr().out


def test_doctor_looks_as_the_server_s_user_would(capsys, monkeypatch, tmp_path):
    def findings(*arguments: str) -> dict[str, dict]:
        assert main(["doctor", "--json", *arguments]) == 0
        return {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)["findings"]}

    monkeypatch.setenv("MEL_SPOOL", str(tmp_path))
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        found = findings("--port", str(port))
    assert found[f"port {port}"]["state"] == "note"
    assert "in use" in found[f"port {port}"]["found"]
    assert str(tmp_path) in found["spool"]["found"]
    assert found["gadgetron's python"]["state"] == "ok"
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("MEL_BART", shutil.which("bart", path=os.defpath) or "/usr/bin/bart")
    found = findings()
    assert "neither python nor python3" in found["gadgetron's python"]["found"]
    assert found[f"port {PORT}"]["name"] == "port 18000"


# What may be asked for.


@pytest.mark.parametrize(
    ("message", "wanted"),
    [
        (ConfigFile("mel_cartesian_3d"), ExamRequest("client", "mel_cartesian_3d", {})),
        (ConfigFile("mel_cine_2dt.xml"), ExamRequest("client", "mel_cine_2dt", {})),
        (script(pipeline="mel_cine_2dt", model="none"), ExamRequest("client", "mel_cine_2dt", {"model": "none"})),
        (ConfigScript(b"<configuration />"), ExamRequest("node", "reconstruct", {})),
        (ConfigScript(b""), ExamRequest("node", "reconstruct", {})),
        (script(target="extract", extract_mask=3), ExamRequest("node", "extract", {"extract_mask": "3"})),
    ],
)
def test_requests_are_understood(message, wanted):
    assert parse_request(message) == wanted
    assert kind_of(message) == wanted.kind


_WHOLE = (Path(__file__).parents[1] / "pipelines" / "mel_cartesian_2d.xml").read_bytes()


@pytest.mark.parametrize(
    ("message", "kind", "words"),
    [
        (ConfigFile("../mel_cartesian_3d.xml"), "client", "there is no pipeline"),
        (ConfigFile("/etc/passwd"), "client", "mel_cartesian_3d"),
        (ConfigFile(""), "client", "there is no pipeline"),
        (ConfigFile("mel_cartesian_3"), "client", "did you mean 'mel_cartesian_3d'"),
        (ConfigScript(_WHOLE), "client", "<version>, but may hold properties only"),
        (ConfigScript(b"<gadgetronStreamConfiguration/>"), "client", "<gadgetronStreamConfiguration>"),
        (ConfigScript(b'<!DOCTYPE x [<!ENTITY a "b">]><configuration/>'), "client", "document type"),
        (ConfigScript(b"import os"), "client", "not readable XML"),
        (script(pipeline="/tmp/mine.xml"), "client", "there is no pipeline"),
        (script(target="os.system"), "node", "there is no target"),
        (script(target="serve"), "node", "there is no target"),
    ],
)
def test_other_requests_are_refused_by_name(message, kind, words):
    with pytest.raises(ConfigError, match=words):
        parse_request(message)
    assert kind_of(message) == kind


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model": "/etc/passwd"}, "there is no model"),
        ({"model": "{bundle}"}, "there is no model"),
        ({"bundle": "../bundles/tiny"}, "there is no model"),
        ({"device": "cuda:7"}, "computes on cpu"),
        ({"modle": "tiny"}, "did you mean 'model'"),
        ({"memory": "lots"}, "12GiB"),
    ],
)
def test_properties_are_checked_and_the_exam_is_kept(server, exam, bundles, values, words):
    named = {name: value.format(bundle=bundles / "tiny.safetensors") for name, value in values.items()}
    text = text_of(send_exam(server.port, exam, script(pipeline="mel_cartesian_2d", **named)))
    assert words in text
    answer = talk(server.port, with_config(recon_data(exam), properties(**named)))
    assert isinstance(answer[-2], Error)  # a node is told so
    assert words in answer[-2].text
    identifier = text.rpartition("mel replay ")[2].strip(")")
    assert identifier in {found.record.id for found in server.exams("failed")}


def test_connections_beyond_the_limit_wait_and_are_served(tmp_path, exam):
    with serving(tmp_path, "--model", "adjoint", "--connections", "1") as server:
        with connect(server.port):
            wait_for(lambda: True)
            answers: list = []
            thread = threading.Thread(target=lambda: answers.append(send_exam(server.port, exam, "mel_cartesian_2d")))
            thread.start()
            time.sleep(0.7)
            assert not answers
        thread.join(PATIENCE)
        assert len(images_of(answers[0])) == 2
