"""Coil compression: fewer virtual coils that keep nearly all the signal.

Buehrer et al., Array compression for MRI with large coil arrays, MRM 57 (2007): one matrix for all data.
Zhang et al., Coil compression for accelerated imaging with Cartesian sampling, MRM 69 (2013): one matrix for each
position along the fully sampled readout, aligned from position to position so that the virtual coils stay smooth.
"""

from collections.abc import Sequence

import torch

from melcore import layout
from melcore.errors import ConfigError, DataError, ShapeError
from melcore.physics.fourier import fft, ifft

_CENTRE = 32  # samples of the calibration region along an axis in which signal is looked for
_LEAST = 4  # virtual coils, where there are as many


def coil_compression_matrix(k_space: torch.Tensor, coils: int) -> tuple[torch.Tensor, float]:
    """Virtual coils by singular value decomposition of the calibration data.

    Parameters
    ----------
    k_space
        Calibration data, complex ``(batch, coil, time, z, y, x)``; zeros do not matter. Whitened: then the
        principal components are those of the signal-to-noise ratio.
    coils
        Number of virtual coils. If there are no more coils than that, the matrix is the identity.

    Returns
    -------
    matrix
        Complex64 ``(virtual, coil)`` with orthonormal rows, so that white noise stays white. The phase of each row is
        fixed by making its largest entry real and positive.
    retained_energy
        Fraction of the energy of `k_space` that the virtual coils keep.

    Raises
    ------
    DataError
        If `k_space` is zero or not finite.
    """
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "the calibration k-space")
    if coils < 1:
        raise ShapeError(f"coils can be compressed to 1 at least, not to {coils}.")
    available = k_space.shape[1]
    if coils >= available:
        return torch.eye(available, dtype=torch.complex64, device=k_space.device), 1.0
    gram = torch.zeros(available, available, dtype=torch.complex128, device=k_space.device)
    for example in k_space:
        # One example at a time, in double precision: the small singular values decide what may be dropped.
        samples = example.reshape(available, -1)
        samples = samples[:, (samples != 0).any(0)].to(torch.complex128)
        gram += samples @ samples.mH
    return matrix_from_gram(gram, coils)


def virtual_coils(
    k_space: torch.Tensor, region: Sequence[int], noise: float, limit: int | None = None
) -> tuple[torch.Tensor, float]:
    """As `coil_compression_matrix`, with as many virtual coils as rise above the noise, and no more than a limit.

    Of noise alone, the singular values of the calibration data stay below a bound (Marchenko and Pastur, 1967): what is
    below it holds no signal that is worth a coil. A fixed number is too few at a high signal-to-noise ratio (12 of 16
    cost 0.5 to 1.4 dB at one of 460) and more than is needed at a low one.

    Parameters
    ----------
    k_space
        White, complex ``(batch, coil, time, z, y, x)``.
    region
        Size ``(z, y, x)`` of the calibration region, whose samples are looked at.
    noise
        Standard deviation of the complex noise of a sample.
    limit
        Of the number of virtual coils.

    Raises
    ------
    DataError
        If `k_space` is zero or not finite.
    """
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "the calibration k-space")
    if limit is not None and limit < 1:
        raise ShapeError(f"coils can be compressed to 1 at least, not to {limit}.")
    available = k_space.shape[1]
    centre = k_space
    for axis, size in zip((3, 4, 5), region, strict=True):
        used = min(size, _CENTRE)
        centre = centre.narrow(axis, centre.shape[axis] // 2 - used // 2, used)
    samples = centre.transpose(0, 1).reshape(available, -1).to(torch.complex128)
    samples = samples[:, (samples != 0).any(0)]
    count = samples.shape[1]
    eigenvalues = torch.linalg.eigvalsh(samples @ samples.mH)
    bound = noise**2 * (count**0.5 + available**0.5) ** 2
    wanted = max(int((eigenvalues > bound).sum()), min(available, _LEAST))
    return coil_compression_matrix(k_space, wanted if limit is None else min(wanted, limit))


def matrix_from_gram(gram: torch.Tensor, coils: int) -> tuple[torch.Tensor, float]:
    """As `coil_compression_matrix`, from the sum of ``samples @ samples^H``, complex128 ``(coil, coil)``."""
    energy = float(gram.diagonal().real.sum())
    if not 0 < energy < float("inf"):
        raise DataError("the calibration data are zero or not finite: coils cannot be compressed by them.")
    eigenvalues, vectors = torch.linalg.eigh(gram)
    matrix = _fixed(vectors.flip(1)[:, :coils])
    retained = float(eigenvalues.flip(0)[:coils].sum()) / energy
    return matrix.to(torch.complex64), min(retained, 1.0)


def geometric_compression_matrices(k_space: torch.Tensor, coils: int) -> tuple[torch.Tensor, float]:
    """Virtual coils for each position along the readout.

    Parameters
    ----------
    k_space
        Calibration data, complex ``(batch, coil, time, z, y, x)``, whitened, with a fully sampled readout.
    coils
        Number of virtual coils.

    Returns
    -------
    matrices
        Complex64 ``(x, virtual, coil)`` with orthonormal rows; for `compress_coils`.
    retained_energy
        Fraction of the energy of `k_space` that the virtual coils keep.

    Raises
    ------
    DataError
        If `k_space` is zero or not finite.
    """
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "the calibration k-space")
    if coils < 1:
        raise ShapeError(f"coils can be compressed to 1 at least, not to {coils}.")
    available, size = k_space.shape[1], k_space.shape[-1]
    coils = min(coils, available)
    grams = torch.zeros(size, available, available, dtype=torch.complex128, device=k_space.device)
    for example in k_space:
        along = ifft(example, (-1,)).flatten(1, -2).permute(2, 0, 1).to(grams.dtype)
        grams += along @ along.mH
    return matrices_along_readout(grams, coils)


def matrices_along_readout(grams: torch.Tensor, coils: int) -> tuple[torch.Tensor, float]:
    """As `geometric_compression_matrices`, from one matrix of inner products for each position, ``(x, coil, coil)``."""
    energy = float(grams.diagonal(dim1=1, dim2=2).real.sum())
    if not 0 < energy < float("inf"):
        raise DataError("the calibration data are zero or not finite: coils cannot be compressed by them.")
    eigenvalues, vectors = torch.linalg.eigh(grams)
    matrices = vectors.flip(2)[:, :, :coils].mH.contiguous()
    middle = len(matrices) // 2
    matrices[middle] = _fixed(matrices[middle].mH)
    # Principal components have free phases and swap places: each position's are turned onto its inner neighbour's.
    for positions, step in ((range(middle + 1, len(matrices)), -1), (range(middle - 1, -1, -1), 1)):
        for x in positions:
            left, _, right = torch.linalg.svd(matrices[x + step] @ matrices[x].mH)
            matrices[x] = left @ right @ matrices[x]
    retained = float(eigenvalues[:, -coils:].sum()) / energy
    return matrices.to(torch.complex64), min(retained, 1.0)


def selection_matrix(available: int, keep: Sequence[int]) -> torch.Tensor:
    """Matrix ``(kept, coil)`` that selects coils by their numbers, in their given order; for `compress_coils`.

    Raises
    ------
    ConfigError
        If there is no such coil, or one is named twice, or none.
    """
    wrong = [coil for coil in keep if not 0 <= coil < available]
    if wrong or not keep or len(set(keep)) < len(keep):
        raise ConfigError(
            f"coils to keep must be different numbers between 0 and {available - 1}, but are {list(keep)}."
        )
    return torch.eye(available, dtype=torch.complex64)[list(keep)]


def _fixed(vectors: torch.Tensor) -> torch.Tensor:
    """Columns as rows, the largest entry of each real and positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return (vectors * (largest.conj() / largest.abs())).mH


def compress_coils(k_space: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply a matrix ``(virtual, coil)``, or one for each x, to ``(batch, coil, time, z, y, x)``.

    Raises
    ------
    ShapeError
        If their coils, or positions along the readout, differ.
    """
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "k-space")
    if k_space.shape[1] != matrix.shape[-1] or (matrix.ndim == 3 and len(matrix) != k_space.shape[-1]):
        raise ShapeError(
            f"the compression matrix {tuple(matrix.shape)} is for {matrix.shape[-1]} coils, "
            f"but the k-space {tuple(k_space.shape)} has {k_space.shape[1]}."
        )
    if matrix.ndim == 3:
        along = torch.einsum("xvc,bctzyx->bvtzyx", matrix.to(k_space.dtype), ifft(k_space, (-1,)))
        return fft(along, (-1,))
    return torch.einsum("vc,bc...->bv...", matrix.to(k_space.dtype), k_space)
