"""Preprocessing: against a recorded Gadgetron server where there is one, and by laws everywhere."""

import dataclasses
import math
import time
import warnings

import h5py
import numpy as np
import pytest
import torch
from cases import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from melcore.data import Geometry, Image, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError
from melcore.physics.fourier import fft, ifft
from melcore.preprocess import compression, field_of_view, masks, oversampling, scaling, whitening
from melcore.preprocess.map_interpolation import interpolated_planes

NOISE_FLAG = 1 << 18


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex64, generator=generator)


# --- against a real server --------------------------------------------------------------------------------------------


def _read_recon_data(path):
    with warnings.catch_warnings():
        from gadgetron.types.recon_data import read_recon_data

        warnings.simplefilter("ignore")  # after the import, which resets the filters
        with path.open("rb") as file:
            while (message := int.from_bytes(file.read(2), "little")) != 1023:
                size = 1024 if message == 1 else int.from_bytes(file.read(4), "little")
                file.read(size)
            return read_recon_data(file)[0].data


@pytest.mark.parametrize(
    ("trace", "exam", "factor"),
    [("3d_to_image", "cart3d_24x20x12_4ch", 1.7810110), ("cine_to_imagearray", "cine_32x32_6ph_4ch", 1.5929847)],
)
def test_whitening_and_oversampling_are_those_of_a_recorded_server(trace, exam, factor):
    buffer = _read_recon_data(shared(f"gadgetron/traces/execute_b_recondata_{trace}.server_to_python.bin"))
    with h5py.File(shared(f"gadgetron/inputs/{exam}.h5")) as file:
        acquisitions = file["dataset/data"][()]
    expected = np.zeros(buffer.data.shape, np.complex64)
    covariance = None
    for head, _, values in acquisitions:
        samples = torch.from_numpy(values.view(np.complex64).reshape(head["active_channels"], -1))
        dwell = float(head["sample_time_us"]) * 1e-6
        if head["flags"] & NOISE_FLAG:
            covariance = whitening.noise_covariance(samples, dwell)
            continue
        matrix = whitening.whitening_matrix(covariance, dwell)
        assert math.sqrt(2 * dwell / covariance.dwell_time * 0.793) == pytest.approx(factor, rel=1e-6)
        line = oversampling.remove_readout_oversampling(whitening.whiten(samples, matrix), expected.shape[0])
        index = head["idx"]
        if not head["flags"] & (1 << 19):  # lines for calibration only are in another buffer
            where = index["kspace_encode_step_1"], index["kspace_encode_step_2"]
            expected[:, *where, :, index["phase"], 0, 0] = line.numpy().T
    error = np.linalg.norm(buffer.data - expected) / np.linalg.norm(expected)
    assert error < 5e-7


# --- whitening --------------------------------------------------------------------------------------------------------


def test_whitened_noise_is_uncorrelated_with_complex_variance_2():
    mixing = _random(5, 5, seed=1) + 2 * torch.eye(5)
    scan = 1e-6 * mixing @ _random(5, 40000, seed=2)
    # An imaging sample of another dwell has the noise power of the bandwidth that it really sees.
    image = 1e-6 * mixing @ _random(5, 40000, seed=3) * math.sqrt(2e-6 / 5e-6 / 0.8)
    covariance = whitening.noise_covariance(scan, 2e-6)
    white = whitening.whiten(image, whitening.whitening_matrix(covariance, 5e-6, 0.8))
    measured = white @ white.mH / white.shape[-1]
    assert torch.allclose(measured, 2 * torch.eye(5) + 0j, atol=0.06)
    assert covariance.remarks == ()
    assert covariance.condition_number == pytest.approx(float(torch.linalg.cond(mixing)) ** 2, rel=0.1)


def test_an_unknown_dwell_time_leaves_the_scale_at_1():
    noise = _random(3, 100)
    known = whitening.whitening_matrix(whitening.noise_covariance(noise, 1e-6), 1e-6)
    unknown = whitening.whitening_matrix(whitening.noise_covariance(noise, 0.0), 1e-6)
    assert torch.allclose(known, math.sqrt(2 * 0.793) * unknown)


def test_a_dead_coil_is_muted_and_the_others_are_whitened_as_if_it_were_absent():
    noise = _random(4, 500)
    noise[2] *= 0
    covariance = whitening.noise_covariance(noise, 1e-6)
    matrix = whitening.whitening_matrix(covariance, 2e-6)
    alive = [0, 1, 3]
    alone = whitening.whitening_matrix(whitening.noise_covariance(noise[alive], 1e-6), 2e-6)
    assert torch.equal(matrix[alive][:, alive], alone)
    assert not matrix[2].any()
    assert not matrix[:, 2].any()
    assert covariance.silent_coils == (2,)
    assert "coils 2 are silent" in covariance.remarks[0]


@pytest.mark.parametrize("kind", ["duplicated", "few samples"])
def test_a_singular_covariance_is_regularised_and_recorded(kind):
    noise = _random(6, 500 if kind == "duplicated" else 4)
    noise[5] = noise[4]
    covariance = whitening.noise_covariance(noise, 1e-6)
    matrix = whitening.whitening_matrix(covariance, 1e-6)
    assert torch.isfinite(matrix.abs()).all()
    assert covariance.loading > 0
    assert "regularised" in covariance.remarks[0]


def test_bad_noise_scans_are_refused():
    noise = _random(4, 50)
    noise[1, 3] = complex(math.nan, 0)
    with pytest.raises(DataError, match="NaN"):
        whitening.noise_covariance(noise, 1e-6)
    with pytest.raises(DataError, match="only zeros"):
        whitening.noise_covariance(torch.zeros(4, 50, dtype=torch.complex64), 1e-6)
    with pytest.raises(ShapeError, match="at least 2 samples"):
        whitening.noise_covariance(noise[:, :1], 1e-6)
    with pytest.raises(ShapeError, match="must have 4 coils"):
        whitening.whiten(_random(3, 7), torch.eye(4, dtype=torch.complex64))


# --- readout oversampling ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("full", "size"), [(48, 24), (46, 23), (31, 15), (33, 16), (20, 20)])
def test_removing_oversampling_is_cropping_the_image(full, size):
    image = _random(2, 3, full)
    cropped = ifft(oversampling.remove_readout_oversampling(fft(image, (-1,)), size), (-1,))
    start = full // 2 - size // 2
    assert torch.allclose(cropped, image[..., start : start + size], atol=1e-5)


def test_a_readout_shorter_than_the_matrix_is_refused():
    with pytest.raises(ShapeError, match="cannot be reduced to 25"):
        oversampling.remove_readout_oversampling(_random(2, 24), 25)


# --- coil compression -------------------------------------------------------------------------------------------------


def test_compression_keeps_what_few_sources_give_and_keeps_noise_white():
    sources = _random(2, 3, 1, 4, 5, 7, seed=4)
    k_space = torch.einsum("cv,bv...->bc...", _random(9, 3, seed=5), sources)
    matrix, energy = compression.coil_compression_matrix(k_space, 3)
    assert energy == pytest.approx(1, abs=1e-6)
    assert torch.allclose(matrix @ matrix.mH, torch.eye(3) + 0j, atol=1e-6)
    compressed = compression.compress_coils(k_space, matrix)
    restored = torch.einsum("vc,bv...->bc...", matrix.conj(), compressed)
    assert compressed.shape == (2, 3, 1, 4, 5, 7)
    assert torch.allclose(restored, k_space, atol=1e-4)
    assert compression.coil_compression_matrix(k_space, 2)[1] < 0.99


def test_the_phase_of_virtual_coils_does_not_depend_on_the_phase_of_the_data():
    k_space = _random(1, 6, 1, 3, 5, 7)
    first, _ = compression.coil_compression_matrix(k_space, 4)
    # A rotated phase of one coil rotates its column alone, up to the phase of each row, which is fixed.
    k_space[:, 2] *= np.exp(0.7j)
    second, _ = compression.coil_compression_matrix(k_space, 4)
    assert torch.allclose(first.abs(), second.abs(), atol=1e-5)
    for matrix in (first, second):
        largest = matrix.gather(1, matrix.abs().argmax(1, keepdim=True))
        assert (largest.real > 0).all()
        assert torch.allclose(largest.imag, torch.zeros(4, 1), atol=1e-6)


def test_compression_to_as_many_coils_changes_nothing_and_bad_data_are_refused():
    k_space = _random(1, 4, 1, 2, 3, 5)
    matrix, energy = compression.coil_compression_matrix(k_space, 7)
    assert torch.equal(compression.compress_coils(k_space, matrix), k_space)
    assert energy == 1
    with pytest.raises(DataError, match="zero or not finite"):
        compression.coil_compression_matrix(torch.zeros_like(k_space), 2)
    with pytest.raises(ShapeError, match="for 4 coils"):
        compression.compress_coils(k_space[:, :3], matrix)


# --- scale ------------------------------------------------------------------------------------------------------------


def _smooth_scan(shape=(10, 48, 40), coils=4, time=3):
    z, y, x = torch.meshgrid(*(torch.linspace(-1, 1, size) for size in shape), indexing="ij")
    inside = (z.abs() < 0.95) & (y**2 + x**2 < 0.7)
    maps = torch.stack([torch.exp(1j * c * x) * (1 + 0.4 * torch.cos(c + 2 * y)) for c in range(coils)])
    maps = maps / maps.abs().square().sum(0).sqrt() * inside
    image = inside * (1 + 0.3 * torch.cos(3 * y) * torch.cos(2 * x))
    k_space = fft(maps * image).unsqueeze(0).unsqueeze(2).expand(1, coils, time, *shape)
    return k_space.clone(), maps.reshape(1, 1, coils, 1, *shape), image


def test_the_scale_is_the_level_of_the_image_whatever_the_acceleration():
    k_space, maps, image = _smooth_scan()
    level = float(image[image > 0].quantile(0.99))
    scales = []
    for acceleration in (1, 2, 3):
        mask = masks.poisson_disc((10, 48), acceleration, calibration=(10, 12), seed=3)
        sampled = k_space * masks.k_space_mask(mask, ("z", "y"))
        scales.append(float(scaling.image_scale(sampled, maps, (10, 12, 40))))
    assert scales[0] == scales[1] == scales[2]
    assert scales[0] == pytest.approx(level, rel=0.1)


def test_the_scale_averages_the_frames_that_sampled_a_line():
    k_space, maps, _ = _smooth_scan()
    full = scaling.image_scale(k_space, maps, (10, 16, 40))
    interleaved = torch.zeros_like(k_space)
    for frame in range(3):
        interleaved[:, :, frame, :, frame::3] = k_space[:, :, frame, :, frame::3]
    assert torch.allclose(scaling.image_scale(interleaved, maps, (10, 16, 40)), full, rtol=1e-4)


def test_the_scale_is_proportional_and_separate_for_each_example():
    k_space, maps, _ = _smooth_scan()
    both = torch.cat([k_space, 1e-7 * k_space])
    one, tiny = scaling.image_scale(both, maps, (10, 16, 24))
    assert float(tiny / one) == pytest.approx(1e-7, rel=1e-4)


def test_an_empty_calibration_region_is_refused():
    k_space, maps, _ = _smooth_scan()
    k_space[..., 4:44, :] = 0
    with pytest.raises(DataError, match="is empty"):
        scaling.image_scale(k_space, maps, (10, 16, 40))


# --- masks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 130), st.integers(20, 150)),
    st.floats(2, 16),
    st.sampled_from([0.0, 1.0, 3.0]),
    st.integers(0, 9),
)
def test_poisson_masks_hit_the_acceleration_and_sample_the_centre(shape, acceleration, variable_density, seed):
    def draw():
        return masks.poisson_disc(shape, acceleration, calibration=(4, 5), seed=seed, variable_density=variable_density)

    if round(shape[0] * shape[1] / acceleration) < min(4, shape[0]) * 5:
        with pytest.raises(ConfigError, match="make it smaller"):
            draw()
        return
    mask = draw()
    assert tuple(mask.shape) == shape
    assert mask.dtype == torch.bool
    assert abs(int(mask.sum()) - mask.numel() / acceleration) <= 0.5
    top, left = shape[0] // 2 - min(4, shape[0]) // 2, shape[1] // 2 - 2
    assert mask[top : top + 4, left : left + 5].all()
    assert torch.equal(mask, draw())


def test_poisson_samples_keep_their_distance_and_thin_out():
    uniform = masks.poisson_disc((128, 96), 9, calibration=(0, 0), seed=2, variable_density=0)
    points = uniform.nonzero().double()
    nearest = torch.cdist(points, points).fill_diagonal_(math.inf).min(1).values
    assert nearest.min() >= 2  # random points at this density are neighbours (distance 1) 35 times in 100
    variable = masks.poisson_disc((128, 96), 9, calibration=(0, 0), seed=2, variable_density=2)
    assert variable[32:96, 24:72].sum() > 1.5 * uniform[32:96, 24:72].sum()


def test_a_large_poisson_mask_takes_less_than_a_second():
    start = time.process_time()
    masks.poisson_disc((320, 256), 12, seed=1)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(("shape", "acceleration"), [((320, 256), 12), ((41, 96), 5), ((1, 60), 3), ((30, 30), 1)])
def test_radial_masks_are_spokes_through_the_centre(shape, acceleration):
    start = time.process_time()
    mask = masks.radial_spokes(shape, acceleration, calibration=(6, 7), seed=3)
    assert time.process_time() - start < 1
    assert int(mask.sum()) == round(mask.numel() / acceleration)
    assert mask[shape[0] // 2, shape[1] // 2]
    assert torch.equal(mask, masks.radial_spokes(shape, acceleration, calibration=(6, 7), seed=3))
    if acceleration == 12:
        assert not torch.equal(mask, masks.radial_spokes(shape, acceleration, calibration=(6, 7), seed=4))
        # As many samples at any radius: the density falls as one over it.
        y, x = torch.meshgrid(torch.arange(320) - 160, torch.arange(256) - 128, indexing="ij")
        radius = (y.square() + x.square()).double().sqrt()
        counts = [float(mask[(radius >= r) & (radius < r + 20)].sum()) for r in (30, 60, 90)]
        assert max(counts) < 1.15 * min(counts)
        # From every direction.
        assert min(float(mask[half].sum()) for half in (y > abs(x), x > abs(y), -y > abs(x), -x > abs(y))) > 900


def test_lines_and_cine_masks():
    uniform = masks.uniform_lines(97, 4, 10)
    assert uniform[97 // 2]
    assert uniform[97 // 2 - 5 : 97 // 2 + 5].all()
    assert int(uniform.sum()) == pytest.approx(97 / 4 + 10 * 3 / 4, abs=2)

    lines = masks.random_lines(129, 4, 11, seed=5)
    assert int(lines.sum()) == round(129 / 4)

    cine = masks.variable_density_kt(20, 127, 8, 6, seed=5)
    assert abs(int(cine.sum()) - cine.numel() / 8) <= 0.5
    assert cine[:, 127 // 2 - 3 : 127 // 2 + 3].all()
    per_frame = cine.sum(1)
    assert per_frame.max() - per_frame.min() <= 1
    # Interleaved: eight frames drawn independently, with the same density, cover 0.51 of the lines.
    assert cine[:8].any(0).double().mean() > 0.55
    assert not torch.equal(cine, masks.variable_density_kt(20, 127, 8, 6, seed=6))


def test_masks_take_the_house_axes():
    assert masks.k_space_mask(torch.ones(3, 7, dtype=torch.bool), ("z", "y")).shape == (1, 1, 1, 3, 7, 1)
    assert masks.k_space_mask(torch.ones(3, 7, dtype=torch.bool), ("time", "y")).shape == (1, 1, 3, 1, 7, 1)
    with pytest.raises(ShapeError, match="order"):
        masks.k_space_mask(torch.ones(3, 7, dtype=torch.bool), ("y", "z"))
    with pytest.raises(ConfigError, match="within 1"):
        masks.poisson_disc((30, 30), 0.5, seed=0)


# --- field of view ----------------------------------------------------------------------------------------------------


def _image(data, encoded, recon, encoded_view, recon_view):
    info = ScanInfo(encoded, recon, encoded_view, geometry=(Geometry(field_of_view=recon_view),))
    return Image(data, info)


def test_readout_oversampling_and_phase_oversampling_are_cropped():
    data = _random(2, 1, 3, 6, 14, 10)
    views = (0.2, 0.14, 0.06), (0.1, 0.1, 0.04)
    image = _image(data, (6, 14, 20), (4, 10, 10), *views)  # x has lost its oversampling already
    result = field_of_view.to_recon_matrix(image)
    assert torch.equal(result.data, data[..., 1:5, 2:12, :])
    again = field_of_view.to_recon_matrix(result)
    assert torch.equal(again.data, result.data)
    still_oversampled = _image(_random(1, 1, 1, 6, 14, 20), (6, 14, 20), (4, 10, 10), *views)
    assert torch.equal(
        field_of_view.to_recon_matrix(still_oversampled).data, still_oversampled.data[..., 1:5, 2:12, 5:15]
    )


def test_the_centre_stays_the_centre_between_even_and_odd_sizes():
    data = torch.zeros(1, 1, 1, 1, 14, 9, dtype=torch.complex64)
    data[..., 7, 4] = 1
    image = _image(data, (1, 14, 9), (1, 9, 14), (0.09, 0.14, 0.005), (0.14, 0.09, 0.005))
    assert field_of_view.to_recon_matrix(image).data[0, 0, 0, 0, 4, 7] == 1


def test_interpolation_keeps_the_intensity_and_the_place():
    y, x = torch.meshgrid(torch.arange(15.0) - 7, torch.arange(12.0) - 6, indexing="ij")
    blob = (torch.exp(-(y**2 + x**2) / 8) + 0j).reshape(1, 1, 1, 1, 15, 12)
    image = _image(blob, (1, 15, 12), (1, 30, 24), (0.24, 0.30, 0.005), (0.24, 0.30, 0.007))
    fine = field_of_view.to_recon_matrix(image).data
    assert fine.shape == (1, 1, 1, 1, 30, 24)
    assert fine[0, 0, 0, 0, 15, 12].real == pytest.approx(1, abs=0.01)
    assert torch.allclose(fine[..., 1::2, ::2], blob, atol=0.02)
    assert field_of_view.to_recon_matrix(image).info.geometry == image.info.geometry


def test_images_without_usable_fields_of_view_are_only_cropped():
    data = _random(1, 1, 1, 1, 8, 8)
    image = _image(data, (1, 8, 8), (1, 6, 10), (0.0, 0.0, 0.0), (0.0, 0.0, 0.0))
    result = field_of_view.to_recon_matrix(image).data
    assert result.shape == (1, 1, 1, 1, 6, 10)
    assert torch.equal(result[..., 1:9], data[..., 1:7, :])
    broken = dataclasses.replace(image.info, recon_matrix=(1, 0, 8))
    with pytest.raises(ShapeError, match="must be positive"):
        field_of_view.to_recon_matrix(Image(data, broken))


def test_maps_between_the_points_of_a_coarse_grid_are_those_of_the_fine_one():
    """Smooth periodic maps, to a thousandth; whatever phase each voxel of the coarse grid has."""
    reference = torch.tensor([1.0, 0.5j, -0.3, 0.2], dtype=torch.complex64)

    def maps(shape):
        axes = [2 * math.pi * (torch.arange(n, dtype=torch.float64) - n // 2) / n for n in shape]
        z, y, x = torch.meshgrid(*axes, indexing="ij")
        coils = torch.stack(
            [2 + torch.cos(z - c) + 1j * torch.cos(y + c) + 0.7 * torch.sin(x + 2 * c) for c in range(4)]
        )
        coils = coils / coils.abs().square().sum(0).sqrt()
        phase = torch.einsum("c,czyx->zyx", reference.conj().to(coils.dtype), coils)
        return (coils * torch.polar(torch.ones(()).double(), -phase.angle())).to(torch.complex64)[None]

    coarse, fine = maps((16, 20, 18)), maps((41, 33, 50))
    turned = coarse * torch.polar(torch.ones(()), 6 * torch.rand(coarse.shape[2:]))
    planes = list(interpolated_planes(turned, torch.ones(1, 16, 20, 18), (41, 33, 50), reference, 0.5))
    found = torch.stack([plane for plane, _ in planes], dim=2)
    assert float((found - fine).norm() / fine.norm()) < 2e-3
    torch.testing.assert_close(torch.stack([values for _, values in planes], dim=1), torch.ones(1, 41, 33, 50))
