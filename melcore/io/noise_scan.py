"""The noise scan of an exam: its own, or one from another file; and whether the two belong together."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.data import Noise
from melcore.errors import DataError
from melcore.io.mrd import RawFile, open_raw
from melcore.io.mrd_header import WHITENED, user_text
from melcore.io.mrd_types import IS_NOISE, NOT_IMAGING, has_any_flag, has_flag
from melcore.preprocess.whitening import RELATIVE_BANDWIDTH, NoiseCovariance, noise_covariance, whitening_matrix


@dataclass(frozen=True)
class Whitening:
    """How the noise of a file is treated.

    Attributes
    ----------
    matrix
        For `melcore.preprocess.whitening.whiten`; None if there is no noise scan, or the data are white already.
    noise
        For `melcore.data.KSpace`.
    words
        The same in words, with every correction that was made; for the record.
    """

    matrix: Tensor | None
    noise: Noise
    words: str


def whitening_of(
    raw: RawFile, headers: npt.NDArray[np.void] | None = None, noise: str | os.PathLike[str] | None = None
) -> Whitening:
    """Find the noise scan and what whitens by it.

    Parameters
    ----------
    raw
        The exam.
    headers
        Of its acquisitions, if they have been read.
    noise
        File with a separate noise scan, which then counts instead of the exam's own.

    Raises
    ------
    DataError
        If the noise is not that of the exam's coils, or unusable; if the data have been whitened before and a noise
        file is given all the same.
    """
    headers = raw.headers() if headers is None else headers
    before = user_text(raw.header, WHITENED)
    if before is not None:
        if noise is not None:
            raise DataError(f"{raw.path} has been whitened already ({before}): do not give a noise file.")
        return Whitening(None, Noise(whitened=True, source="file"), before)
    imaging = headers[~has_any_flag(headers, NOT_IMAGING)]
    if not len(imaging):
        raise DataError(f"of {len(headers)} acquisitions of {raw.path} none is a line of the image.")
    source: Literal["scan", "file"] = "scan" if noise is None else "file"
    if noise is None:
        if not has_flag(headers, IS_NOISE).any():
            return Whitening(None, Noise(), "no noise scan: not whitened")
        covariance, remarks = _covariance(raw, headers)
        words = "by the noise scan"
    else:
        with open_raw(noise) as other:
            _check_labels(raw, other)
            covariance, remarks = _covariance(other, other.headers())
            words = f"by the noise scan of {other.path.name}"
    coils = int(imaging["active_channels"][0])
    if len(covariance.matrix) != coils:
        where = raw.path if noise is None else noise
        raise DataError(
            f"the noise scan of {where} has {len(covariance.matrix)} coils, but the image lines of {raw.path} have "
            f"{coils}: give the noise scan of the same coils (--noise), or leave it out."
        )
    dwell_time = float(imaging["sample_time_us"][0]) * 1e-6
    if not (dwell_time > 0 and covariance.dwell_time > 0):
        remarks.append("the dwell time of the image or of the noise is unknown, so that its level is not corrected")
    bandwidth = getattr(raw.header.acquisitionSystemInformation, "relativeReceiverNoiseBandwidth", None)
    matrix = whitening_matrix(covariance, dwell_time, bandwidth or RELATIVE_BANDWIDTH)
    record = Noise(whitened=True, source=source, condition_number=covariance.condition_number)
    return Whitening(matrix, record, "; ".join((words, *remarks, *covariance.remarks)))


def _covariance(raw: RawFile, headers: npt.NDArray[np.void]) -> tuple[NoiseCovariance, list[str]]:
    """Covariance of the noise readouts, and what was corrected."""
    chosen = np.flatnonzero(has_flag(headers, IS_NOISE))
    if not chosen.size:
        raise DataError(f"{raw.path} holds no noise readouts: give a file with a noise scan.")
    coils = np.unique(headers["active_channels"][chosen])
    if coils.size > 1:
        raise DataError(f"the noise readouts of {raw.path} have {coils.tolist()} coils: expected the same throughout.")
    remarks = []
    dwell_times = headers["sample_time_us"][chosen]
    if (dwell_times != dwell_times[0]).any():
        # The level of the noise depends on the dwell time: readouts of another one are another noise scan.
        alike = dwell_times == dwell_times[0]
        remarks.append(f"{np.count_nonzero(~alike)} noise readouts of another dwell time than the first were left out")
        chosen = chosen[alike]
    samples = [torch.from_numpy(acquisition.data) for acquisition in raw.acquisitions_at(chosen)]
    return noise_covariance(torch.cat(samples, dim=1), float(dwell_times[0]) * 1e-6), remarks


def _check_labels(raw: RawFile, other: RawFile) -> None:
    ours, theirs = (_labels(file.header) for file in (raw, other))
    if ours and theirs and ours != theirs:
        where = next(
            (n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(map(len, (ours, theirs)))
        )
        raise DataError(
            f"the coils of {other.path} are not those of {raw.path}: coil {where} is "
            f"{theirs[where] if where < len(theirs) else 'absent'!r} there and "
            f"{ours[where] if where < len(ours) else 'absent'!r} here; give the noise scan of the same coils."
        )


def _labels(header: Any) -> list[str]:
    system = header.acquisitionSystemInformation
    labels = [] if system is None else system.coilLabel
    return [label.coilName for label in sorted(labels, key=lambda label: label.coilNumber)]
