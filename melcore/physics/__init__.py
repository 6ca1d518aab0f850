"""Linear operators of MRI and the solvers for them (torch only).

Every operator is a `LinearOperator`: `forward`, `adjoint` and `normal`, each differentiable with the adjoint as its
backward. Axes are those of `melcore.layout`.
"""

from melcore.physics.conjugate_gradient import Solution, conjugate_gradient
from melcore.physics.data_consistency import ConvergenceWarning, GradientMode, data_consistency
from melcore.physics.fourier import Fourier, fft, ifft
from melcore.physics.operator import LinearOperator
from melcore.physics.sense import Sense

__all__ = [
    "ConvergenceWarning",
    "Fourier",
    "GradientMode",
    "LinearOperator",
    "Sense",
    "Solution",
    "conjugate_gradient",
    "data_consistency",
    "fft",
    "ifft",
]
