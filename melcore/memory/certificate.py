"""Certificates of tensors: a few numbers that bound how far a recovered copy is off, without the original.

Every element of the batch is cut into rows, and projected on a few random vectors: ``p_j`` is the sum over all rows
``r`` of ``g_jr <w_j, row r>``, with independent standard normal numbers ``g`` and vectors ``w``. An error ``e`` of a
copy shows as the difference of the projections, ``d_j``, whose squares have the expectation ``|e|^2`` whatever the
error looks like; so their root mean square estimates ``|e|`` (Alon, Matias, Szegedy, J Comput Syst Sci 58:137 (1999)).

How likely is a difference that is much too small? Given ``w``, ``d_j`` is normal with the variance
``s_j = w_j^T G w_j``, where ``G`` is the Gram matrix of the error's rows, of trace ``|e|^2``. For every ``a > 0``, by
Chernoff, ``P(mean of d_j^2 <= t^2 |e|^2) <= (exp(a t^2) E[(1 + 2 a s_j / |e|^2)^(-1/2)])^J``. The expectation is convex
in the eigenvalues of ``G``, hence largest where one of them is all of the trace: ``E[(1 + 2 a w^2)^(-1/2)]`` of one
normal ``w``. With J = 64 projections and t = 1/3 the best ``a`` gives ``0.767^64 = 4e-8``: the error is at most three
times its estimate, for any error that does not know the random numbers, but for one case in 20 million.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PROJECTIONS = 64
SAFETY = 3.0  #: the error is at most so many times its estimate
_ROW = 512  # real numbers
_PIECE = 1 << 16  # real numbers projected at a time, in double precision
_SEED = 20210304


@dataclass(frozen=True)
class Certificate:
    """What is remembered of tensors that are to be recovered; they count as one vector for each batch element.

    Attributes
    ----------
    norms
        Of each batch element, ``(batch,)``.
    projections
        ``(batch, PROJECTIONS)``.
    """

    norms: Tensor
    projections: Tensor

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Certificate":
        """The certificate of tensors ``(batch, ...)``; contiguous ones are read in pieces, without a copy."""
        batch, device = tensors[0].shape[0], tensors[0].device
        # Its own random numbers, always the same: those that training draws are not touched.
        generator = torch.Generator(device).manual_seed(_SEED)

        def normal(rows: int) -> Tensor:
            return torch.randn(rows, PROJECTIONS, dtype=torch.float64, device=device, generator=generator)

        vectors = normal(_ROW)
        energy = torch.zeros(batch, dtype=torch.float64, device=device)
        projections = torch.zeros(batch, PROJECTIONS, dtype=torch.float64, device=device)
        length = max(_PIECE // batch // _ROW, 1) * _ROW
        for tensor in tensors:
            for piece in _flat(tensor.detach()).split(length, dim=1):
                # Double precision escapes autocast and TF32, which would round what is to be compared.
                numbers = piece.double()
                missing = -piece.shape[1] % _ROW
                rows = (F.pad(numbers, (0, missing)) if missing else numbers).unflatten(1, (-1, _ROW))
                energy += torch.linalg.vector_norm(rows, dim=(1, 2)).square()
                projections += (rows @ vectors).mul_(normal(rows.shape[1])).sum(dim=1)
                del numbers, rows
        return cls(energy.sqrt(), projections)

    def error(self, tensors: Sequence[Tensor]) -> Tensor:
        """Upper bound of the relative error of recovered tensors: a scalar, of the worst element of the batch.

        NaN where the copy or the original has NaN. An original of zeros has no relative error: 0 or infinity.
        """
        found = Certificate.of(tensors)
        estimates = (found.projections - self.projections).square().mean(dim=1).sqrt()
        return torch.where(estimates == 0, 0.0, SAFETY * estimates / self.norms).max()


def _flat(tensor: Tensor) -> Tensor:
    """Real ``(batch, numbers)``."""
    parts = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return parts.flatten(1)
