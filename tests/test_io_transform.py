"""Whitening and coil compression of whole files: streamed, recorded, and the same as on arrays."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from melcore import layout
from melcore.cli import main
from melcore.errors import ConfigError, DataError
from melcore.io.bart import run
from melcore.io.images import read_images
from melcore.io.load import load_k_space
from melcore.io.mrd import open_raw, write_raw
from melcore.io.mrd_types import IS_NOISE, Waveform, has_flag
from melcore.io.transform import compress_file, whiten_file
from melcore.physics.fourier import ifft
from melcore.preprocess import compression
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol
from tests.cases import centred_fft, coil_images, header_xml, random_complex, readout

COILS = 6


def scan(noise_coils=COILS, dwell=(2.0, 2.0), factor=1.0):
    """Noise readouts, then the lines of a volume seen by six coils."""
    mixing = random_complex((noise_coils, noise_coils), seed=5) + 3 * np.eye(noise_coils)
    for number, time in enumerate(dwell):
        noise = readout((factor * mixing @ random_complex((noise_coils, 400), seed=number)), flags=[IS_NOISE])
        noise.header["sample_time_us"] = time
        yield noise
    yield from image_lines()


def image_lines():
    k_space = centred_fft(coil_images(COILS, (9, 14, 24)), (-3, -2, -1))
    for z, y in np.ndindex(9, 14):
        yield readout(k_space[:, z, y], kspace_encode_step_2=z, kspace_encode_step_1=y)


XML = header_xml((9, 14, 12), COILS)


@pytest.fixture
def exam(tmp_path):
    """An exam with its noise scan and a waveform."""
    from melcore.io.mrd_types import WAVEFORM_HEADER

    head = np.zeros((), WAVEFORM_HEADER)
    head["channels"], head["number_of_samples"] = 1, 4
    path = tmp_path / "exam.h5"
    write_raw(path, XML, scan(), [Waveform(head[()], np.arange(4, dtype=np.uint32).reshape(1, 4))])
    return path


def test_a_whitened_file_gives_what_whitening_on_the_way_gives(exam, tmp_path):
    white = tmp_path / "white.h5"
    assert whiten_file(exam, white) == "by the noise scan"
    expected, _ = load_k_space(exam)
    found, _ = load_k_space(white)
    torch.testing.assert_close(found.data, expected.data, rtol=1e-5, atol=1e-5 * float(expected.data.abs().max()))
    assert found.noise.whitened
    assert found.info.provenance["whitening"] == "by the noise scan"
    with open_raw(white) as raw:
        assert raw.waveform_count == 1
        assert raw.count == 9 * 14
    with pytest.raises(DataError, match=r"whitened already \(by the noise scan\)"):
        whiten_file(white, tmp_path / "again.h5")


def test_the_chain_knows_that_a_file_is_white(tmp_path):
    from gadgets.chain import run_chain

    write_exam(tmp_path / "exam.h5", Protocol(shape=(1, 40, 36), coils=4, acceleration=2, calibration=(1, 16), seed=3))
    whiten_file(tmp_path / "exam.h5", tmp_path / "white.h5")
    images = []
    for name in ("exam.h5", "white.h5"):
        with open_raw(tmp_path / name) as raw:
            options = {"model": "adjoint"}
            (image,) = run_chain("mel_cartesian_2d", raw.header_xml, raw.acquisitions(), overrides=options)
        images.append(image)
        assert "<name>MEL_whitened</name><value>true" in image.meta.replace("\n", "").replace(" ", "")
    np.testing.assert_allclose(images[1].data, images[0].data, rtol=1e-3, atol=1e-4 * images[0].data.max())


def test_a_separate_noise_scan_counts_instead_of_the_own_one(exam, tmp_path):
    separate, bare = tmp_path / "noise.h5", tmp_path / "bare.h5"
    write_raw(separate, XML, list(scan(factor=10))[:2])
    write_raw(bare, XML, image_lines())
    own, _ = load_k_space(exam)
    other, _ = load_k_space(exam, noise=separate)
    torch.testing.assert_close(10 * other.data, own.data, rtol=1e-4, atol=1e-5 * float(own.data.abs().max()))
    assert (other.noise.source, own.noise.source) == ("file", "scan")
    assert other.info.provenance["whitening"] == "by the noise scan of noise.h5"
    assert load_k_space(bare, noise=separate)[0].noise.condition_number == pytest.approx(other.noise.condition_number)
    assert whiten_file(bare, tmp_path / "white.h5", separate) == "by the noise scan of noise.h5"


def test_recon_whitens_by_a_separate_noise_scan(tmp_path, capsys):
    protocol = Protocol(shape=(1, 40, 36), coils=4, acceleration=2, calibration=(1, 16), seed=3)
    write_exam(tmp_path / "exam.h5", protocol)
    with open_raw(tmp_path / "exam.h5") as raw:
        everything = list(raw.acquisitions())
        noise = [one for one in everything if has_flag(one.header, IS_NOISE)]
        write_raw(tmp_path / "noise.h5", raw.header_xml, noise)
        write_raw(tmp_path / "bare.h5", raw.header_xml, everything[len(noise) :])
        loud = [one._replace(data=10 * one.data) for one in noise]
        write_raw(tmp_path / "loud.h5", raw.header_xml, [*loud, *everything[len(noise) :]])
        few = [one._replace(data=one.data[:3]) for one in noise]
        for one in few:
            one.header["active_channels"] = 3
        write_raw(tmp_path / "few.h5", raw.header_xml, few)

    def recon(raw, *options):
        code = main(["recon", str(tmp_path / raw), "--model", "none", "-o", str(tmp_path / "images.h5"), *options])
        return code, capsys.readouterr()

    images = {}
    for name, options in {"exam.h5": [], "bare.h5": ["--noise", str(tmp_path / "noise.h5")]}.items():
        assert recon(name, *options)[0] == 0
        (series,) = read_images(tmp_path / "images.h5")
        images[name] = series.data
        assert "<name>MEL_whitened</name><value>true" in series.metas[0].replace("\n", "").replace(" ", "")
    np.testing.assert_allclose(images["bare.h5"], images["exam.h5"], rtol=1e-4, atol=1e-4 * images["exam.h5"].max())
    assert "by the noise scan of noise.h5" in series.metas[0]
    # It counts instead of the exam's own, ten times as loud.
    assert recon("loud.h5", "--noise", str(tmp_path / "noise.h5"))[0] == 0
    np.testing.assert_allclose(read_images(tmp_path / "images.h5")[0].data, images["bare.h5"], rtol=1e-4, atol=1e-3)
    (tmp_path / "images.h5").unlink()
    code, said = recon("bare.h5", "--noise", str(tmp_path / "few.h5"))
    assert (code, len(said.err.splitlines())) == (1, 1)
    assert "has 3 coils, but the image lines" in said.err
    assert not (tmp_path / "images.h5").exists()


def test_noise_readouts_of_another_dwell_time_are_left_out_and_recorded(tmp_path):
    write_raw(tmp_path / "one.h5", XML, list(scan(dwell=(2.0,))))
    write_raw(tmp_path / "two.h5", XML, scan(dwell=(2.0, 7.0)))
    one, two = (load_k_space(tmp_path / name)[0] for name in ("one.h5", "two.h5"))
    assert torch.equal(one.data, two.data)
    assert "1 noise readouts of another dwell time" in two.info.provenance["whitening"]


def test_an_unknown_dwell_time_is_recorded(tmp_path):
    write_raw(tmp_path / "exam.h5", XML, scan(dwell=(0.0,)))
    assert "dwell time of the image or of the noise is unknown" in whiten_file(tmp_path / "exam.h5", tmp_path / "w.h5")


def label(xml, names):
    labels = "".join(
        f"<coilLabel><coilNumber>{n}</coilNumber><coilName>{name}</coilName></coilLabel>"
        for n, name in enumerate(names)
    )
    return xml.replace("</receiverChannels>", f"</receiverChannels>{labels}")


@pytest.mark.parametrize(
    ("noise", "message"),
    [
        (
            lambda path: write_raw(path, XML, list(scan(noise_coils=5))[:2]),
            "has 5 coils, but the image lines .* have 6",
        ),
        (lambda path: write_raw(path, XML, list(image_lines())[:3]), "holds no noise readouts"),
        (lambda path: write_raw(path, label(XML, "ABXDEF"), list(scan())[:2]), "coil 2 is 'X' there and 'C' here"),
        (lambda path: write_raw(path, XML, [*list(scan())[:1], *list(scan(5))[:1]]), r"have \[5, 6\] coils"),
        (lambda path: path.write_bytes(b""), "is not an HDF5 file|cannot be opened|truncated"),
    ],
)
def test_a_noise_scan_of_other_coils_is_refused_and_nothing_is_written(tmp_path, capsys, noise, message):
    write_raw(tmp_path / "exam.h5", label(XML, "ABCDEF"), image_lines())
    noise(tmp_path / "noise.h5")
    with pytest.raises(DataError, match=message):
        load_k_space(tmp_path / "exam.h5", noise=tmp_path / "noise.h5")
    before = set(tmp_path.iterdir())
    files = [str(tmp_path / name) for name in ("exam.h5", "white.h5", "noise.h5")]
    assert main(["whiten", files[0], "-o", files[1], "--noise", files[2]]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert set(tmp_path.iterdir()) == before


def test_without_any_noise_scan_there_is_nothing_to_whiten_by(tmp_path):
    write_raw(tmp_path / "bare.h5", XML, image_lines())
    with pytest.raises(DataError, match="holds no noise scan"):
        whiten_file(tmp_path / "bare.h5", tmp_path / "white.h5")
    with pytest.raises(ConfigError, match="raw file itself"):
        whiten_file(tmp_path / "bare.h5", tmp_path / "bare.h5")


# --- coil compression


def test_a_compressed_file_is_the_compressed_array(exam, tmp_path):
    whiten_file(exam, tmp_path / "white.h5")
    done = compress_file(tmp_path / "white.h5", tmp_path / "small.h5", coils=3)
    white, small = (load_k_space(tmp_path / name)[0] for name in ("white.h5", "small.h5"))
    assert small.data.shape[1] == done.virtual == 3
    # The oversampled readout had a part in the matrix, so the array is compressed by a matrix of the same span only.
    matrix, energy = compression.coil_compression_matrix(white.data, 3)
    expected = compression.compress_coils(white.data, matrix)
    assert float(small.data.norm() / expected.norm()) == pytest.approx(1, abs=5e-3)
    assert done.energy == pytest.approx(energy, abs=1e-2)
    with open_raw(tmp_path / "small.h5") as raw:
        assert set(raw.headers()["active_channels"]) == {3}
        assert raw.header.acquisitionSystemInformation.receiverChannels == 3


def test_compression_by_svd_takes_the_noise_scan_along(exam, tmp_path):
    compress_file(exam, tmp_path / "small.h5", coils=4)
    small, _ = load_k_space(tmp_path / "small.h5")
    assert small.noise.whitened
    assert small.data.shape[1] == 4


def test_coils_are_selected_by_their_numbers(exam, tmp_path, capsys):
    files = [str(exam), "-o", str(tmp_path / "some.h5")]
    assert main(["compress", *files, "--keep", "0-2,5"]) == 0
    assert "6 coils to 4" in capsys.readouterr().out
    with open_raw(exam) as raw, open_raw(tmp_path / "some.h5") as some:
        for before, after in zip(raw.acquisitions(), some.acquisitions(), strict=True):
            np.testing.assert_array_equal(after.data, before.data[[0, 1, 2, 5]])
    assert main(["compress", *files, "--keep", "0,9"]) == 1
    assert main(["compress", *files, "--coils", "9"]) == 1
    assert main(["compress", *files]) == 1
    assert main(["compress", *files, "--keep", "all"]) == 2


def test_geometric_compression_keeps_more_and_needs_white_data(exam, tmp_path):
    with pytest.raises(DataError, match="run mel whiten first"):
        compress_file(exam, tmp_path / "small.h5", coils=2, method="geometric")
    white = tmp_path / "white.h5"
    whiten_file(exam, white)
    plain = compress_file(white, tmp_path / "plain.h5", coils=2)
    geometric = compress_file(white, tmp_path / "geometric.h5", coils=2, method="geometric")
    assert plain.energy < geometric.energy <= 1
    before, after = (load_k_space(path)[0].data for path in (white, tmp_path / "geometric.h5"))
    assert float(after.norm() / before.norm()) ** 2 == pytest.approx(geometric.energy, abs=0.01)


def test_geometric_compression_spans_what_barts_does():
    k_space = centred_fft(coil_images(COILS, (1, 20, 26)), (-3, -2, -1))[None, :, None]
    k_space = (k_space / np.abs(k_space).max()).astype(np.complex64)
    array = layout.k_space_to_bart(k_space)
    (matrix,) = run(["cc", "-G", "-M", "-r", "20"], [array])
    for coils in (2, 3):
        ours, energy = compression.geometric_compression_matrices(torch.from_numpy(k_space), coils)
        unit = torch.eye(coils, dtype=torch.complex64).expand(26, -1, -1)
        torch.testing.assert_close(ours @ ours.mH, unit, atol=1e-5, rtol=0)
        (applied,) = run(["ccapply", "-G", "-p", str(coils)], [array, matrix])
        theirs = ifft(torch.from_numpy(np.ascontiguousarray(layout.k_space_from_bart(applied))), (-1,))[0, :, 0, 0]
        found = ifft(compression.compress_coils(torch.from_numpy(k_space), ours), (-1,))[0, :, 0, 0]
        assert energy == pytest.approx(float(found.norm()) ** 2 / np.linalg.norm(k_space) ** 2, rel=1e-4)
        # The same energy in the virtual coils, and the same inner products of lines: equal up to a unitary matrix.
        assert float(found.norm()) == pytest.approx(float(theirs.norm()), rel=1e-3)
        for x in range(5, 21):
            ours_gram, theirs_gram = (one[:, :, x].mT @ one[:, :, x].conj() for one in (found, theirs))
            assert (ours_gram - theirs_gram).norm() < 0.02 * theirs_gram.norm()


def test_virtual_coils_change_smoothly_along_the_readout_and_keep_white_noise_white():
    k_space = torch.from_numpy(centred_fft(coil_images(COILS, (3, 20, 64)), (-3, -2, -1))[None, :, None])
    matrices, _ = compression.geometric_compression_matrices(k_space, 3)
    inside = slice(14, 50)
    steps = (matrices[inside][1:] - matrices[inside][:-1]).norm(dim=(1, 2))
    assert steps.max() < 0.5
    noise = torch.from_numpy(random_complex((1, COILS, 1, 3, 50, 64)))
    compressed = compression.compress_coils(noise, matrices)[0].flatten(1)
    covariance = compressed @ compressed.mH / compressed.shape[1]
    torch.testing.assert_close(covariance, 2 * torch.eye(3) + 0j, atol=0.15, rtol=0)


# --- memory


def test_a_file_is_streamed_in_bounded_memory(tmp_path):
    """Less than half of the file is ever in memory."""
    line, noise = random_complex((16, 512)), readout(random_complex((16, 600)), flags=[IS_NOISE])
    for name, count in (("small", 20), ("large", 1800)):  # 1 and 113 MiB
        lines = (readout(line, kspace_encode_step_1=n % 50) for n in range(count))
        write_raw(tmp_path / f"{name}.h5", header_xml((1, 50, 256), 16), [noise, *lines])
    code = (
        "from melcore.io.transform import whiten_file, compress_file\n"
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]) >> 10\n"
        "for name in ('small', 'large'):\n"
        "    begin = peak()\n"
        "    whiten_file(name + '.h5', 'white.h5')\n"
        "    compress_file('white.h5', 'compressed.h5', coils=4)\n"
        "print(peak() - begin)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50  # MiB


@pytest.mark.parametrize("compressed", [False, True])
def test_headers_are_read_without_samples_whatever_the_storage(tmp_path, compressed):
    import h5py

    from melcore.io.mrd_types import ACQUISITION_HEADER

    path = tmp_path / "exam.h5"
    write_raw(path, XML, image_lines())
    if compressed:
        with h5py.File(path, "r+") as file:
            rows = file["dataset/data"][...]
            del file["dataset/data"]
            file["dataset"].create_dataset("data", data=rows, chunks=(7,), compression="gzip")
    with open_raw(path) as raw:
        headers = raw.headers()
        assert headers.dtype == ACQUISITION_HEADER
        np.testing.assert_array_equal(headers, [acquisition.header for acquisition in raw.acquisitions()])
