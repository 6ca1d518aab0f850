"""Radial, spiral and other non-Cartesian files to images: read at once and reconstructed slice by slice.

There is no pipeline for them: a server sorts readouts by their counters, which says nothing of where they lie.
"""

import itertools
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import numpy as np

from gadgets.image_headers import image_header, image_meta
from gadgets.messages import Image, ImageType
from melcore.errors import ConfigError

if TYPE_CHECKING:
    from melcore.io.mrd import RawFile
    from melcore.reconstruct import Conventional

NAME = "nonuniform"  #: of the group of images


def reconstruct_nonuniform(
    raw: "RawFile",
    *,
    model: str = "none",
    noise: str | os.PathLike[str] | None = None,
    output: Literal["magnitude", "complex"] = "magnitude",
) -> Iterator[Image]:
    """Reconstruct each slice of a file, and yield its frames.

    Parameters
    ----------
    raw
        An open file whose readouts carry their trajectory.
    model
        ``"none"`` or ``"cg-sense"``, or ``"adjoint"``: gridding.
    noise
        File with a separate noise scan to whiten by.
    output
        What the images are.

    Raises
    ------
    ConfigError
        If the model is a network.
    DataError
        If the data cannot be reconstructed.
    """
    from gadgets.reconstruct_stage import story
    from melcore.io.load_samples import read_samples
    from melcore.preprocess.field_of_view import to_recon_matrix
    from melcore.reconstruct import CONVENTIONAL
    from melcore.reconstruct_samples import reconstruct_samples

    method: Conventional | None = next((one for one in CONVENTIONAL if one == model), None)
    if model == "none":
        method = "cg-sense"
    if method is None:
        raise ConfigError(
            f"non-Cartesian data can be reconstructed without a network only, not by {model!r}: give --model none "
            "(CG-SENSE) or adjoint (gridding)."
        )
    index = itertools.count(1)
    kind = ImageType.COMPLEX if output == "complex" else ImageType.MAGNITUDE
    for samples, heads in read_samples(raw, noise=noise):
        result = reconstruct_samples(samples, method)
        image = to_recon_matrix(result.image)
        field_of_view = [length * 1e3 for length in image.info.geometry[0].field_of_view]
        data = image.data[0].numpy()
        if output == "magnitude":
            data = np.sqrt(np.square(np.abs(data)).sum(axis=0, keepdims=True)).astype(np.float32)
        meta = image_meta(story(result, method, samples.info.protocol, samples.noise))
        for head, frame in zip(heads, data.swapaxes(0, 1), strict=True):
            yield Image(image_header(head, frame.shape, field_of_view, kind, index=next(index), series=1), meta, frame)
