"""The noise of a scan without a noise scan, from its own samples; and whitening by that estimate.

Every candidate below holds noise and whatever signal is left there: each is an upper bound, and the least is taken.

- *Readout*: where the readout is fully sampled, a transform along it separates positions. In windows of 1/16 of the
  field the outer lines alone are looked at, and of those the median, for they hold the least signal: in the air it is
  noise, and where the object fills the field it is the least that can be had.
- *Centre*: the calibration region, tapered, is a small image of every coil, whose corners often are air.
- *Periphery*: the median of the outermost samples.
- *Air beside the field*: readers that remove readout oversampling see air at the ends of the field before it is gone,
  and hand its samples on (`melcore.data.KSpace.air`, `AirBeside`).
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from melcore.data import KSpace, Noise
from melcore.physics.fourier import ifft
from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.whitening import NoiseCovariance, whitening_matrix

_WINDOWS = 16  # along the readout
_OUTER = 0.5  # of the lines, by their distance from the centre of k-space
_SMALL = 16  # samples of the calibration region along an axis, below which it resolves no corners
_CLEARLY = 0.5  # of the logarithm of the variance
_MOST_LINES = 1024
_LEAST = 32  # samples of a coil behind any estimate
_ROUNDING = 1e-5  # of the root mean square of the data: more than what transforms in single precision add
_SILENT = 1e-8  # a coil whose variance is this far below the others' is dead


def estimate_noise(k_space: KSpace, index: int = 0) -> NoiseCovariance | None:
    """Covariance of the noise of one element of the batch, an upper bound; None where nothing can be said.

    Parameters
    ----------
    k_space
        Not white. Samples that are exactly zero in all coils count as not taken.
    index
        Of the element.
    """
    data = k_space.data[index]
    mask = k_space.mask[min(index, len(k_space.mask) - 1)].expand(1, data.shape[1], -1, -1, -1)
    best: NoiseCovariance | None = None
    # The first have more samples: the next must be clearly lower.
    beside = _beside(k_space.air, data)
    for found in (beside, _along_readout(data, mask), _centre(k_space, index), _periphery(data, mask)):
        if found is not None and (best is None or _level(found.matrix) < _level(best.matrix) - _CLEARLY):
            best = found
    return best


class AirBeside:
    """Samples of the ends of an oversampled readout's field of view, gathered before they are removed.

    A sixteenth next to the field that is kept is looked at, on both sides: further out, receivers dampen the noise (at
    the ends to a third of its amplitude, on two measured scans; by 5 to 15 % where it is looked at). Of long scans
    every second, fourth and so on line is kept.
    """

    def __init__(self) -> None:
        self._lines: list[Tensor] = []
        self._stride, self._seen = 1, 0

    def add(self, lines: Tensor, kept: int, taken: int | None = None) -> None:
        """Take note of readouts.

        Parameters
        ----------
        lines
            k-space ``(line, coil, x)``, oversampled, not white.
        kept
            Samples of the readout once the oversampling is removed.
        taken
            Samples of `lines` that were measured; the rest are zeros.
        """
        size = lines.shape[-1]
        width = size // _WINDOWS
        first, last = size // 2 - kept // 2, size // 2 - kept // 2 + kept
        if width < 1 or first < width or size - last < width:
            return
        starts = (first - width, last)
        chosen = [n for n in range(len(lines)) if (self._seen + n) % self._stride == 0]
        self._seen += len(lines)
        if not chosen:
            return
        hybrid = ifft(lines[chosen], (-1,)) * math.sqrt(size / (taken or size))
        ends = torch.stack([hybrid[..., at : at + width] for at in starts], dim=2)  # (line, coil, window, x)
        self._lines.extend(ends)
        while len(self._lines) > _MOST_LINES:
            self._lines = self._lines[::2]
            self._stride *= 2

    @property
    def samples(self) -> Tensor | None:
        """``(line, coil, window, x)``; None if there was no oversampling."""
        if not self._lines or len({line.shape for line in self._lines}) > 1:
            return None
        return torch.stack(self._lines)


def noise_deviation(covariance: NoiseCovariance) -> float:
    """Standard deviation of the complex noise: the geometric mean over the coils once they are independent."""
    return math.exp(_level(covariance.matrix) / 2)


def whitened_by_estimate(
    k_space: KSpace, calibration: KSpace | None = None, *, mix: bool = True
) -> tuple[KSpace, KSpace | None, Tensor]:
    """White k-space, from data that are not, by the noise that is estimated from them; white data as they are.

    The units of the data are kept, on average over the coils: their noise has the standard deviation that is told in
    `Noise.level` then, for every element of the batch.

    Parameters
    ----------
    k_space, calibration
        Of the same coils.
    mix
        False leaves the samples as they are, and only tells the level: for coils whose maps are known already.

    Returns
    -------
    k_space, calibration
        With the noise that they have now.
    mixing
        What was done to the coils, complex ``(batch, coil, coil)``.
    """
    noise, coils = k_space.noise, k_space.data.shape[1]
    unchanged = torch.eye(coils, dtype=k_space.data.dtype, device=k_space.data.device)
    unchanged = unchanged.expand(len(k_space.data), -1, -1)
    if noise.whitened and noise.source != "upstream":
        return k_space, calibration, unchanged
    matrices, levels = [], []
    for index in range(len(k_space.data)):
        covariance = estimate_noise(k_space, index)
        level = 0.0 if covariance is None else noise_deviation(covariance)
        matrix = unchanged[index]
        if covariance is None or level == 0:
            level = math.sqrt(2) if noise.whitened else 1e-3 * float(k_space.data[index].abs().max())
        elif mix:
            matrix = (level * whitening_matrix(covariance, 0.0)).to(matrix)
        levels.append(level)
        matrices.append(matrix)
    if noise.whitened and all(0.7 < level / math.sqrt(2) < 3 for level in levels):
        return k_space, calibration, unchanged  # as the server said
    known = Noise(whitened=True, source="estimated", level=tuple(levels))
    words = f"estimated from the data: standard deviation {', '.join(f'{level:.3g}' for level in levels)}"
    if mix:
        words += ", whitened by it"

    mixing = torch.stack(matrices)

    def white(one: KSpace) -> KSpace:
        info = replace(one.info, provenance={**one.info.provenance, "noise": words})
        one = replace(one, noise=known, info=info, air=None)
        return replace(one, data=torch.einsum("bvc,bc...->bv...", mixing, one.data)) if mix else one

    return white(k_space), None if calibration is None else white(calibration), mixing


def _level(matrix: Tensor) -> float:
    """Logarithm of the variance, averaged over the coils that are not silent."""
    alive = matrix.diagonal().real
    alive = alive[alive > _SILENT * alive.median()] if bool((alive > 0).any()) else alive[:0]
    return float(alive.log().mean()) if alive.numel() else -math.inf


def _covariance(samples: Tensor) -> NoiseCovariance | None:
    """Of samples ``(coil, n)``, drawn towards equal and independent coils as far as chance explains their differences.

    A covariance from few samples shades the image by the random gains that it gives the coils (James and Stein,
    Estimation with quadratic loss, 1961; Schafer and Strimmer, A shrinkage approach to large-scale covariance matrix
    estimation, 2005).
    """
    coils, count = samples.shape
    samples = samples.to(torch.complex128)
    if count < _LEAST or not bool(samples.any()):
        return None
    matrix = samples @ samples.mH / count
    variance = matrix.diagonal().real
    alive = variance > _SILENT * variance.median()
    logarithms = variance.clamp(min=torch.finfo(variance.dtype).tiny).log()
    mean = logarithms[alive].mean()
    spread = (logarithms[alive] - mean).square().sum() / max(int(alive.sum()) - 1, 1)
    logarithms = mean + max(0.0, 1 - 1 / (count * float(spread) + 1e-12)) * (logarithms - mean)
    shrunk = torch.where(alive, logarithms.exp(), variance)
    deviation = variance.sqrt().clamp(min=torch.finfo(variance.dtype).tiny)
    correlation = matrix / torch.outer(deviation, deviation)
    between = correlation - torch.diag(correlation.diagonal())
    chance = coils * (coils - 1) / count
    share = max(0.0, 1 - chance / (float(between.abs().square().sum()) + 1e-12))
    deviation = shrunk.sqrt()
    matrix = (torch.eye(coils, device=matrix.device) + share * between) * torch.outer(deviation, deviation)
    return NoiseCovariance(matrix, 0.0, count)


def _along_readout(data: Tensor, mask: Tensor) -> NoiseCovariance | None:
    """From positions along a fully sampled readout."""
    if mask.shape[-1] > 1 and not bool((mask.any(-1) == mask.all(-1)).all()):
        return None
    size = data.shape[-1]
    if size < _WINDOWS:
        return None
    lines = mask[0, ..., 0] & data.abs().sum((0, -1)).gt(0)
    distance = _distance(lines.shape[1:]).expand_as(lines)
    far = distance[lines].sort().values
    if not far.numel():
        return None
    outer = lines & (distance >= far[int(_OUTER * (len(far) - 1))])
    hybrid = ifft(data[:, outer], (-1,))  # (coil, line, x)
    width = size // _WINDOWS
    windows = hybrid[..., : width * _WINDOWS].unflatten(-1, (_WINDOWS, width))
    energy = windows.abs().square().sum((0, 3))  # (line, window)
    return _quietest(windows.permute(2, 0, 1, 3).flatten(2), energy.median(0).values, energy.shape[0])


def _quietest(samples: Tensor, energy: Tensor, lines: int) -> NoiseCovariance | None:
    """From the windows ``(window, coil, n)`` of the least energy ``(window)``: all whose excess may be chance."""
    tolerance = 1 + 5 / math.sqrt(samples[0].numel())
    chosen = energy <= tolerance * energy.min()
    part = samples[chosen].transpose(0, 1)  # (coil, window, n)
    # Lines that stand out hold signal; half of them are enough.
    by_line = part.unflatten(2, (lines, -1)).abs().square().sum((0, 1, 3))
    spread = 1 + 4 / math.sqrt(part.numel() / lines)
    quiet = by_line <= spread * by_line.median()
    return _covariance(part.unflatten(2, (lines, -1))[:, :, quiet].flatten(1))


def _beside(air: Tensor | None, data: Tensor) -> NoiseCovariance | None:
    """From the air beside the field, ``(line, coil, window, x)``.

    Nothing if it is empty but for errors of rounding: then somebody removed the oversampling, and filled zeros in.
    """
    if air is None or float(air.abs().square().mean()) <= _ROUNDING**2 * float(data.abs().square().mean()):
        return None
    energy = air.abs().square().sum((1, 3)).median(0).values
    return _quietest(air.permute(2, 1, 0, 3).flatten(2), energy, len(air))


def _distance(sizes: Sequence[int]) -> Tensor:
    """From the centre of k-space, relative to its edge, ``(1, z, y)``."""
    z, y = ((torch.arange(n) - n // 2).float() / max(n / 2, 1) for n in sizes)
    return torch.sqrt(z[:, None] ** 2 + y[None] ** 2)[None]


def _centre(k_space: KSpace, index: int) -> NoiseCovariance | None:
    """From the corners of small images of the calibration region, tapered so that the object does not ring there."""
    data = k_space.data[index : index + 1]
    mask = k_space.mask[min(index, len(k_space.mask) - 1)][None]
    region = calibration_region(mask, data.shape)
    long = [axis for axis, size in zip((-3, -2, -1), region, strict=True) if size >= _SMALL]
    if not long:
        return None
    if mask.shape[2] > 1 and not bool(mask.all(2).any()):
        return None
    image, gain = data[0], 1.0
    for axis, size in zip((-3, -2, -1), region, strict=True):
        image = image.narrow(axis, image.shape[axis] // 2 - size // 2, size)
        if axis not in long:
            continue
        taper = torch.cos(torch.pi * (torch.arange(size) - (size - 1) / 2) / (size + 1)).square().to(image.device)
        gain *= float(taper.square().mean())
        image = image * taper.view(-1, *[1] * (-axis - 1))
    image = ifft(image, tuple(long)) / math.sqrt(gain)
    counts = [_WINDOWS // 2 if axis in long else 1 for axis in (-3, -2, -1)]
    cells = [size // count for size, count in zip(image.shape[2:], counts, strict=True)]
    for axis, count, cell in zip((2, 3, 4), counts, cells, strict=True):
        image = image.narrow(axis, 0, count * cell)
    (z, y, x), (c, b, a) = counts, cells
    image = image.reshape(*image.shape[:2], z, c, y, b, x, a).permute(2, 4, 6, 0, 1, 3, 5, 7)
    samples = image.reshape(z * y * x, len(data[0]), -1)  # (cell, coil, n)
    return _quietest(samples, samples.abs().square().sum((1, 2)), 1)


def _periphery(data: Tensor, mask: Tensor) -> NoiseCovariance | None:
    """From the outermost samples."""
    taken = (mask[0].expand(data.shape[1:]) & (data.abs().sum(0) > 0)).nonzero()
    sizes = torch.tensor(data.shape[2:])
    distance = ((taken[:, 1:] - sizes // 2) / (sizes / 2).clamp(min=1)).square().sum(1)
    if len(distance) < _LEAST:
        return None
    outer = taken[distance.argsort(descending=True)[: max(_LEAST, len(distance) // 10)]]
    samples = data[:, *outer.T]
    variance = samples.abs().square().median(1).values.double() / math.log(2)
    return NoiseCovariance(torch.diag(variance).to(torch.complex128), 0.0, samples.shape[1])
