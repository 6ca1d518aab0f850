"""Parallel imaging with radial, spiral or any other trajectory: coil maps, nonuniform Fourier transform, weights.

Pruessmann et al., Advances in sensitivity encoding with arbitrary k-space trajectories, Magn Reson Med 46:638 (2001).
"""

import math

import torch
from torch import Tensor

from melcore import layout
from melcore.errors import DataError, ShapeError
from melcore.physics.nufft_plan import NufftPlan
from melcore.physics.operator import LinearOperator
from melcore.physics.sense import combine_coils, expand_coils
from melcore.physics.toeplitz import apply_toeplitz, toeplitz_kernel

_PADDED = 1 << 24  # samples of the padded coil images that the normal operator holds at a time (128 MiB)


def check_trajectory(trajectory: Tensor, matrix: tuple[int, int, int]) -> None:
    """Refuse a trajectory of another shape or unit, or with numbers that are not finite.

    Raises
    ------
    ShapeError
        Unless it is ``(time, readout, sample, 2 or 3)``.
    DataError
        If it is not finite, leaves the k-space of `matrix` by more than one cycle (samples there would fold back), or
        stays within half a cycle of the centre along every axis, as it does in other units.
    """
    if trajectory.ndim != 4 or trajectory.shape[-1] not in (2, 3) or min(trajectory.shape) < 1:
        raise ShapeError(
            "a trajectory must have the 4 axes (time, readout, sample, 2 or 3), none empty, but its shape is "
            f"{tuple(trajectory.shape)}: insert missing axes as size 1, the components x, y(, z) last."
        )
    if trajectory.is_complex() or not bool(torch.isfinite(trajectory).all()):
        raise DataError("a trajectory must be real and finite: give x and y as two components, and remove NaN.")
    reach = trajectory.abs().amax((0, 1, 2)).tolist()
    sizes = matrix[::-1][: len(reach)]
    for name, far, size in zip("xyz", reach, sizes, strict=False):
        if size > 1 and far > size / 2 + 1:
            raise DataError(
                f"the trajectory reaches {far:.4g} along {name}, but {size} voxels hold k-space to {size / 2:g} cycles "
                "per field of view: convert its unit (rad/m: times field of view / 2 pi), or enlarge the matrix."
            )
    if max(sizes) >= 4 and max(reach) <= 0.5 + 1e-3:
        raise DataError(
            f"the trajectory stays within {max(reach):.3g} cycles per field of view of the centre: if it is in units "
            "of the sampling rate (-0.5 to 0.5), multiply its components x, y(, z) by the matrix sizes."
        )


def _points(trajectory: Tensor, matrix: tuple[int, int, int]) -> Tensor:
    """Cycles per field of view (x, y, z) to radians per voxel (z, y, x), ``(frame, sample, axis)``."""
    sizes = torch.tensor(matrix[::-1][: trajectory.shape[-1]], dtype=torch.float64)
    turns = trajectory.detach().to("cpu", torch.float64) / sizes
    return (2 * math.pi * turns).flatten(1, 2).flip(-1)


class NonUniformFourier(LinearOperator):
    """Image ``(batch, coil, time, z, y, x)`` to samples ``(batch, coil, time, 1 or z, readout, sample)``.

    ``y(k) = n**-0.5 sum_r x(r) exp(-2 pi i k r)`` over the ``n`` voxels of the transformed axes, with ``r`` in fields
    of view from the centre ``size // 2``. On a Cartesian trajectory it equals `melcore.physics.fft`. With two
    components a trajectory lies in the plane (y, x), and every z is a plane of its own.

    Parameters
    ----------
    shape
        Of the image.
    trajectory
        Real ``(time, readout, sample, 2 or 3)``, time 1 or that of the image; components in the order x, y, z in cycles
        per field of view, from ``-size / 2`` to ``size / 2``, as in BART.
    accuracy
        Relative error of the transforms; by default 1e-6 in single and 1e-12 in double precision.

    Raises
    ------
    ShapeError, DataError
        See `check_trajectory`.
    MissingDependencyError
        When it is first applied, if FINUFFT (on CUDA: cuFINUFFT) is not installed.
    """

    def __init__(self, shape: tuple[int, ...], trajectory: Tensor, *, accuracy: float | None = None) -> None:
        layout.check_axes(tuple(shape), layout.K_SPACE_AXES, "the coil images of a nonuniform transform")
        batch, coils, time, z, y, x = shape
        check_trajectory(trajectory, (z, y, x))
        frames, readouts, samples, axes = trajectory.shape
        if frames not in (1, time):
            raise ShapeError(f"a trajectory of {frames} frames does not fit images of {time}.")
        super().__init__(tuple(shape), (batch, coils, time, 1 if axes == 3 else z, readouts, samples))
        self._plan = NufftPlan(_points(trajectory, (z, y, x)), (z, y, x)[3 - axes :], accuracy)
        self._scale = math.prod(self._plan.shape) ** -0.5

    def _frames(self) -> range:
        return range(self.domain[2])

    def _forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.transform(x[:, :, frame], frame) for frame in self._frames()], dim=2)

    def _adjoint(self, y: Tensor) -> Tensor:
        return torch.stack([self.transform_adjoint(y[:, :, frame], frame) for frame in self._frames()], dim=2)

    def transform(self, image: Tensor, frame: int) -> Tensor:
        """One frame ``(batch, coil, z, y, x)`` to ``(batch, coil, 1 or z, readout, sample)``, with any coils."""
        arrays = image.reshape(-1, *self._plan.shape)
        samples = self._plan.samples(arrays, frame % len(self._plan.points))
        return samples.mul(self._scale).view(*image.shape[:2], *self.codomain[3:])

    def transform_adjoint(self, samples: Tensor, frame: int) -> Tensor:
        """Adjoint of `transform`."""
        rows = samples.reshape(-1, self._plan.points.shape[1])
        arrays = self._plan.arrays(rows, frame % len(self._plan.points))
        return arrays.mul(self._scale).view(*samples.shape[:2], *self.domain[3:])

    def kernel(self, power: Tensor) -> Tensor:
        """Transfer functions of ``A^H diag(power) A`` for real ``(time, readout, sample)``; see `toeplitz_kernel`."""
        return toeplitz_kernel(self._plan.points, self._plan.shape, power.flatten(1))


class NonUniformSense(LinearOperator):
    """Image ``(batch, set, time, z, y, x)`` to samples ``(batch, coil, time, 1 or z, readout, sample)``.

    ``forward(x)[coil] = weights * fourier(sum over sets of coil_maps[set, coil] * x[set])`` with a `NonUniformFourier`.
    Frames are processed one by one and coils in groups, which changes memory, not results.

    The normal operator is a convolution by FFTs on a grid of twice the size (Toeplitz). It needs no gridding, agrees
    with ``adjoint(forward(x))`` to the accuracy of the transforms (1e-6 in single, 1e-12 in double precision), and
    keeps a real kernel of the double grid for each frame that has a trajectory or weights of its own.

    Parameters
    ----------
    coil_maps
        Complex ``(batch, set, coil, 1, z, y, x)``; time 1 or that of the data.
    trajectory
        As for `NonUniformFourier`.
    weights
        Real ``(time, readout, sample)``, time 1 or that of the data; as in `Sense` they act as ``diag(weights)`` in
        `forward` and in `adjoint`. Density compensation is therefore their square.
    time
        Frames; needed where neither trajectory, weights nor maps show them.
    coil_batch
        Coils processed together; all by default.
    toeplitz
        False: the normal operator is ``adjoint(forward(x))``, slower, without the kernel.

    Examples
    --------
    Gridding, that is, the density-compensated adjoint::

        density = density_compensation(trajectory, matrix).weights      # melcore.preprocess.density
        operator = NonUniformSense(coil_maps, trajectory, weights=density.sqrt())
        image = operator.adjoint(density.sqrt()[:, None] * samples)
    """

    coil_maps: Tensor
    weights: Tensor
    _kernel: Tensor | None

    def __init__(
        self,
        coil_maps: Tensor,
        trajectory: Tensor,
        *,
        weights: Tensor | None = None,
        time: int | None = None,
        coil_batch: int | None = None,
        toeplitz: bool = True,
    ) -> None:
        layout.check_axes(tuple(coil_maps.shape), layout.COIL_MAPS_AXES, "coil maps")
        batch, sets, coils, map_time, *matrix = coil_maps.shape
        if weights is None:
            weights = torch.ones(1, *trajectory.shape[1:3])
        frames = time or max(trajectory.shape[0], weights.shape[0], map_time)
        if map_time not in (1, frames) or tuple(weights.shape) not in [
            (t, *trajectory.shape[1:3]) for t in (1, frames)
        ]:
            raise ShapeError(
                f"coil maps {tuple(coil_maps.shape)}, trajectory {tuple(trajectory.shape)} and weights "
                f"{tuple(weights.shape)} do not fit: with {frames} frames the weights must be (1 or {frames}, "
                f"{', '.join(map(str, trajectory.shape[1:3]))})."
            )
        fourier = NonUniformFourier((batch, coils, frames, *matrix), trajectory)
        super().__init__((batch, sets, frames, *matrix), fourier.codomain)
        self.fourier, self.toeplitz, self.coil_batch = fourier, toeplitz, coil_batch or coils
        self.register_buffer("coil_maps", coil_maps, persistent=False)
        self.register_buffer("weights", weights.to(coil_maps.device, coil_maps.dtype.to_real()), persistent=False)
        self.register_buffer("_kernel", None, persistent=False)

    def _groups(self, size: int) -> list[slice]:
        return [slice(start, start + size) for start in range(0, self.codomain[1], size)]

    def _maps(self, group: slice, frame: int) -> Tensor:
        """Maps ``(batch, set, coil, z, y, x)`` of a group of coils in a frame."""
        return self.coil_maps[:, :, group, frame % self.coil_maps.shape[3]]

    def _forward(self, x: Tensor) -> Tensor:
        y = x.new_empty(self.codomain)
        for frame in range(self.domain[2]):
            weights = self.weights[frame % len(self.weights)]
            for group in self._groups(self.coil_batch):
                coil_images = expand_coils(x[:, :, frame], self._maps(group, frame))
                y[:, group, frame] = weights * self.fourier.transform(coil_images, frame)
        return y

    def _adjoint(self, y: Tensor) -> Tensor:
        x = y.new_zeros(self.domain)
        for frame in range(self.domain[2]):
            weights = self.weights[frame % len(self.weights)]
            for group in self._groups(self.coil_batch):
                coil_images = self.fourier.transform_adjoint(weights * y[:, group, frame], frame)
                x[:, :, frame] += combine_coils(coil_images, self._maps(group, frame))
        return x

    def _normal(self, x: Tensor) -> Tensor:
        if not self.toeplitz:
            return super()._normal(x)
        if self._kernel is None:
            self._kernel = self.fourier.kernel(self.weights.square())
        image = x.new_zeros(self.domain)
        padded = math.prod(self._kernel.shape[1:]) * x[:, 0, 0].numel() // math.prod(self.fourier._plan.shape)
        size = min(self.coil_batch, max(1, _PADDED // padded))
        for frame in range(self.domain[2]):
            for group in self._groups(size):
                maps = self._maps(group, frame)
                coil_images = apply_toeplitz(
                    expand_coils(x[:, :, frame], maps), self._kernel[frame % len(self._kernel)]
                )
                image[:, :, frame] += combine_coils(coil_images, maps)
        return image
