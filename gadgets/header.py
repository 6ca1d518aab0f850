"""The ISMRMRD header as the stages need it."""

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from melcore.errors import DataError
from melcore.io import mrd_header

if TYPE_CHECKING:
    from melcore.preprocess.noise_level import AirBeside

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Limit:
    """Range of a counter."""

    minimum: int
    maximum: int
    center: int


@dataclass(frozen=True)
class Encoding:
    """One encoding space; matrix sizes and fields of view (mm) along x, y, z."""

    encoded_matrix: tuple[int, int, int]
    encoded_fov: Triple
    recon_matrix: tuple[int, int, int]
    recon_fov: Triple
    limits: dict[str, Limit]
    trajectory: str
    calibration_mode: str | None  #: None without `parallelImaging`

    @property
    def cartesian(self) -> bool:
        """Whether lines lie on the grid."""
        return self.trajectory in ("cartesian", "epi")


@dataclass(frozen=True)
class Header:
    """What a chain knows of its measurement.

    Attributes
    ----------
    document
        The whole of it, as `ismrmrd.xsd` reads it.
    provenance
        What the stages did to the data, in their own words: each stage writes its step before it hands on the first
        message, so that the stages after it know.
    """

    xml: bytes
    document: Any
    encodings: tuple[Encoding, ...]
    noise_bandwidth: float | None = None
    provenance: dict[str, str] = field(default_factory=dict)

    @functools.cached_property
    def air(self) -> "AirBeside":
        """What the stages have seen so far of the noise of data that are not white."""
        from melcore.preprocess.noise_level import AirBeside

        return AirBeside()


def parse_header(xml: bytes) -> Header:
    """Read an ISMRMRD header.

    Raises
    ------
    DataError
        If it is not XML, not an ISMRMRD header, or lacks its encoding.
    """
    document = mrd_header.parse_header(xml, "the ISMRMRD header")
    spaces = range(len(document.encoding))
    # Checks the matrix sizes; the fields of view divide below.
    for space in spaces:
        mrd_header.scan_info(document, space)
    system = document.acquisitionSystemInformation
    return Header(
        xml=xml,
        document=document,
        encodings=tuple(_encoding(document.encoding[space]) for space in spaces),
        noise_bandwidth=None if system is None else system.relativeReceiverNoiseBandwidth,
    )


def _encoding(encoding: Any) -> Encoding:
    encoded, recon = encoding.encodedSpace, encoding.reconSpace
    fields = {"encoded": _triple(encoded.fieldOfView_mm), "reconstruction": _triple(recon.fieldOfView_mm)}
    for name, lengths in fields.items():
        if not all(0 < length < 1e6 for length in lengths):
            raise DataError(
                f"the header's {name} field of view is {lengths} mm (x, y, z): every length must be positive."
            )
    limits = {}
    for limit in dataclasses.fields(encoding.encodingLimits) if encoding.encodingLimits else ():
        value = getattr(encoding.encodingLimits, limit.name)
        if hasattr(value, "minimum"):
            limits[limit.name] = Limit(int(value.minimum), int(value.maximum), int(value.center))
    parallel = encoding.parallelImaging
    mode = None if parallel is None else str(getattr(parallel.calibrationMode, "value", None) or "other")
    return Encoding(
        encoded_matrix=(encoded.matrixSize.x, encoded.matrixSize.y, encoded.matrixSize.z),
        encoded_fov=fields["encoded"],
        recon_matrix=(recon.matrixSize.x, recon.matrixSize.y, recon.matrixSize.z),
        recon_fov=fields["reconstruction"],
        limits=limits,
        trajectory=str(getattr(encoding.trajectory, "value", encoding.trajectory)),
        calibration_mode=mode,
    )


def _triple(lengths: Any) -> Triple:
    return float(lengths.x), float(lengths.y), float(lengths.z)
