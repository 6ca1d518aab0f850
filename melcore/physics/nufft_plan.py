"""Nonuniform Fourier transforms of stacks of arrays, by FINUFFT on the CPU and cuFINUFFT on CUDA.

Barnett, Magland, af Klinteberg: A parallel nonuniform fast Fourier transform library based on an "exponential of
semicircle" kernel, SIAM J Sci Comput 41:C479 (2019).

The libraries are called directly: MRI-NUFFT, which wraps them, loads matplotlib and SciPy, and needs CuPy on a GPU,
while torch already holds the arrays.
"""

import copy
import math
from typing import Any, Self

import torch
from torch import Tensor

from melcore.errors import DataError, MissingDependencyError
from melcore.physics.operator import _Apply

# The accuracy asked of the transforms. Single precision reaches little more: points have rounding errors too.
_ACCURACY = {torch.complex64: 1e-6, torch.complex128: 1e-12}


class NufftPlan:
    """Transforms between arrays of one shape and the samples of one trajectory for each frame.

    Libraries sort the points once for each frame, number of arrays, precision and device; the sorted plans are kept
    here, but neither copied nor pickled.

    Parameters
    ----------
    points
        float64 ``(frame, sample, axis)`` in radians per voxel, the axes in the order of `shape`.
    shape
        Of the arrays: 2 or 3 axes; index ``n // 2`` is the centre.
    accuracy
        Relative error of the transforms; by default 1e-6 in single and 1e-12 in double precision.
    """

    def __init__(self, points: Tensor, shape: tuple[int, ...], accuracy: float | None = None) -> None:
        self.points, self.shape, self.accuracy = points.cpu(), shape, accuracy
        self._plans: dict[tuple[object, ...], Any] = {}

    def samples(self, arrays: Tensor, frame: int) -> Tensor:
        """``sum_j arrays[j] exp(-i points . j)``: ``(n, *shape)`` to ``(n, sample)``; differentiable."""
        return _Apply.apply(arrays, lambda x: self._run(x, frame, False), lambda y: self._run(y, frame, True))

    def arrays(self, samples: Tensor, frame: int) -> Tensor:
        """Adjoint of `samples`: ``(n, sample)`` to ``(n, *shape)``; differentiable."""
        return _Apply.apply(samples, lambda y: self._run(y, frame, True), lambda x: self._run(x, frame, False))

    def _run(self, values: Tensor, frame: int, adjoint: bool) -> Tensor:
        if values.dtype not in _ACCURACY:
            raise DataError(f"nonuniform transforms take complex64 or complex128, but got {values.dtype}.")
        # The libraries see memory, not tensors: no lazy conjugation, no strides.
        values = values.detach().resolve_conj().resolve_neg().contiguous()
        out = values.new_empty((values.shape[0], *(self.shape if adjoint else self.points.shape[1:2])))
        if isinstance(values, torch._subclasses.FakeTensor):
            return out
        if values.is_cuda:
            self._cuda(values, frame, adjoint).execute(values, out=out)
        else:
            plan = self._cpu(values, frame)
            (plan.execute_adjoint if adjoint else plan.execute)(values.numpy(), out=out.numpy())
        return out

    def _cpu(self, values: Tensor, frame: int) -> Any:
        key = (frame, values.shape[0], values.dtype, torch.get_num_threads())
        if key not in self._plans:
            try:
                import finufft
            except ImportError as error:
                raise _missing("finufft", "nonuniform") from error
            # One plan serves both directions, which makes them adjoint to rounding errors, not to the accuracy.
            plan = finufft.Plan(2, self.shape, **self._options(values), nthreads=key[-1])
            plan.setpts(*(p.numpy() for p in self._coordinates(values, frame)))
            self._plans[key] = plan
        return self._plans[key]

    def _cuda(self, values: Tensor, frame: int, adjoint: bool) -> Any:
        stream = torch.cuda.current_stream(values.device).cuda_stream
        key = (frame, values.shape[0], values.dtype, values.device, stream, adjoint)
        if key not in self._plans:
            try:
                import cufinufft
            except ImportError as error:
                raise _missing("cufinufft", "nonuniform-gpu") from error
            plan = cufinufft.Plan(
                1 if adjoint else 2,
                self.shape,
                **{**self._options(values), "isign": 1 if adjoint else -1},
                gpu_device_id=values.device.index,
                gpu_stream=stream,
            )
            plan.setpts(*self._coordinates(values, frame))
            self._plans[key] = plan
        return self._plans[key]

    def _options(self, values: Tensor) -> dict[str, Any]:
        name = str(values.dtype).removeprefix("torch.")
        accuracy = max(self.accuracy or 0.0, _ACCURACY[values.dtype])
        return {"n_trans": values.shape[0], "eps": accuracy, "isign": -1, "dtype": name}

    def _coordinates(self, values: Tensor, frame: int) -> list[Tensor]:
        # Reduced to one turn in double precision, then rounded once.
        points = torch.remainder(self.points[frame] + math.pi, 2 * math.pi) - math.pi
        return [p.to(values.device, values.dtype.to_real()).contiguous() for p in points.unbind(-1)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return type(self)(copy.deepcopy(self.points, memo), self.shape, self.accuracy)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.points, self.shape, self.accuracy)


def _missing(package: str, extra: str) -> MissingDependencyError:
    return MissingDependencyError(
        f"non-Cartesian trajectories need {package}, which is not installed: pip install 'melcore[{extra}]'."
    )
