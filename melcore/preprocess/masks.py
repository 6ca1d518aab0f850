"""Sampling masks of Cartesian scans: seeded, of an exact acceleration, with a fully sampled centre.

Acceleration is the number of phase-encoding positions over the number that is sampled, the calibration region
included. `k_space_mask` gives a mask the axes of `melcore.layout`.
"""

import math

import numpy as np
import numpy.typing as npt
import torch

from melcore.errors import ConfigError, ShapeError

Mask = npt.NDArray[np.bool_]

# The darts of one round are this many times those that would fill the plane; each round the radius shrinks.
_CROWDING = 1.0
_SHRINK = 0.94


def k_space_mask(mask: torch.Tensor, axes: tuple[str, ...]) -> torch.Tensor:
    """Give a mask the axes ``(batch, coil, time, z, y, x)``, with 1 wherever it does not extend.

    Parameters
    ----------
    mask
        With the axes named by `axes`, for example ``("z", "y")`` or ``("time", "y")``.
    axes
        In the order of `melcore.layout.K_SPACE_AXES`.
    """
    house = ("batch", "coil", "time", "z", "y", "x")
    if mask.ndim != len(axes) or list(axes) != [name for name in house if name in axes]:
        raise ShapeError(f"a mask of shape {tuple(mask.shape)} cannot have the axes {axes}; their order is {house}.")
    sizes = dict(zip(axes, mask.shape, strict=True))
    return mask.reshape([sizes.get(name, 1) for name in house])


def poisson_disc(
    shape: tuple[int, int],
    acceleration: float,
    *,
    calibration: tuple[int, int] = (24, 24),
    seed: int,
    variable_density: float = 1.5,
) -> torch.Tensor:
    """Poisson-disc sampling of two phase-encoding directions, by parallel dart throwing.

    Every round throws many darts at once at the positions farther than a radius from all samples; of darts too close
    to each other the one of highest (random) priority stays. Then the radius shrinks a little, until the
    number of samples is reached, exactly (McCool and Fiume, Hierarchical Poisson disk sampling distributions, 1992).

    Parameters
    ----------
    shape
        Positions ``(z, y)``.
    acceleration
        At least 1.
    calibration
        Fully sampled centre ``(z, y)``; ``(0, 0)`` for none.
    seed
        The same seed gives the same mask.
    variable_density
        How much larger the distance between samples is at the edge of k-space than at its centre, minus 1: 0 is
        uniform, 1.5 is 2.5 times the distance.

    Returns
    -------
    torch.Tensor
        Boolean ``(z, y)``.

    Raises
    ------
    ConfigError
        If the calibration region alone exceeds the number of samples.
    """
    if not 0 <= variable_density < math.inf:
        raise ConfigError(f"variable_density must not be negative, but is {variable_density}.")
    mask = _centre(shape, calibration)
    wanted = _samples(mask, acceleration)
    rng = np.random.default_rng(seed)

    z, y = (np.linspace(-1, 1, size, endpoint=size % 2 == 1) if size > 1 else np.zeros(1) for size in shape)
    spacing = (1 + variable_density * np.minimum(np.hypot(z[:, None], y), 1)).astype(np.float32)
    # On a grid only few distances exist; a little scatter keeps the density from falling in steps.
    spacing *= rng.uniform(0.85, 1.15, shape).astype(np.float32)
    missing = wanted - int(mask.sum())
    # Larger than the radius that fills the plane with as many samples as are missing (about 0.8 of this root).
    radius = float(np.sqrt(np.sum(~mask / spacing**2) / max(missing, 1))) * 1.2
    reach = min(max(shape), math.ceil(radius * float(spacing.max())))
    offsets = _offsets(reach)

    padded = np.full((shape[0] + 2 * reach, shape[1] + 2 * reach), False)
    width = padded.shape[1]
    inside = np.zeros_like(padded)
    inside[reach : reach + shape[0], reach : reach + shape[1]] = True
    padded[inside] = mask.ravel()
    taken, inside = padded.ravel(), inside.ravel()
    space = np.ones(taken.size, np.float32)
    space[inside] = spacing.ravel()
    nearest = np.full(taken.size, np.inf, np.float32)  # distance to the nearest sample, over the local spacing
    priority = np.zeros(taken.size, np.float32)
    _update_distances(nearest, np.flatnonzero(taken), offsets, width, radius, space)

    while missing > 0:
        free = np.flatnonzero(inside & ~taken & (nearest >= radius * space))
        darts = min(free.size, math.ceil(_CROWDING * float(np.sum(1 / space[free] ** 2)) / radius**2) + 1)
        if free.size:
            thrown = rng.choice(free, darts, replace=False)
            priority[thrown] = rng.random(darts, dtype=np.float32) + 0.5
            winners = thrown
            for step, distance in offsets:
                if distance >= radius * float(space[winners].max(initial=0)):
                    break
                close = distance < radius * space[winners]
                winners = winners[~(close & (priority[winners + step[0] * width + step[1]] > priority[winners]))]
            priority[thrown] = 0
            winners = winners[:missing]
            taken[winners] = True
            missing -= winners.size
            _update_distances(nearest, winners, offsets, width, radius, space)
        if free.size <= 4 * darts:
            radius *= _SHRINK
    return torch.from_numpy(taken[inside].reshape(shape))


def _offsets(reach: int) -> list[tuple[tuple[int, int], float]]:
    """Steps within `reach`, nearest first, without the zero step."""
    steps = [
        (a, b) for a in range(-reach, reach + 1) for b in range(-reach, reach + 1) if 0 < a * a + b * b <= reach**2
    ]
    return sorted(((step, math.hypot(*step)) for step in steps), key=lambda item: (item[1], item[0]))


def _update_distances(
    nearest: npt.NDArray[np.float32],
    new: npt.NDArray[np.intp],
    offsets: list[tuple[tuple[int, int], float]],
    width: int,
    radius: float,
    space: npt.NDArray[np.float32],
) -> None:
    """Lower `nearest` around the `new` samples."""
    limit = radius * float(space.max())
    for step, distance in offsets:
        if distance > limit:
            break
        around = new + step[0] * width + step[1]
        nearest[around] = np.minimum(nearest[around], distance)


def radial_spokes(
    shape: tuple[int, int], acceleration: float, *, calibration: tuple[int, int] = (24, 24), seed: int
) -> torch.Tensor:
    """Spokes through the centre of two phase-encoding directions, on the grid: boolean ``(z, y)``.

    Each spoke is rotated by the golden angle (Winkelmann et al., IEEE TMI 26, 2007) from one at random, and takes the
    positions of the grid that are nearest to it; the last one ends, on its way outwards, where the number of samples
    is reached, exactly.

    Parameters
    ----------
    shape, acceleration, calibration, seed
        As for `poisson_disc`.

    Raises
    ------
    ConfigError
        If the calibration region alone exceeds the number of samples.
    """
    mask = _centre(shape, calibration)
    missing = _samples(mask, acceleration) - int(mask.sum())
    golden = math.pi * (math.sqrt(5) - 1) / 2
    angle = np.random.default_rng(seed).random() * math.pi
    # Half a step at a time, from the centre to both ends in turn, and as far as the corners.
    radius = np.arange(0, math.ceil(math.hypot(*shape)) + 1) / 2
    along = np.stack([radius, -radius], axis=1).ravel()
    while missing > 0:
        z = np.rint(shape[0] // 2 + along * math.sin(angle)).astype(int)
        y = np.rint(shape[1] // 2 + along * math.cos(angle)).astype(int)
        inside = (z >= 0) & (z < shape[0]) & (y >= 0) & (y < shape[1])
        flat = z[inside] * shape[1] + y[inside]
        flat = flat[~mask.ravel()[flat]]
        new = flat[np.sort(np.unique(flat, return_index=True)[1])][:missing]
        mask.ravel()[new] = True
        missing -= new.size
        angle += golden
    return torch.from_numpy(mask)


def uniform_lines(y: int, acceleration: float, calibration: int = 24) -> torch.Tensor:
    """Every n-th line, with n the integer nearest to `acceleration`, and the central `calibration` lines: ``(y,)``.

    The centre line is among the regular ones. The calibration lines come on top, as scanners count them.
    """
    mask = _centre((1, y), (1, calibration))[0]
    if not 1 <= acceleration <= y:
        raise ConfigError(f"the acceleration must be within 1 and {y}, but is {acceleration}.")
    step = round(acceleration)
    mask[(y // 2) % step :: step] = True
    return torch.from_numpy(mask)


def random_lines(y: int, acceleration: float, calibration: int = 24, *, seed: int) -> torch.Tensor:
    """Lines at random, denser at the centre, and the central `calibration` lines: boolean ``(y,)``."""
    return variable_density_kt(1, y, acceleration, calibration, seed=seed)[0]


def variable_density_kt(
    time: int, y: int, acceleration: float, calibration: int = 8, *, seed: int, decay: float = 2.0
) -> torch.Tensor:
    """Lines that change from frame to frame, denser at the centre, interleaved over time.

    In every frame the axis is cut into strata of equal probability, with one line in each; the strata of
    successive frames are shifted by the golden ratio, so that any few successive frames together cover k-space evenly.

    Parameters
    ----------
    time, y
        Frames and lines.
    acceleration
        Of all frames together, calibration included.
    calibration
        Central lines that every frame samples.
    seed
        The same seed gives the same mask.
    decay
        Density at the centre over density at the edge, minus 1.

    Returns
    -------
    torch.Tensor
        Boolean ``(time, y)``.
    """
    mask = np.repeat(_centre((1, y), (1, calibration)), time, axis=0)
    wanted = _samples(mask, acceleration)
    rng = np.random.default_rng(seed)
    outside = np.flatnonzero(~mask[0])
    if wanted == mask.sum() or not outside.size:
        return torch.from_numpy(mask)
    # The few lines that do not divide by the frames are spread over them.
    totals = np.linspace(0, wanted - mask.sum(), time + 1).round().astype(int)
    weight = 1 / (1 + decay * np.abs(outside - y // 2) / (y / 2))
    golden = (math.sqrt(5) - 1) / 2
    shift = rng.random()
    for frame, lines in enumerate(np.diff(totals)):
        probability = _probabilities(weight, int(lines))
        edges = np.cumsum(probability)
        # One point per stratum of width 1. A little jitter keeps the pattern from being periodic.
        points = np.arange(lines) + (shift + frame * golden) % 1 + rng.uniform(-0.05, 0.05, lines)
        points = np.sort(points % max(lines, 1))
        chosen = np.minimum(np.searchsorted(edges, points, side="right"), outside.size - 1)
        mask[frame, outside[_distinct(chosen, outside.size)]] = True
    return torch.from_numpy(mask)


def _probabilities(weight: npt.NDArray[np.float64], total: int) -> npt.NDArray[np.float64]:
    """Scale weights to the sum `total` with none above 1."""
    probability = np.zeros_like(weight)
    certain = np.zeros(weight.size, bool)
    for _ in range(weight.size):
        rest = total - certain.sum()
        probability = np.where(certain, 1.0, weight * rest / max(weight[~certain].sum(), 1e-300))
        if not (probability > 1).any():
            break
        certain |= probability >= 1
    return probability


def _distinct(chosen: npt.NDArray[np.intp], size: int) -> npt.NDArray[np.intp]:
    """Move repeated entries of a sorted list to the nearest entries that are free, within ``0 .. size - 1``."""
    free = np.ones(size, bool)
    result = []
    for entry in chosen:
        if not free[entry]:
            candidates = np.flatnonzero(free)
            entry = candidates[np.abs(candidates - entry).argmin()]
        free[entry] = False
        result.append(entry)
    return np.array(result, dtype=np.intp)


def _centre(shape: tuple[int, int], calibration: tuple[int, int]) -> Mask:
    """The fully sampled centre; an axis shorter than the region is sampled entirely."""
    if min(shape) < 1 or min(calibration) < 0:
        raise ConfigError(f"mask sizes must be positive and the calibration's not negative: {shape}, {calibration}.")
    mask = np.zeros(shape, bool)
    size = [min(length, full) for length, full in zip(calibration, shape, strict=True)]
    start = [full // 2 - length // 2 for length, full in zip(size, shape, strict=True)]
    mask[start[0] : start[0] + size[0], start[1] : start[1] + size[1]] = True
    return mask


def _samples(mask: Mask, acceleration: float) -> int:
    """Number of samples for an acceleration, or an error that says what can be reached."""
    if not 1 <= acceleration <= mask.size:
        raise ConfigError(f"the acceleration must be within 1 and {mask.size}, but is {acceleration}.")
    wanted = round(mask.size / acceleration)
    if wanted < mask.sum():
        raise ConfigError(
            f"an acceleration of {acceleration:g} leaves {wanted} of {mask.size} positions, but the calibration region "
            f"alone has {mask.sum()}: make it smaller, or the acceleration at most {mask.size / mask.sum():.3g}."
        )
    return wanted
