"""ISMRMRD files: what we write others read, what others write we read, and damaged files are refused in one line."""

import ctypes
import io
import struct
import subprocess
import time
import warnings

import h5py
import numpy as np
import pytest
import torch

from melcore import layout
from melcore.errors import DataError, MelError
from melcore.io import mrd_types
from melcore.io.checks import all_finite
from melcore.io.images import ImageSeries, read_images, write_images
from melcore.io.load import load_k_space
from melcore.io.mrd import IMAGE_HEADER, Acquisition, Waveform, has_flag, open_raw, parse_header, scan_info, write_raw
from tests.cases import centred_fft, header_xml, random_complex, readout, shared

with warnings.catch_warnings():  # importing ismrmrd resets the filters
    import ismrmrd


def lines(coils=3, z=2, y=5, samples=8, **counters):
    data = random_complex((z, y, coils, samples))
    for i in range(z):
        for j in range(y):
            yield readout(data[i, j], kspace_encode_step_2=i, kspace_encode_step_1=j, **counters)


@pytest.fixture
def raw_file(tmp_path):
    path = tmp_path / "raw.h5"
    write_raw(path, header_xml((2, 5, 4), 3), lines())
    return path


def test_headers_have_the_layout_of_the_c_structures():
    pairs = [
        (mrd_types.ACQUISITION_HEADER, ismrmrd.hdf5.acquisition_header_dtype, ismrmrd.AcquisitionHeader, 340),
        (mrd_types.IMAGE_HEADER, ismrmrd.hdf5.image_header_dtype, ismrmrd.ImageHeader, 198),
        (mrd_types.WAVEFORM_HEADER, ismrmrd.hdf5.waveform_header_dtype, ismrmrd.WaveformHeader, 40),
    ]
    for ours, theirs, structure, size in pairs:
        assert ours == theirs
        assert ours.itemsize == ctypes.sizeof(structure) == size


def test_the_ismrmrd_package_reads_what_we_write(tmp_path):
    path = tmp_path / "raw.h5"
    data = random_complex((3, 7))
    plain = readout(data, flags=[mrd_types.IS_NOISE], kspace_encode_step_1=4, repetition=2)
    plain.header["trajectory_dimensions"] = 2
    written = Acquisition(plain.header, np.arange(14, dtype=np.float32).reshape(7, 2), data)
    wave_header = np.zeros((), mrd_types.WAVEFORM_HEADER)
    wave_header["channels"], wave_header["number_of_samples"], wave_header["waveform_id"] = 2, 3, 1
    wave = Waveform(wave_header[()], np.arange(6, dtype=np.uint32).reshape(2, 3))
    write_raw(path, header_xml((1, 5, 4), 3), [written], [wave])
    with ismrmrd.Dataset(path, mode="r") as dataset:
        read = dataset.read_acquisition(0)
        assert dataset.number_of_acquisitions() == 1
        assert bytes(read.getHead()) == written.header.tobytes()
        np.testing.assert_array_equal(read.data, data)
        np.testing.assert_array_equal(read.traj, written.trajectory)
        np.testing.assert_array_equal(dataset.read_waveform(0).data, wave.data)
        assert dataset.read_xml_header().decode() == header_xml((1, 5, 4), 3)
    with open_raw(path) as raw:
        (again,), (wave_again,) = raw.acquisitions(), raw.waveforms()
        assert again.header.tobytes() == written.header.tobytes()
        np.testing.assert_array_equal(again.trajectory, written.trajectory)
        np.testing.assert_array_equal(wave_again.data, wave.data)
        assert raw.waveform_count == 1


@pytest.fixture(scope="module")
def foreign_file(tmp_path_factory):
    """Written by the C++ library, which pads the rows of the table."""
    path = tmp_path_factory.mktemp("foreign") / "phantom.h5"
    command = ["ismrmrd_generate_cartesian_shepp_logan", "-m", "64", "-c", "4", "-r", "3", "-C", "-o", str(path)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("ismrmrd-tools is not installed")
    return path


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_we_read_what_the_cpp_library_writes(foreign_file, chunk):
    with open_raw(foreign_file) as raw, ismrmrd.Dataset(foreign_file, mode="r") as dataset:
        acquisitions = list(raw.acquisitions(chunk))
        assert len(acquisitions) == raw.count == dataset.number_of_acquisitions()
        np.testing.assert_array_equal(raw.headers(), [acquisition.header for acquisition in acquisitions])
        for index in (0, 1, raw.count // 2, raw.count - 1):
            theirs = dataset.read_acquisition(index)
            assert acquisitions[index].header.tobytes() == bytes(theirs.getHead())
            np.testing.assert_array_equal(acquisitions[index].data, theirs.data)


def test_bulk_reading_is_at_least_twenty_times_faster(foreign_file):
    with open_raw(foreign_file) as raw:
        list(raw.acquisitions())
        start = time.perf_counter()
        count = sum(1 for _ in raw.acquisitions())
        bulk = (time.perf_counter() - start) / count
    with ismrmrd.Dataset(foreign_file, mode="r") as dataset:
        start = time.perf_counter()
        for index in range(50):
            dataset.read_acquisition(index)
        single = (time.perf_counter() - start) / 50
    assert bulk * 20 < single


def test_flags_are_those_of_the_ismrmrd_package():
    flags = (1 << 18) | (1 << 20) | (1 << 63)
    acquisition = ismrmrd.Acquisition()
    acquisition.flags = flags
    for flag in range(1, 65):
        assert has_flag(flags, flag) == bool(acquisition.is_flag_set(flag))
    assert has_flag(np.array([flags, 0], np.uint64), mrd_types.IS_NOISE).tolist() == [True, False]
    assert mrd_types.IS_NOISE == ismrmrd.ACQ_IS_NOISE_MEASUREMENT
    assert mrd_types.IS_CALIBRATION_AND_IMAGING == ismrmrd.ACQ_IS_PARALLEL_CALIBRATION_AND_IMAGING
    assert mrd_types.IS_PHASE_STABILISATION == ismrmrd.ACQ_IS_PHASE_STABILIZATION


def test_scan_info_is_in_metres():
    header = parse_header(header_xml((2, 5, 4), 3))
    acquisition = readout(random_complex((3, 8)))
    acquisition.header["position"] = (10, -20, 30)
    info = scan_info(header, 0, acquisition.header)
    assert info.encoded_matrix == (2, 5, 8)
    assert info.recon_matrix == (2, 5, 4)
    assert info.encoded_field_of_view == pytest.approx((0.016, 0.010, 0.004))
    assert info.geometry[0].field_of_view == pytest.approx((0.008, 0.010, 0.004))
    assert info.geometry[0].position == pytest.approx((0.01, -0.02, 0.03))
    assert (info.trajectory, info.field_strength) == ("cartesian", 3.0)


# --- damaged files


def _truncated(path):
    path.write_bytes(path.read_bytes()[:-1000])


def _not_hdf5(path):
    path.write_bytes(b"PK\x03\x04" * 100)


def _edit(change):
    def damage(path):
        with h5py.File(path, "r+") as file:
            change(file)

    return damage


def _without(name):
    return _edit(lambda file: file.pop(name))


def _header(xml):
    def change(file):
        file["dataset/xml"][0] = xml

    return _edit(change)


def _row(index, **fields):
    def change(file):
        rows = file["dataset/data"][...]
        for name, value in fields.items():
            if name == "data":
                rows[index]["data"] = value
            else:
                rows[index]["head"][name] = value
        file["dataset/data"][...] = rows

    return _edit(change)


_NO_ENCODING = (
    '<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><experimentalConditions><H1resonanceFrequency_Hz>1'
    "</H1resonanceFrequency_Hz></experimentalConditions></ismrmrdHeader>"
)
_NAN = np.array([np.nan] + [0] * 47, np.float32)

DAMAGES = {
    "missing": (lambda path: path.unlink(), "does not exist"),
    "truncated": (_truncated, "truncated"),
    "not HDF5": (_not_hdf5, "not an HDF5 file"),
    "not ISMRMRD": (_edit(lambda file: file.move("dataset", "other")), "no group 'dataset'"),
    "no header": (_without("dataset/xml"), r"no header \(xml\)"),
    "no table": (_without("dataset/data"), r"no acquisitions \(data\)"),
    "no rows": (_edit(lambda file: file["dataset/data"].resize(0, axis=0)), r"no acquisitions \(data\)"),
    "not XML": (_header("<ismrmrd"), "not a readable ISMRMRD header"),
    "other XML": (_header("<html/>"), "not a readable ISMRMRD header"),
    "no encoding": (_header(_NO_ENCODING), "no <encoding>"),
    "coils change": (
        _row(6, active_channels=4, number_of_samples=6),
        "acquisition 6 .* has 4 coils, but acquisition 0 has 3",
    ),
    "NaN": (_row(7, data=_NAN), "acquisition 7 .* NaN or infinity"),
    "infinity": (_row(3, data=_NAN * 0 + np.inf), "acquisition 3 .* NaN or infinity"),
    "short row": (_row(2, data=_NAN[:10]), "acquisition 2 .* 3 coils x 8 samples, but it holds 5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_refused_in_one_line(raw_file, damage):
    change, message = DAMAGES[damage]
    change(raw_file)
    with pytest.raises(DataError, match=message) as caught, open_raw(raw_file) as raw:
        list(raw.acquisitions(chunk=4))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("samples", [8, 20000])
def test_large_values_are_told_from_infinite_ones(samples):
    large = random_complex((3, samples)) * np.float32(1e30)
    assert all_finite(large)
    assert all_finite(large.T)
    for value in (np.nan, np.inf, complex(0, -np.inf)):
        large[1, samples // 2] = value
        assert not all_finite(large)
        assert not all_finite(large.T)


def test_noise_may_have_another_number_of_coils_until_it_is_used(tmp_path):
    noise = readout(random_complex((2, 9)), flags=[mrd_types.IS_NOISE])
    write_raw(tmp_path / "raw.h5", header_xml((2, 5, 4), 3), [noise, *lines()])
    with open_raw(tmp_path / "raw.h5") as raw:
        assert len(list(raw.acquisitions())) == 11
    with pytest.raises(DataError, match=r"noise scan .* has 2 coils, but the image lines .* have 3"):
        load_k_space(tmp_path / "raw.h5")


def test_a_failing_writer_leaves_the_old_file_and_nothing_else(raw_file):
    before = raw_file.read_bytes()

    def breaks_off():
        yield from lines()
        raise RuntimeError("scanner stopped")

    with pytest.raises(RuntimeError, match="scanner stopped"):
        write_raw(raw_file, header_xml((2, 5, 4), 3), breaks_off())
    assert raw_file.read_bytes() == before
    assert list(raw_file.parent.iterdir()) == [raw_file]


def test_acquisitions_that_contradict_their_header_are_not_written(tmp_path):
    wrong = readout(random_complex((3, 8)))._replace(data=random_complex((3, 7)))
    with pytest.raises(DataError, match=r"announces \(3, 8\)"):
        write_raw(tmp_path / "raw.h5", header_xml((1, 5, 4), 3), [wrong])
    assert not list(tmp_path.iterdir())


# --- images


def image_series(index=1, n=2, complex_data=True):
    headers = np.zeros(n, IMAGE_HEADER)
    headers["version"], headers["image_series_index"], headers["image_index"] = 1, index, np.arange(n)
    data = random_complex((n, 1, 3, 4, 5), seed=index)
    return ImageSeries(headers, data if complex_data else np.abs(data), ("<ismrmrdMeta/>", "")[:n])


@pytest.mark.parametrize("complex_data", [True, False])
def test_the_ismrmrd_package_reads_our_images(tmp_path, complex_data):
    path, series = tmp_path / "images.h5", image_series(complex_data=complex_data)
    write_images(path, "mel", header_xml((3, 4, 5), 1), [series])
    with ismrmrd.Dataset(path, "mel", mode="r") as dataset:
        assert dataset.number_of_images("image_1") == 2
        image = dataset.read_image("image_1", 1)
        np.testing.assert_array_equal(image.data, series.data[1])
        assert image.data.dtype == (np.complex64 if complex_data else np.float32)
        assert list(image.matrix_size) == [5, 4, 3]
        assert b"encodedSpace" in dataset.read_xml_header()
    (again,) = read_images(path)
    np.testing.assert_array_equal(again.data, series.data)
    assert again.metas == series.metas
    assert again.headers["matrix_size"].tolist() == [[5, 4, 3]] * 2


def test_we_read_images_of_the_ismrmrd_package(tmp_path):
    data = random_complex((1, 3, 4, 5))
    with ismrmrd.Dataset(tmp_path / "images.h5", "run") as dataset:
        for scale in (1, 2):
            dataset.append_image("image_7", ismrmrd.Image.from_array(scale * data, transpose=False))
    (series,) = read_images(tmp_path / "images.h5", "run")
    np.testing.assert_array_equal(series.data, np.stack([data, 2 * data]))


def test_we_read_images_of_gadgetrons_client():
    (series,) = read_images(shared("gadgetron/inputs/native_simplerecon_of_multislice_32x32_3sl_4ch.h5"))
    assert series.data.shape == (3, 1, 1, 32, 32)
    assert series.headers["measurement_uid"].tolist() == [4711] * 3
    assert np.isfinite(series.data).all()
    assert series.data.max() > 0


def test_images_are_appended_beside_raw_data(raw_file):
    write_images(raw_file, "truth", "", [image_series(1), image_series(4, complex_data=False)], append=True)
    write_images(raw_file, "truth", "", [image_series(2)], append=True)
    with open_raw(raw_file) as raw:
        assert raw.count == 10
    (series,) = read_images(raw_file, "truth")
    assert series.headers["image_series_index"].tolist() == [2, 2]
    with pytest.raises(DataError, match="no group 'magnitude'; its groups with images are: 'truth'"):
        read_images(raw_file, "magnitude")


@pytest.mark.parametrize(
    "series",
    [
        [],
        [image_series(1), image_series(1)],
        [image_series()._replace(data=random_complex((3, 4, 5)))],
        [image_series()._replace(metas=("",))],
    ],
)
def test_unfit_images_are_not_written(tmp_path, series):
    with pytest.raises(MelError):
        write_images(tmp_path / "images.h5", "mel", "", series)
    assert not list(tmp_path.iterdir())


# --- from file to k-space


def _recon_data(trace):
    """Buffers and references that a real server made of a file."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from gadgetron.types.recon_data import read_recon_data
    stream, bits = io.BytesIO(shared(f"gadgetron/traces/{trace}.server_to_python.bin").read_bytes()), []
    while (identifier := struct.unpack("<H", stream.read(2))[0]) != 4:
        if identifier in (2, 3):
            stream.read(struct.unpack("<I", stream.read(4))[0])
        elif identifier == 1:
            stream.read(1024)
        else:
            assert identifier == 1023
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                bits.extend(read_recon_data(stream))
    return bits


@pytest.mark.parametrize(
    ("source", "trace"),
    [
        ("cart3d_24x20x12_4ch", "execute_b_recondata_3d_to_image"),
        ("cine_32x32_6ph_4ch", "execute_b_recondata_cine_to_imagearray"),
        ("multislice_32x32_3sl_4ch", "execute_b_recondata_multislice_loc_to_image"),
    ],
)
def test_k_space_equals_what_a_real_gadgetron_makes_of_the_file(source, trace):
    (bit,) = _recon_data(trace)
    k_space, calibration = load_k_space(shared(f"gadgetron/inputs/{source}.h5"))
    for ours, theirs in ((k_space, bit.data), (calibration, bit.ref)):
        if theirs is None:
            assert ours is None
            continue
        expected = layout.k_space_from_gadgetron(theirs.data)
        np.testing.assert_allclose(ours.data, expected, atol=2e-6 * np.abs(expected).max())
        np.testing.assert_array_equal(ours.mask.expand(ours.data.shape), expected != 0)
    assert k_space.noise.whitened


def load(tmp_path, acquisitions, xml):
    write_raw(tmp_path / "raw.h5", xml, acquisitions)
    return load_k_space(tmp_path / "raw.h5")


def test_slices_and_repetitions_become_batch_and_time_and_averages_are_averaged(tmp_path):
    data = random_complex((2, 2, 3, 5, 4, 6))  # average, slice, repetition, y, coil, x
    scan = [
        readout(data[a, s, r, y], average=a, slice=s, repetition=r + 1, kspace_encode_step_1=y)
        for a, s, r, y in np.ndindex(2, 2, 3, 5)
    ]
    for number, acquisition in enumerate(scan):
        acquisition.header["position"] = (0, 0, 10 * acquisition.header["idx"]["slice"])
        acquisition.header["scan_counter"] = number
    k_space, calibration = load(tmp_path, scan[::-1], header_xml((1, 5, 6), 4, oversampling=1))
    expected = data.mean(0).transpose(0, 3, 1, 2, 4)[:, :, :, np.newaxis]
    np.testing.assert_allclose(k_space.data, expected, atol=1e-6)
    assert k_space.mask.all()
    assert calibration is None
    assert not k_space.noise.whitened
    assert [geometry.position[2] for geometry in k_space.info.geometry] == pytest.approx([0, 0.01])
    assert k_space.info.provenance["time"] == "repetition"


def test_partial_fourier_and_asymmetric_echoes_lie_around_the_centre(tmp_path):
    image = random_complex((4, 1, 8, 12))
    full = centred_fft(image, (-3, -2, -1))
    # Lines 0, 1 and samples 0, 1, 2 were not acquired; counters and samples start at 0 all the same.
    scan = [readout(full[:, 0, y, 3:], centre=3, kspace_encode_step_1=y - 2) for y in range(2, 8)]
    k_space, _ = load(tmp_path, scan, header_xml((1, 8, 12), 4, oversampling=1, centre=(0, 2)))
    expected = np.where((np.arange(8) >= 2)[:, np.newaxis] & (np.arange(12) >= 3), full, 0)
    np.testing.assert_allclose(k_space.data[0, :, 0], expected, atol=1e-6)
    assert k_space.mask.sum() == 6 * 9


def test_removing_oversampling_keeps_the_middle_of_the_field_of_view(tmp_path):
    image = np.zeros((2, 1, 5, 12), np.complex64)
    image[..., 3:9] = random_complex((2, 1, 5, 6))
    full = centred_fft(image, (-2, -1))
    scan = [readout(full[:, 0, y], kspace_encode_step_1=y) for y in range(5)]
    k_space, _ = load(tmp_path, scan, header_xml((1, 5, 6), 2))
    np.testing.assert_allclose(k_space.data[0, :, 0], centred_fft(image[..., 3:9], (-2, -1)), atol=1e-5)


def test_whitened_noise_has_variance_two_and_no_correlation(tmp_path):
    mixing = random_complex((3, 3), seed=1)
    noise = readout(mixing @ random_complex((3, 4096), seed=2), flags=[mrd_types.IS_NOISE])
    noise.header["sample_time_us"] = 2 * 0.793 * 5  # the scale factor is then 1
    data = random_complex((64, 3, 64), seed=3)
    scan = [readout(mixing @ data[y], kspace_encode_step_1=y) for y in range(64)]
    k_space, _ = load(tmp_path, [noise, *scan], header_xml((1, 64, 64), 3, oversampling=1))
    samples = k_space.data[0].reshape(3, -1).numpy()
    np.testing.assert_allclose(samples @ samples.conj().T / samples.shape[1], np.eye(3), atol=0.06)


def test_calibration_lines_go_to_the_calibration_alone(tmp_path):
    data = random_complex((8, 2, 6))
    only, both = [mrd_types.IS_CALIBRATION], [mrd_types.IS_CALIBRATION_AND_IMAGING]
    flags = [(), None, both, only, both, only, (), None]
    scan = [readout(data[y], flags=f, kspace_encode_step_1=y) for y, f in enumerate(flags) if f is not None]
    k_space, calibration = load(tmp_path, scan, header_xml((1, 8, 6), 2, oversampling=1))
    assert k_space.mask.flatten().nonzero().flatten().tolist() == [0, 2, 4, 6]
    assert calibration.mask.flatten().nonzero().flatten().tolist() == [2, 3, 4, 5]
    np.testing.assert_allclose(calibration.data[0, :, 0, 0, 2:6].permute(1, 0, 2), data[2:6])


@pytest.mark.parametrize(
    ("scan", "message"),
    [
        ([readout(random_complex((2, 6)), flags=[mrd_types.IS_NOISE])], "none is a line of the image"),
        ([readout(random_complex((2, 6)), kspace_encode_step_1=9)], "line 9 of 5"),
        ([readout(random_complex((2, 6)), flags=[mrd_types.IS_REVERSE])], "1 of 1 readouts run in the other"),
        ([readout(random_complex((2, n)), kspace_encode_step_1=n) for n in (3, 4)], "readouts differ in length"),
        ([readout(random_complex((2, 7)), centre=0)], "do not fit"),
    ],
)
def test_scans_that_fit_no_grid_are_refused(tmp_path, scan, message):
    with pytest.raises(DataError, match=message):
        load(tmp_path, scan, header_xml((1, 5, 6), 2, oversampling=1))


@pytest.mark.parametrize(("samples", "centre"), [(14, 4), (14, 10), (12, 4)])
def test_asymmetric_echoes_lie_in_the_chain_as_in_the_file(tmp_path, samples, centre):
    """The last of them ends early on both sides."""
    from gadgets.chain import build_chain
    from gadgets.header import parse_header
    from gadgets.reconstruct_stage import to_k_space

    data = random_complex((8, 2, samples))
    scan = [readout(line, centre=centre, kspace_encode_step_1=y) for y, line in enumerate(data)]
    k_space, _ = load(tmp_path, scan, header_xml((1, 8, 10), 2))
    header = parse_header(header_xml((1, 8, 10), 2).encode())
    stream = iter(scan)
    for step in build_chain("mel_cartesian_2d")[:-1]:
        stream = step(stream, header)
    (found,) = [to_k_space(bit, header)[0] for message in stream for bit in message.bits]
    assert torch.equal(found.mask.expand_as(k_space.mask), k_space.mask)
    scale = float(k_space.data.abs().max())
    torch.testing.assert_close(found.data * found.mask, k_space.data, rtol=0, atol=1e-5 * scale)
