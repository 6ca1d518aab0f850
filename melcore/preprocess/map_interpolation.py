"""Coil maps from a coarse grid to the image's.

Sensitivities are smooth, so that ESPIRiT's costly eigenvalue problems need not be solved for every voxel. Their
solutions cannot be interpolated like a picture, though: the eigenvectors of each voxel have a phase of their own (and
where two eigenvalues come close, a unitary mixture of their own). So neighbours are first turned onto each other, and
the phase is fixed anew at the end by the rule that also fixed it on the coarse grid.
"""

import functools
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from melcore.errors import ShapeError

_TINY = 1e-20


def interpolated_planes(
    maps: Tensor, eigenvalues: Tensor, shape: Sequence[int], reference: Tensor, threshold: float
) -> Iterator[tuple[Tensor, Tensor]]:
    """Interpolate map sets, and the eigenvalues behind them, onto a grid of the same field of view.

    Cubic along each axis, from aligned neighbours; the field of view is periodic, as ESPIRiT's is. The result is
    orthonormal over the sets in every voxel, its phase such that ``reference^H maps`` is real and positive, and zero
    where the eigenvalue is not above `threshold`. It comes plane by plane along z, so that little more than four planes
    exist at a time.

    Parameters
    ----------
    maps
        Complex ``(set, coil, z, y, x)``, orthonormal, not cropped. Three sets and more take several times as long.
    eigenvalues
        Real ``(set, z, y, x)`` on the same grid.
    shape
        The new grid ``(z, y, x)``.
    reference
        Complex ``(coil,)``: the virtual coil in which maps are real and positive.
    threshold
        Between 0 and 1.

    Yields
    ------
    maps, eigenvalues
        Of one plane: ``(set, coil, y, x)`` and ``(set, y, x)``.

    Raises
    ------
    ShapeError
        If the arguments do not fit together.
    """
    sets, coils, *grid = maps.shape
    if eigenvalues.shape != (sets, *grid) or reference.shape != (coils,) or len(shape) != 3:
        raise ShapeError(
            f"maps {tuple(maps.shape)} must be (set, coil, z, y, x), the eigenvalues {tuple(eigenvalues.shape)} of "
            f"their grid, and the reference {tuple(reference.shape)} of their coils."
        )
    coarse = maps.shape[-3]

    @functools.lru_cache(maxsize=4)
    def plane(z: int) -> tuple[Tensor, Tensor]:
        """A plane of the coarse grid, fine within itself."""
        return _along(*_along(maps[:, :, z], eigenvalues[:, z], -1, shape[2]), -2, shape[1])

    for position in grid_positions(shape[0], coarse).tolist():
        cell = math.floor(position)
        here, values = plane(cell % coarse)
        if position != cell:
            nodes = [plane((cell + step) % coarse) for step in (-1, 0, 1, 2)]
            turned = [_turned(*node, here) for node in nodes]
            weights = _weights(position - cell)
            here, values = _eigenvectors(*(_sum(weights, parts) for parts in zip(*turned, strict=True)))
        phase = torch.tensordot(here, reference.conj(), dims=([1], [0]))
        phase = phase.conj() / phase.abs().clamp(min=_TINY) * (values > threshold)
        yield here * phase.unsqueeze(1), values


def grid_positions(size: int, coarse: int) -> Tensor:
    """Where the samples of a grid lie on a coarser (or finer) one, whose centre ``coarse // 2`` is theirs."""
    return (torch.arange(size, dtype=torch.float64) - size // 2) * (coarse / size) + coarse // 2


def _along(maps: Tensor, eigenvalues: Tensor, axis: int, size: int) -> tuple[Tensor, Tensor]:
    coarse = maps.shape[axis]
    positions = grid_positions(size, coarse)
    cells = positions.floor().long()
    if bool((positions == cells).all()):
        if size == coarse:
            return maps, eigenvalues
        return maps.index_select(axis, cells % coarse), eigenvalues.index_select(axis, cells % coarse)
    fine_maps, fine_eigenvalues = (
        values.new_empty([*values.shape[:axis], size, *values.shape[values.ndim + axis + 1 :]])
        for values in (maps, eigenvalues)
    )
    for cell in cells.unique().tolist():
        nodes = [(cell + step) % coarse for step in (-1, 0, 1, 2)]
        here = maps.select(axis, nodes[1])
        turned = [_turned(maps.select(axis, node), eigenvalues.select(axis, node), here) for node in nodes]
        for index in torch.nonzero(cells == cell).flatten().tolist():
            weights = _weights(float(positions[index] - cell))
            found = _eigenvectors(*(_sum(weights, values) for values in zip(*turned, strict=True)))
            for result, values in zip((fine_maps, fine_eigenvalues), found, strict=True):
                result.select(axis, index).copy_(values)
    return fine_maps, fine_eigenvalues


def _weights(t: float) -> tuple[float, float, float, float]:
    """Lagrange's cubic through the samples at -1, 0, 1 and 2."""
    return (
        -t * (t - 1) * (t - 2) / 6,
        (t + 1) * (t - 1) * (t - 2) / 2,
        -(t + 1) * t * (t - 2) / 2,
        (t + 1) * t * (t - 1) / 6,
    )


def _sum(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    result = values[0] * weights[0]
    for weight, value in zip(weights[1:], values[1:], strict=True):
        result.add_(value, alpha=weight)
    return result


def _turned(maps: Tensor, eigenvalues: Tensor, onto: Tensor) -> tuple[Tensor, Tensor]:
    """Mix the sets ``(set, coil, ...)`` unitarily so that they come as close to those of `onto` as they can.

    The second result is the matrix ``(set, set, ...)`` of which the sets are no longer the eigenvectors; of one set,
    its eigenvalue ``(set, ...)``.
    """
    if maps.data_ptr() == onto.data_ptr() and len(maps) == 1:
        return maps, eigenvalues
    conjugate = maps.conj()
    overlap = torch.stack([torch.stack([(one * other).sum(0) for other in onto]) for one in conjugate])
    if len(maps) == 1:
        return maps * (overlap[0] / overlap[0].abs().clamp(min=_TINY)), eigenvalues
    unitary = _unitary_factor(overlap)
    weighted = unitary.conj() * eigenvalues.unsqueeze(1)
    matrix = torch.stack([(column.unsqueeze(1) * unitary).sum(0) for column in weighted.unbind(1)])
    return _mixed(maps, unitary), matrix


def _mixed(maps: Tensor, unitary: Tensor) -> Tensor:
    """Sets ``sum over a of unitary[a, b] maps[a]``; in every voxel by itself, where a matrix product would be slow."""
    mixed = torch.zeros_like(maps)
    for one, row in zip(maps, unitary, strict=True):
        for target, factor in zip(mixed, row, strict=True):
            target.addcmul_(one, factor)
    return mixed


def _unitary_factor(matrix: Tensor) -> Tensor:
    """Of the polar decomposition of each matrix ``(set, set, ...)``."""
    if len(matrix) > 2:
        left, _, right = torch.linalg.svd(matrix.movedim((0, 1), (-2, -1)), full_matrices=False)
        return (left @ right).movedim((-2, -1), (0, 1))
    # Of a 2 x 2 matrix M it is M + e^(i arg det M) adj(M)^H, normalised.
    (a, b), (c, d) = matrix
    phase = a * d - b * c
    phase = phase / phase.abs().clamp(min=_TINY)
    first, second = a + phase * d.conj(), b - phase * c.conj()
    third, fourth = c - phase * b.conj(), d + phase * a.conj()
    norm = (first.abs().square() + second.abs().square()).sqrt().clamp(min=_TINY)
    return torch.stack([first, second, third, fourth]).div_(norm).unflatten(0, (2, 2))


def _eigenvectors(maps: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal sets that diagonalise the interpolated matrix, and its eigenvalues, the largest first."""
    sets: list[Tensor] = []
    for one in maps:
        for other in sets:
            one = one - other * (other.conj() * one).sum(0)
        sets.append(one / torch.linalg.vector_norm(one, dim=0).clamp(min=_TINY))
    if len(sets) == 1:
        return sets[0].unsqueeze(0), matrix
    if len(sets) > 2:
        eigenvalues, vectors = torch.linalg.eigh(matrix.movedim((0, 1), (-2, -1)))
        rotation = vectors.flip(-1).movedim((-2, -1), (0, 1))
        return _mixed(torch.stack(sets), rotation), eigenvalues.flip(-1).movedim(-1, 0)
    mean, half = (matrix[0, 0] + matrix[1, 1]).real / 2, (matrix[0, 0] - matrix[1, 1]).real / 2
    coupling = matrix[0, 1]
    radius = (half.square() + coupling.abs().square()).sqrt()
    cosine = ((1 + half / radius.clamp(min=_TINY)) / 2).clamp(0, 1).sqrt()
    sine = (1 - cosine.square()).sqrt() * coupling.conj() / coupling.abs().clamp(min=_TINY)
    rotated = torch.stack([cosine * sets[0] + sine * sets[1], cosine * sets[1] - sine.conj() * sets[0]])
    return rotated, torch.stack([mean + radius, mean - radius])
