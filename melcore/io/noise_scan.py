"""The noise scan of an exam: its own, or one from another file; and whether the two belong together."""

import itertools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.data import Noise
from melcore.errors import DataError
from melcore.io.mrd import Acquisition, RawFile, open_raw
from melcore.io.mrd_header import NOISE_FILE, WHITENED, changed_header, user_text
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


def noise_record(noise: Noise) -> dict[str, str]:
    """What the provenance of data keeps of their noise beside the words of `Whitening`."""
    return {} if noise.condition_number is None else {"noise_condition_number": f"{noise.condition_number:.4g}"}


def _covariance(raw: RawFile, headers: npt.NDArray[np.void]) -> tuple[NoiseCovariance, list[str]]:
    chosen = np.flatnonzero(has_flag(headers, IS_NOISE))
    if not chosen.size:
        raise DataError(f"{raw.path} holds no noise readouts: give a file with a noise scan.")
    return covariance_of(list(raw.acquisitions_at(chosen)), f"the noise readouts of {raw.path}")


def covariance_of(noise: Sequence[Acquisition], what: str = "the noise readouts") -> tuple[NoiseCovariance, list[str]]:
    """Covariance of the readouts of a noise scan, and what was corrected.

    Parameters
    ----------
    noise
        At least one.
    what
        What to call them in errors.

    Raises
    ------
    DataError
        If their coils differ, or they cannot be used (`melcore.preprocess.whitening.noise_covariance`).
    """
    coils = {len(readout.data) for readout in noise}
    if len(coils) > 1:
        raise DataError(f"{what} have {sorted(coils)} coils: expected the same throughout.")
    remarks = []
    # The level of the noise depends on the dwell time: readouts of another one are another noise scan.
    dwell_times = [float(readout.header["sample_time_us"]) for readout in noise]
    alike = [readout for readout, dwell in zip(noise, dwell_times, strict=True) if dwell == dwell_times[0]]
    if len(alike) < len(noise):
        remarks.append(f"{len(noise) - len(alike)} noise readouts of another dwell time than the first were left out")
    samples = torch.from_numpy(np.concatenate([readout.data for readout in alike], axis=1))
    return noise_covariance(samples, dwell_times[0] * 1e-6), remarks


def with_noise_scan(raw: RawFile, noise: str | os.PathLike[str]) -> tuple[str, Iterator[Acquisition]]:
    """The header and the acquisitions of an exam, with the noise readouts of another file before them.

    They take the place of the exam's own, for whatever whitens a stream; the header names the file (`NOISE_FILE`).

    Raises
    ------
    DataError
        If the noise is not that of the exam's coils, or the exam is white already.
    """
    whitening_of(raw, noise=noise)  # refuses what does not fit, before anything is streamed
    with open_raw(noise) as other:
        scan = list(other.acquisitions_at(np.flatnonzero(has_flag(other.headers(), IS_NOISE))))
    own = (one for one in raw.acquisitions() if not has_flag(one.header, IS_NOISE))
    return changed_header(raw.header_xml, {NOISE_FILE: Path(noise).name}), itertools.chain(scan, own)


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
