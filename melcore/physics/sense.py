"""Cartesian parallel imaging: coil maps, Fourier transform, sampling mask.

Pruessmann et al., SENSE: sensitivity encoding for fast MRI, Magn Reson Med 42:952 (1999); with several map sets, soft
SENSE: Uecker et al., ESPIRiT, Magn Reson Med 71:990 (2014).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from melcore import layout
from melcore.errors import ShapeError
from melcore.physics.fourier import centring_phase
from melcore.physics.operator import LinearOperator

_SPACE = (-3, -2, -1)
_SLAB = 1 << 22  # samples of the coil images of a slab: large enough for a device to be busy, small beside a volume


def expand_coils(x: Tensor, maps: Tensor) -> Tensor:
    """Images ``(batch, set, ...)`` to those that coils see, ``(batch, coil, ...)``, by ``(batch, set, coil, ...)``."""
    coil_images = maps[:, 0] * x[:, :1]
    for index in range(1, maps.shape[1]):
        coil_images = torch.addcmul(coil_images, maps[:, index], x[:, index : index + 1])
    return coil_images


def combine_coils(coil_images: Tensor, maps: Tensor) -> Tensor:
    """Adjoint of `expand_coils`."""
    return torch.stack([(maps[:, index].conj() * coil_images).sum(1) for index in range(maps.shape[1])], dim=1)


class Sense(LinearOperator):
    """Image ``(batch, set, time, z, y, x)`` to k-space ``(batch, coil, time, z, y, x)``.

    ``forward(x)[coil] = mask * fft(sum over sets of coil_maps[set, coil] * x[set])``. A matrix of one sample along z,
    or along z and y, makes it the 2D or 1D operator. Coils are processed in groups, so that no more than one group
    exists in image space at a time, and frames likewise; the group sizes change memory, not results. Where the mask
    does not depend on the readout position, the normal operator decouples along the readout and works in slabs.

    Parameters
    ----------
    coil_maps
        Complex ``(batch, set, coil, 1, z, y, x)``; time 1 or that of the data.
    mask
        Sampling mask or real weights in [0, 1], broadcastable to ``(batch, 1, time, z, y, x)``. Data outside the mask
        are ignored; weights act as ``diag(weights)`` in `forward` and in `adjoint`.
    time
        Frames; needed where neither the mask nor the maps show them.
    coil_batch
        Coils processed together; all by default.
    time_batch
        Frames processed together; all by default.
    """

    coil_maps: Tensor
    mask: Tensor

    def __init__(
        self,
        coil_maps: Tensor,
        mask: Tensor,
        *,
        time: int | None = None,
        coil_batch: int | None = None,
        time_batch: int | None = None,
    ) -> None:
        layout.check_axes(tuple(coil_maps.shape), layout.COIL_MAPS_AXES, "coil maps")
        layout.check_axes(tuple(mask.shape), layout.K_SPACE_AXES, "the sampling mask")
        batch, sets, coils, map_time, *matrix = coil_maps.shape
        frames = time or max(mask.shape[2], map_time)
        expected = (batch, 1, frames, *matrix)
        if any(m not in (1, e) for m, e in zip(mask.shape, expected, strict=True)) or map_time not in (1, frames):
            raise ShapeError(
                f"the sampling mask {tuple(mask.shape)} and the coil maps {tuple(coil_maps.shape)} do not fit: "
                f"with these maps and {frames} frames the mask must broadcast to {expected}."
            )
        super().__init__((batch, sets, frames, *matrix), (batch, coils, frames, *matrix))
        self.coil_batch, self.time_batch = coil_batch or coils, time_batch or frames
        # The phase ramps that centre the Fourier transform are folded in: the inner ones live in the maps, the outer
        # ones in `_outer`; in the normal operator the outer ones cancel, which leaves plain transforms.
        for ramp in centring_phase(coil_maps.shape, _SPACE, like=coil_maps):
            coil_maps = coil_maps * ramp
        self._axes = [axis for axis in _SPACE if matrix[axis] > 1]
        self.register_buffer("coil_maps", coil_maps, persistent=False)
        taken = 0.0 if isinstance(mask, torch._subclasses.FakeTensor) else float((mask != 0).float().mean())
        self._acceleration = 1 / taken if taken > 0 else 1.0
        self.register_buffer("mask", _without_readout(mask).to(coil_maps.real.dtype), persistent=False)

    @property
    def acceleration(self) -> float:
        """Samples of the full grid for each sample that is taken."""
        return self._acceleration

    def _coils(self) -> list[slice]:
        return _groups(self.codomain[1], self.coil_batch)

    def _frames(self) -> list[slice]:
        return _groups(self.codomain[2], self.time_batch)

    def _of(self, coils: slice, frames: slice) -> tuple[Tensor, Tensor]:
        """Maps and mask of a group of coils and frames."""
        maps = self.coil_maps[:, :, coils]
        maps = maps[:, :, :, frames] if maps.shape[3] > 1 else maps
        return maps, self.mask[:, :, frames] if self.mask.shape[2] > 1 else self.mask

    def _encode(self, x: Tensor, maps: Tensor, axes: Sequence[int]) -> Tensor:
        """Coil images of a group of coils, transformed; still without the outer phase ramps and the mask."""
        coil_images = expand_coils(x, maps)
        return torch.fft.fftn(coil_images, dim=axes, norm="ortho") if axes else coil_images

    def _combine(self, k_space: Tensor, maps: Tensor, axes: Sequence[int]) -> Tensor:
        """Adjoint of `_encode`."""
        images = torch.fft.ifftn(k_space, dim=axes, norm="ortho") if axes else k_space
        return combine_coils(images, maps)

    def _outer(self, k_space: Tensor, mask: Tensor, conjugate: bool) -> Tensor:
        k_space = k_space * mask
        for ramp in centring_phase(k_space.shape, _SPACE, like=k_space, conjugate=conjugate):
            k_space = k_space.mul_(ramp)
        return k_space

    def _forward(self, x: Tensor) -> Tensor:
        groups = []
        for coils in self._coils():
            parts = []
            for frames in self._frames():
                maps, mask = self._of(coils, frames)
                parts.append(self._outer(self._encode(x[:, :, frames], maps, self._axes), mask, conjugate=False))
            groups.append(torch.cat(parts, dim=2))
        return torch.cat(groups, dim=1)

    def _adjoint(self, y: Tensor) -> Tensor:
        device = self.coil_maps.device
        image = y.new_zeros(self.domain, device=device)
        # k-space may stay on the host: then its coils come over one by one.
        for coils in self._coils() if y.device == device else _groups(self.codomain[1], 1):
            for frames in self._frames():
                maps, mask = self._of(coils, frames)
                k_space = self._outer(y[:, coils, frames].to(device), mask, conjugate=True)
                image[:, :, frames] += self._combine(k_space, maps, self._axes)
        return image

    def _normal(self, x: Tensor) -> Tensor:
        image = x.new_zeros(self.domain)
        axes, slabs = self._axes, [slice(None)]
        if self.mask.shape[-1] == 1:
            # The readout is fully sampled: its transform and the inverse cancel, and what remains acts on every
            # readout position by itself. So the volume is treated in slabs, and the coil images never exist as a whole.
            axes = [axis for axis in axes if axis != -1]
            plane = self.coil_batch * x[:, 0, : self.time_batch, ..., 0].numel()
            width = max(1, _SLAB // plane)
            slabs = [slice(start, start + width) for start in range(0, x.shape[-1], width)]
        for coils in self._coils():
            for frames in self._frames():
                maps, mask = self._of(coils, frames)
                weight = mask.square()
                for slab in slabs:
                    k_space = self._encode(x[:, :, frames, ..., slab], maps[..., slab], axes).mul_(weight)
                    image[:, :, frames, ..., slab] += self._combine(k_space, maps[..., slab], axes)
        return image


def _groups(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _without_readout(mask: Tensor) -> Tensor:
    """The mask with one sample along a readout on which it does not depend."""
    if mask.shape[-1] == 1 or isinstance(mask, torch._subclasses.FakeTensor):
        return mask
    return mask[..., :1] if bool((mask == mask[..., :1]).all()) else mask
