"""Metrics against scikit-image and against what they must give by definition; losses by their laws."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from melcore.errors import ConfigError, ShapeError
from melcore.learning import (
    ReconstructionLoss,
    decibels,
    hfen,
    nrmse,
    object_region,
    psnr,
    relative_l1,
    relative_l2,
    relative_root,
    ssim,
    ssim_map,
)


def _pair(*shape: int, seed: int = 0, noise: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randn(shape, dtype=torch.complex128, generator=generator)
    return truth + noise * torch.randn(shape, dtype=torch.complex128, generator=generator), truth


@pytest.mark.parametrize(("shape", "dimensions"), [((37, 23), 2), ((13, 17, 15), 3), ((3, 29, 18), 2)])
def test_ssim_is_that_of_scikit_image(shape: tuple[int, ...], dimensions: int) -> None:
    grid = (1,) * (3 - len(shape)) + shape
    image, truth = _pair(2, 1, 1, *grid, noise=0.4)
    volume = dimensions == 3
    for example in range(2):
        pair = image[example, 0, 0].abs().numpy(), truth[example, 0, 0].abs().numpy()
        span = pair[1].max()
        slices = [(pair[0], pair[1])] if volume else list(zip(*pair, strict=True))
        options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": span}
        expected = [structural_similarity(a, b, full=True, **options) for a, b in slices]
        ours = ssim(image, truth, dimensions=dimensions)[example]
        assert float(ours) == pytest.approx(np.mean([mean for mean, _ in expected]), abs=1e-12)
        ours_map = ssim_map(image, truth, dimensions=dimensions)[example, 0, 0]
        expected_map = expected[0][1] if volume else np.stack([full for _, full in expected])
        np.testing.assert_allclose(ours_map.numpy(), expected_map, atol=1e-12)


def test_ssim_of_axes_shorter_than_its_window() -> None:
    image, truth = _pair(1, 1, 1, 3, 12, 4)
    span = float(truth.abs().max())
    options = {"sigma": 1.5, "truncate": 3.5, "mode": "reflect"}
    from scipy.ndimage import gaussian_filter

    a, b = image[0, 0, 0].abs().numpy(), truth[0, 0, 0].abs().numpy()
    mean_a, mean_b = gaussian_filter(a, **options), gaussian_filter(b, **options)
    covariance = gaussian_filter(a * b, **options) - mean_a * mean_b
    variances = gaussian_filter(a * a, **options) - mean_a**2 + gaussian_filter(b * b, **options) - mean_b**2
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    expected = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (variances + c2))
    np.testing.assert_allclose(ssim_map(image, truth, dimensions=3)[0, 0, 0].numpy(), expected, atol=1e-12)


def test_psnr_is_that_of_scikit_image() -> None:
    image, truth = _pair(3, 1, 2, 1, 19, 14)
    for index, ours in enumerate(psnr(image, truth)):
        a, b = image[index].abs().numpy(), truth[index].abs().numpy()
        assert float(ours) == pytest.approx(peak_signal_noise_ratio(b, a, data_range=b.max()), abs=1e-10)


def test_nrmse_counts_phase_and_ignores_scale() -> None:
    _, truth = _pair(2, 1, 1, 3, 8, 5)
    np.testing.assert_allclose(nrmse(-truth, truth), 2.0)
    np.testing.assert_allclose(nrmse(truth * 1.1, truth), 0.1, atol=1e-12)
    np.testing.assert_allclose(nrmse(1e9 * truth * 1.1j, 1e9 * truth * 1j), 0.1, atol=1e-12)
    np.testing.assert_allclose(decibels(nrmse(truth * 1.1, truth)), -20, atol=1e-9)


@pytest.mark.parametrize("metric", [nrmse, psnr, ssim, hfen])
def test_what_lies_outside_the_support_does_not_count(metric) -> None:  # type: ignore[no-untyped-def]
    image, truth = _pair(2, 1, 1, 1, 40, 24)
    support = torch.zeros(2, 1, 1, 1, 40, 24, dtype=torch.bool)
    support[..., 8:20, 6:18] = True
    spoiled, spoiled_truth = image.clone(), truth.clone()
    # Windows of SSIM reach 5 samples beyond the support, and its data range is the whole image's.
    spoiled[..., 30:, :] = 7
    spoiled_truth[..., 30:, :] *= 0.5
    options = {"data_range": truth.abs().flatten(1).amax(1)} if metric is ssim else {}
    np.testing.assert_allclose(
        metric(image, truth, support, **options), metric(spoiled, spoiled_truth, support, **options), atol=1e-12
    )
    assert not torch.allclose(metric(image, truth, **options), metric(spoiled, spoiled_truth, **options))


@pytest.mark.parametrize(
    "loss", [relative_l1, relative_l2, ReconstructionLoss(0.5, 0.2, 0.3), ReconstructionLoss(ssim=1), relative_root]
)
def test_losses_vanish_at_the_truth_and_not_beside_it(loss) -> None:  # type: ignore[no-untyped-def]
    image, truth = _pair(2, 1, 2, 1, 12, 13)
    assert float(loss(truth, truth)) == pytest.approx(0, abs=1e-12)
    assert float(loss(image, truth)) > 1e-3
    perfect = truth.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(perfect, truth), perfect)
    assert bool(torch.isfinite(torch.view_as_real(gradient)).all())


def test_loss_gradients_are_right() -> None:
    image, truth = _pair(1, 1, 1, 1, 7, 6)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ReconstructionLoss(0.4, 0.3, 0.3)(x, truth), (image,))


def test_every_example_weighs_the_same() -> None:
    image, truth = _pair(2, 1, 1, 1, 9, 8)
    scale = torch.tensor([1.0, 1e4]).reshape(-1, *[1] * 5)
    for loss in (relative_l1, relative_l2):
        assert float(loss(image * scale, truth * scale)) == pytest.approx(float(loss(image, truth)))


def test_the_root_term_is_nrmse_with_a_finite_gradient() -> None:
    image, truth = _pair(3, 1, 1, 1, 9, 8)
    assert float(relative_root(image, truth)) == pytest.approx(float(nrmse(image, truth).mean()), abs=1e-6)
    assert float(relative_root(1e3 * image, 1e3 * truth)) == pytest.approx(float(relative_root(image, truth)))
    perfect = truth.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(relative_root(perfect, truth), perfect)
    assert bool(torch.isfinite(torch.view_as_real(gradient)).all())


def test_terms_are_divided_by_those_of_a_reference() -> None:
    image, truth = _pair(1, 1, 1, 2, 16, 13)
    other, _ = _pair(1, 1, 1, 2, 16, 13, seed=1)
    reference = truth + 0.3 * other
    loss = ReconstructionLoss(0.4, 0.3, 0.2, 0.1)
    divisors = loss.divisors(reference, truth)
    assert divisors.keys() == {"l1", "l2", "ssim", "nrmse"}
    assert float(loss(reference, truth, None, divisors)) == pytest.approx(1, abs=1e-5)
    # Every term keeps its weight, whatever its size.
    for name, weight in (("l1", 0.4), ("l2", 0.3), ("ssim", 0.2), ("nrmse", 0.1)):
        alone = ReconstructionLoss(**{**dict.fromkeys(("l1", "l2", "ssim", "nrmse"), 0.0), name: weight})
        ratio = alone.terms(image, truth)[name] / divisors[name]
        assert float(alone(image, truth, None, divisors)) == pytest.approx(weight * float(ratio), rel=1e-9)
    assert all(float(value) > 0 for value in loss.divisors(truth, truth).values()), "nothing is divided by zero"


def test_the_region_of_a_loss() -> None:
    image, truth = _pair(1, 1, 1, 1, 20, 14)
    support = torch.zeros(1, 1, 1, 1, 20, 14, dtype=torch.bool)
    support[..., 4:9, 3:11] = True
    outside = torch.where(support, truth, image)
    for region, expected in (("image", False), ("support", True)):
        loss = ReconstructionLoss(0.5, 0.2, 0.0, 0.3, region=region)  # type: ignore[arg-type]
        assert (float(loss(outside, truth, support)) < 1e-6) is expected
    with pytest.raises(ConfigError, match="not over 'object'"):
        ReconstructionLoss(region="object")  # type: ignore[arg-type]


def test_wrong_arguments_are_named() -> None:
    image, truth = _pair(1, 1, 1, 1, 9, 8)
    with pytest.raises(ShapeError, match=r"\(1, 1, 1, 1, 9, 7\)"):
        nrmse(image[..., :7], truth)
    with pytest.raises(ShapeError, match="support"):
        nrmse(image, truth, torch.ones(1, 1, 1, 1, 9, 7, dtype=torch.bool))
    with pytest.raises(ShapeError, match="batch, set, time, z, y, x"):
        ssim(image[0], truth[0])
    with pytest.raises(ConfigError, match="dimensions"):
        ssim(image, truth, dimensions=1)
    with pytest.raises(ConfigError, match="weights"):
        ReconstructionLoss(0, 0, 0)
    with pytest.raises(ConfigError, match="weights"):
        ReconstructionLoss(1, -1, 0)
    assert math.isfinite(float(ReconstructionLoss()(image, truth)))


@pytest.mark.parametrize(
    ("shape", "dimensions"), [((1, 37, 23), 2), ((13, 17, 15), 3), ((3, 29, 18), 2), ((1, 9, 4), 3)]
)
def test_hfen_is_the_norm_that_a_laplacian_of_a_gaussian_leaves(shape: tuple[int, ...], dimensions: int) -> None:
    from scipy.ndimage import gaussian_laplace

    image, truth = _pair(2, 1, 2, *shape, noise=0.4)
    axes = tuple(axis for axis in range(-dimensions, 0) if shape[axis] > 1)
    a, b = (
        gaussian_laplace(part.abs().numpy(), 1.5, mode="reflect", truncate=7 / 1.5, axes=axes)
        for part in (image, truth)
    )
    expected = [np.linalg.norm(a[n] - b[n]) / np.linalg.norm(b[n]) for n in range(2)]
    np.testing.assert_allclose(hfen(image, truth, dimensions=dimensions).numpy(), expected, atol=1e-10)


def test_hfen_sees_lost_edges_and_not_lost_brightness() -> None:
    truth = torch.zeros(1, 1, 1, 1, 48, 40, dtype=torch.complex64)
    truth[..., 12:30, 10:28] = 1j
    offset = truth + 0.3j  # every sample is wrong, no edge is
    blurred = torch.view_as_complex(
        torch.nn.functional.avg_pool2d(torch.view_as_real(truth)[0, 0, 0].movedim(-1, 1), 5, 1, 2)
        .movedim(1, -1)
        .contiguous()
    )[None, None, None]
    assert float(nrmse(offset, truth)) > float(nrmse(blurred, truth))
    assert float(hfen(offset, truth)) < 1e-3 < 0.3 < float(hfen(blurred, truth)) < 1


def test_the_object_is_found_in_noise() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = 0.02 * torch.randn(1, 1, 3, 1, 60, 50, dtype=torch.complex64, generator=generator)
    inside = torch.zeros(1, 1, 1, 1, 60, 50, dtype=torch.bool)
    inside[..., 15:45, 12:37] = True
    found = object_region(truth + inside, 0.1)
    assert found.shape == inside.shape
    assert bool(found[inside].all())
    assert float((found & ~inside).sum() / inside.sum()) < 0.35  # smoothing widens it by two samples or so
    assert bool((found == object_region(1e-6 * (truth + inside), 0.1)).all())
