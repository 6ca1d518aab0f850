"""Where the inputs of units wait for the backward: on the device, in pinned host memory, or nowhere.

States that are nowhere are computed again from the nearest earlier one that has a slot. Which ones get the slots
follows Griewank and Walther, Algorithm 799: Revolve, ACM Trans Math Softw 26:19 (2000).
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Advance = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@functools.lru_cache(maxsize=4096)
def _best(length: int, slots: int) -> tuple[int, int]:
    """Fewest units to be computed again to reverse a chain of `length` from its first state, and the first slot."""
    if length <= 1:
        return 0, 0
    if slots == 0:
        return length * (length - 1) // 2, 0
    options = ((at + _best(length - at, slots - 1)[0] + _best(at, slots)[0], at) for at in range(1, length))
    return min(options)


def placements(length: int, slots: int) -> list[int]:
    """Which inputs to keep on the way through `length` units, the first input (number 0) not counted."""
    found, position = [], 0
    while slots > 0 and length - position > 1:
        step = _best(length - position, slots)[1]
        if step == 0:
            break
        position += step
        slots -= 1
        found.append(position)
    return found


def recomputed(length: int, slots: int) -> int:
    """Units that the backward computes again, besides the recomputation inside each unit.

    The first sweep leaves the slots filled, so its own advance is not counted.
    """
    marks = [0, *placements(length, slots), length]
    pieces = enumerate(itertools.pairwise(marks))
    return sum(_best(stop - start, slots - index)[0] for index, (start, stop) in pieces)


class Shelf:
    """The inputs of all units of a run that are not simply saved on the device.

    Parameters
    ----------
    length
        How many units, from the first, have their states in slots.
    slots
        How many of their inputs are kept at a time, besides the first.
    """

    def __init__(self, length: int, slots: int) -> None:
        self._slots = slots
        self._wanted = {0, *placements(length, slots)}
        self._kept: dict[int, list[Tensor]] = {}
        self._advance: dict[int, Advance] = {}
        self._host: dict[int, Parked] = {}

    def remember(self, index: int, inputs: Sequence[Tensor], advance: Advance) -> None:
        """Keep the inputs of a unit if they have a slot; `advance` computes the inputs of the next one."""
        self._advance[index] = advance
        if index in self._wanted:
            self._kept[index] = [tensor.detach() for tensor in inputs]

    def recall(self, index: int) -> list[Tensor]:
        """The inputs of a unit, computed again where need be; later ones are forgotten."""
        for later in [number for number in self._kept if number > index]:
            del self._kept[later]
        start = max(number for number in self._kept if number <= index)
        state: Sequence[Tensor] = self._kept[start]
        free = self._slots - sum(number > 0 for number in self._kept)
        marks = {start + at for at in placements(index - start + 1, free)}
        for number in range(start, index):
            state = self._advance[number](state)
            if number + 1 in marks and number + 1 < index:
                self._kept[number + 1] = list(state)
        return list(state)

    def park(self, index: int, tensors: Sequence[Tensor]) -> "Parked":
        """Copy tensors to the host, while the device goes on computing."""
        self._host[index] = Parked(tensors)
        return self._host[index]

    def fetch(self, index: int) -> list[Tensor]:
        """Parked tensors, back on the device; those of the unit before begin their way too."""
        found = self._host[index].get()
        before = max((number for number in self._host if number < index), default=None)
        if before is not None:
            self._host[before].prefetch()
        return found


class Parked:
    """Tensors in pinned host memory; on a machine without an accelerator they stay where they are."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._device = tensors[0].device
        self._coming: list[Tensor] | None = None
        self._ready: Any = None
        with self._side():
            self._host = [self._to_host(tensor.detach()) for tensor in tensors]

    def _side(self) -> Any:
        """The stream for copies: it begins after what is queued now."""
        if self._device.type != "cuda" or not torch.cuda.is_available():
            return _Nothing()
        stream = _copy_stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(stream)

    def _to_host(self, tensor: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return tensor
        pinned = torch.cuda.is_available()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
        host.copy_(tensor, non_blocking=pinned)
        if pinned and self._device.type == "cuda":
            tensor.record_stream(_copy_stream(self._device))
        return host

    def prefetch(self) -> None:
        """Begin to copy to the device."""
        if self._coming is not None or self._device.type == "cpu":
            return
        with self._side():
            self._coming = [host.to(self._device, non_blocking=True) for host in self._host]
            if torch.cuda.is_available():
                self._ready = torch.cuda.Event()
                self._ready.record()

    def get(self) -> list[Tensor]:
        """The tensors on the device."""
        if self._device.type == "cpu":
            return self._host
        self.prefetch()
        coming, self._coming = self._coming or [], None
        if self._ready is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._ready)
            for tensor in coming:
                tensor.record_stream(current)
        return coming


class _Nothing:
    """A context that does nothing."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


@functools.cache
def _copy_stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)
