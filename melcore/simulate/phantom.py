"""Random head-like anatomy, rich enough for networks that are to work on real heads.

A template of smooth blobs trains networks that blur: what has to be learned is edges of all orientations with partial
volumes, thin folded structures next to each other, textures on all scales, and dark next to bright. The anatomy is a
function of position in three dimensions, drawn anew from every seed: scalp, fat, skull with its marrow, brain with
folded cortex, ventricles, nuclei and a cerebellum, face and neck with muscles and airways, vessels, small lesions; the
contrast is one of T1, T2, proton density or FLAIR, varied. A single slice is cut from it in a random orientation.
"""

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.errors import ShapeError
from melcore.simulate.fields import RandomField, inside, paint, rotation, slope

Floats = npt.NDArray[np.float64]

# Relative signal of: white matter, grey matter, cerebrospinal fluid, fat, muscle, skin, marrow, vessel.
_CONTRASTS = {
    "t1": (0.85, 0.58, 0.16, 1.35, 0.48, 0.70, 0.75, 0.30),
    "t1-angio": (0.80, 0.60, 0.22, 0.90, 0.50, 0.65, 0.55, 1.40),
    "t2": (0.42, 0.60, 1.20, 0.75, 0.28, 0.45, 0.55, 0.05),
    "pd": (0.68, 0.85, 0.95, 0.90, 0.65, 0.70, 0.65, 0.25),
    "flair": (0.55, 0.75, 0.10, 0.80, 0.40, 0.55, 0.50, 0.10),
}


def positions(shape: tuple[int, int, int], orientation: Tensor, offset: Tensor) -> tuple[Tensor, tuple[float, ...]]:
    """Positions ``(z, y, x, 3)`` of the voxels in the frame of the anatomy, and the size of a voxel along each axis.

    The longer of the extended axes spans -1 to 1, voxels are cubes, and the last axis of the result is x, y, z.
    """
    if len(shape) != 3 or min(shape) < 1:
        raise ShapeError(f"the shape must be (z, y, x), none empty, but is {tuple(shape)}; one slice is (1, y, x).")
    # Axes may be sampled differently: each spans at least the head, so that it fits any matrix.
    longest = max(shape)
    spacing = tuple(2 / max(size, 0.8 * longest) if size > 1 else 2 / longest for size in shape)
    axes = [(torch.arange(size) - size // 2) * step for size, step in zip(shape, spacing, strict=True)]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    return torch.stack((x, y, z), -1) @ orientation.T + offset, spacing


def random_anatomy(shape: tuple[int, int, int], *, seed: int) -> Tensor:
    """Draw a head, or a slice of one.

    Parameters
    ----------
    shape
        ``(z, y, x)``; one slice is ``(1, y, x)``.
    seed
        The same seed gives the same image.

    Returns
    -------
    Tensor
        Complex64 ``(z, y, x)``, magnitude about 1 in bright tissue, 0 in air and outside, with a smooth phase.
    """
    rng = np.random.default_rng(seed)
    orientation, offset = _random_view(rng, shape[0] == 1)
    place, spacing = positions(shape, orientation, offset)
    place = place / torch.from_numpy(rng.uniform((0.66, 0.82, 0.80), (0.80, 0.95, 0.95)).astype(np.float32))
    place = place + 0.05 * RandomField(rng, 1.3, channels=3)(place).movedim(0, -1)
    place = place + 0.012 * RandomField(rng, 0.35, channels=3)(place).movedim(0, -1)
    return _head(rng, place, spacing)


def _random_view(rng: np.random.Generator, single: bool) -> tuple[Tensor, Tensor]:
    """Orientation and offset of the voxel grid: volumes nearly upright, slices anywhere."""
    orientation, offset = rotation(rng, 8), torch.zeros(3)
    if single:
        turn = torch.eye(3)[torch.from_numpy(rng.permutation(3))]
        orientation = rotation(rng, 12) @ turn
        offset = 0.45 * rng.uniform(-1, 1) * turn[:, 2] + torch.tensor([0, 0, 0.1])
    flips = torch.from_numpy(rng.choice([-1.0, 1.0], 3).astype(np.float32))
    return orientation * flips, offset


def _head(rng: np.random.Generator, place: Tensor, spacing: tuple[float, ...]) -> Tensor:
    white, grey, fluid, fat, muscle, skin, marrow, vessel = _draw_contrast(rng)
    x, y, z = place.unbind(-1)
    texture = RandomField(rng, 0.5, channels=4, exponent=3.2)(place)
    fine = RandomField(rng, 0.12, channels=2, exponent=2.0)(place)
    radius = place.square().sum(-1).sqrt()
    outline = radius - 1
    skin_depth, fat_depth = rng.uniform(0.012, 0.03), rng.uniform(0.015, 0.07)
    skull_depth = rng.uniform(0.03, 0.08)

    image = torch.zeros_like(x)
    head = inside(outline)
    stripped = rng.random() < 0.15  # as after brain extraction
    if not stripped:
        paint(image, head, skin * (1 + 0.1 * fine[0]))
        paint(
            image, inside(outline + skin_depth * (1 + 0.3 * texture[0])), fat * (1 + 0.12 * texture[1] + 0.12 * fine[1])
        )
        _paint_soft_tissue(rng, image, inside(outline + skin_depth + fat_depth), place, (muscle, fat, fine, texture))
    # The brain sits in the upper part of the head, in its skull.
    bone = (place - torch.tensor([0, 0.02, 0.14])).div(torch.tensor([0.90, 0.92, 0.84]))
    bone_radius = bone.square().sum(-1).sqrt() - 1 + 0.02 * texture[2]
    base = -0.42 - z + 0.25 * y.square() + 0.05 * texture[3]
    skull = torch.maximum(bone_radius, base)
    if not stripped:
        paint(image, inside(skull), 0.03)
        spongy = (skull + skull_depth / 2).abs() - skull_depth * (0.22 + 0.1 * texture[0])
        paint(image, inside(spongy), marrow * (1 + 0.25 * fine[0]))
    cavity = skull + skull_depth
    paint(image, inside(cavity), fluid)
    _paint_brain(rng, image, place, cavity, spacing, (white, grey, fluid), texture, fine)
    _paint_cerebellum(rng, image, place, cavity, (white, grey, fluid))
    _paint_vessels(rng, image, place, spacing, inside(cavity) if stripped else head, vessel)
    _paint_lesions(rng, image, place, inside(cavity + 0.05), max(fluid, white))

    bias = 1 + rng.uniform(0.03, 0.18) * RandomField(rng, 2.5)(place)[0]
    image = (image * (1 + 0.025 * texture[1] + 0.02 * fine[1]) * bias).clamp(min=0)
    image = image * (inside(cavity) if stripped else head > 0)
    bright = image[image > 0.02]
    if bright.numel():
        image = image / bright.kthvalue(max(1, round(0.99 * bright.numel()))).values
    phase = rng.uniform(-math.pi, math.pi) + smooth_phase(rng, place) + rng.uniform(0, 0.3) * image
    return torch.polar(image, phase)


def smooth_phase(rng: np.random.Generator, place: Tensor) -> Tensor:
    """Phase of the receiver and of the field's inhomogeneity, in rad: slow, a few radians over the head."""
    ramp = place @ torch.from_numpy(rng.normal(0, 0.7, 3).astype(np.float32))
    return ramp + rng.uniform(0.1, 0.6) * RandomField(rng, 1.6)(place)[0]


def _draw_contrast(rng: np.random.Generator) -> list[float]:
    values = np.array(list(_CONTRASTS.values())[rng.choice(len(_CONTRASTS), p=(0.4, 0.1, 0.2, 0.15, 0.15))])
    values = values * rng.normal(1, 0.10, values.size).clip(0.6, 1.4)
    if rng.random() < 0.3:
        values[3] *= rng.uniform(0.1, 0.6)  # fat suppression
    return [float(value) for value in values]


def _paint_soft_tissue(
    rng: np.random.Generator, image: Tensor, where: Tensor, place: Tensor, look: tuple[float, float, Tensor, Tensor]
) -> None:
    """Face and neck: muscles in fat, bones and airways."""
    muscle, fat, fine, texture = look
    bundle = RandomField(rng, 0.35, channels=3)(place)
    paint(image, where, fat * (0.8 + 0.15 * texture[0]))
    fibres = 1 + 0.10 * fine[0] + 0.08 * texture[2]
    paint(image, where * inside(bundle[0].abs() * -1 + 0.25), muscle * fibres)
    paint(image, where * inside(0.9 - bundle[1]), 0.05)
    paint(image, where * inside(1.25 - bundle[1]), 0.6 * fat)
    deep = place.square().sum(-1) - 0.75
    paint(image, where * inside(torch.maximum(0.7 - bundle[2], deep)), 0.0)


def _paint_brain(
    rng: np.random.Generator,
    image: Tensor,
    place: Tensor,
    cavity: Tensor,
    spacing: tuple[float, ...],
    signal: tuple[float, float, float],
    texture: Tensor,
    fine: Tensor,
) -> None:
    white, grey, fluid = signal
    x, y, z = place.unbind(-1)
    gap = rng.uniform(0.005, 0.04)
    surface = cavity + gap * (1 + 0.6 * texture[0])  # negative inside the brain, distance to its hull
    depth = -surface
    thickness = rng.uniform(0.032, 0.055)
    # Folds run inwards from the hull: the field that makes them changes along it and little with depth.
    radius = place.square().sum(-1, keepdim=True).sqrt().clamp(min=0.05)
    along = place / radius * (0.62 + 0.30 * radius)
    along = along + 0.04 * RandomField(rng, 0.3, channels=3)(place).movedim(0, -1)
    folds = RandomField(rng, rng.uniform(0.26, 0.36))(along)[0]
    distance = folds.abs() / slope(folds, spacing).clamp(min=0.5)
    reach = rng.uniform(0.20, 0.34) * (1 + 0.35 * texture[1])
    opening = (1 - depth / reach).clamp(0, 1)  # of the sulci: widest at the hull, none below their depth
    width = rng.uniform(0.002, 0.02) * opening * (1 + 0.5 * texture[0])
    closing = ((reach + 0.05 - depth) / 0.05).clamp(0, 1)
    # The fissure between the hemispheres.
    middle = (
        (x + 0.015 * texture[3]).abs() + 0.25 * (0.15 - z).clamp(min=0) + 0.4 * (0.25 - radius[..., 0]).clamp(min=0)
    )
    distance_2, width_2 = middle, rng.uniform(0.006, 0.02)

    brain = inside(surface)
    tint = 1 + 0.03 * texture[2]
    paint(image, brain, grey * (1 + 0.03 * fine[0]) * tint)
    # Below the sulci the ribbon ends, rather than to thin out to a line.
    ribbon = torch.minimum(
        distance - (width + (thickness + 0.03) * closing - 0.03), depth - thickness * (0.8 + 0.2 * closing)
    )
    ribbon = torch.minimum(ribbon, distance_2 - width_2 - thickness)
    paint(image, brain * inside(-ribbon), white * (1 + 0.02 * fine[1]) * tint)
    # Crevices thinner than a voxel fade, instead of filling half of it.
    voxel = max(spacing)
    paint(image, brain * inside(distance - width) * (2 * width / voxel).clamp(max=1), fluid)
    paint(image, brain * inside(distance_2 - width_2) * min(1.0, 2 * width_2 / voxel), fluid)
    # Nuclei and ventricles, mirrored at the middle and slightly different on both sides.
    mirrored = torch.stack((x.abs() + 0.015 * texture[0], y, z), -1)
    for _ in range(int(rng.integers(4, 8))):
        centre = rng.uniform((0.08, -0.25, -0.12), (0.32, 0.3, 0.2))
        size = rng.uniform(0.04, 0.15, 3)
        value = grey * rng.uniform(0.8, 1.15) if rng.random() < 0.8 else white * rng.uniform(0.9, 1.2)
        paint(image, brain * inside(_ellipsoid(mirrored, centre, size, rotation(rng, 30)) + 0.1 * texture[1]), value)
    for _ in range(int(rng.integers(2, 4))):
        centre = rng.uniform((0.05, -0.3, 0.02), (0.12, 0.3, 0.22))
        size = rng.uniform((0.02, 0.10, 0.04), (0.07, 0.32, 0.12))
        paint(image, brain * inside(_ellipsoid(mirrored, centre, size, rotation(rng, 20)) + 0.15 * texture[2]), fluid)
    third = _ellipsoid(place, np.zeros(3), rng.uniform((0.012, 0.1, 0.08), (0.03, 0.2, 0.16)), rotation(rng, 5))
    paint(image, brain * inside(third), fluid)


def _paint_cerebellum(
    rng: np.random.Generator, image: Tensor, place: Tensor, cavity: Tensor, signal: tuple[float, float, float]
) -> None:
    """Finely folded cerebellum, and the brain stem."""
    white, grey, fluid = signal
    side = rng.choice([-1.0, 1.0])
    centre = np.array([0, 0.48 * side, -0.24])
    body = torch.maximum(_ellipsoid(place, centre, np.array([0.46, 0.27, 0.20]), torch.eye(3)), (cavity + 0.02) * 4)
    paint(image, inside(body - 0.08), fluid)
    cover = inside(body)
    paint(image, cover, grey)
    # Leaves: sheets of white matter that fan out from the stem.
    fan = torch.atan2(place[..., 2] + 0.24, (place[..., 1] - 0.2 * side) * side)
    leaves = torch.cos(rng.uniform(26, 40) * fan + 1.2 * RandomField(rng, 0.3)(place)[0]) - 0.1
    paint(image, cover * inside(torch.maximum(-leaves, body + 0.25)), white)
    paint(image, cover * inside(leaves + 0.8) * inside(-body - 0.6), fluid)
    stem = _ellipsoid(place, np.array([0, 0.16 * side, -0.42]), np.array([0.13, 0.13, 0.42]), rotation(rng, 6))
    paint(image, inside(stem - 0.15), fluid)
    paint(image, inside(stem), 0.5 * (white + grey) * (1 + 0.06 * RandomField(rng, 0.1)(place)[0]))


def _paint_vessels(
    rng: np.random.Generator, image: Tensor, place: Tensor, spacing: tuple[float, ...], head: Tensor, signal: float
) -> None:
    """Vessels: where two random surfaces cross there are curves."""
    for wavelength, thickness in ((0.6, 0.02), (0.3, 0.008)):
        first, second = RandomField(rng, wavelength, channels=2)(place)
        # The floor of the slopes keeps vessels thin where a surface turns along the slice.
        distance_1 = first / slope(first, spacing).clamp(min=1 / wavelength)
        distance_2 = second / slope(second, spacing).clamp(min=1 / wavelength)
        distance = (distance_1.square() + distance_2.square()).sqrt()
        voxel = max(spacing)
        radius = thickness * rng.uniform(0.6, 1.4)
        # Vessels thinner than a voxel fade instead of breaking up.
        coverage = ((radius - distance) / voxel + 0.5).clamp(0, min(1.0, (2 * radius / voxel) ** 2))
        paint(image, head * coverage, signal)


def _paint_lesions(rng: np.random.Generator, image: Tensor, place: Tensor, where: Tensor, brightest: float) -> None:
    for _ in range(int(rng.poisson(5))):
        centre = rng.uniform(-0.55, 0.55, 3)
        size = np.exp(rng.uniform(math.log(0.015), math.log(0.09))) * rng.uniform(0.6, 1.4, 3)
        paint(
            image, where * inside(_ellipsoid(place, centre, size, rotation(rng, 60))), brightest * rng.uniform(0.1, 1.3)
        )


def _ellipsoid(place: Tensor, centre: Floats, size: Floats, turn: Tensor) -> Tensor:
    """Field that is negative inside an ellipsoid, -1 at its centre."""
    shifted = (place - torch.from_numpy(np.asarray(centre, np.float32))) @ turn
    return shifted.div(torch.from_numpy(np.asarray(size, np.float32))).square().sum(-1).sqrt() - 1
