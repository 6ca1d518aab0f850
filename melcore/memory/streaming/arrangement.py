"""How the features of a regulariser are laid out while they are streamed along the readout or along time.

A layout names the axes of a tensor, one word for each dimension; letters in one word are axes that share a dimension,
the slowest first. Features are ``b t c z y x`` for batch, time, channel and space.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from melcore.memory.plan import Axis

_FEATURES = "btczyx"


@dataclass(frozen=True)
class Arrangement:
    """Between features ``(batch, time, channel, z, y, x)`` and planes ``(n, channel, plane, ...)``.

    A plane is what one position along the streamed axis holds: ``z y`` along the readout, or a frame ``z y x`` along
    time. ``n`` is the batch, with time along the readout, and with z where no layer reads neighbours along it.

    Attributes
    ----------
    batch, time, z, y, x
        Sizes of the image.
    volumetric
        Whether some layer reads neighbours along z.
    axis
        The streamed axis.
    """

    batch: int
    time: int
    z: int
    y: int
    x: int
    volumetric: bool
    axis: Axis = "readout"

    @property
    def layout(self) -> tuple[str, ...]:
        """Layout of planes."""
        if self.axis == "time":
            return ("b", "c", "t", "z", "y", "x") if self.volumetric else ("bz", "c", "t", "y", "x")
        return ("bt", "c", "x", "z", "y") if self.volumetric else ("btz", "c", "x", "y")

    @property
    def streamed(self) -> str:
        """Letter of the streamed axis."""
        return self.layout[2]

    @property
    def dim(self) -> int:
        """Dimension of the streamed axis in an image ``(batch, set, time, z, y, x)``."""
        return 2 if self.axis == "time" else 5

    @property
    def size(self) -> int:
        """How many planes there are."""
        return self._sizes(self.streamed)[0]

    @property
    def convolved(self) -> str:
        """Letters of the axes over which a spatial layer runs; the streamed one is the first if it is among them."""
        inside = "".join(self.layout[3:])
        return inside if self.axis == "time" else self.streamed + inside

    def _sizes(self, letters: str) -> tuple[int, ...]:
        sizes = {"b": self.batch, "t": self.time, "z": self.z, "y": self.y, "x": self.x}
        return tuple(sizes[letter] for letter in letters)

    def planes(self, features: Tensor) -> Tensor:
        """Features to planes; a view where the axes that share a dimension are neighbours in memory."""
        order = "".join(self.layout)
        return features.permute([_FEATURES.index(letter) for letter in order]).flatten(0, len(self.layout[0]) - 1)

    def features(self, planes: Tensor) -> Tensor:
        """Planes to features; a view."""
        order = "".join(self.layout)
        return planes.unflatten(0, self._sizes(self.layout[0])).permute([order.index(letter) for letter in _FEATURES])

    def allocate(self, channels: int, planes: int, *, like: Tensor, dtype: torch.dtype) -> Tensor:
        """So many planes of zeros, stored such that a spatial layer reads any few of them in place, channels last."""
        count, inside = math.prod(self._sizes(self.layout[0])), self._sizes("".join(self.layout[3:]))
        if self.axis == "time":  # to a spatial layer each frame is an image of its own
            memory = torch.zeros((planes, count, *inside, channels), dtype=dtype, device=like.device)
            return memory.movedim((0, -1), (2, 1))
        memory = torch.zeros((count, planes, *inside, channels), dtype=dtype, device=like.device)
        return memory.movedim(-1, 1)

    def images(self, planes: Tensor) -> Tensor:
        """Planes to what a spatial layer convolves: ``(n, channel, ...)`` over `convolved`."""
        return planes.movedim(2, 0).flatten(0, 1) if self.axis == "time" else planes

    def of_images(self, images: Tensor, like: Tensor) -> Tensor:
        """Inverse of `images`, for as many planes as `like` has."""
        return images.unflatten(0, (like.shape[2], like.shape[0])).movedim(0, 2) if self.axis == "time" else images
