"""What is kept of an exam, whatever happens; who waits for whom; and exams reconstructed again."""

import json
import resource
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from cases import header_xml, random_complex, readout
from serving import script, tiny_bundle

from gadgets.admission import Admission, StoppingError
from gadgets.chain import run_chain
from gadgets.codec import TransportError, message_parts
from gadgets.exam_feed import ExamFeed
from gadgets.exam_log import MAGIC, ExamLog, LogReader, being_written, to_raw_file
from gadgets.exam_record import LOG, Record, new_id, read_record
from gadgets.header import parse_header
from gadgets.image_headers import image_meta, with_attributes
from gadgets.messages import (
    ACQUISITION_HEADER,
    SAMPLING,
    WAVEFORM_HEADER,
    Close,
    ConfigFile,
    HeaderXml,
    Message,
    ReconBit,
    ReconBuffer,
    ReconData,
    Waveform,
)
from gadgets.replay import complete_repetitions
from gadgets.spool import RAW, Exam, Spool, SpooledExam
from gadgets.warm_models import WarmModels
from melcore.cli import main
from melcore.errors import ConfigError, DataError
from melcore.io.images import read_images
from melcore.io.mrd import open_raw
from melcore.io.mrd_types import IS_NOISE, LAST_IN_MEASUREMENT
from melcore.reconstruct import DeadlineExceededError, Reconstruction
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol

HEADER = HeaderXml(header_xml((1, 12, 10), 3).encode())


def readouts(count: int, samples: int = 20) -> list[Message]:
    return [readout(random_complex((3, samples), seed=i), kspace_encode_step_1=i % 12) for i in range(count)]


def waveform() -> Waveform:
    header = np.zeros((), WAVEFORM_HEADER)
    header["channels"], header["number_of_samples"] = 2, 5
    return Waveform(header[()], np.arange(10, dtype=np.uint32).reshape(2, 5))


def recon_data() -> ReconData:
    data = np.asfortranarray(random_complex((10, 12, 1, 3, 1, 1, 1), seed=5))
    headers = np.zeros((12, 1, 1, 1, 1), ACQUISITION_HEADER)
    return ReconData((ReconBit(ReconBuffer(data, headers, np.zeros((), SAMPLING))),))


def raw_bytes(message: Message) -> bytes:
    return b"".join(bytes(part) for part in message_parts(message))


def alike(found: list[Message], wanted: list[Message]) -> bool:
    return [raw_bytes(message) for message in found] == [raw_bytes(message) for message in wanted]


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: what a full disk is to a writer."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Logs.


def test_a_log_gives_back_every_message_bit_for_bit(tmp_path):
    messages = [script(pipeline="mel_cine_2dt"), HEADER, *readouts(7), waveform(), recon_data(), *readouts(2, 4000)]
    log = ExamLog(tmp_path / LOG)
    for message in messages:
        log.append(message)
    log.append(Close())
    log.close()
    assert (tmp_path / LOG).stat().st_mode & 0o777 == 0o600
    with LogReader(tmp_path / LOG) as reader:
        assert alike(list(reader.messages()), messages)
        assert reader.complete


def test_a_log_that_was_cut_anywhere_gives_its_whole_messages(tmp_path):
    messages = [ConfigFile("mel_cartesian_2d"), HEADER, *readouts(3), waveform(), recon_data()]
    log = ExamLog(tmp_path / LOG)
    ends = []
    for message in messages:
        log.append(message)
        ends.append(log.size)
    log.close()
    whole = (tmp_path / LOG).read_bytes()
    cut = tmp_path / "cut.log"
    for size in [*range(len(MAGIC), len(whole), 97), *ends]:
        cut.write_bytes(whole[:size])
        with LogReader(cut) as reader:
            assert alike(list(reader.messages()), messages[: sum(end <= size for end in ends)])
            assert not reader.complete
    cut.write_bytes(whole[:5])
    with pytest.raises(DataError, match="not an exam log"):
        LogReader(cut)
    # A disk that lost its power may leave zeros.
    cut.write_bytes(whole[: ends[3]] + bytes(500))
    with LogReader(cut) as reader:
        assert alike(list(reader.messages()), messages[:4])


def test_a_full_disk_leaves_a_log_whole(tmp_path):
    messages = readouts(100, 300)
    log = ExamLog(tmp_path / LOG)
    written = 0
    with room_for(100_001), suppress(OSError):
        for message in messages:
            log.append(message)
            written += 1
    assert 5 < written < 99
    assert log.size == (tmp_path / LOG).stat().st_size <= 100_001
    log.append(messages[written])  # there is room again
    log.close()
    with LogReader(tmp_path / LOG) as reader:
        assert alike(list(reader.messages()), messages[: written + 1])


def test_a_log_is_locked_while_its_writer_lives(tmp_path):
    log = ExamLog(tmp_path / LOG)
    assert being_written(tmp_path / LOG)
    log.close()
    assert not being_written(tmp_path / LOG)
    assert not being_written(tmp_path / "none")


def test_readouts_become_a_file_that_others_read(tmp_path, capsys):
    messages = readouts(12)
    log = ExamLog(tmp_path / LOG)
    for message in [ConfigFile("x"), HEADER, *messages[:4], waveform(), *messages[4:], Close()]:
        log.append(message)
    log.close()
    assert to_raw_file(tmp_path / LOG, tmp_path / RAW)
    with warnings.catch_warnings():
        import ismrmrd
    dataset = ismrmrd.Dataset(str(tmp_path / RAW), create_if_needed=False)
    assert dataset.number_of_acquisitions() == 12
    assert dataset.number_of_waveforms() == 1
    np.testing.assert_array_equal(dataset.read_acquisition(5).data, messages[5].data)
    dataset.close()
    assert main(["info", str(tmp_path / RAW)]) == 0
    assert "12" in capsys.readouterr().out


def test_sorted_data_stay_a_log(tmp_path):
    log = ExamLog(tmp_path / LOG)
    for message in [ConfigFile("x"), HEADER, recon_data(), *readouts(2)]:
        log.append(message)
    log.close()
    assert not to_raw_file(tmp_path / LOG, tmp_path / RAW)
    assert not (tmp_path / RAW).exists()


# The spool.


def kept(spool: Spool, state: str, *, count: int = 12, began: float | None = None) -> SpooledExam:
    record = Record(new_id(), began=time.time() if began is None else began, messages=count)
    exam = spool.begin(record)
    for message in [ConfigFile("mel_cartesian_2d"), HEADER, *readouts(count), Close()]:
        exam.log.append(message)
    record.state = state
    record.complete = True
    exam.end()
    return exam


def test_exams_that_were_delivered_go_and_others_stay(tmp_path):
    spool = Spool(tmp_path / "spool")
    kept(spool, "delivered")
    states = ("failed", "fallback", "interrupted")
    for state in states:
        kept(spool, state)
    found = spool.exams()
    assert sorted(exam.record.state for exam in found) == sorted(states)
    assert all(exam.raw is not None and exam.raw.name == RAW for exam in found)
    assert [exam.record.id for exam in found] == sorted(exam.record.id for exam in found)
    assert spool.find(found[1].record.id) == found[1]
    with pytest.raises(ConfigError, match="there is no exam"):
        spool.find("1999")
    with pytest.raises(ConfigError, match="more than one"):
        spool.find("20")


def test_what_nobody_said_anything_in_is_no_exam(tmp_path):
    spool = Spool(tmp_path)
    kept(spool, "failed", count=0)
    assert not list(tmp_path.iterdir())


def test_only_delivered_exams_are_removed_by_limits(tmp_path, caplog):
    spool = Spool(tmp_path, keep="all")
    old = [kept(spool, state, began=time.time() - 9e5) for state in ("delivered", "failed", "replayed")]
    new = [kept(spool, state) for state in ("delivered", "failed", "delivered")]
    assert len(spool.exams()) == 6
    Spool(tmp_path, days=10).tidy()
    left = {exam.record.id for exam in spool.exams()}
    assert left == {exam.record.id for exam in [old[1], *new]}
    size = spool.exams()[0].size
    Spool(tmp_path, limit=int(3.5 * size)).tidy()
    # The oldest of those that were delivered.
    assert {exam.record.id for exam in spool.exams()} == left - {min(new[0].record.id, new[2].record.id)}
    assert not caplog.records
    Spool(tmp_path, limit=1).tidy()
    assert [exam.record.state for exam in spool.exams()] == ["failed", "failed"]
    assert "replay them" in caplog.text


def test_an_exam_whose_writer_died_is_interrupted(tmp_path):
    spool = Spool(tmp_path)
    exam = spool.begin(Record(new_id(), began=1.0))
    exam.log.append(ConfigFile("x"))
    assert spool.exams()[0].record.state == "running"
    exam.log.close()
    assert spool.exams()[0].record.state == "interrupted"
    (exam.folder / "exam.json").write_text("{")
    assert read_record(exam.folder).state == "interrupted"
    (exam.folder / "exam.json").unlink()
    assert spool.find(exam.record.id).raw == exam.folder / LOG


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="give another folder"):
        Spool(tmp_path / "file")


# From the receiver to the chain.


def take(feed: ExamFeed, *, pause: float = 0.0) -> tuple[threading.Thread, list[Message], list[Exception]]:
    found: list[Message] = []
    errors: list[Exception] = []

    def run() -> None:
        try:
            for message in feed:
                found.append(message)
                time.sleep(pause)
        except TransportError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, found, errors


@pytest.mark.parametrize("early", [True, False], ids=["chain first", "receiver first"])
def test_the_chain_gets_what_was_received_in_its_order(tmp_path, early):
    spool = Spool(tmp_path)
    feed = ExamFeed(spool.begin(Record("x")), spool)
    messages = [*readouts(200), recon_data(), waveform()]
    thread = take(feed) if early else None
    for message in messages:
        feed.put(message)
    feed.finish()
    thread, found, errors = thread or take(feed)
    thread.join(10)
    assert alike(found, messages)
    assert not errors


def test_without_room_on_disk_messages_pass_through_memory_a_few_at_a_time(tmp_path):
    spool = Spool(tmp_path)
    messages = readouts(60, 300)
    size = len(raw_bytes(messages[0]))
    exam = spool.begin(Record("x"))
    feed = ExamFeed(exam, spool, in_memory=3 * size)
    done = threading.Event()

    def receive() -> None:
        for message in messages:
            feed.put(message)
        feed.finish()
        done.set()

    with room_for(20 * size):
        receiver = threading.Thread(target=receive)
        receiver.start()
        time.sleep(0.3)
        # The sender waits: what is in memory is bounded.
        assert not done.is_set()
        assert feed._held <= 3 * size
        assert "large" in feed.unspooled
        thread, found, _ = take(feed)
        thread.join(10)
        receiver.join(10)
    assert alike(found, messages)
    with LogReader(exam.log.path) as reader:
        assert alike(list(reader.messages()), messages[: exam.log.size // size])


def test_room_is_made_of_delivered_exams(tmp_path, monkeypatch):
    spool = Spool(tmp_path, keep="all")
    kept(spool, "delivered")
    kept(spool, "failed")
    exam = spool.begin(Record("x"))
    feed = ExamFeed(exam, spool)
    append, failures = exam.log.append, [OSError(28, "No space left on device")]

    def full_once(message: Message) -> None:
        if failures:
            raise failures.pop()
        append(message)

    monkeypatch.setattr(exam.log, "append", full_once)
    feed.put(readouts(1)[0])
    assert not feed.unspooled
    assert sorted(found.record.state for found in spool.exams()) == ["failed", "running"]


def test_a_chain_that_gave_up_does_not_hinder_the_receiver(tmp_path):
    feed = ExamFeed(None, Spool(tmp_path), problem="no room", in_memory=10)
    feed.abandon()
    for message in readouts(50):
        feed.put(message)
    feed.finish()


def test_an_exam_that_broke_off_ends_the_chain_before_half_an_image_is_made(tmp_path):
    spool = Spool(tmp_path)
    feed = ExamFeed(spool.begin(Record("x")), spool)
    thread, _, errors = take(feed)
    feed.put(readouts(1)[0])
    feed.finish(TransportError("gone"))
    feed.finish()
    thread.join(10)
    assert [str(error) for error in errors] == ["gone"]


# The queue for the device.


def test_as_many_run_as_fit_in_the_order_they_came():
    admission = Admission(100, most=3)
    order: list[int] = []
    running: list[int] = []
    most: list[int] = []

    def exam(number: int, size: int) -> None:
        with admission.place(size) as granted:
            assert granted
            order.append(number)
            running.append(size)
            most.append(sum(running))
            time.sleep(0.03)
            running.remove(size)

    sizes = [60, 60, 30, 200, 10, 10, 10, 10]
    threads = [threading.Thread(target=exam, args=pair) for pair in enumerate(sizes)]
    for thread in threads:
        thread.start()
        time.sleep(0.005)
    for thread in threads:
        thread.join(10)
    assert order == sorted(order)
    assert max(most) <= 200
    assert most[3] == 200  # larger than the budget: alone
    assert admission.running == admission.queued == 0


def test_waiting_ends_with_the_deadline_or_the_server():
    admission = Admission(100)
    with admission.place(80):
        begin = time.monotonic()
        with admission.place(50, timeout=0.1) as granted:
            assert not granted
        assert 0.1 <= time.monotonic() - begin < 5
        errors: list[Exception] = []

        def wait() -> None:
            try:
                with admission.place(50):
                    pass
            except StoppingError as error:
                errors.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        while not admission.queued:
            time.sleep(0.01)
        admission.close()
        thread.join(10)
        assert len(errors) == 1
    assert admission.running == 0


def test_who_waits_beyond_the_deadline_gets_cg_sense_and_is_told(tmp_path, exam_file):
    admission = Admission(1 << 30, most=1)
    bundles = {"tiny": tiny_bundle(tmp_path / "tiny.safetensors")}
    models = WarmModels(device="cpu", memory=1 << 30, admission=admission, bundles=bundles)
    seen: list[tuple[str, str, float]] = []

    def observe(result: Reconstruction, waited: float) -> None:
        seen.append((result.path_taken, result.warning, waited))

    def chain(**values: str) -> int:
        overrides = {"model": "tiny", "deadline": "0.3"} | values
        with open_raw(exam_file) as raw:
            options = {"overrides": overrides, "stages": models.stages(observe)}
            return len(list(run_chain("mel_cartesian_2d", raw.header_xml, raw.acquisitions(), **options)))

    with admission.place(1):
        assert chain() == 1
        with pytest.raises(DeadlineExceededError, match="while other exams"):
            chain(fallback="false")
    ((path, warning, waited),) = seen
    assert path == "cg-sense"
    assert "while other exams used the accelerator" in warning
    assert waited >= 0.3
    assert chain(deadline="500") == chain(model="adjoint") == 1
    assert [path for path, _, _ in seen[1:]] == ["learned", "adjoint"]
    assert admission.running == 0


# Words on images.


def test_attributes_are_added_to_what_an_image_says():
    several = "<ismrmrdMeta><meta><name>a</name><value>1</value><value>2</value></meta></ismrmrdMeta>"
    text = with_attributes(several, {"b": "x<y", "c": ""})
    assert "<value>1</value><value>2</value>" in text
    assert with_attributes(several, {"c": ""}) == several
    both = with_attributes(image_meta({"MEL_warning": "one"}), {"MEL_warning": "two"})
    assert "one; two" in both
    assert both.count("<meta>") == 1
    assert "<name>b</name><value>v</value>" in with_attributes("", {"b": "v"})


# Replay.


@pytest.fixture(scope="module")
def exam_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exams") / "exam.h5"
    write_exam(path, Protocol(shape=(1, 30, 26), coils=3, acceleration=1.3, calibration=(12, 14)))
    return path


def broken_off(spool: Spool, path: Path, readouts_kept: int, change=lambda _header: None, config="mel_cartesian_2d"):
    """An exam whose server was killed after so many readouts."""
    with open_raw(path) as raw:
        messages = [ConfigFile(config), HeaderXml(raw.header_xml.encode())]
        for acquisition in list(raw.acquisitions())[:readouts_kept]:
            change(acquisition.header)
            messages.append(acquisition)
    exam = spool.begin(Record(new_id(), began=time.time(), kind="client", name=config))
    for message in messages:
        exam.log.append(message)
    exam.log.close()
    return Exam(exam.folder, exam.record)


def replay(capsys, *arguments: object) -> tuple[int, str]:
    code = main(["replay", *map(str, arguments)])
    out, err = capsys.readouterr()
    return code, out or err


def test_an_exam_that_broke_off_is_reconstructed_as_far_as_it_is_complete(tmp_path, exam_file, capsys):
    spool = Spool(tmp_path / "spool")
    with open_raw(exam_file) as raw:
        count = raw.count

    def unmarked(header: np.void) -> None:
        header["flags"] &= ~np.uint64(1 << LAST_IN_MEASUREMENT - 1 | 1 << 13)

    most = 3 * count // 4
    half = broken_off(spool, exam_file, most, unmarked)
    target = tmp_path / "images.h5"
    options = ("--spool", spool.folder, "-o", target, "--model", "adjoint")
    code, words = replay(capsys, half.record.id, *options)
    assert code == 1
    assert "no image is complete" in words
    assert f"broke off after {most} readouts" in words
    assert not target.exists()
    code, words = replay(capsys, half.record.id, *options, "--incomplete", "--json")
    assert code == 0
    assert "lines that came" in json.loads(words)["warnings"][0]
    # All readouts, but not the CLOSE: complete, as its last readout says.
    whole = broken_off(spool, exam_file, count)
    code, words = replay(capsys, whole.record.id, *options, "--json")
    assert code == 0
    assert "its images are complete" in json.loads(words)["warnings"][0]
    assert main(["recon", str(exam_file), "--model", "adjoint", "-o", str(tmp_path / "recon.h5")]) == 0
    (series,), (wanted,) = read_images(target), read_images(tmp_path / "recon.h5")
    np.testing.assert_array_equal(series.data, wanted.data)
    assert read_record(whole.folder).replays[0]["images"] == 1


def test_the_last_repetition_is_left_out_unless_it_is_whole():
    header = parse_header(HEADER.xml)

    def heads(*counts: int, flags: int = 0, step: int = 2) -> np.ndarray:
        found = [readout(random_complex((3, 20)), flags=(IS_NOISE,))]
        for repetition, count in enumerate(counts):
            found += [
                readout(random_complex((3, 20)), kspace_encode_step_1=line * step, repetition=repetition)
                for line in range(count)
            ]
        array = np.array([one.header for one in found], ACQUISITION_HEADER)
        array["flags"][-1] |= np.uint64(flags)
        return array

    assert complete_repetitions(heads(6, 4), header) == ({0}, 1, 4)
    assert complete_repetitions(heads(6, 6), header) == ({0, 1}, 1, 6)
    assert complete_repetitions(heads(4), header) == (set(), 0, 4)
    assert complete_repetitions(heads(12, step=1), header) == ({0}, 0, 12)
    assert complete_repetitions(heads(4, flags=1 << LAST_IN_MEASUREMENT - 1), header) == ({0}, 0, 4)
    assert complete_repetitions(heads(), header) == (set(), None, 0)


def test_files_and_folders_are_replayed_too(tmp_path, exam_file, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, words = replay(capsys, exam_file, "--model", "adjoint")
    assert code == 0
    assert (tmp_path / "exam_images.h5").exists()
    spool = Spool(tmp_path / "spool")
    exam = broken_off(spool, exam_file, 1000)
    for name in (exam.folder, exam.folder / LOG):
        code, words = replay(capsys, name, "--model", "adjoint", "-o", tmp_path / "i.h5")
        assert code == 0, words


def test_replay_says_what_it_needs(tmp_path, exam_file, capsys):
    spool = Spool(tmp_path / "spool")
    wrong = broken_off(spool, exam_file, 1000, config="no_such_pipeline")
    running = spool.begin(Record(new_id()))
    running.log.append(ConfigFile("x"))
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        ([wrong.record.id, "--spool", spool.folder], "--pipeline"),
        ([running.record.id, "--spool", spool.folder], "still being received"),
        (["2001", "--spool", spool.folder], "there is no exam '2001'"),
        ([], "name an exam"),
        (["x", "--spool", tmp_path / "nothing"], "--spool"),
        ([exam_file, "-o", exam_file], "raw file itself"),
        ([exam_file, "-o", tmp_path / "no" / "i.h5"], "does not exist"),
        ([exam_file, "-o", tmp_path / "i.h5", "--model", "no_such"], "no_such"),
    ):
        code, found = replay(capsys, *arguments)
        assert code == 1
        assert words in found
        assert found.count("\n") == 1
    running.log.close()
    code, words = replay(capsys, running.record.id, "--spool", spool.folder)
    assert code == 1
    assert "before its header" in words
    code, words = replay(capsys, wrong.record.id, "--spool", spool.folder, "--pipeline", "fallback_cgsense", "-o", "/")
    assert code == 1
    options = ("--spool", spool.folder, "--pipeline", "fallback_cgsense", "-o", tmp_path / "i.h5")
    assert replay(capsys, wrong.record.id, *options)[0] == 0
    assert replay(capsys, "--list", "--spool", empty) == (0, f"the spool {empty} holds no exam\n")
    code, words = replay(capsys, "--list", "--spool", spool.folder, "--json")
    assert {one["state"] for one in json.loads(words)} == {"interrupted"}
