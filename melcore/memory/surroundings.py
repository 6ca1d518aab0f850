"""The state of torch around a computation that will be repeated: autocast and random numbers."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


class Surroundings:
    """Autocast and random state as they are now, to be restored when the computation is repeated in the backward."""

    def __init__(self, like: Tensor) -> None:
        types = dict.fromkeys(("cpu", like.device.type))
        self._autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in types if kind != "meta"
        ]
        self._cpu_state = torch.get_rng_state()
        self._device = like.device if like.device.type not in ("cpu", "meta") else None
        module = torch.get_device_module(self._device) if self._device is not None else None
        if module is None or not module.is_available():
            self._device = None
        self._device_state = module.get_rng_state(self._device) if module and self._device is not None else None

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Autocast as it was, without its cache of weights.

        A cast that was cached while nothing was differentiated would cut later gradients off, silently.
        """
        with ExitStack() as stack:
            for kind, dtype, enabled in self._autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False))
            yield

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Autocast and random state as they were; the present random state returns at the end."""
        devices = [] if self._device is None else [self._device]
        kind = "cuda" if self._device is None else self._device.type
        with torch.random.fork_rng(devices=devices, device_type=kind), self.autocast():
            torch.set_rng_state(self._cpu_state)
            if self._device is not None and self._device_state is not None:
                torch.get_device_module(self._device).set_rng_state(self._device_state, self._device)
            yield
