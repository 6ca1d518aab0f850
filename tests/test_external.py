"""Our targets behind a real socket, fed with what a real server sent, and what the server sees when things go wrong."""

import struct
import time
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from cases import shared
from peer import data_messages, properties, run_target, run_target_here

from gadgets.chain import run_chain
from gadgets.codec import message_parts
from gadgets.messages import Close, Error, Image, ImageArray, ReconData
from melcore.io.mrd import open_raw

# Recording, its input file, the pipeline of ours that sorts as the recorded one did, and the frames and slices in it.
SCANS = {
    "execute_b_recondata_to_image": ("t32", "mel_cartesian_2d", {"repetition": [0, 1]}),
    "execute_b_recondata_accel2_to_image": ("t32_a2", "mel_cartesian_2d", {"repetition": [0, 1]}),
    "execute_b_recondata_3d_to_image": ("cart3d_24x20x12_4ch", "mel_cartesian_3d", {"repetition": [0]}),
    "execute_b_recondata_cine_to_imagearray": ("cine_32x32_6ph_4ch", "mel_cine_2dt", {"phase": [0, 1, 2, 3, 4, 5]}),
    "execute_b_recondata_multislice_to_image": ("multislice_32x32_3sl_4ch", "mel_cartesian_2d", {"slice": [0, 1, 2]}),
    "execute_b_recondata_multislice_loc_to_image": (
        "multislice_32x32_3sl_4ch",
        "mel_cartesian_2d",
        {"slice": [0, 1, 2]},
    ),
}
# In the first recording: where the samples of its two messages begin.
FIRST_SAMPLES, SECOND_SAMPLES = 2066 + 74, 89713 + 74

every_scan = pytest.mark.parametrize("name", SCANS)


def _recording(name: str, direction: str = "server_to_python") -> bytes:
    return shared(f"gadgetron/traces/{name}.{direction}.bin").read_bytes()


def _in_process(name: str, model: str) -> list[Image]:
    file, pipeline, _ = SCANS[name]
    with open_raw(shared(f"gadgetron/inputs/{file}.h5")) as raw:
        return list(run_chain(pipeline, raw.header_xml, raw.acquisitions(), overrides={"model": model}))


def _order(images: list[Image]) -> list[Image]:
    return sorted(images, key=lambda image: tuple(int(image.header[key]) for key in ("slice", "phase", "repetition")))


def _check_images(images: list[Image], name: str) -> None:
    """Everything but the pixels."""
    bits = [message.bits[0] for message in data_messages(_recording(name)) if isinstance(message, ReconData)]
    # Calibration lines are lines of the image too.
    buffers = [buffer for bit in bits for buffer in (bit.data, bit.reference) if buffer is not None]
    taken = np.concatenate([buffer.headers[buffer.headers["number_of_samples"] > 0] for buffer in buffers])
    sampling = buffers[0].sampling
    (counter, values) = next(iter(SCANS[name][2].items()))
    assert [int(image.header[counter]) for image in _order(images)] == values
    assert sorted(int(image.header["image_index"]) for image in images) == list(range(1, len(images) + 1))
    for image in images:
        head = image.header
        assert image.data.dtype == np.float32
        assert head["data_type"] == 5
        assert head["image_type"] == 1
        assert head["image_series_index"] == 1
        assert head["matrix_size"].tolist() == list(image.data.shape[:0:-1]) == sampling["recon_matrix"].tolist()
        np.testing.assert_array_equal(head["field_of_view"], sampling["recon_fov"])
        # Only readouts that were really taken may give geometry and time.
        same = taken[(taken["idx"]["slice"] == head["slice"]) & (taken["idx"][counter] == head[counter])]
        assert len(same)
        for field in ("position", "read_dir", "phase_dir", "slice_dir", "patient_table_position"):
            np.testing.assert_array_equal(head[field], same[field][0])
        assert head["acquisition_time_stamp"] in same["acquisition_time_stamp"]
        meta = {e.findtext("name"): e.findtext("value") for e in ElementTree.fromstring(image.meta.encode())}
        assert meta["MEL_path_taken"] == "cg-sense"
        assert meta["MEL_model"] == "cg-sense"
        assert float(meta["MEL_quality_scale"]) > 0


@every_scan
def test_recorded_scans_give_the_images_that_the_file_gives_in_process(name):
    answer = run_target_here(_recording(name), "reconstruct", config=properties(model="none"))
    assert answer.code == 0
    assert answer.messages[-1] == Close()
    images = [message for message in answer.messages[:-1] if isinstance(message, Image)]
    assert len(images) == len(answer.messages) - 1
    _check_images(images, name)
    here = _order(_in_process(name, "none"))
    assert len(here) == len(images)
    for image, other in zip(_order(images), here, strict=True):
        # The server's whitening rounds differently, and the maps come from BART through its 32-bit floats.
        np.testing.assert_allclose(image.data, other.data, atol=2e-3 * other.data.max())
        for field in ("position", "slice", "phase", "repetition", "field_of_view", "matrix_size", "image_series_index"):
            np.testing.assert_array_equal(image.header[field], other.header[field])


@every_scan
def test_root_sum_of_squares_is_the_recorded_one(name):
    """The recorded module did this too: values, orientation and order of a real server's run."""
    answer = run_target_here(_recording(name), "simple_recon")
    recorded = data_messages(_recording(name, "python_to_server"))
    assert all(isinstance(message, ImageArray) for message in answer.messages[:-1])

    def pixels(messages):
        for message in messages:
            if isinstance(message, ImageArray):
                data = message.data.transpose(6, 5, 4, 3, 2, 1, 0)
                yield from np.abs(data).reshape(-1, *data.shape[3:])
            elif isinstance(message, Image):
                yield message.data

    found, wanted = list(pixels(answer.messages)), list(pixels(recorded))
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * theirs.max())


@pytest.mark.parametrize("name", ["execute_b_recondata_multislice_to_image"])
def test_adjoint_agrees_with_the_recorded_image_where_coil_maps_are(name):
    """At high signal to noise the map-weighted sum and the root of the sum of squares are the same, up to noise."""
    answer = run_target_here(_recording(name), "reconstruct", config=properties(model="adjoint"))
    recorded = data_messages(_recording(name, "python_to_server"))
    for ours, theirs in zip(answer.messages, recorded, strict=False):
        inside = ours.data > 0
        assert inside.mean() > 0.5
        error = np.linalg.norm((ours.data - theirs.data)[inside]) / np.linalg.norm(theirs.data[inside])
        assert error < 0.03


def test_complex_images_and_arrays_on_request():
    raw = _recording("execute_b_recondata_cine_to_imagearray")
    magnitude = run_target_here(raw, "reconstruct", config=properties(model="adjoint", series=7)).messages[:-1]
    complex_ = run_target_here(raw, "reconstruct", config=properties(model="adjoint", output="complex")).messages[:-1]
    (array,) = run_target_here(raw, "reconstruct", config=properties(model="adjoint", send="array")).messages[:-1]
    assert array.headers.shape == (6, 1, 1)
    assert len(array.meta) == 6
    assert {int(image.header["image_series_index"]) for image in magnitude} == {7}
    for time_, (real, image) in enumerate(zip(magnitude, complex_, strict=True)):
        assert (image.header["data_type"], image.header["image_type"]) == (7, 5)
        tolerance = 1e-5 * real.data.max()
        np.testing.assert_allclose(np.abs(image.data), real.data, atol=tolerance)
        np.testing.assert_allclose(array.data[..., time_, 0, 0].T, image.data, atol=tolerance)
        assert array.headers[time_, 0, 0]["phase"] == image.header["phase"] == time_


@pytest.mark.parametrize(
    "name",
    [
        *["execute_b_recondata_passthrough", "execute_a_waveforms_passthrough", "execute_imagearray_passthrough"],
        *["execute_image_passthrough", "execute_b_bucket_with_waveforms", "connect_a_traj_acq_to_image"],
    ],
)
def test_passthrough_sends_back_what_came(name):
    raw = _recording(name)
    answer = run_target_here(raw, "passthrough", config="<configuration/>")
    wanted = b"".join(bytes(part) for message in data_messages(raw) for part in message_parts(message))
    assert answer.raw == wanted + struct.pack("<H", 4)
    if name.endswith("passthrough"):  # the recorded module did the same
        assert answer.raw == _recording(name, "python_to_server")


def test_started_as_a_server_starts_it_with_bart_and_without_stdin():
    """A process of its own: lazy import by name, descriptor 0 is the socket, BART runs as a child of it."""
    name = "execute_b_recondata_accel2_to_image"
    answer = run_target(_recording(name), "reconstruct", config=properties(model="none"))
    assert (answer.code, answer.messages[-1]) == (0, Close()), answer.log
    _check_images(answer.messages[:-1], name)


def test_process_passes_recon_data_through():
    name = "execute_b_recondata_passthrough"
    answer = run_target(_recording(name), "passthrough")
    assert answer.code == 0, answer.log
    assert answer.raw == _recording(name, "python_to_server")


# What goes wrong, and what the operator reads.


def _fails(answer, words: str) -> None:
    """Told once, after all input was taken, and ended."""
    assert answer.code == 1
    assert answer.messages[-1] == Close()
    errors = [message for message in answer.messages if isinstance(message, Error)]
    assert len(errors) == 1
    assert answer.messages[-2] == errors[0]
    assert words in errors[0].text
    assert "\n" not in errors[0].text


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (properties(modle="none"), "did you mean 'model'"),
        (properties(output="phase"), "'magnitude', 'complex'"),
        (properties(deadline="soon"), "a number"),
        (properties(memory="lots"), "12GiB"),
        (properties(model="no_such_bundle"), "no_such_bundle"),
        (properties(device="abacus"), "abacus"),
        (properties(map_sets=0), "map_sets"),
    ],
)
def test_wrong_settings_are_told_before_anything_is_reconstructed(config, words):
    answer = run_target_here(_recording("execute_b_recondata_to_image"), "reconstruct", config=config)
    _fails(answer, words)
    assert not any(isinstance(message, Image) for message in answer.messages)


def test_bad_data_are_told():
    raw = bytearray(_recording("execute_b_recondata_to_image"))
    place = FIRST_SAMPLES + 8000
    raw[place : place + 800] = np.full(200, np.nan, "<f4").tobytes()
    _fails(run_target_here(bytes(raw), "reconstruct", config=properties(model="none")), "NaN")


def test_header_without_encoding_is_told():
    raw = _recording("execute_b_recondata_to_image")
    start = raw.index(b"<encoding>")
    stop = raw.index(b"</encoding>") + len(b"</encoding>")
    length = raw.index(b"\x03\0", 46) + 2
    shorter = int.from_bytes(raw[length : length + 4], "little") - (stop - start)
    changed = raw[:length] + shorter.to_bytes(4, "little") + raw[length + 4 : start] + raw[stop:]
    _fails(run_target_here(changed, "reconstruct"), "encoding")


def test_unexpected_errors_are_told_too(monkeypatch):
    import gadgets.reconstruct_stage as stage

    monkeypatch.setattr(stage, "to_k_space", lambda *_: 1 / 0)
    _fails(run_target_here(_recording("execute_b_recondata_to_image"), "reconstruct"), "ZeroDivisionError")


def test_images_that_were_finished_before_the_failure_arrive():
    raw = _recording("execute_b_recondata_to_image")
    place = SECOND_SAMPLES + 8000
    broken = raw[:place] + np.full(200, np.nan, "<f4").tobytes() + raw[place + 800 :]
    answer = run_target_here(broken, "reconstruct", config=properties(model="adjoint"))
    _fails(answer, "NaN")
    assert sum(isinstance(message, Image) for message in answer.messages) == 1


def test_garbage_is_told():
    raw = _recording("execute_b_recondata_to_image")
    _fails(run_target_here(raw[:-2] + struct.pack("<H", 999) + b"?" * 3000, "passthrough"), "message id 999")


@pytest.mark.parametrize("fraction", [0.5, 0.99])
def test_a_message_that_ends_half_way_is_told(fraction):
    raw = _recording("execute_b_recondata_to_image")
    _fails(run_target_here(raw[: int(len(raw) * fraction)], "passthrough"), "gone")


def test_an_unknown_target_is_told_and_the_right_ones_listed():
    answer = run_target(_recording("execute_b_recondata_to_image"), "reconstrukt")
    _fails(answer, "did you mean 'reconstruct'")


def test_a_server_that_dies_ends_the_process():
    raw = _recording("execute_b_recondata_to_image")
    begin = time.monotonic()
    answer = run_target(raw[: len(raw) // 2], "passthrough", stay=False, linger=0.3)
    assert answer.code == 1
    assert "TransportError" in answer.log or "the connection broke" in answer.log
    assert time.monotonic() - begin < 60
