"""Stages against a real server's output, pipelines in process, and `mel recon` on whole files."""

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import h5py
import numpy as np
import pytest
from cases import shared
from peer import data_messages

from gadgets.buffer_stage import BufferSettings, bucket_to_buffer
from gadgets.chain import build_chain, read_pipeline, run_chain
from gadgets.header import parse_header
from gadgets.messages import Acquisition, AcquisitionBucket, Image, ReconData
from gadgets.stages import GADGETS, STAGES
from gadgets.targets import TARGETS
from melcore.cli import main
from melcore.errors import ConfigError, DataError
from melcore.io.images import read_images
from melcore.io.mrd import open_raw, write_raw

PIPELINES = Path(__file__).parents[1] / "pipelines"
_BUCKETS = "execute_b_bucket_to_image"

# Recording, input, trigger, settings of the buffer.
RECORDED = {
    "execute_b_recondata_to_image": ("t32", "repetition", {}),
    "execute_b_recondata_accel2_to_image": ("t32_a2", "repetition", {}),
    "execute_b_recondata_3d_to_image": ("cart3d_24x20x12_4ch", "repetition", {}),
    "execute_b_recondata_cine_to_imagearray": (
        "cine_32x32_6ph_4ch",
        "slice",
        {"N_dimension": "phase", "S_dimension": "set"},
    ),
    "execute_b_recondata_multislice_to_image": ("multislice_32x32_3sl_4ch", "slice", {}),
    "execute_b_recondata_multislice_loc_to_image": (
        "multislice_32x32_3sl_4ch",
        "repetition",
        {"split_slices": "false"},
    ),
}


def _recorded(name: str) -> list:
    return data_messages(shared(f"gadgetron/traces/{name}.server_to_python.bin").read_bytes())


def _through(file: str, *steps: tuple[str, dict[str, str]], change=lambda acquisitions: acquisitions) -> list:
    with open_raw(shared(f"gadgetron/inputs/{file}.h5")) as raw:
        header = parse_header(raw.header_xml.encode())
        stream = iter(change(list(raw.acquisitions())))
        for name, values in steps:
            stream = STAGES[name].bind(values, name)(stream, header)
        return list(stream)


def _sorted(name: str, **options) -> list:
    file, trigger, values = RECORDED[name]
    return _through(
        file,
        ("noise_adjust", {}),
        ("remove_readout_oversampling", {}),
        ("accumulate_trigger", {"trigger_dimension": trigger}),
        ("bucket_to_buffer", {"split_slices": "true"} | values),
        **options,
    )


def _check_buffers(found, wanted) -> None:
    assert (found is None) == (wanted is None)
    if found is None:
        return
    assert found.data.shape == wanted.data.shape
    np.testing.assert_allclose(found.data, wanted.data, rtol=0, atol=1e-6 * np.abs(wanted.data).max())
    np.testing.assert_array_equal(found.headers, wanted.headers)
    for field in ("encoded_fov", "recon_fov", "encoded_matrix", "recon_matrix", "limits"):
        np.testing.assert_array_equal(found.sampling[field], wanted.sampling[field])


@pytest.mark.parametrize("name", RECORDED)
def test_sorted_k_space_is_the_one_of_a_real_server(name):
    found, wanted = _sorted(name), _recorded(name)
    assert len(found) == len(wanted) > 0
    for ours, theirs in zip(found, wanted, strict=True):
        assert isinstance(theirs, ReconData)
        assert len(ours.bits) == len(theirs.bits) == 1
        _check_buffers(ours.bits[0].data, theirs.bits[0].data)
        _check_buffers(ours.bits[0].reference, theirs.bits[0].reference)


def test_buckets_are_those_of_a_real_server():
    found = _through(
        "t32",
        ("noise_adjust", {}),
        ("remove_readout_oversampling", {}),
        ("accumulate_trigger", {"trigger_dimension": "repetition"}),
    )
    wanted = [message for message in _recorded(_BUCKETS) if isinstance(message, AcquisitionBucket)]
    assert len(found) == len(wanted) == 2
    for ours, theirs in zip(found, wanted, strict=True):
        for kind in ("data", "reference"):
            pairs = list(zip(getattr(ours, kind), getattr(theirs, kind), strict=True))
            assert pairs
            for one, other in pairs:
                assert one.header == other.header
                np.testing.assert_allclose(one.data, other.data, atol=1e-6 * np.abs(other.data).max())
            for one, other in zip(
                getattr(ours, f"{kind}_statistics"), getattr(theirs, f"{kind}_statistics"), strict=True
            ):
                for values, others in zip(one, other, strict=True):
                    np.testing.assert_array_equal(values, others)


def test_order_of_acquisition_does_not_matter():
    name = "execute_b_recondata_3d_to_image"
    rng = np.random.default_rng(1)

    def shuffled(acquisitions):
        noise, data = acquisitions[:1], acquisitions[1:]
        return noise + [data[index] for index in rng.permutation(len(data))]

    (found,), (wanted,) = _sorted(name, change=shuffled), _recorded(name)
    _check_buffers(found.bits[0].data, wanted.bits[0].data)


def test_phases_that_do_not_start_at_zero_keep_their_own_frames():
    """A real server leaves the first frame empty and merges the last two."""

    def later(acquisitions):
        for acquisition in acquisitions:
            acquisition.header["idx"]["phase"] += 1
        return acquisitions

    name = "execute_b_recondata_cine_to_imagearray"
    (found,), (wanted,) = _sorted(name, change=later), _recorded(name)
    data = wanted.bits[0].data.data
    np.testing.assert_allclose(found.bits[0].data.data, data, atol=1e-6 * np.abs(data).max())


def test_without_noise_readouts_nothing_is_whitened_and_it_is_said():
    with open_raw(shared("gadgetron/inputs/t32.h5")) as raw:
        header = parse_header(raw.header_xml.encode())
        data = list(raw.acquisitions())[1:]
        found = list(STAGES["noise_adjust"].bind({}, "")(iter(data), header))
    for one, other in zip(found, data, strict=True):
        np.testing.assert_array_equal(one.data, other.data)
    assert "not whitened" in header.provenance["whitening"]


def test_readouts_that_do_not_fit_are_refused():
    def first(**fields):
        def change(acquisitions):
            for name, value in fields.items():
                counters = acquisitions[9].header["idx"]
                (counters if name in counters.dtype.names else acquisitions[9].header)[name] = value
            return acquisitions

        return change

    name = "execute_b_recondata_to_image"
    for fields, words in (
        ({"kspace_encode_step_1": 40}, "outside the encoded matrix"),
        ({"kspace_encode_step_2": 1}, "outside the encoded matrix"),
        ({"encoding_space_ref": 1}, "encoding 1"),
        ({"center_sample": 60}, "does not fit"),
    ):
        with pytest.raises(DataError, match=words):
            _sorted(name, change=first(**fields))

    def fewer(acquisitions):
        header = acquisitions[9].header.copy()
        header["active_channels"] = 3
        acquisitions[9] = Acquisition(header, acquisitions[9].trajectory, acquisitions[9].data[:3])
        return acquisitions

    with pytest.raises(DataError, match="coils"):
        _sorted(name, change=fewer)


def test_calibration_lines_without_parallel_imaging_are_refused():
    (bucket, _) = [message for message in _recorded(_BUCKETS) if isinstance(message, AcquisitionBucket)]
    with open_raw(shared("gadgetron/inputs/t32.h5")) as raw:
        xml = raw.header_xml
    start, stop = xml.index("<parallelImaging>"), xml.index("</parallelImaging>") + len("</parallelImaging>")
    header = parse_header((xml[:start] + xml[stop:]).encode())
    with pytest.raises(DataError, match="parallelImaging"):
        list(bucket_to_buffer(iter([bucket]), header, BufferSettings()))


# Pipelines.


@pytest.mark.parametrize("path", sorted(PIPELINES.glob("*.xml")), ids=lambda path: path.stem)
def test_pipelines_that_ship_are_what_a_real_server_accepts(path):
    """Held against the configurations that a real server ran: same elements, libraries and class names."""
    root = ElementTree.parse(path).getroot()
    example = ElementTree.parse(shared("gadgetron/configs/b_image.xml")).getroot()
    assert [element.tag for element in root] == [element.tag for element in example]
    assert root.findtext("version") == "2"
    for kind in ("reader", "writer"):
        ours, theirs = ([[part.text for part in e] for e in tree.iter(kind)] for tree in (root, example))
        assert ours == theirs
    gadgets = [(e.findtext("dll"), e.findtext("classname")) for e in root.iter("gadget")]
    # The server whose configurations were kept had symmetric echoes only; its library has this gadget too.
    assert gadgets.pop(1) == ("gadgetron_mricore", "AsymmetricEchoAdjustROGadget")
    assert gadgets == [(e.findtext("dll"), e.findtext("classname")) for e in example.iter("gadget")]
    (node,) = root.iter("external")
    assert [child.tag for child in node] == ["execute", "configuration"]
    assert node.find("execute").attrib == {"name": "gadgets", "target": "reconstruct", "type": "python"}
    assert build_chain(path)


@pytest.mark.parametrize("name", ["native", "native_multislice", "native_multislice_loc"])
def test_pipeline_of_standard_gadgets_gives_what_the_server_gave(name):
    """SimpleRecon, split and extract in process against the files that a real server's client wrote."""
    file = {"native": "t32"}.get(name, "multislice_32x32_3sl_4ch")
    result = {"native": "t32"}.get(name, name.removeprefix("native_") + "_32x32_3sl_4ch")
    with open_raw(shared(f"gadgetron/inputs/{file}.h5")) as raw:
        config = shared(f"gadgetron/configs/{name}.xml")
        images = list(run_chain(config, raw.header_xml, raw.acquisitions()))
    (series,) = read_images(shared(f"gadgetron/inputs/native_simplerecon_of_{result}.h5"))
    assert len(images) == len(series.headers)
    for image, header, data in zip(images, series.headers, series.data, strict=True):
        np.testing.assert_allclose(image.data, data, atol=1e-6 * data.max())
        for field in ("matrix_size", "field_of_view", "position", "slice_dir", "slice", "repetition", "image_index"):
            np.testing.assert_array_equal(image.header[field], header[field])


def _pipeline(tmp_path: Path, stream: str) -> Path:
    path = tmp_path / "pipeline.xml"
    path.write_text(f"<configuration><version>2</version><stream>{stream}</stream></configuration>")
    return path


_EXTERNAL = (
    '<external><execute name="gadgets" target="reconstruct" type="python"/><configuration>{}</configuration></external>'
)


@pytest.mark.parametrize(
    ("stream", "words"),
    [
        ("<gadget><classname>NoiseAjustGadget</classname></gadget>", "did you mean 'NoiseAdjustGadget'"),
        ("<gadget><classname>GrappaGadget</classname></gadget>", "GrappaGadget.*BucketToBufferGadget"),
        ('<external><execute name="other" target="thing"/></external>', "other.thing"),
        ('<external><connect port="19000"/></external>', "without <execute>"),
        ("<branch/>", "<branch>"),
        ("", "empty"),
        (_EXTERNAL.format('<property name="bundel" value="x"/>'), "did you mean 'bundle'"),
        (_EXTERNAL.format('<property name="series" value="1.5"/>'), "whole number"),
        (
            '<gadget><classname>BucketToBufferGadget</classname><property name="N_dimension" value="time"/></gadget>',
            "'phase'",
        ),
    ],
)
def test_wrong_pipelines_name_what_is_wrong(tmp_path, stream, words):
    with pytest.raises(ConfigError, match=words):
        build_chain(_pipeline(tmp_path, stream))


def test_unknown_overrides_and_pipelines_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="did you mean 'model'"):
        build_chain("fallback_cgsense", {"modle": "none"})
    with pytest.raises(ConfigError, match="mel_cartesian_3d"):
        read_pipeline("mel_cartesian_4d")
    old = tmp_path / "old.xml"
    old.write_text("<gadgetronStreamConfiguration/>")
    with pytest.raises(ConfigError, match="version 2"):
        read_pipeline(old)
    old.write_text("<configuration>")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pipeline(old)


def test_every_stage_is_a_target_and_no_module_bears_its_name():
    modules = {path.stem for path in (Path(__file__).parents[1] / "gadgets").glob("*.py")}
    assert sorted(STAGES) == sorted(TARGETS)
    assert not modules & set(TARGETS)
    assert len(GADGETS) == len([stage for stage in STAGES.values() if stage.gadget])


# mel recon.


@pytest.mark.parametrize("output", ["magnitude", "complex"])
@pytest.mark.parametrize(
    ("file", "pipeline", "shape"),
    [
        ("cart3d_24x20x12_4ch", "mel_cartesian_3d", (1, 1, 12, 20, 24)),
        ("cine_32x32_6ph_4ch", "mel_cine_2dt", (6, 1, 1, 32, 32)),
        ("multislice_32x32_3sl_4ch", "mel_cartesian_2d", (3, 1, 1, 32, 32)),
    ],
)
def test_recon_command_writes_images(file, pipeline, shape, output, tmp_path, capsys):
    target = tmp_path / "images.h5"
    raw = str(shared(f"gadgetron/inputs/{file}.h5"))
    assert main(["recon", raw, "--model", "none", "-o", str(target), "--output-type", output, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["pipeline"], summary["path_taken"], summary["images"]) == (pipeline, ["cg-sense"], shape[0])
    (series,) = read_images(target, pipeline)
    assert series.data.shape == shape
    assert series.data.dtype == (np.complex64 if output == "complex" else np.float32)
    assert np.abs(series.data).max() > 0
    assert summary["field_of_view_m"][0] * 1e3 == pytest.approx(series.headers["field_of_view"][0, 2])
    assert list(tmp_path.iterdir()) == [target]


def test_recon_command_agrees_with_a_reconstruction_by_numpy(tmp_path):
    """Fully sampled, at high signal to noise: the root of the sum of squares of whitened coil images, from the file."""
    target = tmp_path / "images.h5"
    file = shared("gadgetron/inputs/multislice_32x32_3sl_4ch.h5")
    assert main(["recon", str(file), "--model", "adjoint", "-o", str(target)]) == 0
    (series,) = read_images(target)
    with open_raw(file) as raw:
        acquisitions = list(raw.acquisitions())
    noise = acquisitions[0]
    covariance = noise.data @ noise.data.conj().T / (noise.data.shape[1] - 1)
    dwell = float(acquisitions[1].header["sample_time_us"]) / float(noise.header["sample_time_us"])
    whitener = np.linalg.inv(np.linalg.cholesky(covariance)) * np.sqrt(2 * dwell * 0.8)
    k_space = np.zeros((3, 4, 32, 64), complex)
    for acquisition in acquisitions[1:]:
        counters = acquisition.header["idx"]
        k_space[counters["slice"], :, counters["kspace_encode_step_1"]] = whitener @ acquisition.data
    axes = (-2, -1)
    images = np.fft.fftshift(np.fft.ifftn(np.fft.ifftshift(k_space, axes=axes), axes=axes, norm="ortho"), axes=axes)
    wanted = np.sqrt((np.abs(images[..., 16:48]) ** 2).sum(axis=1))
    for header, image in zip(series.headers, series.data[:, 0, 0], strict=True):
        inside = image > 0
        difference = (image - wanted[header["slice"]])[inside]
        assert np.linalg.norm(difference) < 0.03 * np.linalg.norm(wanted[header["slice"]][inside])


def _rewritten(tmp_path: Path, change) -> str:
    path = tmp_path / "changed.h5"
    with open_raw(shared("gadgetron/inputs/t32.h5")) as raw:
        xml, acquisitions = change(raw.header_xml, list(raw.acquisitions()))
        write_raw(path, xml, acquisitions)
    return str(path)


def _second_encoding(xml, acquisitions):
    start, stop = xml.index("<encoding>"), xml.index("</encoding>") + len("</encoding>")
    for acquisition in acquisitions[20:]:
        acquisition.header["encoding_space_ref"] = 1
    return xml[:stop] + xml[start:stop] + xml[stop:], acquisitions


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda xml, acquisitions: (xml, acquisitions[:1]), "none of an image"),
        (_second_encoding, "only the first encoding"),
        (lambda xml, acquisitions: (xml.replace(">cartesian<", ">spiral<"), acquisitions), "spiral"),
        (lambda xml, acquisitions: (xml, acquisitions[:3]), "calibration|centre"),
    ],
)
def test_recon_command_refuses_what_it_cannot_do_and_writes_nothing(change, words, tmp_path, capsys):
    raw = _rewritten(tmp_path, change)
    target = tmp_path / "images.h5"
    assert main(["recon", raw, "--model", "none", "-o", str(target)]) == 1
    error = capsys.readouterr().err
    assert any(word in error for word in words.split("|"))
    assert error.count("\n") == 1
    assert not target.exists()


def test_recon_command_with_wrong_arguments(tmp_path, capsys):
    raw = str(shared("gadgetron/inputs/t32.h5"))
    for arguments, words in (
        (["-o", str(tmp_path / "no" / "images.h5")], "does not exist"),
        (["-o", str(tmp_path / "i.h5"), "--model", "no_such"], "no_such"),
        (["-o", str(tmp_path / "i.h5"), "--memory", "lots"], "12GiB"),
        (["-o", str(tmp_path / "i.h5"), "--deadline", "-1"], "deadline"),
        (["-o", str(tmp_path / "i.h5"), "--pipeline", "nothing"], "fallback_cgsense"),
    ):
        assert main(["recon", raw, *arguments]) == 1
        assert words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_recon_command_does_not_overwrite_its_input(tmp_path, capsys):
    raw = tmp_path / "raw.h5"
    raw.write_bytes(shared("gadgetron/inputs/t32.h5").read_bytes())
    assert main(["recon", str(raw), "--model", "none", "-o", str(raw)]) == 1
    assert "raw file itself" in capsys.readouterr().err
    with h5py.File(raw) as file:
        assert "dataset" in file


def test_chain_checks_its_settings_before_it_takes_a_message():
    def forbidden():
        raise AssertionError("a message was taken")
        yield

    with open_raw(shared("gadgetron/inputs/t32.h5")) as raw, pytest.raises(ConfigError, match="series"):
        run_chain("fallback_cgsense", raw.header_xml, forbidden(), overrides={"series": "-1"})


def test_chain_that_ends_too_early_is_an_error(tmp_path):
    path = _pipeline(tmp_path, "<gadget><classname>NoiseAdjustGadget</classname></gadget>")
    with open_raw(shared("gadgetron/inputs/t32.h5")) as raw, pytest.raises(DataError, match="a gadget missing"):
        assert not [image for image in run_chain(path, raw.header_xml, raw.acquisitions()) if isinstance(image, Image)]
