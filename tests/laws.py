"""The laws of linear operators: properties that hold for every one of them, tested for every case that enrols.

A new operator enrols itself by adding cases to `OPERATORS`; nothing else is needed.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.physics import Fourier, LinearOperator, NonUniformFourier, NonUniformSense, Sense
from melcore.simulate.trajectories import kooshball, radial, spiral, stack


@dataclass(frozen=True)
class Case:
    """An operator to be made in a precision, under a name for the test report.

    An approximate operator has tolerances: of its normal operator, which may be approximated otherwise than the two
    parts, and of single precision. Adjointness, linearity and gradients are exact for every one.
    """

    name: str
    make: Callable[[torch.dtype], LinearOperator]
    normal_tolerance: float = 1e-12
    single_tolerance: float = 2e-6
    cuda_package: str | None = None  #: what it needs on a CUDA device

    def __str__(self) -> str:
        return self.name


def random(shape: tuple[int, ...], dtype: torch.dtype = torch.complex128, seed: int = 0) -> Tensor:
    """Standard complex normal numbers, always the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.complex128, generator=generator).to(dtype)


def sense(
    matrix: tuple[int, int, int], *, batch: int = 1, sets: int = 1, coils: int = 3, time: int = 1, **options: int | None
) -> Callable[[torch.dtype], Sense]:
    """A SENSE operator with random maps, and a random mask that differs from frame to frame and along (z, y)."""

    def make(dtype: torch.dtype) -> Sense:
        mask = random((batch, 1, time, *matrix[:2], 1), seed=1).real > -0.3
        return Sense(random((batch, sets, coils, 1, *matrix), dtype, seed=2), mask, time=time, **options)

    return make


def weighted(dtype: torch.dtype) -> Sense:
    """SENSE with real sampling weights instead of a mask, over the whole grid and with maps for each frame."""
    weights = random((2, 1, 3, 1, 5, 7), seed=1).real.abs().clamp(max=1)
    return Sense(random((2, 1, 4, 3, 1, 5, 7), dtype, seed=2), weights)


def nonuniform(
    trajectory: Tensor,
    matrix: tuple[int, int, int],
    *,
    sets: int = 1,
    coils: int = 3,
    batch: int = 1,
    weighted: bool = False,
    **options: int | None,
) -> Callable[[torch.dtype], NonUniformSense]:
    """A non-Cartesian SENSE operator with random maps, and random weights or none."""

    def make(dtype: torch.dtype) -> NonUniformSense:
        weights = random(tuple(trajectory.shape[:3]), seed=1).real.abs() if weighted else None
        return NonUniformSense(
            random((batch, sets, coils, 1, *matrix), dtype, seed=2), trajectory, weights=weights, **options
        )

    return make


def approximate(name: str, make: Callable[[torch.dtype], LinearOperator]) -> Case:
    """The case of an operator that relies on nonuniform transforms."""
    return Case(name, make, normal_tolerance=1e-10, single_tolerance=1e-5, cuda_package="cufinufft")


OPERATORS = [
    Case("fourier-3d", lambda _: Fourier((2, 5, 4, 7))),
    Case("fourier-1d", lambda _: Fourier((3, 1, 1, 9))),
    Case("fourier-one-axis", lambda _: Fourier((3, 5, 6), axes=(1,))),
    Case("sense-1d", sense((1, 1, 9))),
    Case("sense-2d", sense((1, 7, 10), batch=2)),
    Case("sense-2d-two-sets", sense((1, 6, 5), sets=2, coils=4)),
    Case("sense-2d+t", sense((1, 7, 6), time=4)),
    Case("sense-3d", sense((3, 8, 5))),
    Case("sense-3d-two-sets-coil-groups", sense((4, 5, 7), batch=2, sets=2, coils=5, coil_batch=2)),
    Case("sense-3d+t", sense((3, 4, 5), time=2, coil_batch=1)),
    Case("sense-one-coil", sense((1, 5, 8), coils=1)),
    Case("sense-weights", weighted),
    Case("sense-2d+t-frame-groups", sense((1, 7, 6), time=5, coils=4, coil_batch=3, time_batch=2)),
    approximate("nonuniform-fourier", lambda _: NonUniformFourier((2, 3, 2, 1, 9, 10), radial(9, 5, time=2))),
    approximate("radial", nonuniform(radial(9, 7, samples=11), (1, 9, 10), batch=2)),
    approximate("radial-frames-two-sets", nonuniform(radial(8, 5, time=3), (1, 8, 7), sets=2, weighted=True)),
    approximate("radial-planes-coil-groups", nonuniform(radial(6, 4), (3, 5, 6), coils=5, coil_batch=2, time=2)),
    approximate("spiral", nonuniform(spiral(9, 3, samples=40), (1, 9, 9), coils=1, weighted=True)),
    approximate("spiral-gridding-twice", nonuniform(spiral(8, 2, samples=50), (1, 7, 8), toeplitz=False)),
    approximate("stack-of-stars", nonuniform(stack(radial(7, 5, time=2), 4), (4, 6, 7), sets=2)),
    approximate("kooshball", nonuniform(kooshball(6, 20), (5, 6, 7), coils=4, coil_batch=3, weighted=True)),
]


def relative(a: Tensor, b: Tensor) -> float:
    """``|a - b| / |b|``."""
    return float((a - b).detach().norm() / b.detach().norm())


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Inner product, antilinear in the first argument."""
    return torch.vdot(a.flatten(), b.flatten())
