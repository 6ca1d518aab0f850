"""What travels on a Gadgetron socket, as light objects over numpy arrays.

Headers are elements (`numpy.void`) or arrays of structured dtypes, never one Python object per header: a 3D scan has
tens of thousands.
"""

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from melcore.io.mrd_types import ACQUISITION_HEADER, IMAGE_HEADER, WAVEFORM_HEADER, Acquisition, Waveform

Array = npt.NDArray[Any]

SAMPLING = np.dtype(
    [
        ("encoded_fov", "<f4", (3,)),
        ("recon_fov", "<f4", (3,)),
        ("encoded_matrix", "<u2", (3,)),
        ("recon_matrix", "<u2", (3,)),
        ("limits", [("min", "<u2"), ("center", "<u2"), ("max", "<u2")], (3,)),
        ("padding", "u1", (2,)),
    ]
)  #: 56 bytes, C's padding included: lengths in mm, matrix sizes and index limits along x, y, z

#: The counters of an acquisition that a bucket's statistics list, in the order of the wire.
COUNTERS = (
    "kspace_encode_step_1",
    "kspace_encode_step_2",
    "slice",
    "phase",
    "contrast",
    "repetition",
    "set",
    "segment",
    "average",
)


class ImageType(enum.IntEnum):
    """What the numbers of an image are, as its header says."""

    MAGNITUDE = 1
    PHASE = 2
    REAL = 3
    IMAGINARY = 4
    COMPLEX = 5


#: `data_type` of an image header to the dtype of its numbers.
IMAGE_DTYPES: dict[int, np.dtype[Any]] = {
    1: np.dtype("<u2"),
    2: np.dtype("<i2"),
    3: np.dtype("<u4"),
    4: np.dtype("<i4"),
    5: np.dtype("<f4"),
    6: np.dtype("<f8"),
    7: np.dtype("<c8"),
    8: np.dtype("<c16"),
}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The name of a configuration that the server has."""

    name: str


@dataclass(frozen=True, slots=True)
class ConfigScript:
    """A configuration itself: the `<configuration>` of an external node, or a client's whole pipeline."""

    xml: bytes


@dataclass(frozen=True, slots=True)
class HeaderXml:
    """The ISMRMRD header."""

    xml: bytes


@dataclass(frozen=True, slots=True)
class Close:
    """Nothing more follows in this direction."""


@dataclass(frozen=True, slots=True)
class Text:
    """Words for the operator; a server accepts them from clients only, not from external modules."""

    text: str


@dataclass(frozen=True, slots=True)
class Error:
    """Why the other side gave up."""

    text: str


@dataclass(frozen=True, slots=True)
class ReconBuffer:
    """Sorted k-space of one encoding space.

    Attributes
    ----------
    data
        Complex64 ``[RO, E1, E2, CHA, N, S, LOC]``, zero where nothing was sampled.
    headers
        `ACQUISITION_HEADER` ``[E1, E2, N, S, LOC]``; where nothing was sampled, `number_of_samples` is 0.
    sampling
        One `SAMPLING` record, shape ``()``.
    trajectory
        Float32 ``[dimension, RO, E1, E2, N, S, LOC]``.
    density
        Float32 ``[RO, E1, E2, N, S, LOC]``.
    """

    data: npt.NDArray[np.complex64]
    headers: Array
    sampling: Array
    trajectory: npt.NDArray[np.float32] | None = None
    density: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True, slots=True)
class ReconBit:
    """One encoding space: what was measured for the image, and the calibration data that came along."""

    data: ReconBuffer
    reference: ReconBuffer | None = None


@dataclass(frozen=True, slots=True)
class ReconData:
    """All encoding spaces of what is reconstructed together."""

    bits: tuple[ReconBit, ...]


@dataclass(frozen=True, slots=True)
class Image:
    """One image: header (`IMAGE_HEADER`), meta attributes as ISMRMRD XML (or empty), data ``(channel, z, y, x)``."""

    header: np.void
    meta: str
    data: Array


@dataclass(frozen=True, slots=True)
class ImageArray:
    """Images of one shape.

    Attributes
    ----------
    data
        Complex64 ``[X, Y, Z, CHA, N, S, LOC]``.
    headers
        `IMAGE_HEADER` ``[N, S, LOC]``.
    meta
        None at all, or one XML text for each image, ``N`` fastest.
    waveforms, acquisition_headers
        Optional companions; the headers are ``[E1, E2, N, S, LOC]`` or any other shape the sender chose.
    """

    data: npt.NDArray[np.complex64]
    headers: Array
    meta: tuple[str, ...] = ()
    waveforms: tuple[Waveform, ...] | None = None
    acquisition_headers: Array | None = None


#: For each encoding space, the sorted distinct values of each of `COUNTERS`.
Statistics = tuple[tuple[npt.NDArray[np.uint16], ...], ...]


@dataclass(frozen=True, slots=True)
class AcquisitionBucket:
    """The readouts between two triggers, in the order of acquisition.

    A readout flagged as calibration *and* imaging is in both `data` and `reference`, calibration alone in `reference`.
    """

    data: Sequence[Acquisition]
    reference: Sequence[Acquisition]
    data_statistics: Statistics = ()
    reference_statistics: Statistics = ()
    waveforms: tuple[Waveform, ...] = ()


Message = (
    ConfigFile
    | ConfigScript
    | HeaderXml
    | Close
    | Text
    | Error
    | Acquisition
    | Waveform
    | ReconData
    | Image
    | ImageArray
    | AcquisitionBucket
)

__all__ = [
    "ACQUISITION_HEADER",
    "COUNTERS",
    "IMAGE_DTYPES",
    "IMAGE_HEADER",
    "SAMPLING",
    "WAVEFORM_HEADER",
    "Acquisition",
    "AcquisitionBucket",
    "Array",
    "Close",
    "ConfigFile",
    "ConfigScript",
    "Error",
    "HeaderXml",
    "Image",
    "ImageArray",
    "ImageType",
    "Message",
    "ReconBit",
    "ReconBuffer",
    "ReconData",
    "Statistics",
    "Text",
    "Waveform",
]
