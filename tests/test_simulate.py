"""Simulation: anatomy as rich as the real one, physical coils and noise, exams as from a scanner."""

import dataclasses
import gzip
import math
import os
import warnings

import numpy as np
import pytest
import torch
from cases import shared

from melcore.cli import main
from melcore.errors import ConfigError, MelError, ShapeError
from melcore.io.images import read_images
from melcore.io.load import load_k_space
from melcore.io.mrd import open_raw
from melcore.physics.fourier import ifft
from melcore.preprocess.whitening import noise_covariance, whiten, whitening_matrix
from melcore.simulate.acquisition import scale_to_snr, simulate_k_space
from melcore.simulate.coils import coil_maps
from melcore.simulate.exam import TRUTH, write_exam
from melcore.simulate.fields import RandomField, inside
from melcore.simulate.heart import random_cine
from melcore.simulate.motion import contract, contraction
from melcore.simulate.noise import complex_noise, correlated_noise, random_noise_covariance
from melcore.simulate.phantom import random_anatomy
from melcore.simulate.protocol import Protocol

# --- fields -----------------------------------------------------------------------------------------------------------


def test_a_level_set_has_the_area_of_its_shape():
    y, x = torch.meshgrid(torch.arange(61.0) - 30.3, torch.arange(50.0) - 24.6, indexing="ij")
    disc = inside((torch.hypot(x, y) - 17.4).unsqueeze(0))
    assert float(disc.sum()) == pytest.approx(math.pi * 17.4**2, rel=3e-3)
    assert ((disc > 0) & (disc < 1)).sum() > 80  # partial volumes along the edge


def test_a_random_field_is_a_smooth_periodic_function_of_position():
    field = RandomField(np.random.default_rng(1), 0.4, channels=2)
    place = torch.rand(5, 7, 3, generator=torch.Generator().manual_seed(0))
    values = field(place)
    assert values.shape == (2, 5, 7)
    assert torch.allclose(values, field(place + torch.tensor([1.2, 0, 0])), atol=1e-3)  # three waves of 0.4
    assert (field(place + 0.004) - values).abs().max() < 0.2
    assert float(field(torch.rand(20000, 3) * 5).std()) == pytest.approx(1, abs=0.15)


# --- anatomy ----------------------------------------------------------------------------------------------------------


def _richness(image):
    """Percentiles of the gradient in the tissue, and the share of each octave in the power spectrum (log10)."""
    image = image / np.percentile(image[image > 0.05 * image.max()], 99)
    tissue = image > 0.05
    gradient = np.hypot(*np.gradient(image))[tissue]
    power = np.abs(np.fft.fftshift(np.fft.fft2(image))) ** 2
    y, x = np.meshgrid(*(np.fft.fftshift(2 * np.fft.fftfreq(size)) for size in image.shape), indexing="ij")
    radius = np.hypot(y, x)
    octaves = [power[(radius >= low) & (radius < 2 * low)].mean() for low in (0.03, 0.06, 0.12, 0.25, 0.5)]
    return np.array([*np.percentile(gradient, (50, 90, 99)), *np.log10(np.array(octaves[1:]) / octaves[0])])


def test_heads_are_as_rich_as_a_real_one():
    raw = gzip.decompress(shared("data/3d/chris_t1.nii.gz").read_bytes())
    real = np.frombuffer(raw[352:], np.uint8).reshape(190, 256, 188)
    cuts = real[:, 128, :], real[:, :, 94], real[110]
    measured = np.mean([_richness(cut.astype(float)) for cut in cuts], 0)
    drawn = np.mean([_richness(random_anatomy((1, 192, 176), seed=seed)[0].abs().numpy()) for seed in range(8)], 0)
    # Edges as many and as steep within 40 percent, detail as strong within a factor of 2.5 in every octave.
    assert (np.abs(np.log(drawn[:3] / measured[:3])) < 0.35).all(), (drawn, measured)
    assert (np.abs(drawn[3:] - measured[3:]) < 0.4).all(), (drawn, measured)


@pytest.mark.parametrize("shape", [(1, 97, 80), (17, 30, 25)])
def test_anatomy_is_seeded_finite_and_surrounded_by_nothing(shape):
    image = random_anatomy(shape, seed=4)
    assert image.shape == shape
    assert image.dtype == torch.complex64
    assert torch.equal(image, random_anatomy(shape, seed=4))
    assert not torch.equal(image, random_anatomy(shape, seed=5))
    assert torch.isfinite(image.abs()).all()
    corners = image[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert not corners.any()
    assert 0.15 < (image.abs() > 0.05).double().mean() < 0.85
    neighbours = image[..., 1:] * image[..., :-1].conj()
    bright = (image[..., 1:].abs() > 0.3) & (image[..., :-1].abs() > 0.3)
    assert neighbours[bright].angle().abs().quantile(0.99) < 14 / shape[2]


def test_shapes_without_all_axes_are_refused():
    with pytest.raises(ShapeError, match="one slice is"):
        random_anatomy((64, 64), seed=0)
    with pytest.raises(ShapeError, match="time, z, y, x"):
        random_cine((1, 64, 64), seed=0)


# --- motion -----------------------------------------------------------------------------------------------------------


def test_contraction_is_periodic_and_smooth():
    amount = contraction(200, start=0.3)
    assert float(amount.min()) == pytest.approx(0, abs=1e-3)
    assert float(amount.max()) == pytest.approx(1, abs=1e-3)
    assert (amount - amount.roll(1)).abs().max() < 0.04


def test_contraction_keeps_area_and_what_is_far_away():
    y, x = torch.meshgrid(torch.linspace(-1, 1, 601), torch.linspace(-1, 1, 601), indexing="ij")
    place = torch.stack((x, y, torch.zeros_like(x)), -1)
    options = {"cavity": 0.3, "wall": 0.1, "strength": 0.4, "twist": 0.1}
    still = contract(place, torch.tensor(0.0), **options)
    assert torch.allclose(still, place, atol=1e-5)
    before = contract(place, torch.tensor(1.0), **options)[..., :2].norm(dim=-1)
    voxel = (2 / 600) ** 2
    assert float((before < 0.3).sum() * voxel) == pytest.approx(math.pi * 0.18**2, rel=0.02)
    wall = (before >= 0.3) & (before < 0.4)
    assert float(wall.sum() * voxel) == pytest.approx(math.pi * (0.4**2 - 0.3**2), rel=0.05)
    far = place[..., :2].norm(dim=-1) > 0.95
    assert torch.allclose(before[far], place[..., :2].norm(dim=-1)[far], atol=1e-4)


def test_a_cine_beats_once_and_leaves_the_chest_at_rest():
    cine = random_cine((12, 1, 80, 96), seed=1)
    assert cine.shape == (12, 1, 80, 96)
    assert cine.dtype == torch.complex64
    assert torch.equal(cine, random_cine((12, 1, 80, 96), seed=1))
    changes = (cine - cine.roll(1, 0)).abs().mean((1, 2, 3))
    assert changes[0] < 1.5 * changes[1:].max()  # the last frame leads to the first
    amount = cine.abs().std(0) / cine.abs().amax()
    assert (amount > 0.15).double().mean() > 0.01  # walls move; the swirl of blood alone changes less
    moving = (cine - cine[:1]).abs().amax(0) > 0.05
    assert 0.02 < moving.double().mean() < 0.4
    assert (cine.abs().std(0)[cine.abs().mean(0) > 0.05] < 1e-4).double().mean() > 0.4
    assert random_cine((3, 6, 30, 25), seed=1).shape == (3, 6, 30, 25)


# --- coils and noise --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "coils"), [((1, 90, 71), 8), ((20, 25, 31), 12), ((1, 40, 40), 1)])
def test_coil_maps_are_normalised_smooth_and_different(shape, coils):
    maps = coil_maps(shape, coils, seed=2)
    assert maps.shape == (coils, *shape)
    assert torch.allclose(maps.abs().square().sum(0), torch.ones(shape), atol=1e-5)
    if coils > 1:
        middle = maps[..., shape[1] // 4 : -shape[1] // 4, shape[2] // 4 : -shape[2] // 4]
        assert (middle[..., 1:] - middle[..., :-1]).abs().max() < 0.1
        values = torch.linalg.svdvals(maps.reshape(coils, -1))
        assert values[3] > 0.05 * values[0]  # coils that see different things


def test_coil_maps_do_not_depend_on_the_resolution():
    coarse, fine = coil_maps((1, 20, 30), 6, seed=3), coil_maps((1, 40, 60), 6, seed=3)
    both = (coarse.conj() * fine[..., ::2, ::2]).sum(0)[:, 5:-5, 8:-8].abs()
    assert both.min() > 0.999


def test_noise_has_the_covariance_that_was_asked_for():
    generator = torch.Generator().manual_seed(0)
    assert float(complex_noise((50000,), generator).abs().square().mean()) == pytest.approx(2, rel=0.03)
    covariance = random_noise_covariance(6, 0.4, seed=1)
    deviation = covariance.diagonal().real.sqrt()
    correlation = (covariance / torch.outer(deviation, deviation)).abs() - torch.eye(6)
    assert float(correlation.max()) == pytest.approx(0.4)
    noise = correlated_noise((6, 40000), covariance, generator).to(torch.complex128)
    assert torch.allclose(noise @ noise.mH / 40000, covariance, atol=0.04)
    with pytest.raises(ConfigError, match="below 1"):
        random_noise_covariance(6, 1.2, seed=1)


@pytest.mark.parametrize("correlated", [False, True])
def test_the_signal_to_noise_ratio_holds_in_the_combined_image(correlated):
    image = random_anatomy((1, 60, 50), seed=1).unsqueeze(0)
    maps = coil_maps((1, 60, 50), 5, seed=1)
    mask = torch.ones(1, 1, 1, 1, 60, 1, dtype=torch.bool)
    covariance = random_noise_covariance(5, seed=2) if correlated else None
    k_space, truth = simulate_k_space(image, maps, mask, snr=20, covariance=covariance, seed=3)
    assert k_space.noise.whitened is not correlated
    error = ifft(k_space.data)[0, :, 0] - maps * truth.data[0, 0, 0]
    samples = error.reshape(5, -1).to(torch.complex128)
    expected = 2 * (torch.eye(5) if covariance is None else covariance)
    assert torch.allclose(samples @ samples.mH / samples.shape[1], expected.to(torch.complex128), atol=0.2)
    magnitude = truth.data.abs()
    assert float(magnitude[magnitude > 0.1 * magnitude.max()].mean()) == pytest.approx(20, rel=1e-4)


def test_k_space_is_zero_where_nothing_was_sampled_and_bad_calls_are_refused():
    image, maps = random_anatomy((1, 30, 20), seed=1).unsqueeze(0), coil_maps((1, 30, 20), 3, seed=1)
    mask = torch.zeros(1, 1, 1, 1, 30, 1, dtype=torch.bool)
    mask[..., ::3, :] = True
    k_space, truth = simulate_k_space(image, maps, mask, snr=None, seed=0)
    assert k_space.data[..., ::3, :].all()
    assert not k_space.data[..., 1::3, :].any()
    assert torch.equal(truth.data[0, 0], image)
    with pytest.raises(ShapeError, match="do not fit"):
        simulate_k_space(image, maps[..., 1:], mask, snr=None, seed=0)
    with pytest.raises(ConfigError, match="signal-to-noise"):
        scale_to_snr(image, 0)


# --- exams ------------------------------------------------------------------------------------------------------------

SMALL = Protocol(shape=(18, 26, 22), coils=5, acceleration=1, calibration=(8, 8), snr=150)
EXAMS = {
    "3D": SMALL,
    "one slice": dataclasses.replace(SMALL, shape=(1, 40, 30)),
    "slices": dataclasses.replace(SMALL, shape=(5, 40, 30), slices=True),
    "cine": dataclasses.replace(SMALL, shape=(1, 40, 30), time=4),
    "3D cine": dataclasses.replace(SMALL, shape=(9, 20, 24), time=3),
    "no oversampling": dataclasses.replace(SMALL, oversampling=1, coils=64),
}


@pytest.mark.parametrize("name", EXAMS)
def test_a_fully_sampled_exam_reads_back_as_its_truth(name, tmp_path):
    protocol = EXAMS[name]
    write_exam(tmp_path / "exam.h5", protocol)
    k_space, calibration = load_k_space(tmp_path / "exam.h5")
    z, y, x = protocol.shape
    depth = z if protocol.volume else 1
    assert k_space.data.shape == (z // depth, protocol.coils, protocol.time, depth, y, x)
    assert k_space.mask.all()
    assert calibration is not None
    (series,) = read_images(tmp_path / "exam.h5", TRUTH)
    truth = torch.from_numpy(np.asarray(series.data)).reshape(protocol.time, z // depth, depth, y, x).transpose(0, 1)
    combined = ifft(k_space.data).abs().square().sum(1).sqrt()
    tissue = truth.abs() > 0.3 * truth.abs().max()
    error = (combined - truth.abs())[tissue].norm() / truth[tissue].norm()
    # What the noise of the image and of the estimated covariance leave.
    assert error < (0.12 if protocol.coils == 64 else 0.03)
    assert torch.equal(
        torch.tensor([int(head["slice"]) for head in series.headers]), torch.arange(z // depth).repeat(protocol.time)
    )


def test_an_undersampled_exam_has_its_acceleration_flags_and_noise(tmp_path):
    protocol = Protocol(shape=(40, 44, 24), coils=4, acceleration=6, calibration=(10, 12))
    write_exam(tmp_path / "exam.h5", protocol)
    k_space, calibration = load_k_space(tmp_path / "exam.h5")
    assert k_space.mask.double().mean() == pytest.approx(1 / 6, rel=0.01)
    assert int(calibration.mask.sum()) == 120
    assert calibration.mask[..., 20 - 5 : 20 + 5, 22 - 6 : 22 + 6, :].all()
    assert k_space.noise.whitened
    assert k_space.noise.source == "scan"
    with open_raw(tmp_path / "exam.h5") as raw:
        flags = raw.headers()["flags"]
        first, *_, last = list(raw.acquisitions())
        assert raw.header.encoding[0].parallelImaging.calibrationMode.value == "embedded"
        assert raw.header.encoding[0].encodingLimits.kspace_encoding_step_2.maximum == 39
        assert raw.header.acquisitionSystemInformation.relativeReceiverNoiseBandwidth == pytest.approx(0.793)
    assert flags[0] == 1 << 18
    assert (flags[1:] & (1 << 20) > 0).sum() == 120
    assert last.header["flags"] & (1 << 24)
    assert (flags & (1 << 24) > 0).sum() == 1
    # The noise scan whitens the noise of the lines to complex variance 2: an exam of faint signal shows it.
    faint = dataclasses.replace(protocol, snr=1e-3)
    write_exam(tmp_path / "faint.h5", faint)
    with open_raw(tmp_path / "faint.h5") as raw:
        scan, *lines = list(raw.acquisitions())
    covariance = noise_covariance(torch.from_numpy(scan.data), float(scan.header["sample_time_us"]))
    matrix = whitening_matrix(covariance, float(lines[0].header["sample_time_us"]))
    white = whiten(torch.from_numpy(np.concatenate([line.data for line in lines], 1)), matrix)
    assert torch.allclose(white @ white.mH / white.shape[1], 2 * torch.eye(4) + 0j, atol=0.15)
    assert first.data.shape == (4, 8192)


def test_the_reference_implementation_reads_an_exam(tmp_path):
    write_exam(tmp_path / "cine.h5", dataclasses.replace(SMALL, shape=(1, 40, 30), time=3, acceleration=2))
    with warnings.catch_warnings():
        import ismrmrd

        warnings.simplefilter("ignore")  # after the import, which resets the filters
        dataset = ismrmrd.Dataset(os.fspath(tmp_path / "cine.h5"), "dataset", False)
        header = ismrmrd.xsd.CreateFromDocument(dataset.read_xml_header())
        assert header.encoding[0].encodingLimits.phase.maximum == 2
        count = dataset.number_of_acquisitions()
        assert count == 1 + 3 * 20
        last = dataset.read_acquisition(count - 1)
        assert last.is_flag_set(ismrmrd.ACQ_LAST_IN_MEASUREMENT)
        assert last.is_flag_set(ismrmrd.ACQ_LAST_IN_PHASE)
        assert last.idx.phase == 2
        assert list(last.slice_dir) == pytest.approx(list(np.cross(last.read_dir, last.phase_dir)), abs=1e-5)
        dataset.close()
        images = ismrmrd.Dataset(os.fspath(tmp_path / "cine.h5"), TRUTH, False)
        assert images.read_image("image_0", 2).data.shape == (1, 1, 40, 30)
        images.close()


def test_exams_that_cannot_be_are_refused_and_leave_nothing(tmp_path, capsys):
    path = tmp_path / "exam.h5"
    with pytest.raises(ConfigError, match="calibration region alone has 576"):
        write_exam(path, Protocol(shape=(40, 40, 20)))
    with pytest.raises(ConfigError, match="not be negative"):
        Protocol(seed=-1)
    with pytest.raises(ConfigError, match="at least 8"):
        Protocol(shape=(1, 4, 30))
    with pytest.raises(MelError):
        write_exam(tmp_path / "absent" / "exam.h5", SMALL)
    assert main(["simulate", "-o", str(path), "--shape", "40,40,20"]) == 1
    assert "make it smaller" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_command_writes_an_exam(tmp_path, capsys):
    arguments = ["--shape", "1,64,48", "--time", "3", "--coils", "4", "--acceleration", "4", "--no-noise-scan"]
    assert main(["simulate", "-o", str(tmp_path / "cine.h5"), *arguments]) == 0
    assert "3 phases" in capsys.readouterr().out
    k_space, _ = load_k_space(tmp_path / "cine.h5")
    assert k_space.data.shape == (1, 4, 3, 1, 64, 48)
    assert not k_space.noise.whitened
