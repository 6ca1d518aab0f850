"""Cines from real anatomy: hearts between the two phases that were imaged, and static anatomies that are made to move.

Two phases are no cine. The optical flows between them (computed once, by ``mel prepare``) carry either phase to any
point of a contraction curve; what lies outside the heart stays at rest, as in a breath-hold.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from melcore.simulate.motion import contract, contraction
from training.anatomies import Entry, Folder
from training.anatomy import Matrix, draw_magnitude, outlined
from training.fields import add_phase, fourier_resample, normalised, smooth_field

_HEART = 0.3  # of the field of the phases: beyond this distance from the middle nothing moves


def draw_cine(
    folder: Folder, entry: Entry, matrix: Matrix, frames: int, zoom: float, phase: float, rng: np.random.Generator
) -> Tensor:
    """Draw a cine of one beat, complex ``(time, 1, y, x)``, magnitude about 1; the last frame is followed by the first.

    Parameters
    ----------
    folder, entry
        Pairs of phases; of other kinds a slice is deformed as a heart would deform it.
    matrix, zoom, phase
        See `training.anatomy.draw_anatomy`.
    frames
        Of the beat.
    """
    if entry.kind == "pairs":
        fine = _beating(folder, entry, matrix, frames, zoom, rng)
    else:
        fine = _deformed(draw_magnitude(folder, entry, matrix, zoom, rng)[0], frames, rng)
    fine = fine.unsqueeze(1)
    image = add_phase(fine, phase, rng)
    if rng.random() < 0.5:  # blood that moves has a phase of its own
        moving = fine.std(0, keepdim=True) / fine.std(0).max().clamp(min=1e-6)
        course = smooth_field((frames,), 3, rng).view(-1, 1, 1, 1)
        image = image * torch.polar(torch.ones(()), rng.uniform(0, 0.6) * course * moving)
    return fourier_resample(image, matrix, roll_off=max(0.0, rng.uniform(-0.3, 0.5)))


def _beating(
    folder: Folder, entry: Entry, matrix: Matrix, frames: int, zoom: float, rng: np.random.Generator
) -> Tensor:
    """Frames ``(time, y, x)`` of one slice, in a window at least as fine as the matrix."""
    index = int(rng.integers(entry.shape[0]))
    first, second = (folder.read(entry, name, index).float() for name in ("first", "second"))
    forward, backward = (folder.read(entry, name, index).float() for name in ("forward", "backward"))
    size = first.shape[-1]
    amount = contraction(frames, start=rng.random(), systole=rng.uniform(0.3, 0.42)).view(-1, 1, 1)
    amount = (amount * rng.uniform(0.7, 1.1)).clamp(0, 1.1)
    moving = torch.ones_like(first)
    if rng.random() < 0.75:
        moving = _heart(first, second, forward, rng)
    # Either phase is carried towards the other, and the nearer one counts more.
    from_first = warp(first, backward * (amount * moving).unsqueeze(1))
    from_second = warp(second, forward * ((1 - amount) * moving).unsqueeze(1))
    image = from_first * (1 - amount * moving) + from_second * (amount * moving)
    image = image.clamp(min=0)
    if rng.random() < 0.5:  # the roles of the axes
        image = image.transpose(1, 2)
    flips = [axis for axis in (1, 2) if rng.random() < 0.5]
    image = image.flip(flips) if flips else image
    _, y, x = matrix
    most = image.shape[-1] / max(y, x)
    step = max(1.0, most / zoom * rng.uniform(0.85, 1)) if most > 1 else 1.0
    height, width = min(round(y * step), image.shape[1]), min(round(x * step), image.shape[2])
    corners = [
        int(np.clip((n - kept) / 2 + rng.normal() * 0.06 * size, 0, n - kept))
        for n, kept in zip(image.shape[1:], (height, width), strict=True)
    ]
    image = image[:, corners[0] : corners[0] + height, corners[1] : corners[1] + width]
    if min(height / y, width / x) < 1:  # a matrix finer than the source
        image = functional.interpolate(image[None], (y, x), mode="bilinear", align_corners=False)[0]
    mean = image.mean(0, keepdim=True)
    if rng.random() < 0.6:  # an object with air around it, the same in every frame
        bare = outlined(torch.ones_like(mean), rng)
        image = image * bare.clamp(max=1) + (bare - 1).clamp(min=0)
    bias = torch.exp(rng.uniform(0, 0.35) * smooth_field(mean.shape, 2, rng))
    return normalised(image * bias) ** rng.uniform(0.8, 1.3)


def _heart(first: Tensor, second: Tensor, flow: Tensor, rng: np.random.Generator) -> Tensor:
    """Where the heart is, between 0 and 1: where there is both motion and change, near the middle."""
    size = first.shape[-1]
    y, x = (torch.arange(n) - n // 2 for n in first.shape)
    near = torch.exp(-((y[:, None].square() + x.square()).sqrt() / (_HEART * size)).pow(4))
    motion = smooth(flow.norm(dim=0) * ((first - second).abs() + 0.05), 0.025 * size) * near
    inside = (motion > 0.25 * motion.max() * rng.uniform(0.3, 1)).float()
    return (1.8 * smooth(inside, 0.02 * size)).clamp(0, 1)


def _deformed(image: Tensor, frames: int, rng: np.random.Generator) -> Tensor:
    """Frames ``(time, y, x)`` of a static image ``(y, x)`` in which one region contracts and relaxes."""
    y, x = image.shape
    axes = torch.meshgrid(torch.linspace(-1, 1, y), torch.linspace(-1, 1, x), indexing="ij")
    centre = rng.uniform(-0.35, 0.35, 2)
    place = torch.stack((axes[1] - centre[1], axes[0] - centre[0], torch.zeros_like(axes[0])), -1).unsqueeze(0)
    amount = contraction(frames, start=rng.random(), systole=rng.uniform(0.3, 0.42)).view(-1, 1, 1)
    cavity, wall = rng.uniform(0.12, 0.35), rng.uniform(0.06, 0.15)
    before = contract(
        place, amount, cavity=cavity, wall=wall, strength=rng.uniform(0.15, 0.45), twist=rng.uniform(-0.3, 0.3)
    )
    offset = (before - place)[..., :2]
    flow = torch.stack((offset[..., 1] * (y - 1) / 2, offset[..., 0] * (x - 1) / 2), 1)
    moved = warp(image, flow).clamp(min=0)
    # Blood flows in and out: its brightness follows the beat.
    radius = place[..., :2].norm(dim=-1)
    cover = torch.sigmoid((cavity - radius) / 0.02)
    swirl = 1 + cover * (rng.uniform(-0.3, 0.3) * amount + 0.1 * smooth_field((frames, y, x), 6, rng))
    return normalised(moved * swirl.clamp(min=0))


def warp(image: Tensor, flow: Tensor) -> Tensor:
    """``(time, y, x)``: an image ``(y, x)`` read at every voxel moved by a flow ``(time, 2, y, x)``, in voxels."""
    y, x = image.shape
    rows, columns = torch.meshgrid(torch.arange(y), torch.arange(x), indexing="ij")
    grid = torch.stack(
        (2 * (columns + flow[:, 1]) / max(x - 1, 1) - 1, 2 * (rows + flow[:, 0]) / max(y - 1, 1) - 1), -1
    )
    stack = image.expand(len(flow), 1, y, x)
    return functional.grid_sample(stack, grid, mode="bicubic", padding_mode="border", align_corners=True)[:, 0]


def smooth(image: Tensor, deviation: float) -> Tensor:
    """Gaussian blur of ``(y, x)``."""
    reach = max(1, math.ceil(3 * deviation))
    kernel = torch.exp(-torch.arange(-reach, reach + 1).square() / (2 * deviation**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, -1)
    blurred = functional.conv2d(image[None, None], kernel, padding="same")
    return functional.conv2d(blurred, kernel.transpose(2, 3), padding="same")[0, 0]
