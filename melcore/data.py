"""What travels between the parts: k-space, samples, maps, image, and what the scanner said of them. No behaviour.

The axes are those of `melcore.layout`; lengths are in m, times in s, fields in T, frequencies in Hz.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from melcore import layout
from melcore.errors import ShapeError

Vector = tuple[float, float, float]


@dataclass(frozen=True)
class Geometry:
    """Where an image lies in the patient. ISMRMRD's coordinate system (DICOM LPS), unit vectors, lengths in m."""

    field_of_view: Vector = (0.3, 0.3, 0.005)  #: along x (readout), y and z, in m
    position: Vector = (0.0, 0.0, 0.0)  #: centre of the field of view, in m
    read_direction: Vector = (1.0, 0.0, 0.0)
    phase_direction: Vector = (0.0, 1.0, 0.0)
    slice_direction: Vector = (0.0, 0.0, 1.0)


@dataclass(frozen=True)
class ScanInfo:
    """What is known of a scan besides its samples."""

    encoded_matrix: tuple[int, int, int]  #: (z, y, x) of the k-space grid, readout oversampling included
    recon_matrix: tuple[int, int, int]  #: (z, y, x) of the image that was asked for
    encoded_field_of_view: Vector = (0.3, 0.3, 0.005)  #: along x, y and z, in m
    geometry: tuple[Geometry, ...] = (Geometry(),)  #: one for each element of the batch, or one for all
    trajectory: str = "cartesian"
    field_strength: float | None = None  #: in T
    protocol: str = ""
    provenance: Mapping[str, str] = field(default_factory=dict)  #: how the data came here, step by step


@dataclass(frozen=True)
class Noise:
    """How the noise of a k-space was treated.

    Attributes
    ----------
    source
        Of what is known of the noise. ``"upstream"``: a server, if it had a scan. ``"estimated"``: the data themselves
        (`melcore.preprocess.noise_level`).
    condition_number
        Of the noise covariance before whitening.
    level
        Standard deviation of the complex noise of white data, in their units: one for all, or one for each element of
        the batch. Whitening by a noise scan gives the root of 2 (Gadgetron's convention).
    """

    whitened: bool = False
    source: Literal["none", "scan", "file", "simulated", "upstream", "estimated"] = "none"
    convention: str = "gadgetron-noiseadjust"  #: complex variance 2 after whitening by a noise scan
    condition_number: float | None = None
    level: tuple[float, ...] = (math.sqrt(2),)


@dataclass(frozen=True)
class KSpace:
    """Samples on the Cartesian grid.

    Attributes
    ----------
    data
        Complex ``(batch, coil, time, z, y, x)``; zero where nothing was sampled.
    mask
        Boolean, true where a sample was taken; broadcasts against `data` with one coil.
    air
        Of data that are not white, samples of the air beside the field of view, complex ``(line, coil, window, x)``:
        what readout oversampling held (`melcore.preprocess.noise_level.AirBeside`).
    """

    data: torch.Tensor
    mask: torch.Tensor
    info: ScanInfo
    noise: Noise = Noise()
    air: torch.Tensor | None = None

    def __post_init__(self) -> None:
        layout.check_axes(tuple(self.data.shape), layout.K_SPACE_AXES, "k-space data")
        layout.check_axes(tuple(self.mask.shape), layout.K_SPACE_AXES, "the sampling mask")
        sizes = zip(self.mask.shape, self.data.shape, strict=True)
        if self.mask.shape[1] != 1 or any(m not in (1, d) for m, d in sizes):
            raise ShapeError(
                f"the sampling mask {tuple(self.mask.shape)} does not broadcast against the k-space data "
                f"{tuple(self.data.shape)}: give it one coil, and 1 or the data's size along every other axis."
            )
        if self.mask.dtype != torch.bool:
            raise ShapeError(f"the sampling mask must be boolean, but is {self.mask.dtype}: use mask != 0.")


@dataclass(frozen=True)
class Samples:
    """Samples along trajectories of any shape: radial, spiral.

    Attributes
    ----------
    data
        Complex ``(batch, coil, time, 1, readout, sample)``; zero where nothing was sampled.
    trajectory
        Real ``(time, readout, sample, 2 or 3)``, time 1 or that of the data, in cycles per encoded field of view,
        components x, y(, z).
    taken
        Boolean ``(time, readout)``, time as of the trajectory; frames may have fewer readouts than there is room for.
    """

    data: torch.Tensor
    trajectory: torch.Tensor
    taken: torch.Tensor
    info: ScanInfo
    noise: Noise = Noise()

    def __post_init__(self) -> None:
        layout.check_axes(tuple(self.data.shape), layout.K_SPACE_AXES, "non-Cartesian samples")
        _, _, time, z, readouts, samples = self.data.shape
        frames = self.trajectory.shape[0]
        fits = self.trajectory.shape[1:-1] == (readouts, samples) and self.taken.shape == (frames, readouts)
        if not fits or frames not in (1, time) or z != 1:
            raise ShapeError(
                f"samples {tuple(self.data.shape)}, trajectory {tuple(self.trajectory.shape)} and readouts that were "
                f"taken {tuple(self.taken.shape)} do not fit: expected (batch, coil, {time}, 1, {readouts}, "
                f"{samples}), (1 or {time}, {readouts}, {samples}, 2 or 3) and (1 or {time}, {readouts})."
            )


@dataclass(frozen=True)
class CoilMaps:
    """Coil sensitivities, complex ``(batch, set, coil, 1, z, y, x)``, zero outside the object.

    Attributes
    ----------
    source
        How they were made, for example ``"bart ecalib -m 1"``.
    gauge
        How their phase was fixed; a network sees the gauge, so it is recorded in bundles.
    """

    data: torch.Tensor
    source: str = "unknown"
    gauge: str = "first principal component"

    def __post_init__(self) -> None:
        layout.check_axes(tuple(self.data.shape), layout.COIL_MAPS_AXES, "coil maps")


@dataclass(frozen=True)
class Image:
    """Reconstructed images, complex ``(batch, set, time, z, y, x)``, in the units of the whitened k-space."""

    data: torch.Tensor
    info: ScanInfo

    def __post_init__(self) -> None:
        layout.check_axes(tuple(self.data.shape), layout.IMAGE_AXES, "image")
