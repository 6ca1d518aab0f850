"""Signs that a measurement is not what a scanner measures: spikes, clipping, wrong phases, swapped lines, bad coils.

Samples are judged by what CG-SENSE leaves of them: neighbours in k-space and other coils foretell each, up to the noise
and the errors of the maps, which on sound exams leave up to a tenth of the signal unexplained (volumes at a high
signal-to-noise ratio; 1 to 7 % elsewhere). Bounds lie between sound exams (measured ones, and heads and hearts with
simulated coils, at noise levels of .002 to .2) and exams with injected defects::

                        sound, at most          with defects, at least
    unexplained         .29 (.10 at low noise)  .15 (half of the central lines swapped) to .79
    line / expected     1.8                     19 (one spike of a third of the peak, two readouts of spikes)
    sample / expected   37 (one coil; 21 else)  45 (one spike) to 10000
    noise of a coil     2.6                     1000
    energy of centre    10 at least             1.2 at most (pure noise)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.noise_level import estimate_noise
from melcore.preprocess.preparation import Prepared

_UNEXPLAINED, _FOR_NOISE = 0.12, 0.5
_TOO_NOISY = 0.38  # beyond, maps of sound volumes may fail: .74 was left of one at .43
_MISFIT = 0.15**2  # of the energy of a sample: what maps may leave
_LINE, _SAMPLE = 4.0, 50.0
_NOISY_COIL, _WEIGHTLESS_COIL = 10.0, 0.02
_CENTRE, _LEAST_SIGNAL = 24, 2.0
_SHELLS = 20


@dataclass(frozen=True)
class Residual:
    """What an image leaves of the samples, in units of their noise, for one element of the batch.

    Attributes
    ----------
    relative
        ``|A x - y| / |y|``.
    noise
        ``|noise| / |y|``: what a perfect image leaves.
    lines, line_signal
        Mean energy of the residual, and of the samples, of each readout that was taken, ``(n,)``.
    samples, sample_signal
        The same of each sample, averaged over the coils.
    line_at, sample_at
        Where they are: ``(n, 3)`` as (time, z, y), and ``(n, 4)``.
    sizes
        Of the grid (z, y, x).
    """

    relative: float
    noise: float
    lines: Tensor
    line_signal: Tensor
    samples: Tensor
    sample_signal: Tensor
    line_at: Tensor
    sample_at: Tensor
    sizes: tuple[int, int, int]

    @property
    def unexplained(self) -> float:
        """Part of the signal beyond the noise."""
        return math.sqrt(max(0.0, self.relative**2 - self.noise**2))


def residuals(image: Tensor, prepared: Prepared) -> list[Residual]:
    """Residual of each element of the batch.

    Parameters
    ----------
    image
        Scaled image ``(batch, set, time, z, y, x)``.
    prepared
        The data that it was made from.
    """
    measured = prepared.k_space.data
    left = prepared.operator()(image.to(measured.device)) - measured
    masks = prepared.k_space.mask
    result = []
    for index, (ours, data) in enumerate(zip(left, measured, strict=True)):
        taken = masks[min(index, len(masks) - 1), 0].expand(data.shape[1:])  # (time, z, y, x)
        unit = float(prepared.sigma[index]) ** -2
        energy, signal = (unit * part.abs().square().mean(0) for part in (ours, data))
        counts = taken.sum(-1)
        line_at, sample_at = counts.nonzero(), taken.nonzero()
        lines, line_signal = ((part.sum(-1) / counts.clamp(min=1))[counts > 0] for part in (energy, signal))
        total = signal.sum().clamp(min=torch.finfo(signal.dtype).tiny)
        result.append(
            Residual(
                math.sqrt(float(energy.sum() / total)),
                math.sqrt(float(taken.sum() / total)),
                lines,
                line_signal,
                energy[taken],
                signal[taken],
                line_at,
                sample_at,
                (data.shape[2], data.shape[3], data.shape[4]),
            )
        )
    return result


def defects(prepared: Prepared, left: list[Residual]) -> list[str]:
    """What is wrong with the measurement, one line each; nothing about a sound one.

    Parameters
    ----------
    prepared
        The data.
    left
        `residuals` of CG-SENSE.
    """
    found = _bad_coils(prepared)
    energies = _central_energy(prepared)
    for index, (one, energy) in enumerate(zip(left, energies, strict=True)):
        where = f" (slice {index})" if len(left) > 1 else ""
        if energy < _LEAST_SIGNAL:
            found.append(f"the centre of k-space holds nothing but noise{where}")
            continue
        found += [words + where for words in _inconsistent(one)]
    return found


def _inconsistent(left: Residual) -> list[str]:
    found = []
    bound = _UNEXPLAINED + _FOR_NOISE * left.noise
    if left.noise < _TOO_NOISY and left.unexplained > bound:
        found.append(
            f"the samples contradict each other: CG-SENSE leaves {left.unexplained:.0%} of the signal unexplained, "
            f"sound data up to {bound:.0%} (clipping, wrong phases or swapped lines?)"
        )
    for name, limit, energy, signal, at in (
        ("readout", _LINE, left.lines, left.line_signal, left.line_at),
        ("sample", _SAMPLE, left.samples, left.sample_signal, left.sample_at),
    ):
        sizes = left.sizes[: at.shape[1] - 1]
        worst = _outstanding(at[:, 1:], sizes, energy, signal)
        if bool((worst > limit).any()):
            count, place = int((worst > limit).sum()), at[int(worst.argmax())].tolist()
            found.append(
                f"{count} {name}{'s' if count > 1 else ''} stand{'' if count > 1 else 's'} out, the worst at "
                f"{tuple(place)} (time, z, y{', x' if len(place) > 3 else ''}): spikes?"
            )
    return found


def _outstanding(at: Tensor, sizes: tuple[int, ...], energy: Tensor, signal: Tensor) -> Tensor:
    """Energies of a residual relative to what may be left: of noise, of neighbours, and of signal by the maps."""
    expected = 1 + _usual(at, sizes, energy) + _MISFIT * (_usual(at, sizes, signal) + signal)
    # Noise has a tail: of many, the largest is larger.
    return energy / expected / (1 + math.log(max(len(energy), 1)) / 14)


def _usual(at: Tensor, sizes: tuple[int, ...], energy: Tensor) -> Tensor:
    """Median of an energy over places about as far from the centre of k-space."""
    centre = torch.tensor([n // 2 for n in sizes], device=at.device)
    half = torch.tensor([max(n / 2, 1.0) for n in sizes], device=at.device)
    order = ((at - centre) / half).square().sum(1).argsort()
    width = max(1, len(order) // _SHELLS)
    result = torch.empty_like(energy)
    for start in range(0, len(order), width):
        neighbours = order[max(0, start - width // 2) : start + width + width // 2]
        result[order[start : start + width]] = energy[neighbours].median()
    return result


def _bad_coils(prepared: Prepared) -> list[str]:
    found = []
    weights = prepared.mixing.abs().square().sum(1).sqrt()
    for index, weight in enumerate(weights):
        alive = weight > 0
        weak = alive & (weight < _WEIGHTLESS_COIL * weight[alive].median())
        if bool(weak.any()):
            where = f" (slice {index})" if len(weights) > 1 else ""
            coils = ", ".join(str(int(coil)) for coil in weak.nonzero().flatten())
            found.append(f"coil {coils} is so noisy that it hardly counts{where}")
    if prepared.sigma_source == "estimated":
        return found  # by the same data: it is white
    for index, sigma in enumerate(prepared.sigma.tolist()):
        covariance = estimate_noise(prepared.k_space, index)
        if covariance is None:
            continue
        noise = float(covariance.matrix.diagonal().real.max().sqrt()) / sigma
        if noise > _NOISY_COIL:
            where = f" (slice {index})" if len(prepared.sigma) > 1 else ""
            found.append(f"the noise of a coil is {noise:.0f} times as strong as the noise scan says{where}")
    return found


def _central_energy(prepared: Prepared) -> list[float]:
    """Mean energy of the samples of the calibration region, in units of the noise, of each element."""
    k_space = prepared.k_space
    region = calibration_region(k_space.mask, k_space.data.shape)
    energies = []
    for data, sigma in zip(k_space.data, prepared.sigma.tolist(), strict=True):
        for axis, size in enumerate(region, 2):
            used = min(size or 1, _CENTRE)
            data = data.narrow(axis, data.shape[axis] // 2 - used // 2, used)
        samples = data[(data != 0).any(0, keepdim=True).expand_as(data)]
        energies.append(float(samples.abs().square().mean()) / sigma**2 if samples.numel() else 0.0)
    return energies
