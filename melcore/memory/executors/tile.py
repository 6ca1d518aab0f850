"""The regulariser box by box, each with the halo that its receptive field asks for.

Works for any regulariser that declares its halo, however it computes. Boxes at the volume's faces end there, so that
the network continues the volume as it always does; boxes elsewhere are cut out with their halo and cropped. Along an
axis that continues circularly the halo wraps around.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor, nn

from melcore.memory.noise import NoiseLike, draws_anew, noise_of
from melcore.memory.protocols import Gradients
from melcore.memory.streaming.faces import fold, gather

_AXES = (3, 4, 5)


def why_not(regulariser: nn.Module) -> str | None:
    """Why a regulariser cannot be computed in boxes, or None if it can."""
    if getattr(regulariser, "halo", None) is None:
        return f"{type(regulariser).__name__} declares no halo: every output sample may depend on every input sample"
    if draws_anew(regulariser):
        return f"{type(regulariser).__name__} has dropout of its own, which would be drawn anew for every box"
    return None


@dataclass(frozen=True)
class _Piece:
    """One axis of a box: which samples it reads, and which of them it is responsible for."""

    index: list[int]
    start: int
    stop: int
    offset: int


class Tile:
    """Boxes of `chunk` samples along each of (z, y, x)."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        result, noise = torch.empty_like(x), noise_of(regulariser, x)
        for box in self._boxes(regulariser, x):
            _region(result, box).copy_(_inner(regulariser(_cut(x, box), *_noise(noise, box)), box))
        return result, ()

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],  # noqa: ARG002
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        result, noise = torch.zeros_like(x), noise_of(regulariser, x)
        sums: list[Tensor | None] = [None] * len(parameters)
        for box in self._boxes(regulariser, x):
            with torch.enable_grad():
                leaf = _cut(x, box).requires_grad_()
                inner = _inner(regulariser(leaf, *_noise(noise, box)), box)
            first, *others = torch.autograd.grad(inner, [leaf, *parameters], _region(gradient, box), allow_unused=True)
            del inner
            for index, value in enumerate(others):
                if value is not None:
                    total = sums[index]
                    sums[index] = value if total is None else total + value
            _add(result, first, box)
        return result, sums

    def _boxes(self, regulariser: nn.Module, x: Tensor) -> Iterator[tuple[_Piece, ...]]:
        halo: tuple[int, int, int, int] = regulariser.halo  # type: ignore[assignment]
        axes = [self._pieces(x.shape[axis], halo[axis - 2], _mode(regulariser, axis - 2)) for axis in _AXES]
        yield from product(*axes)

    def _pieces(self, size: int, halo: int, mode: str) -> list[_Piece]:
        circular = mode == "circular"
        if mode == "mixed" or (circular and self.chunk + 2 * halo >= size) or self.chunk >= size:
            return [_Piece(list(range(size)), 0, size, 0)]
        pieces = []
        for start in range(0, size, self.chunk):
            stop = min(start + self.chunk, size)
            low, high = start - halo, stop + halo
            if not circular:
                low, high = max(low, 0), min(high, size)
            pieces.append(_Piece([i % size for i in range(low, high)], start, stop, start - low))
        return pieces


def _mode(regulariser: nn.Module, axis: int) -> str:
    """How the layers continue an axis (z 1, y 2, x 3): circular, mixed (then the axis is not cut), or anything else."""
    modes: set[str] = set()
    for module in regulariser.modules():
        if isinstance(module, nn.modules.conv._ConvNd):
            modes.add(module.padding_mode)
        elif hasattr(module, "padding") and hasattr(module, "halo") and module.halo[axis]:  # type: ignore[index]
            modes.add(str(module.padding))
    if modes == {"circular"}:
        return "circular"
    return "mixed" if "circular" in modes else "other"


def _cut(x: Tensor, box: tuple[_Piece, ...]) -> Tensor:
    part = x
    for axis, piece in zip(_AXES, box, strict=True):
        part = gather(part, axis, piece.index) if len(piece.index) < x.shape[axis] or piece.index[0] else part
    return part.detach().clone() if part is x else part.detach()


def _noise(noise: NoiseLike | None, box: tuple[_Piece, ...]) -> tuple[NoiseLike, ...]:
    """The noise of a box, wherever in the volume its samples come from."""
    if noise is None:
        return ()
    for axis, piece in zip("zyx", box, strict=True):
        noise = noise.part(axis, piece.index)
    return (noise,)


def _region(x: Tensor, box: tuple[_Piece, ...]) -> Tensor:
    for axis, piece in zip(_AXES, box, strict=True):
        x = x.narrow(axis, piece.start, piece.stop - piece.start)
    return x


def _inner(output: Tensor, box: tuple[_Piece, ...]) -> Tensor:
    for axis, piece in zip(_AXES, box, strict=True):
        output = output.narrow(axis, piece.offset, piece.stop - piece.start)
    return output


def _add(result: Tensor, gradient: Tensor, box: tuple[_Piece, ...]) -> None:
    """Adjoint of `_cut`, added to `result`."""
    z, y, x = box
    if all(piece.index == list(range(piece.index[0], piece.index[0] + len(piece.index))) for piece in box):
        for axis, piece in zip(_AXES, box, strict=True):
            result = result.narrow(axis, piece.index[0], len(piece.index))
        result.add_(gradient)
        return
    for axis, piece in ((5, x), (4, y)):
        wide = list(gradient.shape)
        wide[axis] = result.shape[axis]
        folded = gradient.new_zeros(wide)
        fold(folded, gradient, axis, piece.index)
        gradient = folded
    fold(result, gradient, 3, z.index)
