"""Linear operators of MRI and the solvers for them (torch only).

Every operator is a `LinearOperator`: `forward`, `adjoint` and `normal`, each differentiable with the adjoint as its
backward. Axes are those of `melcore.layout`.
"""

from melcore.physics.conjugate_gradient import Solution, conjugate_gradient
from melcore.physics.data_consistency import ConvergenceWarning, GradientMode, data_consistency
from melcore.physics.fourier import Fourier, fft, ifft
from melcore.physics.nonuniform import NonUniformFourier, NonUniformSense
from melcore.physics.operator import LinearOperator
from melcore.physics.partial_fourier import (
    FilledImage,
    PartialFourierWarning,
    PartialSampling,
    find_partial_fourier,
    homodyne,
    pocs,
)
from melcore.physics.power_method import Eigenvalue, power_method
from melcore.physics.sense import Sense

__all__ = [
    "ConvergenceWarning",
    "Eigenvalue",
    "FilledImage",
    "Fourier",
    "GradientMode",
    "LinearOperator",
    "NonUniformFourier",
    "NonUniformSense",
    "PartialFourierWarning",
    "PartialSampling",
    "Sense",
    "Solution",
    "conjugate_gradient",
    "data_consistency",
    "fft",
    "find_partial_fourier",
    "homodyne",
    "ifft",
    "pocs",
    "power_method",
]
