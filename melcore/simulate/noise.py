"""Receiver noise: white, or correlated between coils."""

import numpy as np
import torch
from torch import Tensor

from melcore.errors import ConfigError


def complex_noise(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """White Gaussian noise, complex64, of complex variance 2 (1 in the real and in the imaginary part)."""
    return torch.randn(shape, dtype=torch.complex64, generator=generator) * 2**0.5


def correlated_noise(shape: tuple[int, ...], covariance: Tensor, generator: torch.Generator) -> Tensor:
    """Gaussian noise ``(coil, ...)``, complex64, with this covariance (the complex variances on its diagonal)."""
    mixing = torch.linalg.cholesky(covariance.to(torch.complex128)).to(torch.complex64)
    return torch.tensordot(mixing, complex_noise(shape, generator) / 2**0.5, 1)


def random_noise_covariance(coils: int, correlation: float = 0.3, *, seed: int) -> Tensor:
    """Covariance of a coil array's noise.

    Parameters
    ----------
    coils
        Number of coils.
    correlation
        Largest correlation between two coils, in magnitude; at least 0 and below 1. Very high ones may not be reached.
    seed
        The same seed gives the same covariance.

    Returns
    -------
    Tensor
        Hermitian positive definite, complex128 ``(coil, coil)``; variances scatter about 1, as gains do.
    """
    if not 0 <= correlation < 1:
        raise ConfigError(f"the correlation must be at least 0 and below 1, but is {correlation}.")
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((coils, 2 * coils)) + 1j * rng.standard_normal((coils, 2 * coils))
    gram = mixing @ mixing.conj().T
    deviation = np.sqrt(gram.diagonal().real)
    gram = gram / np.outer(deviation, deviation)
    largest = float(np.abs(gram - np.eye(coils)).max())
    share = min(1.0, correlation / largest) if largest > 0 else 0.0
    gains = np.exp(rng.normal(0, 0.15, coils))
    return torch.from_numpy(((1 - share) * np.eye(coils) + share * gram) * np.outer(gains, gains))
