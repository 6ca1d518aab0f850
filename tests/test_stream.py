"""Streams of training examples: pure, the same for any number of workers, honest about noise, and gone when closed."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from melcore.errors import ConfigError, DataError
from melcore.physics.fourier import fft, ifft
from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.preparation import Preparation, prepare
from tests import data_cases as cases
from training.anatomies import check_splits, file_name, open_folder, split_of
from training.anatomy import draw_anatomy
from training.cine import draw_cine, warp
from training.config import MaskSettings
from training.data import Example, Stream, base_of, window_readout
from training.fields import fourier_resample, smooth_field
from training.measured import _turned, draw_measured
from training.sampling import draw_mask
from training.simulation import _check_maps, draw_base, draw_example, draw_scan
from training.sources import open_mixture
from training.workers import WorkerError, Workers

PREPARATION = Preparation(start_iterations=4)


def tensors(example: Example) -> list[torch.Tensor]:
    p = example.prepared
    return [p.k_space.data, p.k_space.mask, p.coil_maps.data, p.scale, p.initial, p.sigma, example.truth]


def same(first: Example, second: Example) -> bool:
    return all(torch.equal(one, other) for one, other in zip(tensors(first), tensors(second), strict=True))


# Purity


def test_an_example_depends_on_its_number_alone() -> None:
    forwards = Stream(cases.data(), PREPARATION)
    examples = [forwards[n] for n in range(6)]
    again = Stream(cases.data(), PREPARATION)
    assert all(same(again[n], examples[n]) for n in (5, 0, 3))
    assert same(Stream(cases.data(), PREPARATION)[4], examples[4]), "a resumed training begins anywhere"
    assert not same(Stream(cases.data(seed=2), PREPARATION)[4], examples[4])
    sums = {float(example.prepared.k_space.data.abs().sum()) for example in examples}
    assert len(sums) == 6, "no two are alike, though bases are reused"


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(workers: int) -> None:
    alone = Stream(cases.data(), PREPARATION)
    with Stream(cases.data(workers=workers), PREPARATION) as together:
        for n in (0, 1, 2, 3, 4, 5, 6, 40, 41, 2):  # a jump ahead and one back
            assert same(alone[n], together[n]), n


def test_every_base_serves_as_often_as_configured() -> None:
    for reuse in (1, 2, 4, 5):
        numbers = [base_of(n, reuse) for n in range(40 * reuse)]
        counts = Counter(numbers)
        assert all(counts[base] == reuse for base in range(2 * reuse, 40)), "once the stream has begun"
        assert max(counts.values()) == reuse
        assert reuse == 1 or all(first != second for first, second in pairwise(numbers))
        # A constant number of them is alive at any time.
        last = {base: n for n, base in enumerate(numbers)}
        alive = [len({b for b in numbers[: n + 1] if last[b] > n}) for n in range(10 * reuse, 20 * reuse)]
        assert max(alive) <= 2 * (reuse - 1) + 1


def test_splits_have_seeds_of_their_own() -> None:
    validation = Stream(cases.data(), PREPARATION, "validation")
    assert len(validation) == 3
    assert len(list(validation)) == 3
    assert validation[1] is validation[1], "validation examples are kept"
    assert not same(validation[0], Stream(cases.data(), PREPARATION)[0])
    with pytest.raises(IndexError):
        validation[3]
    with pytest.raises(TypeError, match="no end"):
        len(Stream(cases.data(), PREPARATION))


# What examples are


def test_examples_take_the_path_of_the_scanner() -> None:
    """Maps, compression and scale as `prepare` makes them of the same data; the target predicts the measurement."""
    settings = cases.data(coils=[6, 6], snr=[300, 300], y=[44, 44], x=[40, 40], reuse=1)
    preparation = Preparation(coils=4)
    example = Stream(settings, preparation)[3]
    p = example.prepared
    assert p.k_space.data.shape[1] == 4
    again = prepare(
        type(p.k_space)(p.k_space.data * p.scale, p.k_space.mask, p.k_space.info, p.k_space.noise),
        coil_maps=p.coil_maps,
        settings=preparation,
    )
    torch.testing.assert_close(again.scale, p.scale)
    torch.testing.assert_close(again.initial, p.initial, rtol=0, atol=5e-3)  # conjugate gradients amplify rounding
    predicted = p.operator()(example.truth)
    error = float((predicted - p.k_space.data).norm() / p.k_space.data.norm())
    assert error < 0.08, "noise, and the maps' own error"
    bright = example.truth.abs().flatten().kthvalue(round(0.99 * example.truth.numel())).values
    assert 0.5 < float(bright) < 2.5


def test_the_noise_that_is_told_is_the_noise_that_is_there() -> None:
    settings = cases.data(y=[64, 64], x=[64, 64], snr=[5, 1000], coils=[4, 4], correlation=0.6)
    mixture = open_mixture(settings, "train")
    for seed in range(3):
        base = draw_base(settings, PREPARATION, mixture, np.random.default_rng(seed))
        example = draw_example(base, settings, PREPARATION, np.random.default_rng(seed))
        p = example.prepared
        mask = p.k_space.mask.expand(p.k_space.data.shape)
        # The truth of all coils in the units of the example: its level follows from the combined image.
        level = float(example.truth.norm() / base.combined.norm())
        noise = (p.k_space.data - base.scan.complete * level)[mask].reshape(p.k_space.data.shape[1], -1)
        covariance = (noise @ noise.mH / noise.shape[1]).numpy() / float(p.sigma) ** 2
        np.testing.assert_allclose(covariance, np.eye(len(covariance)), atol=0.15)


def test_signal_to_noise_and_acceleration_fill_their_ranges() -> None:
    settings = cases.data(snr=[5, 1000], reuse=2)
    stream = Stream(settings, PREPARATION)
    sigmas = np.array([float(stream[n].prepared.sigma) for n in range(24)])
    assert sigmas.max() / sigmas.min() > 20
    fractions = [float(stream[n].prepared.k_space.mask.float().mean()) for n in range(24)]
    assert min(fractions) < 0.4
    assert max(fractions) > 0.55


def test_a_window_of_the_readout_is_that_of_the_whole_example() -> None:
    """But for the start image, which is computed for the window: closer to what conjugate gradients converge to."""
    masks = [{"kind": "uniform lines", "acceleration": [2, 2], "calibration": [14, 14]}]
    settings, preparation = cases.data(masks=masks, snr=[20, 30]), Preparation(start_iterations=200)
    whole, part = Stream(settings, preparation)[2], Stream(settings, preparation, window=16)[2]
    size = whole.truth.shape[-1]
    starts = [s for s in range(size - 15) if torch.equal(whole.truth[..., s : s + 16], part.truth)]
    assert len(starts) == 1
    expected = window_readout(whole, starts[0], 16)
    assert torch.equal(expected.prepared.k_space.data, part.prepared.k_space.data)
    assert torch.equal(expected.prepared.support, part.prepared.support)
    torch.testing.assert_close(part.prepared.initial, expected.prepared.initial, atol=5e-3, rtol=0)
    assert same(Stream(settings, preparation, window=size + 1)[2], whole)
    planes = cases.data()
    assert same(Stream(planes, PREPARATION, window=16)[2], Stream(planes, PREPARATION)[2]), "the mask needs all of it"


def test_failed_maps_make_no_example() -> None:
    settings = cases.data()
    source = open_mixture(settings, "train").sources[0]
    scan = draw_scan(settings, source, None, np.random.default_rng(3))
    combined = torch.zeros(1, 1, *scan.complete.shape[2:], dtype=torch.complex64)
    with pytest.raises(DataError, match="miss"):
        _check_maps(scan.complete, combined, 0.0, 100.0)


@pytest.mark.parametrize(
    ("kind", "frames", "matrix"),
    [
        ("poisson", 1, (14, 18, 8)),
        ("elliptical", 1, (1, 40, 36)),
        ("grid", 1, (1, 40, 36)),
        ("uniform lines", 1, (1, 48, 10)),
        ("random lines", 1, (1, 48, 10)),
        ("time lines", 6, (1, 48, 10)),
        ("shifted lines", 6, (1, 48, 10)),
    ],
)
def test_masks_are_as_configured(kind: Any, frames: int, matrix: tuple[int, int, int]) -> None:
    settings = MaskSettings(kind=kind, acceleration=(1.5, 5), calibration=(5, 8))
    for seed in range(12):
        mask = draw_mask(settings, matrix, frames, np.random.default_rng(seed))
        sampled = mask.expand(1, 1, frames, *matrix)
        acceleration = 1 / float(sampled.float().mean())
        # Calibration lines come on top in regular patterns.
        regular = kind in ("grid", "uniform lines", "shifted lines")
        assert (1 if regular else 1.45) <= acceleration <= 5.3
        region = calibration_region(mask[:, :, :1], (1, 1, 1, *matrix))
        assert min(found for found, size in zip(region, mask.shape[-3:], strict=True) if size > 1) >= 4


def test_partial_fourier_leaves_the_centre() -> None:
    settings = MaskSettings(kind="uniform lines", acceleration=(2, 2), calibration=(8, 8), partial_fourier=1.0)
    for seed in range(8):
        mask = draw_mask(settings, (1, 64, 8), 1, np.random.default_rng(seed)).flatten()
        assert bool(mask[28:36].all())
        ends = bool(mask[:6].any()), bool(mask[-6:].any())
        assert sum(ends) == 1, "one end is missing"


def test_nearly_full_sampling_is_drawn() -> None:
    settings = MaskSettings(kind="poisson", acceleration=(1, 1), calibration=(8, 8))
    assert bool(draw_mask(settings, (1, 30, 26), 1, np.random.default_rng(0)).all())


# Sources


def test_weights_of_a_mixture_are_kept(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        cases.write(tmp_path / name, f"subject {name}", "train", seed=seed)
    sources = [
        {"folder": str(tmp_path / "a"), "weight": 3},
        {"folder": str(tmp_path / "b"), "weight": 1},
        {"simulate": True, "weight": 4},
    ]
    mixture = open_mixture(cases.data(sources=sources), "train")
    rng = np.random.default_rng(0)
    names = [source.folder.path.name if source.folder else "simulation" for source in map(mixture.choose, [rng] * 2000)]
    counts = Counter(names)
    assert abs(counts["a"] / 2000 - 3 / 8) < 0.04
    assert abs(counts["b"] / 2000 - 1 / 8) < 0.03
    assert abs(counts["simulation"] / 2000 - 4 / 8) < 0.04


@pytest.mark.parametrize(
    ("kind", "dimensions", "sizes"),
    [
        ("planes", "2d", {}),
        ("volume", "2d", {}),
        ("labels", "2d", {}),
        ("pairs", "2d", {}),
        ("volume", "3d", {"z": [20, 20]}),
        ("labels", "3d", {"z": [20, 20]}),
        ("pairs", "2d+t", {"frames": [5, 5]}),
        ("planes", "2d+t", {"frames": [5, 5]}),
    ],
)
def test_examples_of_every_kind(tmp_path: Path, kind: str, dimensions: str, sizes: dict[str, Any]) -> None:
    cases.write(tmp_path / "own", "one", "train", kind, seed=3)
    masks = [
        {"kind": "time lines" if "t" in dimensions else "poisson", "acceleration": [1.5, 2], "calibration": [8, 9]}
    ]
    settings = cases.data(dimensions=dimensions, sources=[{"folder": str(tmp_path / "own")}], masks=masks, **sizes)
    example = Stream(settings, PREPARATION)[1]
    shape = example.truth.shape
    assert shape[2] == (5 if "t" in dimensions else 1)
    assert shape[3] == (20 if dimensions == "3d" else 1)
    assert bool(torch.isfinite(torch.view_as_real(example.truth)).all())
    if "t" in dimensions:
        assert float(example.truth.std(2).mean()) > 1e-3, "something moves"


def test_only_subjects_of_the_split_are_drawn(tmp_path: Path) -> None:
    for index, split in enumerate(("train", "train", "validation")):
        cases.write(tmp_path / "own", f"subject {index}", split, seed=index)  # type: ignore[arg-type]
    settings = cases.data(sources=[{"folder": str(tmp_path / "own")}])
    assert {entry.subject for entry in open_mixture(settings, "train").sources[0].entries} == {"subject 0", "subject 1"}
    assert {entry.subject for entry in open_mixture(settings, "validation").sources[0].entries} == {"subject 2"}
    with pytest.raises(ConfigError, match=r"test split.*own: 2 train, 1 validation, 0 test"):
        open_mixture(settings, "test")


def test_a_leak_between_splits_is_refused(tmp_path: Path) -> None:
    cases.write(tmp_path / "a", "anna", "train", seed=1)
    cases.write(tmp_path / "b", "anna", "validation", seed=2)
    sources = [{"folder": str(tmp_path / name)} for name in "ab"]
    with pytest.raises(DataError, match=r"leak.*subject"):
        Stream(cases.data(sources=sources), PREPARATION)
    cases.write(tmp_path / "c", "other name", "test", seed=1)
    with pytest.raises(DataError, match=r"leak.*content"):
        check_splits([open_folder(tmp_path / name) for name in "ac"])


def test_missing_folders_tell_the_command(tmp_path: Path) -> None:
    settings = cases.data(sources=[{"folder": str(tmp_path / "absent")}])
    with pytest.raises(DataError, match=r"does not exist.*mel prepare SOURCE\.\.\. -o .*absent"):
        Stream(settings, PREPARATION)
    cases.write(tmp_path / "flat", "one", "train", "planes")
    with pytest.raises(ConfigError, match="holds planes: of no use for 3d"):
        Stream(cases.data(dimensions="3d", z=[16, 16], sources=[{"folder": str(tmp_path / "flat")}]), PREPARATION)
    (tmp_path / "flat" / file_name("one")).unlink()
    with pytest.raises(DataError, match=r"lacks one\.safetensors"):
        Stream(cases.data(sources=[{"folder": str(tmp_path / "flat")}]), PREPARATION)


def test_splits_of_subjects_are_steady_and_shared_out() -> None:
    counts = Counter(split_of(f"subject {index}") for index in range(2000))
    assert 0.77 < counts["train"] / 2000 < 0.83
    assert 0.08 < counts["validation"] / 2000 < 0.12
    assert split_of("anna") == split_of("anna")
    names = {file_name(name) for name in ("a/b", "a_b", "a:b", ".a_b", "x" * 300, "x" * 301)}
    assert len(names) == 6
    assert all("/" not in name and len(name) < 120 for name in names)


def test_measured_references_keep_little_of_their_noise(tmp_path: Path) -> None:
    """Data of a noisy reference have more noise of their own than the reference, and the level that is told is all."""
    cases.write(tmp_path / "raw", "scan", "train", "k-space", k_space=cases.measured(4, snr=40))
    settings = cases.data(sources=[{"folder": str(tmp_path / "raw")}], snr=[5, 1000], y=[40, 40], x=[36, 36], reuse=1)
    stream = Stream(settings, PREPARATION)
    for n in range(4):
        example = stream[n]
        p = example.prepared
        assert float(p.sigma) > 1.5 / 40 / 1.8, "never the reference's own noise alone"
        residual = (p.operator()(example.truth) - p.k_space.data)[p.k_space.mask.expand(p.k_space.data.shape)]
        told = float(p.sigma)
        assert 0.7 < float(residual.abs().square().mean().sqrt()) / told < 1.6


def test_measured_k_space_gives_its_own_signal(tmp_path: Path) -> None:
    entry = cases.write(tmp_path, "scan", "train", "k-space", k_space=cases.measured(4, snr=40))
    data, signal_level = draw_measured(open_folder(tmp_path), entry, cases.data(), 1, np.random.default_rng(0))
    assert data.shape == (1, 4, 1, 1, 40, 36)
    assert 30 < signal_level < 55


def test_undersampled_scans_are_taken_as_they_are(tmp_path: Path) -> None:
    k_space = cases.measured(4, snr=40, shape=(1, 40, 36))
    mask = draw_mask(
        MaskSettings(kind="uniform lines", acceleration=(2, 2), calibration=(14, 14)),
        (1, 40, 36),
        1,
        np.random.default_rng(0),
    )
    cases.write(tmp_path / "raw", "scan", "train", "undersampled", k_space=k_space * mask, mask=mask)
    example = Stream(cases.data(sources=[{"folder": str(tmp_path / "raw")}]), PREPARATION)[1]
    assert example.truth is None
    assert torch.equal(example.prepared.k_space.mask, mask)
    volume = cases.measured(4, snr=60, shape=(14, 18, 16))
    lines = torch.ones(1, 1, 1, 14, 18, 1, dtype=torch.bool)
    lines[..., ::2, :3, :] = False
    cases.write(tmp_path / "volume", "other", "train", "undersampled", k_space=volume * lines, mask=lines)
    plane = Stream(cases.data(sources=[{"folder": str(tmp_path / "volume")}]), Preparation(start_iterations=2))[0]
    assert plane.prepared.k_space.data.shape[-3:] == (1, 14, 18)
    assert torch.equal(plane.prepared.k_space.mask[0, 0, 0, 0], lines[0, 0, 0, :, :, 0])


@pytest.mark.parametrize("size", [15, 16])
def test_mirroring_measured_data_mirrors_the_image(size: int) -> None:
    image = torch.zeros(2, 1, 1, size, size, dtype=torch.complex64)
    image[:, 0, 0, size // 2 + 3, size // 2 - 4] = 1
    places = set()
    for seed in range(64):
        turned = ifft(_turned(fft(image, (-2, -1)), "2d", np.random.default_rng(seed)), (-2, -1))
        peak = int(turned[0].abs().argmax())
        assert float(turned.abs().max()) == pytest.approx(1, abs=1e-4)
        places.add((peak // size - size // 2, peak % size - size // 2))
    assert places == {(a, b) for a, b in ((3, 4), (3, -4), (-3, 4), (-3, -4), (4, 3), (4, -3), (-4, 3), (-4, -3))}


# Images


def test_resampling_is_what_a_scan_of_lower_resolution_sees() -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, 12, 10, dtype=torch.complex64, generator=generator)
    flat = torch.full((1, 1, 24, 30), 2.0 + 1j)
    torch.testing.assert_close(fourier_resample(flat, (1, 12, 10)), torch.full((1, 1, 12, 10), 2.0 + 1j))
    assert fourier_resample(coarse, (1, 12, 10)) is coarse


def test_smooth_fields_are_smooth_and_of_unit_variance() -> None:
    rng = np.random.default_rng(1)
    fields = torch.stack([smooth_field((1, 40, 36), 5, rng) for _ in range(200)])
    assert 0.7 < float(fields.std()) < 1.3
    assert float((fields[..., 1:] - fields[..., :-1]).abs().mean()) < 0.2


def test_volumes_fit_into_the_field_of_view(tmp_path: Path) -> None:
    """At zoom 0.8 nothing folds over: the edges of the image are air."""
    image = torch.zeros(1, 30, 34, 32)
    image[:, 3:-3, 3:-3, 3:-3] = 1
    entry = cases.write(tmp_path, "block", "train", images=image.half())
    entry = type(entry)(**{**entry.__dict__, "box": ((3, 26), (3, 30), (3, 28))})
    rng, edges = np.random.default_rng(0), []
    for _ in range(12):
        drawn = draw_anatomy(open_folder(tmp_path), entry, (1, 40, 36), 0.6, 0.3, rng).abs()[0, 0]
        edges.append(float(torch.cat([drawn[0], drawn[-1], drawn[:, 0], drawn[:, -1]]).mean() / drawn.max()))
    assert np.median(edges) < 0.1


def test_flows_carry_one_phase_to_the_other(tmp_path: Path) -> None:
    y, x = torch.meshgrid(torch.arange(30.0), torch.arange(26.0), indexing="ij")
    blob = torch.exp(-((y - 14) ** 2 + (x - 12) ** 2) / 20)
    moved = torch.exp(-((y - 14) ** 2 + (x - 15) ** 2) / 20)
    flow = torch.zeros(1, 2, 30, 26)
    flow[:, 1] = 3  # moved(p + flow) = blob(p)
    assert float((warp(moved, flow)[0] - blob).abs().max()) < 0.02
    cases.write(tmp_path, "heart", "train", "pairs", seed=5)
    folder = open_folder(tmp_path)
    cine = draw_cine(folder, folder.entries[0], (1, 40, 36), 6, 1.2, 0.3, np.random.default_rng(0))
    assert cine.shape == (6, 1, 40, 36)


# Processes


def _slow_square(n: int) -> int:
    time.sleep(0.01)
    return n * n


def _fails_at_three(n: int) -> int:
    if n == 3:
        raise DataError("example 3 is no good")
    return n


def _dies(_: int) -> int:
    os.kill(os.getpid(), signal.SIGKILL)
    return 0


def test_results_come_in_order_and_few_wait() -> None:
    workers = Workers(_slow_square, 2, ahead=3)
    assert [workers.get(n) for n in range(12)] == [n * n for n in range(12)]
    time.sleep(0.3)
    assert workers._team is not None
    assert len(workers._team._results) <= 3
    assert [workers.get(n) for n in (100, 102, 5)] == [10000, 10404, 25]
    workers.close()
    assert workers.get(7) == 49, "started again"
    workers.close()


def test_errors_reach_the_one_who_asks() -> None:
    workers = Workers(_fails_at_three, 2, ahead=4)
    assert [workers.get(n) for n in range(3)] == [0, 1, 2]
    with pytest.raises(DataError, match="example 3 is no good"):
        workers.get(3)
    assert workers.get(4) == 4
    workers.close()


def test_a_killed_worker_is_an_error_and_not_a_hang() -> None:
    workers = Workers(_dies, 1, ahead=2)
    with pytest.raises(WorkerError, match=r"exit code -9.*data\.workers"):
        workers.get(0)
    workers.close()


_OWNER = """
import os, sys, time, torch
from tests import data_cases as cases
from melcore.preprocess.preparation import Preparation
from training.data import Stream
if __name__ == "__main__":
    stream = Stream(cases.data(workers=2), Preparation(start_iterations=2))
    stream[0]
    print(*(p.pid for p in stream._workers._team._processes), flush=True)
    if sys.argv[1] == "wait":
        time.sleep(60)
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("end", ["return", "SIGTERM", "SIGKILL"])
def test_no_worker_outlives_its_owner(tmp_path: Path, end: str) -> None:
    script = tmp_path / "owner.py"
    script.write_text(_OWNER)
    root = Path(__file__).parents[1]
    owner = subprocess.Popen(
        [sys.executable, script, "exit" if end == "return" else "wait"],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout is not None
    workers = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(workers) == 2
    if end != "return":
        owner.send_signal(getattr(signal, end))
    owner.communicate(timeout=60)
    deadline = time.monotonic() + 30
    while any(map(_alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(_alive, workers))
