"""ISMRMRD's XML header, and what MEL keeps of it. Millimetres and milliseconds end here."""

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from melcore.data import Geometry, ScanInfo, Vector
from melcore.errors import DataError

#: User parameters of a header whose data `mel whiten` has whitened, or `mel compress` compressed; they tell how.
WHITENED, COMPRESSED = "MEL_whitening", "MEL_compression"
#: User parameter of a header in whose stream the noise scan of another file takes the place of the exam's own.
NOISE_FILE = "MEL_noise_file"


def parse_header(xml: str | bytes, source: str = "the header") -> Any:
    """Read an ISMRMRD header.

    Parameters
    ----------
    xml
        The document.
    source
        What to call it in errors.

    Returns
    -------
    ismrmrd.xsd.ismrmrdHeader
        With at least one encoding.

    Raises
    ------
    DataError
        If it is not XML, not an ISMRMRD header, or without encoding.
    """
    with warnings.catch_warnings():  # importing ismrmrd resets the warning filters
        from ismrmrd import xsd
    try:
        with warnings.catch_warnings(record=True) as remarks:
            warnings.simplefilter("always")
            header = xsd.CreateFromDocument(xml)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        reason = " ".join(str(error).split()).replace("ismrmrdHeader.__init__() ", "")
        raise DataError(f"{source} is not a readable ISMRMRD header: {reason[:300]}") from None
    # An unknown trajectory is for those to name who need a known one; any other value must be what the standard says.
    for remark in remarks:
        if "`encodingType.trajectory`" not in str(remark.message) and "ConverterWarning" in remark.category.__name__:
            raise DataError(f"{source} is not a readable ISMRMRD header: {' '.join(str(remark.message).split())[:300]}")
    if not header.encoding:
        raise DataError(
            f"{source} has no <encoding>, so that neither matrix nor field of view are known: the file was not "
            "completely converted; convert it again."
        )
    return header


def scan_info(header: Any, encoding: int = 0, acquisition_header: np.void | None = None) -> ScanInfo:
    """What `melcore.data.ScanInfo` keeps of a header.

    Parameters
    ----------
    header
        From `parse_header`.
    encoding
        Which of its encodings.
    acquisition_header
        Of an imaging acquisition; gives the orientation, which the header does not know.

    Raises
    ------
    DataError
        If there is no such encoding, or if it is without matrix or field of view.
    """
    if not 0 <= encoding < len(header.encoding):
        raise DataError(f"the header has {len(header.encoding)} encodings, but the data refer to number {encoding}.")
    encoded, recon = header.encoding[encoding].encodedSpace, header.encoding[encoding].reconSpace
    matrices = []
    for name, space in (("encoded", encoded), ("reconstruction", recon)):
        matrix = (space.matrixSize.z, space.matrixSize.y, space.matrixSize.x)
        if min(matrix) < 1:
            raise DataError(f"the header's {name} matrix is {matrix} (z, y, x): every size must be at least 1.")
        matrices.append(matrix)
    system, measurement = header.acquisitionSystemInformation, header.measurementInformation
    trajectory = header.encoding[encoding].trajectory
    return ScanInfo(
        encoded_matrix=matrices[0],
        recon_matrix=matrices[1],
        encoded_field_of_view=_metres(encoded.fieldOfView_mm),
        geometry=(_geometry(_metres(recon.fieldOfView_mm), acquisition_header),),
        trajectory=str(getattr(trajectory, "value", trajectory)),
        field_strength=system.systemFieldStrength_T if system is not None else None,
        protocol=(measurement.protocolName or "") if measurement is not None else "",
    )


def _metres(field_of_view: Any) -> Vector:
    return field_of_view.x / 1e3, field_of_view.y / 1e3, field_of_view.z / 1e3


def _geometry(field_of_view: Vector, head: np.void | None) -> Geometry:
    if head is None:
        return Geometry(field_of_view)
    read, phase, normal = (_vector(head[name]) for name in ("read_dir", "phase_dir", "slice_dir"))
    x, y, z = _vector(head["position"])
    position = (x / 1e3, y / 1e3, z / 1e3)
    if not any(read) or not any(phase):  # simulators leave the directions empty
        return Geometry(field_of_view, position)
    if not any(normal):
        normal = _vector(np.cross(read, phase))
    return Geometry(field_of_view, position, read, phase, normal)


def _vector(values: Any) -> Vector:
    x, y, z = (float(value) for value in values)
    return x, y, z


def is_nonuniform(header: Any, encoding: int = 0) -> bool:
    """Whether an encoding of a header is neither Cartesian nor EPI, so that readouts must carry their trajectory."""
    trajectory = header.encoding[encoding].trajectory
    return str(getattr(trajectory, "value", trajectory)) not in ("cartesian", "epi")


def user_text(header: Any, name: str) -> str | None:
    """Value of a string among the header's user parameters, or None."""
    parameters = header.userParameters
    return next((one.value for one in parameters.userParameterString if one.name == name), None) if parameters else None


def changed_header(header_xml: str, texts: Mapping[str, str], coils: int | None = None) -> str:
    """A header with string user parameters set and, if the coils are others now, with their number and no names.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    header = parse_header(header_xml.encode())
    with warnings.catch_warnings():
        from ismrmrd import xsd
    if header.userParameters is None:
        header.userParameters = xsd.userParametersType()
    others = [one for one in header.userParameters.userParameterString if one.name not in texts]
    ours = [xsd.userParameterStringType(name=name, value=value) for name, value in texts.items()]
    header.userParameters.userParameterString = others + ours
    if coils is not None and header.acquisitionSystemInformation is not None:
        header.acquisitionSystemInformation.receiverChannels = coils
        header.acquisitionSystemInformation.coilLabel = []
    xml = xsd.ToXML(header)
    return xml if isinstance(xml, str) else xml.decode()
