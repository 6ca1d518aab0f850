"""Noise whitening, number for number as Gadgetron's NoiseAdjust does it, scale factor included.

With the noise samples ``N`` (coil x samples) and their covariance ``C = N N^H / (n - 1) = L L^H``, the whitened samples
are ``out = s L^-1 samples`` with ``s = sqrt(2 dwell_image / dwell_noise * relative_bandwidth)``: a noise scan is
sampled faster than the image, through a receiver whose noise does not fill the whole bandwidth. The noise of the
result has unit correlation and complex variance 2 (1 in the real and 1 in the imaginary part).

``L`` is lower triangular, so that coils are mixed; a diagonal scaling would leave them correlated.

Kellman and McVeigh, Image reconstruction in SNR units, MRM 54 (2005).
"""

import math
from dataclasses import dataclass

import torch

from melcore.errors import DataError, ShapeError

#: Gadgetron's value where the header does not state `relativeReceiverNoiseBandwidth`.
RELATIVE_BANDWIDTH = 0.793

# A coil whose noise variance is this far below the others' is not quiet but dead (unplugged, or stored as zeros).
_SILENT = 1e-8
# Largest condition number (of the correlation matrix) that is inverted as it is; more is duplicated channels.
_MAX_CONDITION = 1e8


@dataclass(frozen=True)
class NoiseCovariance:
    """Covariance of the coils' noise.

    Attributes
    ----------
    matrix
        Hermitian ``(coil, coil)``, complex128.
    dwell_time
        Time between two samples of the noise scan, in s; 0 if unknown.
    samples
        Number of samples (per coil) behind the estimate.
    """

    matrix: torch.Tensor
    dwell_time: float
    samples: int

    @property
    def silent_coils(self) -> tuple[int, ...]:
        """Coils without noise, hence without signal: `whitening_matrix` mutes them and whitens the rest."""
        variance = self.matrix.diagonal().real
        alive = variance[variance > 0]
        floor = _SILENT * alive.median() if alive.numel() else torch.inf
        return tuple(int(coil) for coil in torch.nonzero(variance <= floor).flatten())

    @property
    def condition_number(self) -> float:
        """Largest over smallest eigenvalue, of the coils that are not silent; infinite if singular."""
        eigenvalues = torch.linalg.eigvalsh(_select(self.matrix, self._alive()))
        if eigenvalues.numel() == 0 or eigenvalues[0] <= 0:
            return math.inf
        return float(eigenvalues[-1] / eigenvalues[0])

    @property
    def loading(self) -> float:
        """Fraction of each variance that `whitening_matrix` adds to the diagonal, to bound the inverse; mostly 0."""
        eigenvalues = torch.linalg.eigvalsh(_correlation(_select(self.matrix, self._alive())))
        if eigenvalues.numel() == 0 or eigenvalues[0] * _MAX_CONDITION >= eigenvalues[-1]:
            return 0.0
        return float(eigenvalues[-1] / _MAX_CONDITION - eigenvalues[0].clamp(max=0))

    @property
    def remarks(self) -> tuple[str, ...]:
        """What was wrong and what is done about it, one readable line each, for the record of the scan."""
        lines = []
        if silent := self.silent_coils:
            lines.append(f"coils {', '.join(map(str, silent))} are silent in the noise scan and were muted")
        if loading := self.loading:
            lines.append(
                f"the noise covariance from {self.samples} samples is close to singular (condition number "
                f"{self.condition_number:.1e}) and was regularised by {loading:.1e} of each variance"
            )
        return tuple(lines)

    def _alive(self) -> torch.Tensor:
        alive = torch.ones(len(self.matrix), dtype=torch.bool, device=self.matrix.device)
        alive[list(self.silent_coils)] = False
        return alive


def noise_covariance(noise: torch.Tensor, dwell_time: float) -> NoiseCovariance:
    """Covariance of a noise scan.

    Parameters
    ----------
    noise
        Complex ``(coil, samples)``; readouts of several noise scans are concatenated along the samples.
    dwell_time
        In s; 0 if unknown.

    Raises
    ------
    ShapeError
        If `noise` has other axes or fewer than two samples.
    DataError
        If it holds NaN or infinity, or nothing but zeros.
    """
    if noise.ndim != 2 or noise.shape[1] < 2:
        raise ShapeError(f"noise must be (coil, samples), at least 2 samples, but its shape is {tuple(noise.shape)}.")
    if not bool(torch.isfinite(torch.view_as_real(noise)).all()):
        raise DataError("the noise scan contains NaN or infinity: leave it out, which reconstructs without whitening.")
    if not bool((noise != 0).any()):
        raise DataError("the noise scan contains only zeros: leave it out, which reconstructs without whitening.")
    samples = noise.to(torch.complex128)
    matrix = samples @ samples.mH / (noise.shape[1] - 1)
    return NoiseCovariance(matrix, float(dwell_time), noise.shape[1])


def whitening_matrix(
    covariance: NoiseCovariance, dwell_time: float, relative_bandwidth: float = RELATIVE_BANDWIDTH
) -> torch.Tensor:
    """Matrix that whitens the samples of the image.

    A coil that is dead in the noise scan gets a row and a column of zeros, and a nearly singular covariance
    (duplicated channels, fewer samples than coils) is loaded on its diagonal, rather than losing the exam:
    `NoiseCovariance.remarks` tells.

    Parameters
    ----------
    covariance
        Of the noise scan.
    dwell_time
        Of the samples to whiten, in s. If this or the noise scan's is 0 (unknown), the scale factor is 1.
    relative_bandwidth
        The header's ``relativeReceiverNoiseBandwidth``.

    Returns
    -------
    torch.Tensor
        Complex64 ``(coil, coil)``, lower triangular; for `whiten`.
    """
    alive = covariance._alive()
    matrix = _select(covariance.matrix, alive)
    if covariance.loading:
        matrix = matrix + covariance.loading * torch.diag(matrix.diagonal())
    factor = torch.linalg.cholesky(matrix)
    inverse = torch.linalg.solve_triangular(factor, torch.eye(len(factor)).to(factor), upper=False)
    if dwell_time > 0 and covariance.dwell_time > 0:
        inverse = inverse * math.sqrt(2 * dwell_time / covariance.dwell_time * relative_bandwidth)
    result = torch.zeros_like(covariance.matrix)
    result[alive.unsqueeze(1) & alive] = inverse.flatten()
    return result.to(torch.complex64)


def whiten(samples: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply a whitening matrix to samples ``(..., coil, n)``; the shape stays.

    Raises
    ------
    ShapeError
        If the coils of `samples` and `matrix` differ.
    """
    if samples.ndim < 2 or samples.shape[-2] != matrix.shape[-1]:
        raise ShapeError(
            f"the samples {tuple(samples.shape)} must have {matrix.shape[-1]} coils along their last axis but one, "
            f"because the noise scan has {matrix.shape[-1]}: is it the noise scan of this measurement?"
        )
    return matrix.to(samples.dtype) @ samples


def _select(matrix: torch.Tensor, alive: torch.Tensor) -> torch.Tensor:
    return matrix[alive][:, alive]


def _correlation(matrix: torch.Tensor) -> torch.Tensor:
    # Coils may have very different gains; that alone makes no covariance hard to invert.
    deviation = matrix.diagonal().real.sqrt()
    return matrix / (deviation.unsqueeze(1) * deviation)
