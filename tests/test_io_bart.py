"""BART: its conventions are ours, and none of its ways of failing looks like a result."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from melcore import layout
from melcore.cli import main
from melcore.data import KSpace, ScanInfo
from melcore.errors import ConfigError, DataError, MissingDependencyError, ShapeError, ToolError
from melcore.io.bart import (
    EmptyOutputError,
    MapSettings,
    estimate_coil_maps,
    estimate_maps,
    read_cfl,
    run,
    version,
    write_cfl,
)
from melcore.io.load import load_k_space
from melcore.physics import Sense, conjugate_gradient
from melcore.preprocess.calibration import calibration_region
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol
from tests.cases import centred_fft, coil_images, random_complex


@pytest.fixture(autouse=True)
def scratch(tmp_path, monkeypatch):
    """A scratch folder that must be empty again after each test."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setenv("MEL_SCRATCH", str(folder))
    yield folder
    assert not list(folder.iterdir())


def program(path: Path, script: str) -> str:
    """A program in BART's place: one that fails in a way that BART can, but not at will."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


# --- files


@settings(max_examples=25, deadline=None)
@given(shape=hnp.array_shapes(min_dims=1, max_dims=7, max_side=4), seed=st.integers(0, 99))
def test_arrays_survive_the_file(tmp_path_factory, shape, seed):
    path, array = tmp_path_factory.mktemp("cfl") / "array", random_complex(shape, seed)
    write_cfl(path, array)
    read = read_cfl(path.with_suffix(".cfl"))
    assert read.shape == shape + (1,) * (16 - len(shape))
    np.testing.assert_array_equal(read.reshape(shape), array)


def test_bart_reads_and_writes_the_same_files(tmp_path):
    array = random_complex((3, 5, 2))
    write_cfl(tmp_path / "a", array)
    subprocess.run(["bart", "transpose", "0", "2", "a", "b"], cwd=tmp_path, check=True, capture_output=True)
    np.testing.assert_array_equal(read_cfl(tmp_path / "b")[:, :, :, *[0] * 13], array.transpose(2, 1, 0))
    assert {path.name for path in tmp_path.iterdir()} >= {"a.cfl", "a.hdr"}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("header", "samples", "message"),
    [
        (None, b"", "array.hdr does not exist"),
        ("# Dimensions\n2 3\n", None, "array.cfl does not exist"),
        (
            "# Dimensions\n2 3\n",
            b"0" * 40,
            "holds 40 bytes, but array.hdr announces 6 complex values, which is 48 bytes",
        ),
        ("# Dimensions\n2 -3\n", b"0" * 48, "not the header of a BART array"),
        ("# Dimensions\n", b"0" * 48, "not the header of a BART array"),
        ("2 3\n", b"0" * 48, "not the header of a BART array"),
    ],
)
def test_damaged_files_are_refused(tmp_path, header, samples, message):
    if header is not None:
        (tmp_path / "array.hdr").write_text(header)
    if samples is not None:
        (tmp_path / "array.cfl").write_bytes(samples)
    with pytest.raises(DataError, match=message):
        read_cfl(tmp_path / "array")


def test_writing_into_a_missing_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="cannot be written"):
        write_cfl(tmp_path / "none" / "array", random_complex((2,)))


# --- commands


def test_barts_axes_and_fourier_transform_are_ours():
    image = random_complex((2, 3, 4, 5, 6, 7))
    (transformed,) = run(["fft", "-u", "7"], [layout.k_space_to_bart(image)])
    np.testing.assert_allclose(layout.k_space_from_bart(transformed), centred_fft(image, (-3, -2, -1)), atol=1e-5)


def test_named_inputs_are_where_the_command_says():
    first, second = random_complex((3, 4)), random_complex((3, 4), 1)
    (result,) = run(["saxpy", "2", "b", "a"], {"a": first, "b": second})
    np.testing.assert_allclose(result.reshape(3, 4), 2 * second + first, rtol=1e-6)


def test_a_command_may_have_several_outputs():
    matrix = random_complex((4, 3))
    left, values, right = run(["svd", "-e"], [matrix], 3)
    values = np.diag(values.flatten()[:3])
    rebuilt = left.squeeze() @ values @ right.squeeze()
    np.testing.assert_allclose(rebuilt, matrix, atol=1e-5)


def test_version():
    assert version().split(".")[0].isdigit()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["nosuchcommand"], "bart nosuchcommand failed .exit code 255.: Unknown bart command"),
        (["ecalib", "-m", "9"], "bart ecalib failed .exit code 134.: .*maps <= ksp_dims"),
        (["fft", "--none", "7"], "bart fft failed .*none"),
    ],
)
def test_failures_carry_barts_own_words_in_one_plain_line(command, message):
    with pytest.raises(ToolError, match=message) as caught:
        run(command, [random_complex((8, 8, 1, 2))])
    text = str(caught.value)
    assert text.isprintable()
    assert "Done." not in text


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_inputs_that_are_not_finite_are_refused(value):
    array = random_complex((8, 8))
    array[3, 4] = value
    with pytest.raises(DataError, match="input in0 of bart fft holds NaN or infinity"):
        run(["fft", "3"], [array])


def test_outputs_of_zeros_are_refused():
    with pytest.raises(EmptyOutputError, match="bart zeros reported success but its output out0 holds only zeros"):
        run(["zeros", "2", "4", "4"])


HEADER = "printf '# Dimensions\\n2\\n' > out0.hdr; "


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            HEADER + "head -c 16 /dev/zero > out0.cfl; echo '\033[31mERROR: \033[0mno\n luck' >&2; exit 1",
            "1.: ERROR: no luck",
        ),
        (
            HEADER + "printf '\\000\\000\\300\\177\\000\\000\\000\\000' > out0.cfl; cat out0.cfl >> out0.cfl.2",
            "no valid out0",
        ),
        (
            HEADER + "for i in 1 2; do printf '\\000\\000\\300\\177\\000\\000\\000\\000'; done > out0.cfl",
            "out0 holds NaN",
        ),
        ("true", "wrote no valid out0"),
        ("kill -BUS $$", "exit code 135.*scratch folder .* is probably full"),
        ("kill -KILL $$", "exit code 137.*want of memory"),
    ],
)
def test_wrong_results_at_any_exit_code_are_errors(tmp_path, monkeypatch, script, message):
    monkeypatch.setenv("MEL_BART", program(tmp_path / "bart", script))
    with pytest.raises(ToolError, match=message):
        run(["anything"])


def test_a_missing_bart_says_how_to_install_it(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(MissingDependencyError, match=r"apt install bart.*MEL_BART"):
        run(["version"])
    monkeypatch.setenv("MEL_BART", "/nowhere/bart")
    with pytest.raises(MissingDependencyError, match="MEL_BART names '/nowhere/bart', which is no program"):
        version()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def _wait_for(condition) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("why", ["timeout", "cancel", "interrupt"])
def test_whatever_stops_a_command_ends_all_its_processes(tmp_path, monkeypatch, why):
    pids = tmp_path / "pids"
    script = f"sleep 100 & echo $! $$ > {pids}.part; mv {pids}.part {pids}; wait"
    monkeypatch.setenv("MEL_BART", program(tmp_path / "bart", script))
    cancel = threading.Event()

    def stop():
        _wait_for(pids.exists)
        if why == "cancel":
            cancel.set()
        elif why == "interrupt":
            time.sleep(0.3)  # until the main thread waits for the program that it has started
            os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=stop)
    thread.start()
    expected = {"timeout": "did not end within 1 s", "cancel": "was cancelled", "interrupt": None}[why]
    with pytest.raises(KeyboardInterrupt if why == "interrupt" else ToolError, match=expected):
        run(["sleep"], timeout=1 if why == "timeout" else None, cancel=cancel if why == "cancel" else None)
    thread.join()
    for pid in map(int, pids.read_text().split()):
        _wait_for(lambda pid=pid: _gone(pid))


def test_it_works_where_standard_input_is_a_socket(tmp_path, monkeypatch):
    """As under Gadgetron: `sys.stdin` is None and the connection is file 0, which BART must not get hold of."""
    script = 'test "$(readlink /proc/self/fd/0)" = /dev/null && exec bart "$@"'
    monkeypatch.setenv("MEL_BART", program(tmp_path / "bart", script))
    ours, theirs = socket.socketpair()
    code = (
        "import sys; sys.stdin = None; import numpy as np; from melcore.io.bart import run;"
        "assert run(['ones', '2', '3', '3'])[0].sum() == 9; import os; os.write(0, b'alive')"
    )
    with ours, theirs:
        subprocess.run([sys.executable, "-c", code], stdin=theirs, check=True)
        assert ours.recv(5) == b"alive"


# --- calibration region


@settings(max_examples=60, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, max_side=7), elements=st.booleans()))
def test_calibration_region_is_a_full_box_that_cannot_grow(mask):
    region = calibration_region(torch.from_numpy(mask[np.newaxis, np.newaxis, np.newaxis]))

    def full(sizes):
        starts = [n // 2 - s // 2 for n, s in zip(mask.shape, sizes, strict=True)]
        return mask[tuple(slice(a, a + s) for a, s in zip(starts, sizes, strict=True))].all()

    if region == (0, 0, 0):
        assert not full((1, 1, 1))
        return
    assert full(region)
    for axis in range(3):
        larger = [size + (axis == i) for i, size in enumerate(region)]
        assert larger[axis] > mask.shape[axis] or not full(larger)


def test_calibration_region_joins_frames_and_fills_broadcast_axes():
    mask = torch.zeros(2, 1, 3, 9, 10, 1, dtype=torch.bool)
    mask[:, :, 0, 2:7, 3:7] = True
    mask[:, :, 1, 2:7, 7] = True
    mask[:, :, 2, 2:7, 2] = True
    assert calibration_region(mask, (2, 8, 3, 9, 10, 16)) == (5, 6, 16)
    mask[1, :, 2, 2:7, 2] = False
    assert calibration_region(mask) == (5, 5, 1)


# --- coil maps


def k_space_of(images, mask=None) -> KSpace:
    """K-space (1, coil, 1, z, y, x) of coil images, sampled by a mask (z, y)."""
    data = torch.from_numpy(centred_fft(images, (-3, -2, -1)))[None, :, None]
    grid = tuple(data.shape[-3:])
    sampled = torch.ones(1, 1, 1, *grid[:2], 1, dtype=torch.bool) if mask is None else mask.view(1, 1, 1, *grid[:2], 1)
    return KSpace(data * sampled, sampled, ScanInfo(grid, grid))


def centre_mask(grid, sizes) -> torch.Tensor:
    """Every second line, and a fully sampled centre."""
    mask = torch.zeros(grid, dtype=torch.bool)
    mask[:, ::2] = True
    starts = [n // 2 - s // 2 for n, s in zip(grid, sizes, strict=True)]
    mask[starts[0] : starts[0] + sizes[0], starts[1] : starts[1] + sizes[1]] = True
    return mask


def unexplained(maps, images) -> float:
    """Fraction of the coil images that no combination of the map sets explains, where there are maps."""
    maps, images = maps.data[0, :, :, 0].numpy(), images * (np.abs(maps.data[0, 0, :, 0].numpy()).sum(0) > 0)
    explained = np.zeros_like(images)
    for one in maps:  # sets of ESPIRiT maps are orthonormal
        explained += one * (one.conj() * images).sum(0)
    return float(np.linalg.norm(images - explained) / np.linalg.norm(images))


@pytest.mark.parametrize(
    ("grid", "coils", "centre", "options"),
    [
        ((1, 62, 50), 6, (1, 24), {}),
        ((1, 62, 50), 6, (1, 24), {"sets": 2}),
        ((30, 36, 28), 5, (16, 18), {}),
        ((3, 48, 40), 4, (3, 20), {}),
        ((4, 48, 40), 4, (4, 20), {}),
        ((8, 48, 39), 4, (8, 20), {}),
    ],
)
def test_maps_explain_the_coil_images(grid, coils, centre, options):
    images = coil_images(coils, grid)
    k_space = k_space_of(images, centre_mask(grid[:2], centre))
    maps = estimate_coil_maps(k_space, **options)
    assert maps.data.shape == (1, options.get("sets", 1), coils, 1, *grid)
    assert maps.data.dtype == torch.complex64
    assert maps.source.startswith(f"bart ecalib -m {options.get('sets', 1)} ")
    assert maps.gauge == "first principal component"
    assert unexplained(maps, images) < 0.05
    # Cropped outside the object, not inside: BART's eigenvalues are what they should be, on thin slabs too.
    strength, covered = np.linalg.norm(images, axis=0), (maps.data[0, 0, :, 0].abs().sum(0) > 0).numpy()
    assert covered[strength > 0.3 * strength.max()].mean() > 0.99
    assert covered.mean() < 0.98


def test_caldir_has_its_own_gauge():
    images = coil_images(4, (1, 48, 40))
    maps = estimate_coil_maps(k_space_of(images), method="caldir")
    assert maps.source == "bart caldir 24"
    assert maps.gauge != "first principal component"
    magnitude = np.abs(images) / np.linalg.norm(images, axis=0).max()
    inside = magnitude.sum(0) > 0.5
    expected = np.abs(images) / np.maximum(np.linalg.norm(images, axis=0), 1e-6)
    assert np.abs(np.abs(maps.data[0, 0, :, 0].numpy()) - expected)[:, inside].mean() < 0.05


def test_maps_do_not_depend_on_scale_or_on_the_other_slices():
    slices = [k_space_of(coil_images(4, (1, 40, 36)) * factor, centre_mask((1, 40), (1, 16))) for factor in (1, 1e19)]
    both = torch.cat([one.data for one in slices])
    maps = estimate_coil_maps(both).data
    np.testing.assert_allclose(maps[0], maps[1], atol=2e-4)
    np.testing.assert_allclose(maps[:1], estimate_coil_maps(slices[0]).data, atol=1e-6)


def test_frames_are_averaged_over_the_samples_that_were_taken():
    images = coil_images(4, (1, 40, 36))
    full = k_space_of(images)
    mask = torch.zeros(1, 1, 4, 1, 40, 1, dtype=torch.bool)
    for frame in range(4):
        mask[:, :, frame, :, frame::4] = True
    mask[:, :, :2, :, 18:22] = True  # some lines in several frames
    interleaved = KSpace(full.data * mask, mask, full.info)
    np.testing.assert_allclose(estimate_coil_maps(interleaved).data, estimate_coil_maps(full).data, atol=1e-4)


def test_separate_calibration_is_used_where_its_centre_is_larger():
    images = coil_images(4, (1, 40, 36))
    undersampled = k_space_of(images, centre_mask((1, 40), (1, 1)))
    calibration = k_space_of(images, centre_mask((1, 40), (1, 20)))
    maps = estimate_coil_maps(undersampled, calibration=calibration)
    np.testing.assert_allclose(maps.data, estimate_coil_maps(calibration).data, atol=1e-6)
    better = estimate_coil_maps(calibration, calibration=undersampled)
    np.testing.assert_allclose(better.data, maps.data, atol=1e-6)
    with pytest.raises(ShapeError, match="calibration data"):
        estimate_coil_maps(undersampled, calibration=k_space_of(images[:3]))


def test_one_coil_has_maps_of_one_in_the_object():
    images = coil_images(1, (1, 40, 36))
    maps = estimate_coil_maps(k_space_of(images)).data[0, 0, 0, 0, 0].numpy()
    assert set(np.unique(maps)) == {0, 1}
    assert maps[np.abs(images[0, 0]) > 0.3 * np.abs(images).max()].all()


def test_a_slice_of_noise_does_not_cost_the_exam():
    grid = (1, 40, 36)
    k_space = torch.cat([k_space_of(coil_images(4, grid)).data, torch.from_numpy(random_complex((1, 4, 1, *grid)))])
    # A threshold that noise does not reach, so that its maps are empty.
    maps = estimate_coil_maps(k_space, crop=0.995).data
    assert (maps[0] == 0).any()
    assert (maps[1].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize(
    ("mask", "options", "found"),
    [
        (centre_mask((1, 40), (1, 5)), {}, r"at least 1x6x6 .* have a fully sampled centre of 1x5x36"),
        (centre_mask((1, 40), (1, 20)) & (torch.arange(40) != 20), {}, "have no fully sampled centre"),
        (centre_mask((1, 40), (1, 4)), {"method": "caldir"}, "at least 1x6x6"),
    ],
)
def test_too_small_a_calibration_region_is_explained(mask, options, found):
    k_space = k_space_of(coil_images(4, (1, 40, 36)), mask)
    with pytest.raises(DataError, match=found):
        estimate_coil_maps(k_space, **options)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (lambda data: data * 0, DataError, "only zeros"),
        (lambda data: data * torch.nan, DataError, "NaN"),
        (lambda data: data[0], ShapeError, "6 axes"),
    ],
)
def test_unusable_k_space_is_refused(change, kind, message):
    data = k_space_of(coil_images(3, (1, 30, 28))).data
    with pytest.raises(kind, match=message):
        estimate_coil_maps(change(data))


@pytest.mark.parametrize(
    "options",
    [{"sets": 4}, {"sets": 0}, {"method": "grappa"}, {"crop": 2.0}, {"kernel": 30}, {"method": "caldir", "sets": 2}],
)
def test_wrong_settings_are_refused(options):
    with pytest.raises(ConfigError):
        estimate_coil_maps(k_space_of(coil_images(3, (1, 30, 28))), **options)


def test_the_time_limit_is_for_all_slices():
    data = k_space_of(coil_images(3, (1, 30, 28))).data.expand(200, -1, -1, -1, -1, -1)
    start = time.monotonic()
    with pytest.raises(ToolError, match=r"coil maps of slice .* did not end within"):
        estimate_coil_maps(data, timeout=0.5)
    assert time.monotonic() - start < 5


def test_odd_sizes_keep_their_centre():
    """Maps must not be shifted by half a voxel where axes are odd: mirrored data give mirrored maps."""
    for n, m in product((31, 32), (35, 36)):
        images = coil_images(3, (1, n, m))
        maps = estimate_coil_maps(k_space_of(images))
        assert unexplained(maps, images) < 0.05


# --- coil maps from a reduced grid


def principal_reference(k_space: KSpace, size: int) -> torch.Tensor:
    centre = k_space.data[0, :, 0]
    for axis in (1, 2, 3):
        centre = centre.narrow(axis, centre.shape[axis] // 2 - size // 2, size)
    samples = centre.reshape(len(centre), -1).to(torch.complex128)
    return torch.linalg.eigh(samples @ samples.mH).eigenvectors[:, -1].to(torch.complex64)


@pytest.fixture(scope="module")
def volume():
    """Noisy undersampled k-space of a volume, and its true coil images."""
    images = coil_images(4, (40, 45, 42))
    full = k_space_of(images + 0.02 * np.abs(images).max() * random_complex(images.shape))
    y, z = torch.meshgrid(torch.arange(40), torch.arange(45), indexing="ij")
    mask = ((y + z) % 2 == 0) | (((y - 20).abs() <= 9) & ((z - 22).abs() <= 9))
    return KSpace(full.data * mask[..., None], mask[None, None, None, ..., None], full.info), images


def cg_sense(k_space: KSpace, maps: torch.Tensor) -> torch.Tensor:
    """Coil images of a regularised SENSE reconstruction."""
    operator = Sense(maps, k_space.mask)
    rhs = operator.adjoint(k_space.data)
    solution = conjugate_gradient(lambda v: operator.normal(v) + 0.01 * v, rhs, max_iterations=8)
    return (maps[0, :, :, 0] * solution.value[0, :, 0].unsqueeze(1)).sum(0)


@pytest.mark.parametrize("sets", [1, 2])
def test_maps_of_a_reduced_grid_reconstruct_as_those_of_the_full_one(volume, sets):
    k_space, images = volume
    truth, errors, found = torch.from_numpy(images), {}, {}
    for grid in ("full", "reduced"):
        found[grid] = estimate_maps(k_space, MapSettings(sets=sets, grid=grid, calibration_size=16))
        error = cg_sense(k_space, found[grid].coil_maps.data) - truth
        errors[grid] = float(error.norm() / truth.norm())
    assert errors["reduced"] < 1.01 * errors["full"]
    assert ", interpolated from 32x32x32" in found["reduced"].coil_maps.source
    assert "interpolated" not in found["full"].coil_maps.source
    full, reduced = (found[grid].coil_maps.data[0, :, :, 0] for grid in ("full", "reduced"))
    for one in reduced:
        norm = one.abs().square().sum(0)
        assert torch.all((norm == 0) | ((norm - 1).abs() < 1e-4))
    # The same support, sign and gauge, where the signal decides about them.
    assert ((full != 0).any(1) == (reduced != 0).any(1)).float().mean() > 0.995
    strong = truth.abs().square().sum(0) > 0.05 * truth.abs().square().sum(0).max()
    assert (full[0] - reduced[0])[:, strong].abs().square().sum(0).mean().sqrt() < 0.02
    eigenvalues = [found[grid].eigenvalues[0, 0, 0][strong] for grid in ("full", "reduced")]
    torch.testing.assert_close(*eigenvalues, atol=0.01, rtol=0)


@pytest.mark.parametrize("grid", ["full", "reduced"])
def test_the_gauge_is_the_first_principal_component_of_the_calibration_data(volume, grid):
    k_space, _ = volume
    maps = estimate_coil_maps(k_space, grid=grid, calibration_size=16).data[0, 0, :, 0]
    virtual = torch.einsum("c,czyx->zyx", principal_reference(k_space, 16).conj(), maps)
    virtual = virtual * torch.polar(torch.ones(()), -virtual.sum().angle())
    clear = virtual.abs() > 0.1
    assert virtual[clear].angle().abs().max() < 0.05


def test_the_default_is_the_reduced_grid_for_one_set(volume):
    assert "interpolated" in estimate_coil_maps(volume[0], calibration_size=16).source
    assert "interpolated" not in estimate_coil_maps(volume[0], calibration_size=16, sets=2).source
    plane = k_space_of(coil_images(4, (1, 64, 70)))
    assert "interpolated from 1x48x48" in estimate_coil_maps(plane).source
    assert "interpolated" not in estimate_coil_maps(plane, grid="full").source
    # A grid that is hardly coarser is not worth it.
    assert "interpolated" not in estimate_coil_maps(k_space_of(coil_images(4, (1, 54, 50)))).source
    with pytest.raises(ConfigError, match="caldir"):
        estimate_coil_maps(plane, method="caldir", grid="reduced")


def test_a_plane_of_the_reduced_grid_reconstructs_as_one_of_the_full_grid():
    images = coil_images(6, (1, 90, 101))
    noisy = k_space_of(images + 0.02 * np.abs(images).max() * random_complex(images.shape))
    lines = (torch.arange(90) % 3 == 0) | ((torch.arange(90) - 45).abs() < 12)
    k_space = KSpace(noisy.data * lines[:, None], lines[None, None, None, None, :, None], noisy.info)
    errors = {}
    for grid in ("full", "reduced"):
        maps = estimate_coil_maps(k_space, grid=grid).data
        errors[grid] = float((cg_sense(k_space, maps) - torch.from_numpy(images)).norm())
    assert errors["reduced"] < 1.005 * errors["full"]


def test_eigenvalues_are_what_maps_are_cropped_by():
    images = coil_images(4, (1, 48, 40))
    estimate = estimate_maps(k_space_of(images), MapSettings(crop=0.9))
    values = estimate.eigenvalues
    assert values.shape == (1, 1, 1, 1, 48, 40)
    assert torch.equal(values[0, 0, 0] > 0.9, (estimate.coil_maps.data[0, 0, :, 0] != 0).any(0))
    inside = torch.from_numpy(np.abs(images).sum(0) > 0.3 * np.abs(images).sum(0).max())
    assert values[0, 0, 0][inside].min() > 0.95
    assert estimate_maps(k_space_of(images), MapSettings(method="caldir")).eigenvalues is None


def test_only_the_calibration_region_is_looked_at():
    k_space = k_space_of(coil_images(4, (1, 48, 40)), centre_mask((1, 48), (1, 21)))
    alone = torch.zeros_like(k_space.data)
    alone[..., 14:35, 8:32] = k_space.data[..., 14:35, 8:32]
    for method in ("espirit", "caldir"):
        expected = estimate_coil_maps(k_space, method=method, calibration_size=20).data
        np.testing.assert_allclose(estimate_coil_maps(alone, method=method, calibration_size=20).data, expected)


def test_neighbouring_slices_have_neighbouring_maps():
    """Each slice has its own principal component; their phases must not jump."""
    images = coil_images(5, (9, 40, 36)) * np.exp(0.3j)
    slices = torch.from_numpy(centred_fft(images, (-2, -1))).movedim(1, 0)[:, :, None, None]
    maps = estimate_coil_maps(slices.contiguous()).data[:, 0, :, 0, 0]
    both = (maps[1:] != 0).any(1) & (maps[:-1] != 0).any(1)
    turn = (maps[1:] * maps[:-1].conj()).sum(1)
    assert turn[both].angle().abs().quantile(0.95) < 0.3


# --- the cache


def test_the_same_question_is_asked_once(tmp_path, monkeypatch):
    calls = tmp_path / "calls"
    script = f'[ "$1" = version ] || echo "$1" >> {calls}; exec {shutil.which("bart")} "$@"'
    monkeypatch.setenv("MEL_BART", program(tmp_path / "bart", script))
    k_space, cache = k_space_of(coil_images(4, (1, 40, 36))), tmp_path / "cache"

    def estimate(**options):
        return estimate_maps(k_space, MapSettings(**options), cache=cache)

    first, again = estimate(), estimate()
    assert torch.equal(first.coil_maps.data, again.coil_maps.data)
    assert torch.equal(first.eigenvalues, again.eigenvalues)
    assert calls.read_text() == "ecalib\n"
    cropped = estimate(crop=0.95)  # cropping is ours
    assert calls.read_text() == "ecalib\n"
    assert (cropped.coil_maps.data != 0).sum() < (first.coil_maps.data != 0).sum()
    estimate(kernel=5)
    assert calls.read_text() == "ecalib\n" * 2
    for file in cache.iterdir():
        file.write_bytes(b"damaged")
    assert torch.equal(estimate().coil_maps.data, first.coil_maps.data)
    assert torch.equal(estimate().coil_maps.data, first.coil_maps.data)
    assert calls.read_text() == "ecalib\n" * 3
    monkeypatch.setenv("MEL_CACHE", str(cache))
    estimate_coil_maps(k_space)
    assert calls.read_text() == "ecalib\n" * 3
    changed = KSpace(k_space.data * (1 + 1e-3 * torch.arange(4).view(1, 4, 1, 1, 1, 1)), k_space.mask, k_space.info)
    estimate_coil_maps(changed)
    assert calls.read_text() == "ecalib\n" * 4


def test_a_cache_that_cannot_be_made_is_explained(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"cache .* cannot be made"):
        estimate_maps(k_space_of(coil_images(3, (1, 30, 28))), cache=tmp_path / "file" / "cache")


@pytest.mark.parametrize("calibration", [(1, 18), (0, 0)])
def test_maps_of_a_file_need_its_centre_only(tmp_path, calibration, capsys):
    """The command reads little; its maps are those of all that the file holds."""
    path = tmp_path / "exam.h5"
    write_exam(path, Protocol(shape=(3, 64, 60), slices=True, coils=4, acceleration=3, calibration=calibration, seed=3))
    centre, separate = load_k_space(path, centre=16)
    if calibration == (0, 0):
        assert int(centre.mask.sum()) < 3 * 6
        assert main(["maps", str(path), "-o", str(tmp_path / "maps.npy")]) == 1
        assert "fully sampled centre" in capsys.readouterr().err
        return
    assert separate is not None
    assert centre.mask.any(-1).any(0).flatten().nonzero().flatten().tolist() == list(range(24, 40))
    k_space, extra = load_k_space(path)
    assert torch.equal(centre.data, k_space.data * centre.mask)
    assert main(["maps", str(path), "-o", str(tmp_path / "maps.npy")]) == 0
    expected = estimate_coil_maps(k_space, calibration=extra).data
    np.testing.assert_array_equal(np.load(tmp_path / "maps.npy"), expected)
