"""Coil sensitivities: the fields of wire loops around the object, by the law of Biot and Savart."""

import math

import numpy as np
import numpy.typing as npt
import torch
from numpy.polynomial import chebyshev
from torch import Tensor

from melcore.errors import ConfigError, ShapeError

_SEGMENTS = 32  # of a loop
_NODES = 16  # of the polynomial along each axis; the fields of currents outside the volume are analytic inside it

Floats = npt.NDArray[np.float64]


def coil_maps(shape: tuple[int, int, int], coils: int, *, seed: int) -> Tensor:
    """Sensitivities of loops placed around the volume, with random positions, sizes and tilts.

    The receive field is ``Bx - i By`` for a main field along z (Hoult, The principle of reciprocity, 2000). It is
    computed at the nodes of a Chebyshev polynomial and interpolated by it, so that any matrix is quick and smooth.

    Parameters
    ----------
    shape
        ``(z, y, x)``; one slice is ``(1, y, x)``.
    coils
        At least 1; more than 8 are placed in several rings along z.
    seed
        The same seed gives the same maps.

    Returns
    -------
    Tensor
        Complex64 ``(coil, z, y, x)`` with unit sum of squares over the coils. Their common phase makes the sensitivity
        of the first principal component real, the gauge of `melcore.data.CoilMaps`.
    """
    if coils < 1:
        raise ConfigError(f"at least 1 coil is needed, not {coils}.")
    if len(shape) != 3 or min(shape) < 1:
        raise ShapeError(f"the shape must be (z, y, x), none empty, but is {tuple(shape)}.")
    rng = np.random.default_rng(seed)
    half = np.array(shape[::-1]) / max(shape)  # half the size of the volume along x, y, z
    counts = [min(_NODES, size) if size > 1 else 1 for size in shape[::-1]]
    nodes = [chebyshev.chebpts1(count) if count > 1 else np.zeros(1) for count in counts]
    points = np.stack(np.meshgrid(*(n * h for n, h in zip(nodes, half, strict=True)), indexing="ij"), -1)
    rings = 1 if coils <= 8 and half[2] < 0.3 else max(1, math.ceil(coils / 8)) + (coils in range(6, 9))
    fields = []
    for coil in range(coils):
        ring = coil % rings
        angle = 2 * math.pi * (coil + 0.5 * ring + rng.normal(0, 0.15)) / coils
        height = half[2] * ((2 * ring + 1) / rings - 1) * 0.8 + rng.normal(0, 0.05)
        fields.append(_loop_field(rng, points, angle, height, half))
    maps = _interpolate(np.stack(fields), nodes, shape)
    maps = maps / maps.abs().square().sum(0).sqrt()
    samples = (maps * _middle(shape)).reshape(coils, -1).to(torch.complex128)
    principal = torch.linalg.eigh(samples @ samples.mH).eigenvectors[:, -1].to(maps.dtype)
    combined = torch.tensordot(principal.conj(), maps, 1)
    return maps * torch.polar(torch.ones_like(combined.real), -combined.angle())


def _middle(shape: tuple[int, int, int]) -> Tensor:
    """1 in the ellipsoid that holds the object: the corners must not decide about the phase."""
    axes = torch.meshgrid(*((torch.arange(size) - size // 2) / max(size / 2, 1) for size in shape), indexing="ij")
    return (torch.stack(axes).square().sum(0) < 0.8).float()


def _loop_field(
    rng: np.random.Generator, points: Floats, angle: float, height: float, half: Floats
) -> npt.NDArray[np.complex128]:
    """``Bx - i By`` of one loop that faces the centre, at `points` ``(x, y, z, 3)``."""
    outwards = np.array([math.cos(angle), math.sin(angle), 0.0])
    # On a box around the volume, so that no wire comes near a voxel.
    distance = 1 / max(abs(outwards[0]) / half[0], abs(outwards[1]) / half[1])
    distance += rng.uniform(0.25, 0.45)
    centre = outwards * distance + np.array([0, 0, height])
    normal = outwards + rng.normal(0, 0.12, 3)
    normal /= np.linalg.norm(normal)
    first = np.cross(normal, [0, 0, 1.0])
    first /= np.linalg.norm(first)
    second = np.cross(normal, first)
    turns = 2 * math.pi * np.arange(_SEGMENTS) / _SEGMENTS
    radius = rng.uniform(0.45, 0.7)
    wire = centre + radius * (np.cos(turns)[:, None] * first + np.sin(turns)[:, None] * second)
    # No part of the wire may enter the volume, however it is tilted.
    wire += outwards * max(0.0, distance - 0.1 - float((wire @ outwards).min()))
    along = np.roll(wire, -1, 0) - np.roll(wire, 1, 0)
    field = np.zeros(points.shape[:-1], complex)
    for place, step in zip(wire, along, strict=True):
        offset = points - place
        bent = np.cross(step, offset) / np.sum(offset**2, -1, keepdims=True) ** 1.5
        field += bent[..., 0] - 1j * bent[..., 1]
    return field


def _interpolate(fields: npt.NDArray[np.complex128], nodes: list[Floats], shape: tuple[int, int, int]) -> Tensor:
    """Values at the nodes ``(coil, x, y, z)`` to the voxels ``(coil, z, y, x)``."""
    result = torch.from_numpy(fields)
    for points, size in zip(nodes, shape[::-1], strict=True):
        voxels = (np.arange(size) - size // 2) / (size / 2)
        to_coefficients = np.linalg.inv(chebyshev.chebvander(points, len(points) - 1))
        matrix = torch.from_numpy(chebyshev.chebvander(voxels, len(points) - 1) @ to_coefficients).to(result.dtype)
        result = torch.tensordot(result, matrix, ([1], [1]))  # the axis moves to the end: x, y, z one after another
    return result.permute(0, 3, 2, 1).to(torch.complex64).contiguous()
