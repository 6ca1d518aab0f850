"""What this machine has left, and where a server keeps its exams on it."""

import contextlib
import ctypes
import gc
import os
from pathlib import Path


def available_memory(device: str = "cpu") -> int | None:
    """Bytes that can be allocated on a device now; None where the system does not say.

    A container's own limit, where it has one, lies below what the machine has.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    return min([free, *_container_room()])


def _container_room() -> list[int]:
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text(encoding="ascii").strip() for name in ("memory.max", "memory.current"))
    except OSError:
        return []
    return [max(0, int(limit) - int(used))] if limit.isdigit() else []


def give_back_memory() -> None:
    """Return memory that is not used any more to the system.

    Left alone, Python looks rarely for what only refers to itself, and glibc keeps some of every thread's memory.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no such function
        ctypes.CDLL(None).malloc_trim(0)


def default_spool() -> Path:
    """Folder of a server's spool: ``MEL_SPOOL``, else ``mel/spool`` where programs of this user keep their state."""
    named = os.environ.get("MEL_SPOOL")
    if named:
        return Path(named)
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "mel" / "spool"
