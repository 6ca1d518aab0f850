"""Radial, spiral and other non-Cartesian files: read as they are meant, reconstructed, or refused by name."""

import json

import numpy as np
import pytest
import torch

from melcore.cli import main
from melcore.data import CoilMaps, Samples, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError
from melcore.io.images import read_images
from melcore.io.load import load_k_space
from melcore.io.load_samples import load_samples, to_cycles
from melcore.io.mrd import write_raw
from melcore.io.mrd_types import IS_NAVIGATION, IS_NOISE
from melcore.physics import NonUniformFourier
from melcore.preprocess.gridding import calibration_from_samples, sample_density
from melcore.reconstruct_samples import reconstruct_samples
from melcore.simulate.trajectories import radial, spiral
from tests.cases import centred_fft, coil_images, header_xml, random_complex, readout
from tests.laws import relative

COILS, MATRIX = 5, (1, 40, 40)


def xml(matrix=MATRIX, trajectory="radial"):
    return header_xml(matrix, COILS, oversampling=1).replace(">cartesian<", f">{trajectory}<")


def measured(trajectory, matrix=MATRIX):
    """Samples ``(coil, time, readout, sample)`` of the ellipsoid with a hole, which lies off centre."""
    images = torch.from_numpy(coil_images(COILS, matrix))[None, :, None]
    images = images.expand(-1, -1, len(trajectory), -1, -1, -1).contiguous()
    return NonUniformFourier(tuple(images.shape), trajectory)(images)[0, :, :, 0].numpy()


def readouts(samples, trajectory, *, time="repetition", **counters):
    for frame, readout_number in np.ndindex(samples.shape[1:3]):
        one = readout(samples[:, frame, readout_number], kspace_encode_step_1=readout_number, **counters)
        one.header["idx"][time] = frame
        one.header["trajectory_dimensions"] = trajectory.shape[-1]
        yield one._replace(trajectory=trajectory[frame, readout_number].numpy().astype(np.float32))


def sum_of_squares(matrix=MATRIX):
    return np.sqrt((np.abs(coil_images(COILS, matrix)) ** 2).sum(0))


def close_to_truth(image, matrix=MATRIX):
    wanted = torch.from_numpy(sum_of_squares(matrix))
    found = torch.as_tensor(image).abs()
    inside = found > 0
    assert inside.float().mean() > 0.3
    return relative(found[inside], wanted[inside])


TRAJECTORIES = {"radial": radial(40, 48, time=2), "spiral": spiral(40, 12, samples=260, time=2)}


@pytest.mark.parametrize("kind", TRAJECTORIES)
@pytest.mark.parametrize("unit", [1, 1 / 40], ids=["per field of view", "per voxel"])
def test_a_file_gives_the_image_that_was_scanned(tmp_path, capsys, kind, unit):
    trajectory = TRAJECTORIES[kind]
    samples = measured(trajectory)
    write_raw(tmp_path / "raw.h5", xml(trajectory=kind), readouts(samples, unit * trajectory))
    (found,) = load_samples(tmp_path / "raw.h5")
    torch.testing.assert_close(found.trajectory, trajectory, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(found.data[0, :, :, 0], samples)
    assert found.info.provenance["trajectory"].startswith(f"{kind}, in cycles per")
    for model, tolerance in (("none", 0.08), ("adjoint", 0.12)):
        options = ["--model", model, "-o", str(tmp_path / "images.h5"), "--output-type", "complex", "--json"]
        assert main(["recon", str(tmp_path / "raw.h5"), *options]) == 0
        summary = json.loads(capsys.readouterr().out)
        assert (summary["images"], summary["matrix"]) == (2, list(MATRIX))
        assert summary["path_taken"] == ["cg-sense" if model == "none" else "adjoint"]
        (series,) = read_images(tmp_path / "images.h5", "nonuniform")
        assert series.headers["repetition"].tolist() == [0, 1]
        for image in series.data:
            assert close_to_truth(image[0]) < tolerance


def test_a_grid_as_a_trajectory_gives_the_cartesian_image_in_its_place(tmp_path):
    """The two ways of reading agree in orientation, centre and level."""
    k_space = centred_fft(coil_images(COILS, MATRIX), (-3, -2, -1))
    y, x = torch.meshgrid(torch.arange(40.0) - 20, torch.arange(40.0) - 20, indexing="ij")
    trajectory = torch.stack([x, y], dim=-1)[None]
    write_raw(tmp_path / "samples.h5", xml(trajectory="other"), readouts(k_space, trajectory))
    lines = [readout(k_space[:, 0, y], kspace_encode_step_1=y) for y in range(40)]
    write_raw(tmp_path / "grid.h5", header_xml(MATRIX, COILS, oversampling=1), lines)
    maps = torch.from_numpy(coil_images(COILS, MATRIX) / np.maximum(sum_of_squares(), 1e-6))[None, None, :, None]
    (samples,), (grid, _) = load_samples(tmp_path / "samples.h5"), load_k_space(tmp_path / "grid.h5")
    ours = reconstruct_samples(samples, "adjoint", coil_maps=CoilMaps(maps)).image.data
    wanted = (maps.conj() * torch.from_numpy(coil_images(COILS, MATRIX))[None, None, :, None]).sum(2)
    # The density of a grid is 1 but for its rim.
    assert relative(ours, wanted) < 0.05
    calibration = calibration_from_samples(samples, 16)
    both = calibration.mask & grid.mask
    assert int(both.sum()) == 16 * 16
    assert relative(calibration.data * both, grid.data * both) < 0.02


def test_frames_of_unequal_length_and_slices(tmp_path):
    trajectory = radial(40, 40, time=3)
    samples = measured(trajectory)
    scan = list(readouts(samples, trajectory, time="phase", slice=4)) + list(
        readouts(2 * samples, trajectory, time="phase", slice=1)
    )
    del scan[50:70]  # the second frame of the first slice loses half of its spokes
    scan.insert(3, readout(random_complex((COILS, 9)), flags=[IS_NAVIGATION]))
    write_raw(tmp_path / "raw.h5", xml(), scan)
    second, first = load_samples(tmp_path / "raw.h5")
    assert second.taken.sum(1).tolist() == [40, 40, 40]
    assert first.taken.sum(1).tolist() == [40, 20, 40]
    assert torch.equal(second.data[:, :, 0], 2 * first.data[:, :, 0])
    assert not first.data[:, :, 1, :, 20:].any()
    assert not first.trajectory[1, 20:].any()
    weights, _ = sample_density(first)
    assert not weights[1, 20:].any()
    assert bool((weights[1, :20] > 1.1 * weights[0, :20].mean()).any())  # each stands for more of k-space
    result = reconstruct_samples(first)
    assert result.image.data.shape == (1, 1, 3, *MATRIX)
    assert result.quality["readouts"] == pytest.approx(100 / 3)
    for frame in range(3):
        assert close_to_truth(result.image.data[0, 0, frame]) < (0.15 if frame == 1 else 0.08)


def test_a_stack_of_stars_has_its_partitions_from_the_counter(tmp_path):
    matrix = (8, 24, 24)
    plane = radial(24, 30)
    partitions = [torch.cat([plane, torch.full((*plane.shape[:3], 1), z - 4.0)], dim=-1) for z in range(8)]
    scan = []
    for z, whole in enumerate(partitions):
        scan += readouts(measured(whole, matrix), plane / 24, kspace_encode_step_2=z)
    write_raw(tmp_path / "raw.h5", xml(matrix), scan)
    (samples,) = load_samples(tmp_path / "raw.h5")
    assert samples.data.shape == (1, COILS, 1, 1, 240, 48)
    torch.testing.assert_close(samples.trajectory, torch.cat(partitions, dim=1), rtol=0, atol=1e-5)
    assert "stacked along z" in samples.info.provenance["trajectory"]
    assert close_to_truth(reconstruct_samples(samples).image.data[0, 0, 0], matrix) < 0.1


def test_the_unit_is_found_or_refused():
    trajectory = TRAJECTORIES["radial"]
    for factor in (1 / 400, 2.2, 40, torch.pi / 20):
        with pytest.raises(DataError, match="unit of the trajectory is unknown: it reaches"):
            to_cycles(factor * trajectory, MATRIX)
    with pytest.raises(DataError, match="NaN"):
        to_cycles(trajectory * torch.nan, MATRIX)
    with_weights = torch.cat([trajectory / 40, torch.rand(*trajectory.shape[:3], 1)], dim=-1)
    found, words = to_cycles(with_weights, MATRIX)
    torch.testing.assert_close(found, trajectory)
    assert "third component left out" in words


def without_trajectory(scan):
    for one in scan:
        one.header["trajectory_dimensions"] = 0
        yield one._replace(trajectory=one.trajectory[:, :0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_trajectory, r"readouts do not carry it \(0 dimensions"),
        (lambda scan: [*scan[1:], readout(random_complex((COILS, 33)))], "differ in length"),
        (lambda scan: [one._replace(trajectory=2.5 * one.trajectory) for one in scan], "unit of the trajectory"),
        (lambda scan: [one._replace(trajectory=one.trajectory * np.nan) for one in scan], "NaN"),
        (lambda _: [readout(random_complex((COILS, 80)), flags=[IS_NOISE])], "none is a readout"),
        (lambda scan: [one._replace(data=one.data * 0) for one in scan], "all zero"),
        (lambda scan: scan[:2], "fewer than it has positions"),
    ],
)
def test_files_that_cannot_be_used_are_named(tmp_path, capsys, change, message):
    trajectory = TRAJECTORIES["radial"][:1]
    scan = list(readouts(measured(trajectory), trajectory))
    write_raw(tmp_path / "raw.h5", xml(), change(scan))
    with pytest.raises(DataError, match=message):
        reconstruct_samples(*load_samples(tmp_path / "raw.h5"))
    assert main(["recon", str(tmp_path / "raw.h5"), "-o", str(tmp_path / "images.h5")]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert "MEL_DEBUG" not in error
    assert not (tmp_path / "images.h5").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "primal_dual_2d"], "without a network only, not by 'primal_dual_2d'"),
        (["--memory", "2GiB", "--deadline", "3"], "without --memory and --deadline"),
        (["--pipeline", "mel_cartesian_2d", "--model", "none"], "the trajectory is radial: pipelines"),
    ],
)
def test_what_does_not_apply_is_refused(tmp_path, capsys, options, message):
    trajectory = TRAJECTORIES["radial"][:1]
    write_raw(tmp_path / "raw.h5", xml(), readouts(measured(trajectory), trajectory))
    assert main(["recon", str(tmp_path / "raw.h5"), "-o", str(tmp_path / "images.h5"), *options]) == 1
    assert message in capsys.readouterr().err
    with pytest.raises(ConfigError, match="not by primal_dual_2d"):
        reconstruct_samples(*load_samples(tmp_path / "raw.h5"), method="primal_dual_2d")


def test_a_separate_noise_scan_whitens_samples_too(tmp_path):
    trajectory = TRAJECTORIES["radial"][:1]
    noise = readout(10 * random_complex((COILS, 600)), flags=[IS_NOISE])
    write_raw(tmp_path / "raw.h5", xml(), readouts(measured(trajectory), trajectory))
    write_raw(tmp_path / "noise.h5", xml(), [noise])
    (plain,) = load_samples(tmp_path / "raw.h5")
    (white,) = load_samples(tmp_path / "raw.h5", noise=tmp_path / "noise.h5")
    assert (plain.noise.whitened, white.noise.whitened) == (False, True)
    assert white.info.provenance["whitening"] == "by the noise scan of noise.h5"
    # The variance of random_complex is 2, so that its covariance needs only the factor 10 (and the bandwidth's).
    assert relative(white.data * 10 / 0.793**0.5, plain.data) < 0.2


def test_samples_that_do_not_fit_their_trajectory_are_refused():
    data, info = torch.zeros(1, 2, 3, 1, 4, 5, dtype=torch.complex64), ScanInfo(MATRIX, MATRIX)
    taken = torch.ones(3, 4, dtype=torch.bool)
    for trajectory in (torch.zeros(2, 4, 5, 2), torch.zeros(3, 4, 6, 2)):
        with pytest.raises(ShapeError, match="do not fit"):
            Samples(data, trajectory, taken, info)
    with pytest.raises(ShapeError, match="do not fit"):
        Samples(data, torch.zeros(3, 4, 5, 2), taken[:1], info)


def test_maps_of_a_radial_file_are_those_of_its_coils(tmp_path):
    trajectory = TRAJECTORIES["radial"][:1]
    scan = [one for number in (0, 1) for one in readouts(measured(trajectory), trajectory, slice=number)]
    write_raw(tmp_path / "raw.h5", xml(), scan)
    assert main(["maps", str(tmp_path / "raw.h5"), "-o", str(tmp_path / "maps.npy")]) == 0
    maps = np.load(tmp_path / "maps.npy")
    assert maps.shape == (2, 1, COILS, 1, *MATRIX)
    images = coil_images(COILS, MATRIX)
    inside = sum_of_squares() > 0.2 * sum_of_squares().max()
    overlap = np.abs((maps[0, 0, :, 0].conj() * images).sum(0))[inside] / sum_of_squares()[inside]
    assert np.median(overlap) > 0.99
