"""A meter for memory and work: what a computation would hold and do, on tensors that hold nothing.

On fake tensors a volume of any size is measured in seconds on any machine; on real ones the same meter confirms it.
"""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_FOURIER = {torch.ops.aten._fft_c2c, torch.ops.aten._fft_r2c, torch.ops.aten._fft_c2r}


@dataclass
class Meter(TorchDispatchMode):
    """Counts live bytes of storages, and work, while it is entered.

    Attributes
    ----------
    device_type
        Only storages on devices of this type count.
    live, peak
        Bytes now, and at most since `restart`, of what was allocated under the meter or given to `hold`.
    convolution
        Floating-point operations of convolutions and matrix products.
    fourier
        Those of Fourier transforms, ``5 n log2 n`` for each.
    """

    device_type: str = "cpu"
    live: int = 0
    peak: int = 0
    convolution: int = 0
    fourier: int = 0
    _seen: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def restart(self) -> None:
        """Forget the peak and the work so far; what is live stays."""
        self.peak, self.convolution, self.fourier = self.live, 0, 0

    def hold(self, *tensors: Tensor) -> None:
        """Count tensors that were there before the meter."""
        for tensor in tensors:
            self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation, and note what it allocated."""
        if func is torch.ops.aten._local_scalar_dense.default and _is_fake(args[0]):
            # A loop that asks whether to go on goes on: predictions are for the longest run.
            return True if args[0].dtype == torch.bool else 1
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._count(leaf, new=False)
        result = func(*args, **(kwargs or {}))
        packet = func.overloadpacket
        if packet in flop_registry:
            self.convolution += int(flop_registry[packet](*args, **(kwargs or {}), out_val=result))
        elif packet in _FOURIER:
            self.fourier += _fourier_work(args[0], args[1])
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result

    def _count(self, tensor: Tensor, *, new: bool = True) -> None:
        """Note a storage; one that was there before the meter has no size for it."""
        if tensor.device.type != self.device_type:
            return
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._seen:
            return
        size = storage.nbytes() if new else 0
        self._seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)


def _is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)


def _fourier_work(x: Tensor, axes: list[int]) -> int:
    size = 1
    for axis in axes:
        size *= x.shape[axis]
    return int(5 * x.numel() * max(size - 1, 0).bit_length())


@contextmanager
def fake_tensors() -> Iterator[FakeTensorMode]:
    """Within this context tensors have shapes, types and devices, but no memory."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode
