"""How far an image is from the truth. All functions give one number for each element of the batch.

Images are complex (or real) ``(batch, set, time, z, y, x)``. The support, boolean and broadcastable to the images, is
where the coil maps are not zero: what lies outside was never measured, and counting its zeros flatters every method.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from melcore import layout
from melcore.errors import ConfigError, ShapeError


def check_images(image: Tensor, truth: Tensor, support: Tensor | None = None) -> None:
    """Raise `ShapeError` unless `image` and `truth` have the same six axes and `support` broadcasts to them."""
    layout.check_axes(tuple(truth.shape), layout.IMAGE_AXES, "the true image")
    if image.shape != truth.shape:
        raise ShapeError(f"the image {tuple(image.shape)} and the truth {tuple(truth.shape)} differ in shape.")
    if support is not None:
        layout.check_axes(tuple(support.shape), layout.IMAGE_AXES, "the support")
        if any(s not in (1, t) for s, t in zip(support.shape, truth.shape, strict=True)):
            raise ShapeError(
                f"the support {tuple(support.shape)} does not broadcast against the images {tuple(truth.shape)}."
            )


def decibels(ratio: Tensor) -> Tensor:
    """``20 log10(ratio)``: -20 dB is a tenth."""
    return 20 * ratio.log10()


def nrmse(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Root mean square of the complex difference over that of the truth, ``(batch,)``; 0 is perfect.

    It counts the phase: an image of opposite sign has an error of 2.

    Raises
    ------
    ShapeError
        If the shapes do not fit.
    """
    check_images(image, truth, support)
    error, energy = (image - truth).abs().square(), truth.abs().square()
    if support is not None:
        error, energy = error * support, energy * support
    return (error.flatten(1).sum(1) / energy.flatten(1).sum(1)).sqrt()


def psnr(image: Tensor, truth: Tensor, support: Tensor | None = None) -> Tensor:
    """Peak of the true magnitude over the root mean square difference of magnitudes, ``(batch,)`` in dB."""
    check_images(image, truth, support)
    weight = (torch.ones_like(truth.real) if support is None else support.expand(truth.shape).to(truth.real)).flatten(1)
    error = (image.abs() - truth.abs()).square().flatten(1)
    peak = (truth.abs().flatten(1) * weight).amax(1)
    return -decibels(((error * weight).sum(1) / weight.sum(1)).sqrt() / peak)


def ssim(
    image: Tensor,
    truth: Tensor,
    support: Tensor | None = None,
    *,
    dimensions: int = 2,
    data_range: Tensor | None = None,
) -> Tensor:
    """Structural similarity of the magnitudes, ``(batch,)``; 1 is perfect.

    Wang et al., Image quality assessment, IEEE Trans Image Process 13:600 (2004), with its Gaussian window (sigma 1.5,
    11 samples) and constants; scikit-image calls this ``gaussian_weights=True, use_sample_covariance=False``.

    Parameters
    ----------
    image, truth
        ``(batch, set, time, z, y, x)``.
    support
        Where the map of similarities is averaged. By default everywhere but within 5 samples of the faces, as
        scikit-image does.
    dimensions
        2: windows over (y, x), every slice and frame on its own; 3: over (z, y, x).
    data_range
        ``(batch,)``; the maximum of the true magnitude by default.
    """
    similarity = ssim_map(image, truth, dimensions=dimensions, data_range=data_range)
    if support is None:
        axes = range(6 - dimensions, 6)
        for axis in axes:
            if similarity.shape[axis] > 2 * _RADIUS:
                similarity = similarity.narrow(axis, _RADIUS, similarity.shape[axis] - 2 * _RADIUS)
        return similarity.flatten(1).mean(1)
    check_images(image, truth, support)
    weight = support.expand(truth.shape).to(similarity).flatten(1)
    return (similarity.flatten(1) * weight).sum(1) / weight.sum(1)


_SIGMA = 1.5
_RADIUS = 5  # int(3.5 * sigma + 0.5), where scikit-image truncates the Gaussian


def ssim_map(image: Tensor, truth: Tensor, *, dimensions: int = 2, data_range: Tensor | None = None) -> Tensor:
    """Structural similarity around every sample, shaped as the images; see `ssim`."""
    check_images(image, truth)
    if dimensions not in (2, 3):
        raise ConfigError(f"ssim has windows of 2 or 3 dimensions, not of {dimensions}.")
    a, b = image.abs(), truth.abs()
    if data_range is None:
        data_range = b.flatten(1).amax(1)
    span = data_range.reshape(-1, *[1] * 5)
    c1, c2 = (0.01 * span).square(), (0.03 * span).square()
    # One smoothing of five stacked images is faster than five smoothings.
    mean_a, mean_b, mean_aa, mean_bb, mean_ab = _smooth(torch.stack([a, b, a * a, b * b, a * b]), dimensions)
    variance_a, variance_b = mean_aa - mean_a.square(), mean_bb - mean_b.square()
    covariance = mean_ab - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + c1) / (mean_a.square() + mean_b.square() + c1)
    return luminance * (2 * covariance + c2) / (variance_a + variance_b + c2)


def _smooth(images: Tensor, dimensions: int) -> Tensor:
    """Gaussian window along the last `dimensions` axes, continued by mirroring about the faces of the volume."""
    offsets = torch.arange(-_RADIUS, _RADIUS + 1, device=images.device, dtype=images.dtype)
    window = torch.exp(-0.5 * (offsets / _SIGMA).square())
    window = window / window.sum()
    for axis in range(images.ndim - dimensions, images.ndim):
        if images.shape[axis] > 1:  # else its mirror images are itself
            images = _filtered(images, window, axis)
    return images


def _filtered(images: Tensor, window: Tensor, axis: int) -> Tensor:
    """Convolve with a window of odd length along one axis, continued by mirroring about the faces."""
    size, radius = images.shape[axis], len(window) // 2
    moved = images.movedim(axis, -1)
    position = torch.arange(-radius, size + radius, device=images.device) % (2 * size)
    mirrored = torch.minimum(position, 2 * size - 1 - position)
    rows = moved.index_select(-1, mirrored).reshape(-1, 1, size + 2 * radius)
    return F.conv1d(rows, window.reshape(1, 1, -1)).reshape(moved.shape).movedim(-1, axis)


_LOG_RADIUS = 7  # a window of 15 samples


def hfen(image: Tensor, truth: Tensor, support: Tensor | None = None, *, dimensions: int = 2) -> Tensor:
    """High-frequency error norm of the magnitudes, ``(batch,)``; 0 is perfect, 1 is an image without any edge.

    Both magnitudes are filtered with a Laplacian of a Gaussian (standard deviation 1.5, 15 samples), which leaves
    edges and texture; the norm of the difference is divided by that of the truth. Ravishankar and Bresler, MR image
    reconstruction from highly undersampled k-space data by dictionary learning, IEEE Trans Med Imaging 30:1028 (2011).

    Parameters
    ----------
    image, truth
        ``(batch, set, time, z, y, x)``.
    support
        Where the filtered images count; everywhere by default.
    dimensions
        2: filtered over (y, x), every slice and frame on its own; 3: over (z, y, x).
    """
    check_images(image, truth, support)
    if dimensions not in (2, 3):
        raise ConfigError(f"hfen has filters of 2 or 3 dimensions, not of {dimensions}.")
    error, edges = (_laplacian(part, dimensions) for part in (image.abs() - truth.abs(), truth.abs()))
    error, edges = error.square(), edges.square()
    if support is not None:
        error, edges = error * support, edges * support
    return (error.flatten(1).sum(1) / edges.flatten(1).sum(1)).sqrt()


def object_region(truth: Tensor, threshold: float = 0.1, *, dimensions: int = 2) -> Tensor:
    """Where there is anatomy, boolean ``(batch, set, 1, z, y, x)``.

    The magnitude, averaged over time and smoothed with the window of `ssim` (so that single noisy samples do not
    count), is above `threshold` of its own 99th percentile.

    Parameters
    ----------
    truth
        ``(batch, set, time, z, y, x)``.
    threshold
        Between 0 and 1.
    dimensions
        Of the smoothing: 2 over (y, x), 3 over (z, y, x).
    """
    check_images(truth, truth)
    if not 0 <= threshold < 1:
        raise ConfigError(f"the threshold of the object must be within 0 and 1, but is {threshold}.")
    smooth = _smooth(truth.abs().mean(2, keepdim=True), dimensions)
    values = smooth.flatten(1)
    # torch.quantile refuses more than 16 million values.
    level = values.kthvalue(max(1, round(0.99 * values.shape[1])), dim=1).values
    return smooth > threshold * level.reshape(-1, *[1] * 5)


def _laplacian(images: Tensor, dimensions: int) -> Tensor:
    """Laplacian of a Gaussian along the last `dimensions` axes: one second derivative for each axis, then their sum."""
    offsets = torch.arange(-_LOG_RADIUS, _LOG_RADIUS + 1, device=images.device, dtype=images.dtype)
    window = torch.exp(-0.5 * (offsets / _SIGMA).square())
    window = window / window.sum()
    second = window * (offsets.square() / _SIGMA**4 - 1 / _SIGMA**2)
    axes = [axis for axis in range(images.ndim - dimensions, images.ndim) if images.shape[axis] > 1]
    total = torch.zeros_like(images)
    for differentiated in axes:
        part = images
        for axis in axes:
            part = _filtered(part, second if axis == differentiated else window, axis)
        total = total + part
    return total
