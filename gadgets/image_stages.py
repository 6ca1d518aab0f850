"""What Gadgetron's standard gadgets do to images after a reconstruction, and its simplest reconstruction."""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gadgets.acquisition_stages import NoSettings
from gadgets.header import Header
from gadgets.image_headers import image_header
from gadgets.messages import Array, Image, ImageArray, ImageType, Message, ReconBit, ReconData
from melcore import layout
from melcore.errors import ConfigError


@dataclass(frozen=True)
class ExtractSettings:
    """What to make of complex images: one series for each that is chosen; the mask adds 1, 2, 4 and 8."""

    extract_mask: int = 0
    extract_magnitude: bool = False
    extract_real: bool = False
    extract_imag: bool = False
    extract_phase: bool = False
    real_imag_offset: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.extract_mask < 16:
            raise ConfigError(f"extract_mask adds 1, 2, 4 and 8, but is {self.extract_mask}.")

    def kinds(self) -> list[ImageType]:
        """Chosen kinds; magnitude where none is."""
        flags = (self.extract_magnitude, self.extract_real, self.extract_imag, self.extract_phase)
        kinds = (ImageType.MAGNITUDE, ImageType.REAL, ImageType.IMAGINARY, ImageType.PHASE)
        chosen = [kind for bit, kind in enumerate(kinds) if flags[bit] or self.extract_mask >> bit & 1]
        return chosen or [ImageType.MAGNITUDE]


# Each kind goes to a series of its own: a client aborts over a series of several kinds.
_SERIES_OFFSET = {ImageType.MAGNITUDE: 0, ImageType.REAL: 1000, ImageType.IMAGINARY: 2000, ImageType.PHASE: 3000}
_EXTRACT: dict[ImageType, Callable[[Array], Array]] = {
    ImageType.MAGNITUDE: np.abs,
    ImageType.REAL: np.real,
    ImageType.IMAGINARY: np.imag,
    ImageType.PHASE: np.angle,
}


def simple_recon(messages: Iterator[Message], _header: Header, _settings: NoSettings) -> Iterator[Message]:
    """Inverse Fourier transform and root of the sum of squares over the coils (SimpleReconGadget)."""
    counter = itertools.count(1)
    for message in messages:
        if not isinstance(message, ReconData):
            yield message
            continue
        for bit in message.bits:
            if bit.data.data.size:
                yield _root_sum_of_squares(bit, counter)


def _root_sum_of_squares(bit: ReconBit, counter: Iterator[int]) -> ImageArray:
    import torch

    from melcore.physics.fourier import ifft

    buffer = bit.data
    k_space = np.ascontiguousarray(layout.k_space_from_gadgetron(buffer.data))
    coil_images = ifft(torch.from_numpy(k_space), (-3, -2, -1))
    image = coil_images.abs().square().sum(1, keepdim=True).sqrt().to(torch.complex64).numpy()
    centers = buffer.sampling["limits"]["center"]
    middle = buffer.headers[int(centers[1]), int(centers[2])]
    time, sets, locations = middle.shape
    heads = [
        image_header(
            middle[n, s, loc],
            image.shape[1:2] + image.shape[3:],
            buffer.sampling["recon_fov"].tolist(),
            ImageType.COMPLEX,
            index=next(counter),
            series=0,
        )
        for loc, s, n in np.ndindex(locations, sets, time)
    ]
    headers = np.array(heads, heads[0].dtype).reshape(locations, sets, time).transpose()
    headers["image_type"] = 0  # the gadget leaves it so
    return ImageArray(layout.image_to_gadgetron(image, sets), headers)


def split_image_array(messages: Iterator[Message], _header: Header, _settings: NoSettings) -> Iterator[Message]:
    """Image arrays to single images, N fastest, then S, then LOC (ImageArraySplitGadget)."""
    for message in messages:
        if not isinstance(message, ImageArray):
            yield message
            continue
        time, sets, locations = message.headers.shape
        for index, (loc, s, n) in enumerate(np.ndindex(locations, sets, time)):
            meta = message.meta[index] if message.meta else ""
            pixels = np.ascontiguousarray(message.data[..., n, s, loc].transpose(3, 2, 1, 0))
            head: Any = message.headers[n, s, loc]
            yield Image(head, meta, pixels)


def extract(messages: Iterator[Message], _header: Header, settings: ExtractSettings) -> Iterator[Message]:
    """Complex images to float32 magnitude, real or imaginary part, or phase (ExtractGadget); others pass."""
    for message in messages:
        if not isinstance(message, Image) or not np.iscomplexobj(message.data):
            yield message
            continue
        for kind in settings.kinds():
            head = message.header.copy()
            head["data_type"] = 5
            head["image_type"] = kind
            head["image_series_index"] += _SERIES_OFFSET[kind]
            pixels = _EXTRACT[kind](message.data).astype(np.float32)
            if kind in (ImageType.REAL, ImageType.IMAGINARY):
                pixels += np.float32(settings.real_imag_offset)
            yield Image(head, message.meta, pixels)
