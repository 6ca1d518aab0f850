"""The XML header of simulated exams (ISMRMRD schema, version 15)."""

from melcore.preprocess.whitening import RELATIVE_BANDWIDTH
from melcore.simulate.protocol import Protocol

REPETITION_TIME = 5e-3  #: between two lines, in s
CYCLE = 0.8  #: of the heart, in s
_FREQUENCY = 123_249_940  # of protons at 2.89 T, in Hz


def header(protocol: Protocol) -> str:
    """Header of an exam with this protocol."""
    z, y, x = protocol.shape
    depth = z if protocol.volume else 1
    thickness, width, height = (1e3 * size for size in protocol.voxel)
    read = x * protocol.oversampling
    kind = f"{'3D' if protocol.volume else '2D'} {'cine' if protocol.time > 1 else 'head'}"
    coils = "".join(
        f"<coilLabel><coilNumber>{coil}</coilNumber><coilName>C{coil + 1}</coilName></coilLabel>"
        for coil in range(protocol.coils)
    )
    limits = {
        "kspace_encoding_step_0": (read, read // 2),
        "kspace_encoding_step_1": (y, y // 2),
        "kspace_encoding_step_2": (depth, depth // 2),
        "average": (1, 0),
        "slice": (1 if protocol.volume else z, 0),
        "contrast": (1, 0),
        "phase": (protocol.time, 0),
        "repetition": (1, 0),
        "set": (1, 0),
        "segment": (1, 0),
    }
    encoding_limits = "\n".join(
        f"   <{name}><minimum>0</minimum><maximum>{size - 1}</maximum><center>{centre}</center></{name}>"
        for name, (size, centre) in limits.items()
    )
    return f"""<?xml version="1.0" encoding="utf-8"?>
<ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD">
 <version>15</version>
 <subjectInformation><patientID>seed {protocol.seed}</patientID></subjectInformation>
 <measurementInformation>
  <measurementID>{protocol.seed}</measurementID>
  <patientPosition>HFS</patientPosition>
  <protocolName>simulated {kind}</protocolName>
 </measurementInformation>
 <acquisitionSystemInformation>
  <systemVendor>MEL</systemVendor>
  <systemModel>simulate</systemModel>
  <systemFieldStrength_T>2.89</systemFieldStrength_T>
  <relativeReceiverNoiseBandwidth>{RELATIVE_BANDWIDTH}</relativeReceiverNoiseBandwidth>
  <receiverChannels>{protocol.coils}</receiverChannels>
  {coils}
 </acquisitionSystemInformation>
 <experimentalConditions><H1resonanceFrequency_Hz>{_FREQUENCY}</H1resonanceFrequency_Hz></experimentalConditions>
 <encoding>
  <encodedSpace>
   {_space((read, y, depth), (read * height, y * width, depth * thickness))}
  </encodedSpace>
  <reconSpace>
   {_space((x, y, depth), (x * height, y * width, depth * thickness))}
  </reconSpace>
  <encodingLimits>
{encoding_limits}
  </encodingLimits>
  <trajectory>cartesian</trajectory>
{_parallel_imaging(protocol)} </encoding>
 <sequenceParameters>
  <TR>{1e3 * REPETITION_TIME:g}</TR>
  <TE>{5e2 * REPETITION_TIME:g}</TE>
  <flipAngle_deg>12</flipAngle_deg>
 </sequenceParameters>
</ismrmrdHeader>
"""


def _space(matrix: tuple[int, int, int], size: tuple[float, float, float]) -> str:
    x, y, z = matrix
    return (
        f"<matrixSize><x>{x}</x><y>{y}</y><z>{z}</z></matrixSize>"
        f"<fieldOfView_mm><x>{size[0]:.6g}</x><y>{size[1]:.6g}</y><z>{size[2]:.6g}</z></fieldOfView_mm>"
    )


def _parallel_imaging(protocol: Protocol) -> str:
    """Whole numbers, as the standard wants; of scans without calibration lines nothing, as Gadgetron wants."""
    if not protocol.calibrated:
        return ""
    second = 2 if protocol.volume and protocol.acceleration >= 3 else 1
    first = max(1, round(protocol.acceleration / second))
    return f"""  <parallelImaging>
   <accelerationFactor>
    <kspace_encoding_step_1>{first}</kspace_encoding_step_1>
    <kspace_encoding_step_2>{second}</kspace_encoding_step_2>
   </accelerationFactor>
   <calibrationMode>embedded</calibrationMode>
  </parallelImaging>
"""
