"""Coil compression: fewer virtual coils that keep nearly all the signal.

Buehrer et al., Array compression for MRI with large coil arrays, MRM 57 (2007).
"""

import torch

from melcore import layout
from melcore.errors import DataError, ShapeError


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
    energy = float(gram.diagonal().real.sum())
    if not 0 < energy < float("inf"):
        raise DataError("the calibration data are zero or not finite: coils cannot be compressed by them.")
    eigenvalues, vectors = torch.linalg.eigh(gram)
    vectors = vectors.flip(1)[:, :coils]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    matrix = (vectors * (largest.conj() / largest.abs())).mH
    retained = float(eigenvalues.flip(0)[:coils].sum()) / energy
    return matrix.to(torch.complex64), min(retained, 1.0)


def compress_coils(k_space: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Apply a compression matrix ``(virtual, coil)`` to ``(batch, coil, time, z, y, x)``.

    Raises
    ------
    ShapeError
        If their coils differ.
    """
    layout.check_axes(tuple(k_space.shape), layout.K_SPACE_AXES, "k-space")
    if k_space.shape[1] != matrix.shape[1]:
        raise ShapeError(
            f"the compression matrix {tuple(matrix.shape)} is for {matrix.shape[1]} coils, "
            f"but the k-space {tuple(k_space.shape)} has {k_space.shape[1]}."
        )
    return torch.einsum("vc,bc...->bv...", matrix.to(k_space.dtype), k_space)
