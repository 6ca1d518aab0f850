"""A window of consecutive planes of a signal, in memory that is allocated once."""

import torch
from torch import Tensor

from melcore.memory.streaming.faces import ZERO, continued


class Ring:
    """Planes ``[low, high)`` of features ``(n, channel, plane, ...)``.

    Parameters
    ----------
    memory
        For as many planes as are held at most, filled with zeros; see `Arrangement.allocate`.
    domain
        First and last plane of the signal; those beyond it are written by the ring itself.
    pad
        How many planes beyond either end are kept.
    mode
        What they contain: zeros, or copies of planes inside.
    """

    def __init__(self, memory: Tensor, domain: tuple[int, int], pad: int, mode: str) -> None:
        self._planes = memory
        self._domain, self._pad, self._mode = domain, pad, mode
        self._base = self.low = domain[0] - pad
        self.high = domain[0]
        self._begun = mode == "zeros"  # the memory begins as zeros

    def push(self, count: int) -> Tensor:
        """Memory for the next `count` planes, to be written before anything is read."""
        return self._reserve(count)

    def written(self) -> None:
        """Continue the signal beyond its ends, as far as its planes are there; call after writing."""
        start, end = self._domain
        if not self._begun and (self.high == end or self.high - start > self._pad):
            self._continue(range(start - self._pad, start))
            self._begun = True
        if self.high == end and self._pad:
            self._reserve(self._pad)
            self._continue(range(end, end + self._pad))

    def view(self, start: int, stop: int) -> Tensor:
        """The planes ``[start, stop)``, in place."""
        return self._planes.narrow(2, start - self._base, stop - start)

    def drop(self, start: int) -> None:
        """Forget the planes before `start`."""
        self.low = max(self.low, start)

    def _reserve(self, count: int) -> Tensor:
        if self.high + count - self._base > self._planes.shape[2]:
            self._compact()
        start = self.high
        self.high += count
        return self.view(start, self.high)

    def _compact(self) -> None:
        """Move the planes that are held to the beginning of the memory, in pieces that do not overlap."""
        shift, held = self.low - self._base, self.high - self.low
        for start in range(0, held, max(shift, 1)):
            count = min(shift, held - start)
            self._planes.narrow(2, start, count).copy_(self._planes.narrow(2, start + shift, count))
        self._base = self.low

    def _continue(self, planes: range) -> None:
        start, end = self._domain
        sources = continued(self._mode, end - start, self._pad, self._pad)
        for plane in planes:
            target, source = self.view(plane, plane + 1), sources[plane - start + self._pad]
            if source == ZERO:
                target.zero_()
            else:
                target.copy_(self.view(start + source, start + source + 1))


class Whole(Ring):
    """A signal of which every plane is kept, from the forward to the backward.

    Parameters
    ----------
    planes
        What an earlier sweep kept; then nothing is written any more.
    """

    def __init__(self, planes: Tensor, domain: tuple[int, int], pad: int, dtype: torch.dtype) -> None:
        self._planes, self._dtype = planes, dtype
        self._base = domain[0] - pad

    def view(self, start: int, stop: int) -> Tensor:
        """The planes ``[start, stop)``, in the precision of the computation."""
        return super().view(start, stop).to(self._dtype)

    def drop(self, start: int) -> None:
        """Nothing is forgotten."""
