"""Dropout whose noise is a function of the place: the same wherever, and in whatever order, a volume is computed.

Which samples are dropped follows from a seed, the number of the layer, and the coordinates (batch, time, channel, z, y,
x) of the sample alone; there is no state that advances. A box, a plane or a frame computed by itself, or computed
again, so meets the noise that it meets in the whole volume, and no mask is kept.

Counter-based random numbers: Salmon et al., Parallel random numbers: as easy as 1, 2, 3, SC 2011. The hash is the
finaliser of Appleby's MurmurHash3, where each input bit changes each output bit with a probability of nearly one half.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from melcore.errors import ConfigError

#: Elements that are hashed at a time, unless that makes more than 64 pieces: few enough that the hashes stay in a CPU's
#: cache and are small beside features, and on accelerators enough that launching a kernel takes little of the time.
_PIECE, _PIECE_ELSEWHERE = 1 << 18, 1 << 22


def check_rate(rate: float) -> float:
    """A rate of dropout, at least 0 and below 1."""
    if isinstance(rate, bool) or not isinstance(rate, int | float) or not 0 <= rate < 1:
        raise ConfigError(f"dropout is the part of samples that is dropped, at least 0 and below 1, but is {rate!r}.")
    return float(rate)


@dataclass(frozen=True)
class Noise:
    """Which samples of the features of a layer are dropped in one evaluation of a regulariser.

    Attributes
    ----------
    rate
        Part of the samples that is dropped; the others are scaled by ``1 / (1 - rate)``, so that the mean stays
        (Srivastava et al., Dropout, J Mach Learn Res 15:1929, 2014).
    keys
        For each axis, by its letter in ``b t c z y x``, a hash (int32) of each of its positions. The sum of its six
        keys, hashed once more, tells the fate of a sample.
    """

    rate: float
    keys: Mapping[str, Tensor]

    @classmethod
    def draw(cls, rate: float, sizes: Mapping[str, int], device: torch.device) -> "Noise":
        """New noise for features of such sizes; draws one number from torch's global generator on the CPU."""
        # The seed stays a tensor: on fake tensors, where memory plans are made, it has no value.
        seed = torch.randint(-(2**31), 2**31 - 1, (), dtype=torch.int32)
        keys = {}
        for number, (axis, size) in enumerate(sizes.items()):
            start = _hash(seed + _signed(0x9E3779B9 * (number + 1)))
            keys[axis] = _hash(torch.arange(size, dtype=torch.int32, device=device) * _signed(0x9E3779B1) + start)
        return cls(rate, keys)

    def layer(self, number: int) -> "Noise":
        """The noise of another layer."""
        batch = _hash(self.keys["b"] + _signed(0x85EBCA77 * (number + 1)))
        return replace(self, keys={**self.keys, "b": batch})

    def part(self, axis: str, index: Sequence[int]) -> "Noise":
        """The noise at some positions of an axis, in any order."""
        key = self.keys[axis]
        first, count = index[0], len(index)
        if list(index) == list(range(first, first + count)):
            chosen = key.narrow(0, first, count)
        else:
            chosen = key.index_select(0, torch.tensor(index, device=key.device))
        return replace(self, keys={**self.keys, axis: chosen})

    def drop_(self, features: Tensor, layout: Sequence[str]) -> Tensor:
        """Drop and scale samples in place, without automatic differentiation.

        Parameters
        ----------
        features
            Of any floating type.
        layout
            For each dimension the letters of the axes that it holds, the slowest first: ``("bt", "c", "z", "y", "x")``.
        """
        keys = [self._key(letters, size) for letters, size in zip(layout, features.shape, strict=True)]
        piece = _PIECE if features.device.type == "cpu" else _PIECE_ELSEWHERE
        with torch.no_grad():
            _drop(features, keys, self.rate, max(piece, features.numel() // 64))
        return features

    def drop(self, features: Tensor, layout: Sequence[str]) -> Tensor:
        """As `drop_`, for automatic differentiation: the mask is hashed again for the backward."""
        dropped: Tensor = _Drop.apply(features, self, layout)
        return dropped

    def _key(self, letters: str, size: int) -> Tensor:
        key = self.keys[letters[0]]
        for letter in letters[1:]:
            key = (key[:, None] + self.keys[letter]).flatten()
        return key[:size]  # layers may have fewer channels than the widest


class _Drop(torch.autograd.Function):
    """Linear, and its own adjoint."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, noise: Noise, layout: Sequence[str]) -> Tensor:
        ctx.noise, ctx.layout = noise, layout
        ctx.mark_dirty(features)
        return noise.drop_(features, layout)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.noise.drop(gradient.clone(), ctx.layout), None, None


def _drop(features: Tensor, keys: list[Tensor], rate: float, most: int) -> None:
    """Drop and scale in place, in pieces of `most` elements that lie together in memory."""
    dims = [dim for dim in range(features.ndim) if features.shape[dim] > 1]
    if features.numel() > most and dims:
        dim = max(dims, key=features.stride)
        size = features.shape[dim]
        step = max(1, size * most // features.numel())
        for start in range(0, size, step):
            count = min(step, size - start)
            part = [key.narrow(0, start, count) if i == dim else key for i, key in enumerate(keys)]
            _drop(features.narrow(dim, start, count), part, rate, most)
            if isinstance(features, FakeTensor):
                break  # the other pieces would take as much memory, one after the other
        return
    # The fastest axis is added last, so that only one sum is as large as the features; it is laid out as they are.
    total = torch.empty_like(features, dtype=torch.int32)
    order = sorted(range(features.ndim), key=features.stride, reverse=True)
    shaped = [keys[dim].view([-1 if i == dim else 1 for i in range(features.ndim)]) for dim in order]
    torch.add(sum(shaped[1:-1], shaped[0]), shaped[-1], out=total)
    features.masked_fill_(_hash(total) < round(rate * 2**32) - 2**31, 0).mul_(1 / (1 - rate))


def _hash(words: Tensor) -> Tensor:
    """MurmurHash3's finaliser, in place on int32, whose arithmetic wraps around; shifts are made logical by masks."""
    words ^= (words >> 16) & 0xFFFF
    words *= _signed(0x85EBCA6B)
    words ^= (words >> 13) & 0x7FFFF
    words *= _signed(0xC2B2AE35)
    words ^= (words >> 16) & 0xFFFF
    return words


def _signed(word: int) -> int:
    """The int32 of the same 32 bits."""
    return (word + 2**31) % 2**32 - 2**31
