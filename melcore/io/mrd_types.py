"""ISMRMRD's binary layouts and flags, as in files and on the wire of a Gadgetron."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

_COUNTERS = np.dtype(
    [
        ("kspace_encode_step_1", "<u2"),
        ("kspace_encode_step_2", "<u2"),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("segment", "<u2"),
        ("user", "<u2", (8,)),
    ]
)

#: The 340 bytes of an acquisition's header; times in us, lengths in mm.
ACQUISITION_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("number_of_samples", "<u2"),
        ("available_channels", "<u2"),
        ("active_channels", "<u2"),
        ("channel_mask", "<u8", (16,)),
        ("discard_pre", "<u2"),
        ("discard_post", "<u2"),
        ("center_sample", "<u2"),
        ("encoding_space_ref", "<u2"),
        ("trajectory_dimensions", "<u2"),
        ("sample_time_us", "<f4"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("idx", _COUNTERS),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
    ]
)

#: The 198 bytes of an image's header.
IMAGE_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("data_type", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("matrix_size", "<u2", (3,)),
        ("field_of_view", "<f4", (3,)),
        ("channels", "<u2"),
        ("position", "<f4", (3,)),
        ("read_dir", "<f4", (3,)),
        ("phase_dir", "<f4", (3,)),
        ("slice_dir", "<f4", (3,)),
        ("patient_table_position", "<f4", (3,)),
        ("average", "<u2"),
        ("slice", "<u2"),
        ("contrast", "<u2"),
        ("phase", "<u2"),
        ("repetition", "<u2"),
        ("set", "<u2"),
        ("acquisition_time_stamp", "<u4"),
        ("physiology_time_stamp", "<u4", (3,)),
        ("image_type", "<u2"),
        ("image_index", "<u2"),
        ("image_series_index", "<u2"),
        ("user_int", "<i4", (8,)),
        ("user_float", "<f4", (8,)),
        ("attribute_string_len", "<u4"),
    ]
)

#: The 40 bytes of a waveform's header (C's padding included).
WAVEFORM_HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("flags", "<u8"),
        ("measurement_uid", "<u4"),
        ("scan_counter", "<u4"),
        ("time_stamp", "<u4"),
        ("number_of_samples", "<u2"),
        ("channels", "<u2"),
        ("sample_time_us", "<f4"),
        ("waveform_id", "<u2"),
    ],
    align=True,
)

# Numbers of flags as the standard gives them, counted from 1.
FIRST_IN_SLICE = 7
LAST_IN_SLICE = 8
LAST_IN_REPETITION = 14
IS_NOISE = 19
IS_CALIBRATION = 20
IS_CALIBRATION_AND_IMAGING = 21
IS_REVERSE = 22
IS_NAVIGATION = 23
IS_PHASE_CORRECTION = 24
LAST_IN_MEASUREMENT = 25
IS_HIGH_PASS_FEEDBACK = 26
IS_DUMMY = 27
IS_REALTIME_FEEDBACK = 28
IS_SURFACE_COIL_CORRECTION = 29
IS_PHASE_STABILISATION_REFERENCE = 30
IS_PHASE_STABILISATION = 31

#: What people call them.
FLAG_NAMES = {
    FIRST_IN_SLICE: "first in slice",
    LAST_IN_SLICE: "last in slice",
    LAST_IN_REPETITION: "last in repetition",
    IS_NOISE: "noise",
    IS_CALIBRATION: "calibration",
    IS_CALIBRATION_AND_IMAGING: "calibration and imaging",
    IS_REVERSE: "reversed",
    IS_NAVIGATION: "navigation",
    IS_PHASE_CORRECTION: "phase correction",
    LAST_IN_MEASUREMENT: "last in measurement",
    IS_HIGH_PASS_FEEDBACK: "high-pass feedback",
    IS_DUMMY: "dummy",
    IS_REALTIME_FEEDBACK: "realtime feedback",
    IS_SURFACE_COIL_CORRECTION: "surface coil correction",
    IS_PHASE_STABILISATION_REFERENCE: "phase stabilisation reference",
    IS_PHASE_STABILISATION: "phase stabilisation",
}

#: Acquisitions with one of these flags hold no lines of the image and no calibration lines.
NOT_IMAGING = (
    IS_NOISE,
    IS_NAVIGATION,
    IS_PHASE_CORRECTION,
    IS_HIGH_PASS_FEEDBACK,
    IS_DUMMY,
    IS_REALTIME_FEEDBACK,
    IS_SURFACE_COIL_CORRECTION,
    IS_PHASE_STABILISATION_REFERENCE,
    IS_PHASE_STABILISATION,
)


class Acquisition(NamedTuple):
    """One readout.

    Attributes
    ----------
    header
        Of `ACQUISITION_HEADER`.
    trajectory
        float32 ``(samples, dimensions)``.
    data
        complex64 ``(coil, samples)``.
    """

    header: np.void
    trajectory: npt.NDArray[np.float32]
    data: npt.NDArray[np.complex64]


class Waveform(NamedTuple):
    """A piece of a physiological signal: a header of `WAVEFORM_HEADER` and uint32 data ``(channel, samples)``."""

    header: np.void
    data: npt.NDArray[np.uint32]


def has_flag(flags: Any, flag: int) -> Any:
    """Whether a flag is set in a header, in an array of headers, or in their flags.

    Parameters
    ----------
    flags
        Header(s) of acquisitions or images, or integers.
    flag
        Number as the standard gives it, counted from 1; for example `IS_NOISE`.
    """
    names = getattr(getattr(flags, "dtype", None), "names", None)
    bits = flags["flags"] if names else flags
    return (np.asarray(bits, np.uint64) >> np.uint64(flag - 1) & np.uint64(1)).astype(bool)[()]


def has_any_flag(flags: Any, wanted: Iterable[int]) -> Any:
    """As `has_flag`, for any of several."""
    return np.logical_or.reduce([has_flag(flags, flag) for flag in wanted])[()]
