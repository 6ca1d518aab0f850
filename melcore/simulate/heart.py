"""Random cine of a beating heart in its chest, in breath-hold: what moves is the heart, what is around it is at rest.

The signal is that of balanced steady-state cine: bright blood, dark muscle, fat of either kind, dark lungs with
vessels. Everything is painted in the frame of the tissue and carried along by the deformation of
`melcore.simulate.motion`.
"""

import math

import numpy as np
import torch
from torch import Tensor

from melcore.errors import ShapeError
from melcore.simulate.fields import RandomField, inside, paint, rotation, slope
from melcore.simulate.motion import contract, contraction
from melcore.simulate.phantom import positions, smooth_phase


def random_cine(shape: tuple[int, int, int, int], *, seed: int) -> Tensor:
    """Draw a cine of one heart beat; the last frame is followed by the first.

    Parameters
    ----------
    shape
        ``(time, z, y, x)``; one slice is ``(time, 1, y, x)``.
    seed
        The same seed gives the same cine.

    Returns
    -------
    Tensor
        Complex64 ``(time, z, y, x)``, magnitude about 1 in blood, with a smooth phase.
    """
    if len(shape) != 4 or min(shape) < 1:
        raise ShapeError(f"the shape must be (time, z, y, x), none empty, but is {tuple(shape)}.")
    rng = np.random.default_rng(seed)
    turn = rotation(rng, 10)
    place, spacing = positions(shape[1:], turn, torch.tensor([0.0, 0.0, rng.uniform(-0.1, 0.1)]))
    place = place * rng.uniform(0.55, 1.0)  # from the heart alone to the whole chest
    place = place + 0.05 * RandomField(rng, 1.2, channels=3)(place).movedim(0, -1)
    place = place + 0.012 * RandomField(rng, 0.3, channels=3)(place).movedim(0, -1)
    quarter = torch.linalg.matrix_exp(torch.tensor([[0, 1.0, 0], [-1, 0, 0], [0, 0, 0]]) * rng.uniform(0, 2 * math.pi))

    cavity, wall = rng.uniform(0.15, 0.28), rng.uniform(0.06, 0.11)
    centre = torch.from_numpy(rng.uniform((-0.2, -0.2, 0), (0.2, 0.2, 0.01)).astype(np.float32))
    amount = contraction(shape[0], start=rng.random(), systole=rng.uniform(0.3, 0.42)).reshape(-1, 1, 1, 1)
    tissue = contract(
        (place - centre).unsqueeze(0),
        amount,
        cavity=cavity,
        wall=wall,
        strength=rng.uniform(0.2, 0.45),
        twist=rng.uniform(-0.2, 0.2),
    )
    blood, muscle, fat = (
        rng.uniform(0.85, 1.1),
        rng.uniform(0.22, 0.42),
        float(rng.choice([0.25, 1.0]) * rng.uniform(0.8, 1.3)),
    )
    chest = _paint_chest(rng, place @ quarter, spacing, (blood, muscle, fat)).unsqueeze(0)
    image = _paint_heart(rng, chest, tissue, amount, (cavity, wall), (blood, muscle, fat))

    image = image * (1 + rng.uniform(0.05, 0.35) * RandomField(rng, 2.5)(place)[0]).clamp(min=0.2)
    bright = image[0][image[0] > 0.02]
    if bright.numel():
        image = image / bright.kthvalue(max(1, round(0.99 * bright.numel()))).values
    phase = rng.uniform(-math.pi, math.pi) + smooth_phase(rng, place)
    return torch.polar(image.clamp(min=0), phase.expand_as(image).contiguous())


def _paint_chest(
    rng: np.random.Generator, place: Tensor, spacing: tuple[float, ...], signal: tuple[float, float, float]
) -> Tensor:
    """The chest at rest ``(z, y, x)``: fat, muscles, ribs, lungs with vessels, liver, spine and aorta."""
    blood, muscle, fat = signal
    texture = RandomField(rng, 0.5, channels=3, exponent=3.0)(place)
    fine = RandomField(rng, 0.12, exponent=2.0)(place)[0]
    x, y, z = place.unbind(-1)
    body = (x / rng.uniform(0.85, 1.3)).square() + (y / rng.uniform(0.7, 1.1)).square()
    body = body.sqrt() - 1 + 0.012 * texture[0]
    image = torch.zeros_like(x)
    whole = inside(body)
    paint(image, whole, fat * (1 + 0.1 * fine))
    bundles = RandomField(rng, 0.3, channels=2)(place)
    wall = body + rng.uniform(0.03, 0.12)
    paint(image, inside(wall) * inside(0.2 - bundles[0].abs()), muscle * (1 + 0.12 * fine + 0.1 * texture[1]))
    ribs = torch.maximum((wall + 0.08).abs() - 0.03, torch.cos(18 * torch.atan2(y, x) + 6 * z) - 0.3)
    paint(image, inside(ribs), 0.25 * fat)
    cavity = wall + 0.15 + 0.02 * texture[2]
    lungs = rng.uniform(0.02, 0.10)
    paint(image, inside(cavity), lungs * (1 + 0.3 * fine))
    first, second = RandomField(rng, 0.22, channels=2)(place)
    distance = torch.hypot(first / slope(first, spacing).clamp(min=4), second / slope(second, spacing).clamp(min=4))
    paint(image, inside(cavity + 0.02) * inside(distance - 0.014), blood * rng.uniform(0.4, 0.9))
    organ = torch.maximum(cavity + 0.02, 0.25 + 0.8 * y - 0.3 * x + 0.08 * texture[1])
    veins = 1 + 0.1 * fine + 0.4 * inside(0.9 - bundles[1])
    paint(image, inside(organ), rng.uniform(0.3, 0.6) * veins)
    spine = torch.hypot(x, y - 0.62) - 0.14 + 0.02 * texture[0]
    paint(image, inside(spine), rng.uniform(0.25, 0.6) * (1 + 0.2 * fine))
    paint(image, inside(torch.hypot(x, y - 0.64) - 0.05), 1.1 * blood)
    paint(image, inside(torch.hypot(x + 0.2, y - 0.5) - rng.uniform(0.05, 0.08)), blood)
    return image * (1 + 0.04 * texture[2] + 0.03 * fine) * (whole > 0)


def _paint_heart(
    rng: np.random.Generator,
    chest: Tensor,
    tissue: Tensor,
    amount: Tensor,
    sizes: tuple[float, float],
    signal: tuple[float, float, float],
) -> Tensor:
    """The frames ``(time, z, y, x)``: both ventricles, papillary muscles and fat, on the chest."""
    cavity, wall = sizes
    blood, muscle, fat = signal
    x, y, z = tissue.unbind(-1)
    texture = RandomField(rng, 0.3, channels=2, exponent=3.0)(tissue)
    fine = RandomField(rng, 0.08, exponent=2.0)(tissue)[0]
    taper = (1 - (z / rng.uniform(0.7, 1.0)).square()).clamp(min=0.05).sqrt()  # towards apex and base
    angle = torch.atan2(y, x)
    radius = (x.square() + (y / rng.uniform(0.85, 1.15)).square()).sqrt()
    rough = 0.03 * texture[0] + 0.02 * torch.cos(3 * angle + rng.uniform(0, 6))
    # Blood swirls: its brightness changes from frame to frame, smoothly and periodically.
    cycle = 2 * math.pi * torch.arange(len(amount)) / len(amount)
    drift = 0.06 * torch.stack((torch.cos(cycle), torch.sin(cycle), torch.zeros_like(cycle)), -1)
    swirl = RandomField(rng, 0.2)(tissue + drift.reshape(-1, 1, 1, 1, 3))[0]
    flow = blood * (1 + 0.07 * swirl * (0.4 + amount) + 0.03 * fine - rng.uniform(0, 0.12) * amount)

    image = chest.repeat(len(amount), 1, 1, 1)
    epicardium = radius - (cavity + wall) * taper * (1 + rough)
    side = rng.uniform(0, 2 * math.pi)
    shift = (cavity + wall) * rng.uniform(0.75, 0.95)
    right_x = x * math.cos(side) + y * math.sin(side) - shift
    right_y = -x * math.sin(side) + y * math.cos(side)
    right = ((right_x / rng.uniform(0.85, 1.1)).square() + (right_y / rng.uniform(1.0, 1.3)).square()).sqrt()
    right = right - (cavity + 0.5 * wall) * taper * (1 + 0.04 * texture[1])
    sac = torch.minimum(epicardium, right) - rng.uniform(0.01, 0.05) * (1 + 0.6 * texture[0])
    paint(image, inside(sac), fat * (1 + 0.15 * fine))
    paint(image, inside(right - 0.02), muscle)
    trabeculae = 0.012 * RandomField(rng, 0.07)(tissue)[0]
    paint(image, inside(right + 0.012 + trabeculae), flow)
    paint(image, inside(epicardium), muscle * (1 + 0.06 * texture[1] + 0.06 * fine))
    endocardium = radius - cavity * taper * (1 + 1.5 * rough)
    paint(image, inside(endocardium + 0.8 * trabeculae), flow)
    for start in (rng.uniform(0.3, 1.2), rng.uniform(2.2, 3.4), rng.uniform(0, 6)):
        size = cavity * rng.uniform(0.12, 0.24)
        where = cavity * rng.uniform(0.55, 0.8)
        papillary = torch.hypot(x - where * math.cos(start + side), y - where * math.sin(start + side))
        paint(image, inside(torch.maximum(papillary - size * (1 + 0.2 * texture[0]), endocardium)), muscle)
    return image
