"""Static images from prepared anatomies: pictures, slices and windows of volumes, and label maps with drawn contrasts.

The anatomy is sampled on a grid finer than the drawn matrix, given a phase there, and then seen through the k-space of
the matrix as a scan would: with partial volumes and the ringing of edges.
"""

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from training.anatomies import Entry, Folder
from training.fields import add_phase, fourier_resample, normalised, smooth_field

Matrix = tuple[int, int, int]

_SPARSEST = 0.05  # of a slice, at least, that must show something
_ATTEMPTS = 8  # to find such a slice
_MOST_ANISOTROPIC = 2.0  # voxels; beyond, a volume is a stack of slices
# FreeSurfer's labels of the left half of a brain, and of the right: one tissue has one contrast.
_MIRRORED = {
    41: 2, 42: 3, 43: 4, 44: 5, 46: 7, 47: 8, 49: 10, 50: 11, 51: 12, 52: 13, 53: 17, 54: 18, 58: 26, 60: 28, 62: 30,
    63: 31, 137: 136, 164: 163,
}  # fmt: skip


def thick_axis(entry: Entry) -> int | None:
    """Axis (0 to 2: z, y, x) along which the voxels are so long that a volume is a stack of slices along it."""
    if min(entry.voxel) <= 0 or max(entry.voxel) / min(entry.voxel) < _MOST_ANISOTROPIC:
        return None
    return int(np.argmax(entry.voxel))


def draw_anatomy(
    folder: Folder, entry: Entry, matrix: Matrix, zoom: float, phase: float, rng: np.random.Generator
) -> Tensor:
    """Draw a complex image ``(1, z, y, x)`` of one subject, magnitude about 1 in bright tissue.

    Parameters
    ----------
    folder, entry
        Planes, a volume, labels, or pairs (of which one phase is taken).
    matrix
        Sizes ``(z, y, x)``; one slice has z = 1.
    zoom
        How much larger the anatomy is than the field of view.
    phase
        See `training.fields.add_phase`.
    """
    fine = draw_magnitude(folder, entry, matrix, zoom, rng)
    image = add_phase(fine[None], phase, rng)
    return fourier_resample(image, matrix, roll_off=max(0.0, rng.uniform(-0.3, 0.5)))


def draw_magnitude(folder: Folder, entry: Entry, matrix: Matrix, zoom: float, rng: np.random.Generator) -> Tensor:
    """As `draw_anatomy`, real ``(z, y, x)`` on a grid as fine as the anatomy, or as the matrix where that is finer."""
    if entry.kind in ("planes", "pairs"):
        image = _picture(folder, entry, matrix, zoom, rng)
    else:
        image = _volume(folder, entry, matrix, zoom, rng)
    bias = torch.exp(rng.uniform(0, 0.35) * smooth_field(image.shape, 2, rng))
    return normalised((image * bias).clamp(min=0))


def outlined(image: Tensor, rng: np.random.Generator) -> Tensor:
    """An image ``(z, y, x)`` cut to an object with air around it, and often with a bright rim, as of fat."""
    shape = image.shape
    axes = torch.meshgrid(*(torch.linspace(-1, 1, n) if n > 1 else torch.zeros(1) for n in shape), indexing="ij")
    radius = sum((axis / rng.uniform(0.65, 0.97)).square() for axis in axes) + 0.12 * smooth_field(shape, 5, rng)
    image = image * torch.sigmoid((1 - radius) / 0.01)
    if rng.random() < 0.5:
        depth, width = rng.uniform(0.88, 0.96), rng.uniform(0.02, 0.05)
        image = image + rng.uniform(0.3, 1.2) * torch.exp(-((radius - depth) / width).square())
    return image


def _picture(folder: Folder, entry: Entry, matrix: Matrix, zoom: float, rng: np.random.Generator) -> Tensor:
    """A window of a plane, in a random mix of its colours, on a grid up to twice as fine as the matrix."""
    _, y, x = matrix
    name = "images" if entry.kind == "planes" else str(rng.choice(["first", "second"]))
    rows, columns = entry.shape[-2:]
    # Source pixels for one of the matrix: from a window at full detail to all of the plane.
    most = min(rows / y, columns / x)
    least = min(1.0, most)
    if zoom > 1:
        most = max(least, most / zoom)
    pixels = math.exp(rng.uniform(math.log(least), math.log(most)))
    height, width = min(rows, round(y * pixels)), min(columns, round(x * pixels))
    top, left = int(rng.integers(rows - height + 1)), int(rng.integers(columns - width + 1))
    index = int(rng.integers(entry.shape[0]))
    where = (index, slice(top, top + height), slice(left, left + width))
    if entry.kind == "planes":
        part = folder.read(entry, name, index, slice(None), *where[1:]).float()
        mix = torch.from_numpy(rng.dirichlet(np.ones(len(part))).astype(np.float32))
        part = torch.tensordot(mix, part, 1)
    else:
        part = folder.read(entry, name, *where).float()
    part = part / part.max().clamp(min=1e-6)
    if entry.kind == "planes":
        if rng.random() < 0.3:
            part = 1 - part
        part = (part - rng.uniform(0, 1) * part.min()).clamp(min=0) ** rng.uniform(0.7, 1.8)
    factor = 2 if pixels >= 1.5 else 1
    part = functional.interpolate(part[None, None], (factor * y, factor * x), mode="bilinear", antialias=True)[0]
    part = _turned(part, rng)
    if part.shape[1:] != (factor * y, factor * x):
        part = part.transpose(1, 2)
    return outlined(part, rng) if rng.random() < 0.7 else part


def _turned(image: Tensor, rng: np.random.Generator) -> Tensor:
    flips = [axis for axis in range(3) if rng.random() < 0.5]
    return image.flip(flips) if flips else image


def _volume(folder: Folder, entry: Entry, matrix: Matrix, zoom: float, rng: np.random.Generator) -> Tensor:
    """A slice or a block of a volume or of a label map, in a random orientation."""
    contrast = _Contrast(folder, entry, rng)
    for _ in range(_ATTEMPTS):
        positions, sizes = _view(entry, matrix, zoom, rng)
        image = contrast.sample(positions)
        if entry.kind == "labels":
            image = image * contrast.texture(positions)
        image = image.reshape(sizes)
        if image.shape[0] > 1 and matrix[0] == 1:
            image = image.mean(0, keepdim=True)  # through the thickness of the slice
        if float((image > 0.1 * image.max()).float().mean()) > _SPARSEST:
            break
    if entry.kind == "volume" and rng.random() < 0.5:
        image = normalised(image).clamp(min=0) ** rng.uniform(0.75, 1.4)
    return image


def _view(entry: Entry, matrix: Matrix, zoom: float, rng: np.random.Generator) -> tuple[Tensor, Matrix]:
    """Positions ``(..., 3)`` of the samples in voxels of the volume (z, y, x), and the sizes of their grid."""
    voxel = np.array(entry.voxel if min(entry.voxel) > 0 else (1.0, 1.0, 1.0))
    box = np.array(entry.box, float)
    extent, middle = (box[:, 1] - box[:, 0] + 1) * voxel, box.mean(1) * voxel
    slices = matrix[0] == 1
    thick = thick_axis(entry)
    order = rng.permutation(3)
    if slices and thick is not None:
        order = np.array([thick, *rng.permutation([axis for axis in range(3) if axis != thick])])
    if (extent[order[1]] - extent[order[2]]) * (matrix[1] - matrix[2]) < 0 and rng.random() < 0.7:
        order[[1, 2]] = order[[2, 1]]  # long sides along long sides, as technicians do
    shown = extent[order]  # along z, y, x of the matrix
    used = [axis for axis in range(3) if matrix[axis] > 1]
    # Voxels are cubes, or nearly; the longest side decides, or the matrix would be filled with air: a mean of all.
    sides = np.array([shown[axis] / matrix[axis] for axis in used])
    side = (sides.max() if rng.random() < 0.5 else rng.uniform(sides.mean(), sides.max())) / zoom
    spacing = np.array([side * rng.uniform(0.9, 1.1) for _ in range(3)])
    centre = middle[order].copy()
    for axis in range(3):
        if matrix[axis] == 1:
            centre[axis] += rng.uniform(-0.4, 0.4) * shown[axis]
        else:
            room = abs(shown[axis] - spacing[axis] * matrix[axis])
            # A window lies anywhere within the anatomy; an anatomy that fits is nearly in the middle.
            reach = 0.5 * room if spacing[axis] * matrix[axis] < shown[axis] else 0.25 * room
            centre[axis] += rng.uniform(-1, 1) * reach
    factor = np.ones(3, int)
    for axis in used:
        factor[axis] = int(np.clip(math.ceil(spacing[axis] / voxel[order[axis]] - 0.1), 1, 2 if not slices else 3))
    sizes = [matrix[axis] * int(factor[axis]) for axis in range(3)]
    axes = []
    for axis in range(3):
        if slices and axis == 0:
            depth = 0.0 if thick is not None else rng.uniform(0, 4)
            count = max(1, min(5, round(depth / voxel[order[0]])))
            sizes[0] = count
            axes.append((np.arange(count) - (count - 1) / 2) * voxel[order[0]])
        else:
            step = spacing[axis] / factor[axis]
            axes.append((np.arange(sizes[axis]) - sizes[axis] // 2) * step * rng.choice([-1.0, 1.0]))
    grid = torch.stack(torch.meshgrid(*(torch.from_numpy(a.astype(np.float32)) for a in axes), indexing="ij"), -1)
    turn = _rotation(rng, (0.0, 0.0) if slices and thick is not None else (8.0, 8.0), 12.0)
    grid = grid.reshape(-1, 3) @ turn.T + torch.from_numpy(centre.astype(np.float32))
    # Back to the axes of the volume, in voxels.
    inverse = np.argsort(order)
    grid = grid[:, torch.from_numpy(inverse)] / torch.from_numpy(voxel.astype(np.float32))
    return grid, (sizes[0], sizes[1], sizes[2])


def _rotation(rng: np.random.Generator, tilts: tuple[float, float], turn: float) -> Tensor:
    """Rotation of (z, y, x): about y and x by angles of these deviations in degrees, in the plane by `turn`."""
    x, y, z = (math.radians(deviation) * rng.standard_normal() for deviation in (tilts[0], tilts[1], turn))
    generator = torch.tensor([[0, -x, y], [x, 0, -z], [-y, z, 0]], dtype=torch.float64)
    return torch.linalg.matrix_exp(generator).float()


class _Contrast:
    """Intensity at any position of one volume, or of one label map with contrasts drawn for its labels."""

    def __init__(self, folder: Folder, entry: Entry, rng: np.random.Generator) -> None:
        self.folder, self.entry = folder, entry
        self.channel = int(rng.integers(entry.shape[0])) if entry.kind == "volume" else 0
        self.seed = np.random.default_rng(int(rng.integers(2**31)))
        if entry.kind == "labels":
            self.values, self.roughness = _tissues(rng)
        self.blur = rng.uniform(0, 0.8)

    def sample(self, positions: Tensor) -> Tensor:
        """Values at positions ``(n, 3)``, by linear interpolation; zero outside."""
        grid = self.entry.shape[-3:]
        first = positions.min(0).values.floor().clamp(min=0).int().tolist()
        last = positions.max(0).values.ceil().int().tolist()
        where = [slice(a, max(a + 1, min(b + 1, n))) for a, b, n in zip(first, last, grid, strict=True)]
        if any(part.start >= n for part, n in zip(where, grid, strict=True)):
            return torch.zeros(len(positions))
        if self.entry.kind == "labels":
            labels = self.folder.read(self.entry, "labels", *where).int()
            block = self.values[labels]
        else:
            block = self.folder.read(self.entry, "images", self.channel, *where)
            block = block.abs().float() if block.is_complex() else block.float()
        sizes = torch.tensor(block.shape)
        local = positions - torch.tensor(first)
        scaled = 2 * local / (sizes - 1).clamp(min=1) - 1
        return functional.grid_sample(
            block[None, None], scaled.flip(-1).view(1, 1, 1, -1, 3), mode="bilinear", align_corners=True
        ).flatten()

    def texture(self, positions: Tensor) -> Tensor:
        """What no label tells: structure inside tissues, on several scales, about 1."""
        fields = torch.zeros(len(positions))
        for wavelength in (3.0, 7.0, 20.0):
            waves = torch.from_numpy(self.seed.standard_normal((3, 12)).astype(np.float32)) * (2 * math.pi / wavelength)
            phases = torch.from_numpy(self.seed.uniform(0, 2 * math.pi, 12).astype(np.float32))
            fields += torch.cos(positions @ waves + phases).sum(1) / math.sqrt(6)
        return (1 + self.roughness * fields / 3).clamp(min=0)


def _tissues(rng: np.random.Generator) -> tuple[Tensor, float]:
    """Intensity of every label, 0 for air; a few tissues look alike, some give no signal."""
    values = rng.uniform(0.05, 1.0, 1 << 16).astype(np.float32)
    dark = rng.random(values.size) < 0.12
    values[dark] = rng.uniform(0, 0.05)
    for label, twin in _MIRRORED.items():
        values[label] = values[twin] * rng.normal(1, 0.01)
    values[0] = 0
    return torch.from_numpy(values), float(rng.uniform(0, 0.25))
