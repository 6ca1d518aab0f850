"""Raw data to raw data, readout by readout, in bounded memory: whitened, or with fewer coils."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.errors import ConfigError, DataError
from melcore.io.mrd import Acquisition, RawFile, open_raw, write_raw
from melcore.io.mrd_header import COMPRESSED, WHITENED, changed_header, user_text
from melcore.io.mrd_types import IS_NOISE, NOT_IMAGING, has_any_flag, has_flag
from melcore.io.noise_scan import whitening_of
from melcore.physics.fourier import fft, ifft
from melcore.preprocess.compression import matrices_along_readout, matrix_from_gram, selection_matrix

Complex = npt.NDArray[np.complex64]

_BLOCK = 64  # readouts that are transformed together


@dataclass(frozen=True)
class Compression:
    """What coil compression did; `energy` is the fraction of the image lines' energy that is left."""

    coils: int
    virtual: int
    energy: float
    words: str


def whiten_file(
    source: str | os.PathLike[str], target: str | os.PathLike[str], noise: str | os.PathLike[str] | None = None
) -> str:
    """Write an exam with white noise of complex variance 2, without its noise readouts; returns how, in words.

    The header's user parameters say what was done, so that nothing whitens the data again.

    Raises
    ------
    DataError
        If there is no noise scan, if it is not that of these coils, or if the data are white already.
    """
    _check_target(source, target)
    with open_raw(source) as raw:
        before = user_text(raw.header, WHITENED)
        if before is not None:
            raise DataError(f"{raw.path} has been whitened already ({before}).")
        whitening = whitening_of(raw, noise=noise)
        if whitening.matrix is None:
            raise DataError(f"{raw.path} holds no noise scan: give a file that does (--noise).")
        matrix = whitening.matrix.numpy()
        xml = changed_header(raw.header_xml, {WHITENED: whitening.words})
        kept = (one for one in raw.acquisitions() if not has_flag(one.header, IS_NOISE))
        lines = (one._replace(data=matrix @ _of_coils(one, len(matrix), raw)) for one in kept)
        write_raw(target, xml, lines, raw.waveforms())
    return whitening.words


def compress_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    coils: int | None = None,
    keep: Sequence[int] | None = None,
    method: Literal["svd", "geometric"] = "svd",
) -> Compression:
    """Write an exam with fewer coils.

    The file is read twice: for the covariance of the image lines, and to be transformed.

    Parameters
    ----------
    source, target
        ISMRMRD raw files.
    coils
        Virtual coils; all that are kept if None.
    keep
        Numbers of the coils to keep before that; all by default.
    method
        ``"svd"``: one matrix for all readouts, the noise scan's too (Buehrer et al., MRM 57, 2007). ``"geometric"``:
        one for each position along the readout (Zhang et al., MRM 69, 2013); of white data, or without a noise scan.

    Raises
    ------
    ConfigError
        If the coils do not exist, or more are asked for than there are.
    DataError
        If the data hold no signal, or cannot be compressed along the readout.
    """
    _check_target(source, target)
    with open_raw(source) as raw:
        headers = raw.headers()
        imaging = ~has_any_flag(headers, NOT_IMAGING)
        if not imaging.any():
            raise DataError(f"{raw.path} holds no image lines to compress the coils by.")
        available = int(headers["active_channels"][np.argmax(imaging)])
        chosen = selection_matrix(available, range(available) if keep is None else keep)
        virtual = len(chosen) if coils is None else coils
        if not 1 <= virtual <= len(chosen):
            raise ConfigError(
                f"{len(chosen)} coils can be compressed to between 1 and {len(chosen)}, not to {virtual}."
            )
        if method == "geometric" and virtual < len(chosen):
            matrix, energy = _along_readout(raw, headers, imaging, chosen, virtual)
        else:
            gram = _gram(raw, imaging, available)
            total = float(gram.diagonal().real.sum())
            if not total > 0:
                raise DataError(f"the image lines of {raw.path} hold only zeros: coils cannot be compressed by them.")
            matrix = chosen
            if virtual < len(chosen):
                wide = chosen.to(gram.dtype)
                matrix = matrix_from_gram(wide @ gram @ wide.mH, virtual)[0] @ chosen
            exact = matrix.to(gram.dtype)
            energy = float((exact @ gram @ exact.mH).diagonal().real.sum()) / total
        words = (
            f"{available} coils to {virtual}, {method if virtual < len(chosen) else 'selected'}, energy {energy:.4f}"
        )
        xml = changed_header(raw.header_xml, {COMPRESSED: words}, virtual)
        write_raw(target, xml, _transformed(raw, matrix), raw.waveforms())
    return Compression(available, virtual, energy, words)


def _check_target(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    if Path(target).exists() and Path(source).exists() and Path(target).samefile(source):
        raise ConfigError(f"{target} is the raw file itself: give another name for the result.")


def _of_coils(acquisition: Acquisition, coils: int, raw: RawFile) -> Complex:
    if len(acquisition.data) != coils:
        raise DataError(
            f"a readout of {raw.path} (scan counter {int(acquisition.header['scan_counter'])}) has "
            f"{len(acquisition.data)} coils, but {coils} were expected: all readouts must be of the same coils."
        )
    return acquisition.data


def _image_lines(raw: RawFile, imaging: npt.NDArray[np.bool_], coils: int) -> Iterator[Tensor]:
    """Blocks ``(coil, line, sample)`` of lines of one length."""
    block: list[Complex] = []
    for acquisition, wanted in zip(raw.acquisitions(), imaging, strict=True):
        if not wanted:
            continue
        line = _of_coils(acquisition, coils, raw)
        if block and (len(block) == _BLOCK or line.shape != block[0].shape):
            yield torch.from_numpy(np.stack(block, axis=1))
            block = []
        block.append(line)
    if block:
        yield torch.from_numpy(np.stack(block, axis=1))


def _gram(raw: RawFile, imaging: npt.NDArray[np.bool_], coils: int) -> Tensor:
    gram = torch.zeros(coils, coils, dtype=torch.complex128)
    for lines in _image_lines(raw, imaging, coils):
        flat = lines.flatten(1)
        gram += (flat @ flat.mH).to(gram.dtype)
    return gram


def _along_readout(
    raw: RawFile, headers: npt.NDArray[np.void], imaging: npt.NDArray[np.bool_], chosen: Tensor, virtual: int
) -> tuple[Tensor, float]:
    """Matrices ``(x, virtual, coil)``, and the energy that is left."""
    if has_flag(headers, IS_NOISE).any():
        raise DataError(f"{raw.path} has a noise scan, which has no position along the readout: run mel whiten first.")
    layouts = np.unique(headers[["number_of_samples", "center_sample"]])
    samples = int(layouts["number_of_samples"][0])
    if len(layouts) > 1 or int(layouts["center_sample"][0]) != samples // 2:
        raise DataError(
            f"the readouts of {raw.path} differ in length or are asymmetric: geometric compression needs whole "
            "readouts; use the method svd."
        )
    grams = torch.zeros(samples, len(chosen), len(chosen), dtype=torch.complex128)
    for lines in _image_lines(raw, imaging, chosen.shape[1]):
        along = torch.tensordot(chosen, ifft(lines, (-1,)), dims=1).permute(2, 0, 1)
        grams += (along @ along.mH).to(grams.dtype)
    matrices, energy = matrices_along_readout(grams, virtual)
    return matrices @ chosen, energy


def _transformed(raw: RawFile, matrix: Tensor) -> Iterator[Acquisition]:
    virtual, coils = matrix.shape[-2:]
    apply: Callable[[Complex], Complex]
    if matrix.ndim == 2:
        numbers = matrix.numpy()

        def apply(data: Complex) -> Complex:
            return np.asarray(numbers @ data)
    else:

        def apply(data: Complex) -> Complex:
            along = ifft(torch.from_numpy(data), (-1,))
            return np.asarray(fft(torch.einsum("xvc,cx->vx", matrix, along), (-1,)).numpy())

    for acquisition in raw.acquisitions():
        header = acquisition.header.copy()
        data = apply(_of_coils(acquisition, coils, raw))
        header["active_channels"] = header["available_channels"] = virtual
        header["channel_mask"] = 0
        yield Acquisition(header, acquisition.trajectory, data)
