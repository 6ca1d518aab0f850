"""From k-space to an image: right images, honest labels, and clear errors for data that cannot be used."""

import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from melcore.bundle import Bundle
from melcore.data import CoilMaps, KSpace, Noise, ScanInfo
from melcore.errors import ConfigError, DataError, ShapeError, ToolError
from melcore.physics import Sense, fft, ifft
from melcore.preprocess.preparation import Preparation, prepare, start_image
from melcore.reconstruct import DeadlineExceededError, Reconstructor
from melcore.unrolled import build
from tests.laws import random, relative

MATRIX = (1, 54, 47)
CENTRE = (1, 22, 22)


def smooth_maps(matrix: tuple[int, int, int], coils: int) -> torch.Tensor:
    """Complex Gaussians around the object, of unit sum of squares, ``(1, 1, coil, 1, z, y, x)``."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in matrix), indexing="ij")
    angles = torch.arange(coils) * (2 * torch.pi / coils)
    maps = [
        torch.exp(
            -1.5 * ((axes[1] - a.sin()) ** 2 + (axes[2] - a.cos()) ** 2)
            - 0.3 * axes[0] ** 2
            + 1j * (a + axes[1] * a.cos())
        )
        for a in angles
    ]
    data = torch.stack(maps)
    return (data / data.abs().square().sum(0).sqrt()).to(torch.complex64)[None, None, :, None]


def disc(matrix: tuple[int, int, int]) -> torch.Tensor:
    """An object with structure, ``(1, 1, 1, z, y, x)``, off centre, so that no flip goes unseen."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in matrix), indexing="ij")
    y, x = axes[1], axes[2]
    image = ((y / 0.8) ** 2 + (x / 0.7) ** 2 < 1).float() + 0.6 * ((y - 0.3) ** 2 + (x + 0.2) ** 2 < 0.04)
    return (image * torch.exp(0.5j * x)).to(torch.complex64)[None, None, None]


def exam(matrix: tuple[int, int, int] = MATRIX, *, coils: int = 6, frames: int = 1, level: float = 0.02) -> KSpace:
    """Noisy k-space of the disc: every third line, moving from frame to frame, and the whole centre."""
    clean = fft(smooth_maps(matrix, coils)[:, 0] * disc(matrix)).expand(-1, -1, frames, -1, -1, -1)
    mask = torch.zeros((1, 1, frames, *matrix[:2], 1), dtype=torch.bool)
    for frame in range(frames):
        mask[:, :, frame, :, frame % 3 :: 3] = True
    centre = [slice(n // 2 - c // 2, n // 2 - c // 2 + c) for n, c in zip(matrix, CENTRE, strict=True)]
    mask[:, :, :, centre[0], centre[1]] = True
    data = (clean + level * random(tuple(clean.shape), torch.complex64, seed=4)) * mask
    info = ScanInfo(encoded_matrix=matrix, recon_matrix=matrix)
    return KSpace(data.to(torch.complex64), mask, info)


def bundle(dimensions: int = 2, channels: int = 4) -> Bundle:
    torch.manual_seed(0)
    architecture = {
        "iterations": 2,
        "cg_iterations": 3,
        "regulariser": {"name": "resnet", "dimensions": dimensions, "channels": channels, "layers": 2},
    }
    return Bundle(build(architecture), architecture, Preparation(), name="untrained", digest="0123456789abcdef")


def against_truth(image: torch.Tensor, matrix: tuple[int, int, int] = MATRIX) -> float:
    """Relative error of the magnitude in the object, after the best scale: maps are determined up to a phase only.

    Outside the object is noise, which images show.
    """
    truth = disc(matrix).abs().expand_as(image)
    magnitude = image.abs() * (truth > 0)
    scale = (magnitude * truth).sum() / magnitude.square().sum()
    return relative(scale * magnitude, truth)


def test_methods_reconstruct_and_rank_as_they_should() -> None:
    adjoint, cg_sense = (Reconstructor(method)(exam()) for method in ("adjoint", "cg-sense"))
    assert (adjoint.path_taken, cg_sense.path_taken) == ("adjoint", "cg-sense")
    assert against_truth(cg_sense.image.data) < 0.05 < against_truth(adjoint.image.data)
    assert cg_sense.image.data.shape == (1, 1, 1, *MATRIX)
    assert cg_sense.warning == ""
    assert cg_sense.quality["acceleration"] == pytest.approx(54 / 33)
    assert 0.4 < cg_sense.quality["map_support"] < 0.95
    assert cg_sense.quality["data_residual"] < 0.2


def test_images_come_in_the_units_of_the_data() -> None:
    """The network works at scale one, but what leaves is as large as what came."""
    k_space = exam()
    for factor in (1e-9, 1.0, 5e13):
        image = Reconstructor("none")(replace(k_space, data=k_space.data * factor)).image.data
        assert float(image.abs().max()) / factor == pytest.approx(1.6, rel=0.15)


def test_network_at_the_start_of_training_is_nearly_cg_sense() -> None:
    learned = Reconstructor(bundle())(exam())
    assert learned.path_taken == "learned"
    assert against_truth(learned.image.data) < 0.05


def test_given_maps_are_used_as_they_are() -> None:
    maps = CoilMaps(smooth_maps(MATRIX, 6), source="known")
    image = Reconstructor("cg-sense")(exam(level=0), coil_maps=maps).image.data
    assert relative(image, disc(MATRIX)) < 0.06


def test_slices_do_not_know_each_other() -> None:
    one, other = exam(), exam(level=0.1)
    both = KSpace(torch.cat([one.data, 3 * other.data]), torch.cat([one.mask, other.mask]), one.info)
    for model in ("cg-sense", bundle()):
        together = Reconstructor(model)(both).image.data
        assert relative(together[:1], Reconstructor(model)(one).image.data) < 1e-4


def test_soft_sense_gives_one_image_for_each_set() -> None:
    result = Reconstructor("cg-sense", preparation=Preparation(map_sets=2))(exam())
    assert result.image.data.shape == (1, 2, 1, *MATRIX)
    total = result.image.data.abs().square().sum(1, keepdim=True).sqrt()
    assert against_truth(total) < 0.06


def test_compressed_coils_give_nearly_the_same_image() -> None:
    k_space = exam(coils=9)
    full = Reconstructor("cg-sense")(k_space)
    compressed = Reconstructor("cg-sense", preparation=Preparation(coils=6))(k_space)
    assert full.quality["retained_energy"] == 1
    assert 0.99 < compressed.quality["retained_energy"] < 1
    assert against_truth(compressed.image.data) < 0.06


def test_start_from_the_time_average_helps_where_frames_are_alike() -> None:
    k_space = exam(frames=6)
    errors = [
        against_truth(prepare(k_space, settings=Preparation(start=start, start_iterations=2)).initial)
        for start in ("zero", "time average")
    ]
    assert errors[1] < 0.75 * errors[0]


def test_the_weight_of_cg_sense_follows_the_noise_unless_it_is_given() -> None:
    quiet, loud, truth = exam(level=0.002), exam(level=0.2), disc(MATRIX)
    maps = CoilMaps(smooth_maps(MATRIX, 6), source="known")
    for k_space in (quiet, loud):
        images = [
            Reconstructor("cg-sense", weight=weight)(k_space, maps).image.data * (truth != 0)
            for weight in (None, 1e-5, 1e-3, 0.1, 1.0)
        ]
        errors = [relative(image, truth) for image in images]
        assert errors[0] < min(errors[1:]) * 1.1
    few = Reconstructor("cg-sense", iterations=2)(quiet).image.data
    assert against_truth(few) > 1.3 * against_truth(Reconstructor("cg-sense")(quiet).image.data)


def test_the_fallback_is_the_cg_sense_that_users_get() -> None:
    prepared = prepare(exam())
    expected = start_image(
        prepared.k_space, prepared.coil_maps, prepared.sigma, Preparation(start="zero"), prepared.prior
    )
    image = Reconstructor("none")(exam()).image.data / prepared.scale
    assert relative(image, expected) < 1e-5
    assert relative(prepared.initial, expected) < 1e-5


def test_what_is_faint_is_shown() -> None:
    """Far from the object, where maps are unsure: a spot of a twentieth of its brightness."""
    spot = torch.zeros(1, 1, 1, *MATRIX)
    spot[..., 4:7, 3:6] = 0.05
    k_space = exam(level=0.002)
    data = k_space.data + fft(smooth_maps(MATRIX, 6)[:, 0] * spot) * k_space.mask
    image = Reconstructor("none")(replace(k_space, data=data)).image.data.abs()
    assert float(image[..., 4:7, 3:6].mean()) == pytest.approx(0.05, rel=0.3)
    assert bool((image > 0).all())


def test_virtual_coils_are_those_that_rise_above_the_noise() -> None:
    told = [Noise(whitened=True, source="scan", level=(level,)) for level in (0.0005, 0.02, 1.0)]
    counts = [
        prepare(replace(exam(coils=12, level=noise.level[0]), noise=noise)).k_space.data.shape[1] for noise in told
    ]
    assert 12 == counts[0] >= counts[1] > counts[2] >= 4
    limited = prepare(exam(coils=12, level=0.0005), settings=Preparation(coils=5))
    assert limited.k_space.data.shape[1] == 5
    mixed = torch.einsum("bvc,bc...->bv...", limited.mixing, exam(coils=12, level=0.0005).data)
    assert relative(limited.k_space.data * limited.scale, mixed) < 1e-5


def test_separate_calibration_gives_the_maps() -> None:
    whole = exam()
    mask = whole.mask.clone()
    mask[:, :, :, :, MATRIX[1] // 2] = False  # a hole in the centre: no region of their own
    image_only = replace(whole, data=whole.data * mask, mask=mask)
    with pytest.raises(DataError, match="calibration"):
        Reconstructor("cg-sense")(image_only)
    result = Reconstructor("cg-sense")(image_only, calibration=whole)
    assert against_truth(result.image.data) < 0.06


class TestFallback:
    """A learned reconstruction that fails gives a labelled conventional one, never silence."""

    def broken(self) -> Bundle:
        made = bundle()
        with torch.no_grad():
            next(made.model.parameters()).fill_(float("nan"))
        return made

    def test_nan_from_the_network(self) -> None:
        result = Reconstructor(self.broken())(exam())
        assert result.path_taken == "cg-sense"
        assert "NaN" in result.warning
        assert "CG-SENSE" in result.warning
        assert against_truth(result.image.data) < 0.05

    def test_after_the_deadline_the_image_is_cg_sense(self) -> None:
        maps = CoilMaps(smooth_maps(MATRIX, 6), source="known")
        result = Reconstructor(bundle(), deadline=1e-6)(exam(), maps)
        assert result.path_taken == "cg-sense"
        assert "deadline of 1e-06 s" in result.warning

    def test_shortly_before_the_deadline_only_the_zero_filled_image_is_ready(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("melcore.reconstruct._seconds_of_cg_sense", lambda *_: 2000.0)
        # A start image that is CG-SENSE itself is ready at once.
        assert Reconstructor(bundle(), deadline=1000.0)(exam()).path_taken == "learned"
        result = Reconstructor(bundle(), deadline=1000.0, preparation=Preparation(start="time average"))(exam())
        assert result.path_taken == "adjoint"
        assert "zero-filled" in result.warning
        assert torch.equal(result.image.data, Reconstructor("adjoint")(exam()).image.data)

    def test_maps_that_are_late(self) -> None:
        result = Reconstructor(bundle(), deadline=1e-6)(exam(level=0))
        assert result.path_taken == "root-sum-of-squares"
        assert "coil maps were not ready" in result.warning
        coil_images = ifft(exam(level=0).data)
        assert relative(result.image.data, coil_images.abs().square().sum(1, keepdim=True).sqrt()) < 1e-6
        with pytest.raises(ToolError, match="did not end within"):
            Reconstructor("cg-sense", map_timeout=1e-6)(exam())

    def test_a_deadline_takes_nothing_from_conventional_methods(self) -> None:
        a, b = (Reconstructor("cg-sense", deadline=deadline)(exam()) for deadline in (None, 1e-6))
        assert (b.path_taken, b.warning) == ("cg-sense", "")
        assert torch.equal(a.image.data, b.image.data)

    def test_cancelled(self) -> None:
        cancel = threading.Event()
        cancel.set()
        maps = CoilMaps(smooth_maps(MATRIX, 6), source="known")
        with pytest.raises(DeadlineExceededError, match="cancelled"):
            Reconstructor(bundle(), cancel=cancel)(exam(), maps)
        with pytest.raises(ToolError, match="cancelled"):
            Reconstructor("cg-sense", cancel=cancel)(exam())

    def test_may_be_refused(self) -> None:
        with pytest.raises(DataError, match="NaN"):
            Reconstructor(self.broken(), fallback=False)(exam())

    def test_deadline_in_time_changes_nothing(self) -> None:
        made = bundle()
        a, b = (Reconstructor(made, deadline=deadline)(exam()) for deadline in (None, 1000.0))
        assert b.path_taken == "learned"
        assert torch.equal(a.image.data, b.image.data)


class TestMemory:
    """A limit of memory changes how the network is computed, not what comes out."""

    def test_streams_where_the_whole_does_not_fit(self) -> None:
        made = bundle(channels=64)
        free = Reconstructor(made)(exam())
        small = Reconstructor(made, memory=830_000)
        assert small.plan(MATRIX, 6).iterations[0].executor == "stream"
        limited = small(exam())
        assert limited.path_taken == "learned"
        assert relative(limited.image.data, free.image.data) < 1e-5

    def test_a_limit_that_nothing_fits_gives_a_labelled_image_and_the_least(self) -> None:
        result = Reconstructor(bundle(), memory=1000)(exam())
        assert result.path_taken == "cg-sense"
        assert "the least that would do is" in result.warning


class TestBadInput:
    def test_nan(self) -> None:
        k_space = exam()
        k_space.data[0, 2, 0, 0, 5, 6] = float("nan")
        with pytest.raises(DataError, match="NaN"):
            Reconstructor("cg-sense")(k_space)

    def test_nothing_but_zeros(self) -> None:
        k_space = exam()
        with pytest.raises(DataError, match="no sample that is not zero"):
            Reconstructor("cg-sense")(replace(k_space, data=torch.zeros_like(k_space.data)))

    def test_no_calibration_region(self) -> None:
        k_space = exam()
        mask = k_space.mask.clone()
        mask[:, :, :, :, 20:34] = False
        with pytest.raises(DataError, match="calibration"):
            Reconstructor("cg-sense")(replace(k_space, data=k_space.data * mask, mask=mask))

    def test_bundle_of_another_dimensionality(self) -> None:
        with pytest.raises(DataError, match=r"untrained is for 3d data, but these are 2d \(1, 6, 1, 1, 54, 47\)"):
            Reconstructor(bundle(3))(exam())

    def test_maps_of_other_coils(self) -> None:
        with pytest.raises(ShapeError, match=r"5 coils .* k-space has 6"):
            Reconstructor("adjoint")(exam(), coil_maps=CoilMaps(smooth_maps(MATRIX, 5)))

    def test_calibration_of_other_coils(self) -> None:
        with pytest.raises(ShapeError, match=r"4 coils .* k-space has 6"):
            Reconstructor("adjoint")(exam(), calibration=exam(coils=4))

    def test_settings(self) -> None:
        with pytest.raises(ConfigError, match="deadline"):
            Reconstructor("none", deadline=0)
        with pytest.raises(ConfigError, match="weight of CG-SENSE must be a positive number"):
            Reconstructor("none", weight=0.0)
        with pytest.raises(ConfigError, match="1 iteration at least"):
            Reconstructor("none", iterations=0)
        with pytest.raises(ConfigError, match="nowhere"):
            Reconstructor("none", device="nowhere")
        with pytest.raises(ConfigError, match="no bundle 'unknown'"):
            Reconstructor("unknown")

    def test_shapes_of_types(self) -> None:
        k_space = exam()
        with pytest.raises(ShapeError, match="6 axes"):
            replace(k_space, data=k_space.data[0])
        with pytest.raises(ShapeError, match="boolean"):
            replace(k_space, mask=k_space.mask.float())
        with pytest.raises(ShapeError, match="broadcast"):
            replace(k_space, mask=k_space.mask[..., :-1, :])


def test_bundle_from_a_file_is_named_in_the_result(tmp_path: Path) -> None:
    path = bundle().save(tmp_path / "mine.safetensors")
    reconstructor = Reconstructor(path)
    assert reconstructor.name.startswith("mine@")
    assert reconstructor(exam()).path_taken == "learned"


def test_sense_of_the_preparation_fits_its_data() -> None:
    prepared = prepare(exam(frames=3))
    operator = prepared.operator()
    assert isinstance(operator, Sense)
    assert operator.codomain == tuple(prepared.k_space.data.shape)
    assert operator.domain == tuple(prepared.initial.shape)
