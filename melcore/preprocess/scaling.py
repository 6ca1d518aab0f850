"""The one number per scan that brings its image to about 1, from the undersampled data alone."""

import torch

from melcore import layout
from melcore.errors import DataError, ShapeError
from melcore.physics.fourier import ifft


def image_scale(
    k_space: torch.Tensor,
    coil_maps: torch.Tensor,
    calibration: tuple[int, int, int],
    support: torch.Tensor | None = None,
) -> torch.Tensor:
    """99th percentile of the magnitude of the image that the calibration region alone gives.

    As the region is fully sampled whatever the acceleration, so is this image, and its level is the one of the final
    image (the centre holds the mean): the scale does not depend on the acceleration or on the matrix. It is blurred to
    the resolution of the region, so that structures smaller than a voxel of the region count less.

    Parameters
    ----------
    k_space, coil_maps, calibration
        See `low_resolution_image`.
    support
        Boolean ``(batch, set, 1, z, y, x)``: where the signal is; by default where the maps are not zero.

    Returns
    -------
    torch.Tensor
        Positive, float32 ``(batch,)``. Dividing the k-space by it brings the image to about 1.

    Raises
    ------
    DataError
        If the calibration region or the maps are empty, or the data are not finite.
    """
    image, _ = low_resolution_image(k_space, coil_maps, calibration)
    if support is None:
        support = (coil_maps != 0).any(2)
    return scale_within(image, support, calibration)


def scale_within(image: torch.Tensor, support: torch.Tensor, calibration: tuple[int, int, int]) -> torch.Tensor:
    """As `image_scale`, of an image that is there already, ``(batch, set, 1, z, y, x)``."""
    magnitude = image.abs().square().sum(1).sqrt()
    within = support.any(1).expand_as(magnitude)
    scale = torch.stack([_percentile(one[where], 0.99) for one, where in zip(magnitude, within, strict=True)])
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise DataError(
            f"the central {'x'.join(map(str, calibration))} of k-space (z, y, x) is empty or not finite, so the scale "
            "of the image is unknown: give the size of the region that was fully sampled."
        )
    return scale


def low_resolution_image(
    k_space: torch.Tensor, coil_maps: torch.Tensor, calibration: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The image that the calibration region alone gives, averaged over time, on the full grid.

    The centre of k-space is cut out, tapered (which keeps the ringing of bright edges away), transformed, and combined
    with the maps.

    Parameters
    ----------
    k_space
        Complex ``(batch, coil, time, z, y, x)``, zero where nothing was sampled.
    coil_maps
        Complex ``(batch, set, coil, 1, z, y, x)``.
    calibration
        Size ``(z, y, x)`` of the region; sizes beyond the grid mean all of it.

    Returns
    -------
    image
        Complex ``(batch, set, 1, z, y, x)``.
    noise
        ``(batch,)``: standard deviation of its noise, for noise of 1 in k-space and maps of unit sum of squares.
    """
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "k-space")
    layout.check_axes(tuple(coil_maps.shape), layout.COIL_MAPS_AXES, "coil maps")
    if k_space.shape[1] != coil_maps.shape[2] or k_space.shape[3:] != coil_maps.shape[4:]:
        raise ShapeError(f"coil maps {tuple(coil_maps.shape)} do not fit the k-space {tuple(k_space.shape)}.")
    grid = tuple(k_space.shape[3:])
    window = _window(grid, calibration).to(k_space.device)
    images, gains = [], []
    for example, maps in zip(k_space, coil_maps.expand(len(k_space), *coil_maps.shape[1:]), strict=True):
        image = torch.zeros_like(maps[:, 0, 0])
        gain = window.new_zeros(())
        for coil in range(len(example)):  # coil by coil: a whole volume of all coils may not fit twice
            lines = example[coil] * (window > 0)
            taken = (lines != 0).sum(0).clamp(min=1)
            average = window * lines.sum(0) / taken
            image += maps[:, coil, 0].conj() * ifft(average, (-3, -2, -1))
            gain = torch.maximum(gain, (window.square() / taken).mean().sqrt())
        images.append(image.unsqueeze(1))
        gains.append(gain)
    return torch.stack(images), torch.stack(gains)


def _window(grid: tuple[int, ...], calibration: tuple[int, int, int]) -> torch.Tensor:
    """Hann taper over the calibration region, zero outside it; 1 along axes that it covers entirely."""
    window = torch.ones(grid)
    for axis, (full, size) in enumerate(zip(grid, calibration, strict=True)):
        if size >= full:
            continue
        if size < 1:
            raise ShapeError(f"the calibration region {calibration} must have sizes of at least 1.")
        profile = torch.zeros(full)
        start = full // 2 - size // 2
        # The taper is centred on the centre of k-space and does not reach 0 inside the region.
        offset = torch.arange(size) - size // 2
        profile[start : start + size] = torch.cos(torch.pi * offset / (size + 2)).square()
        window = window * profile.reshape([-1 if other == axis else 1 for other in range(len(grid))])
    return window


def _percentile(values: torch.Tensor, fraction: float) -> torch.Tensor:
    # torch.quantile refuses more than 16 million values, fewer than a volume has.
    if values.numel() == 0:
        return torch.zeros((), device=values.device)
    return values.float().kthvalue(max(1, round(fraction * values.numel()))).values
