"""How an axis continues beyond its two ends, as lists of indices; and copies along one axis that follow such lists."""

from collections.abc import Sequence

from torch import Tensor

from melcore.errors import ConfigError

ZERO = -1  #: stands for a sample that is zero


def continued(mode: str, size: int, before: int, after: int) -> list[int]:
    """Where the samples ``-before .. size + after`` of an axis of `size` samples come from."""
    if mode == "zeros":
        return [index if 0 <= index < size else ZERO for index in range(-before, size + after)]
    if mode == "replicate":
        return [min(max(index, 0), size - 1) for index in range(-before, size + after)]
    if mode == "circular":
        return [index % size for index in range(-before, size + after)]
    if max(before, after) >= size:
        raise ConfigError(
            f"reflect padding by {max(before, after)} needs more than {max(before, after)} samples, "
            f"but an axis has {size}."
        )
    last = size - 1
    return [last - abs(last - abs(index)) for index in range(-before, size + after)]


def runs(index: Sequence[int]) -> list[tuple[int, int, int]]:
    """Cut a list of indices into stretches of neighbours: (position in the list, first index, length)."""
    found: list[tuple[int, int, int]] = []
    for position, source in enumerate(index):
        if source == ZERO:
            continue
        if found:
            start, first, length = found[-1]
            if start + length == position and first + length == source:
                found[-1] = (start, first, length + 1)
                continue
        found.append((position, source, 1))
    return found


def gather(source: Tensor, dim: int, index: Sequence[int]) -> Tensor:
    """``source[index]`` along `dim`, zero where the index is `ZERO`; keeps the order of the axes in memory."""
    shape = list(source.shape)
    shape[dim] = len(index)
    order = sorted(range(source.ndim), key=lambda axis: source.stride(axis), reverse=True)
    storage = source.new_zeros([shape[axis] for axis in order])
    result = storage.permute([order.index(axis) for axis in range(source.ndim)])
    for position, first, length in runs(index):
        result.narrow(dim, position, length).copy_(source.narrow(dim, first, length))
    return result


def fold(target: Tensor, addend: Tensor, dim: int, index: Sequence[int]) -> None:
    """Adjoint of `gather`: add every sample to where it came from. Always in the same order, so reruns agree."""
    for position, first, length in runs(index):
        target.narrow(dim, first, length).add_(addend.narrow(dim, position, length))
