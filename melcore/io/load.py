"""An ISMRMRD file to k-space without a chain: whitened, without readout oversampling, sorted onto the grid."""

import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from melcore.data import KSpace, Noise, ScanInfo
from melcore.errors import MemoryBudgetError
from melcore.io.mrd import Acquisition, RawFile, open_raw, scan_info
from melcore.io.noise_scan import noise_record, whitening_of
from melcore.io.placement import Booleans, Placement, place
from melcore.preprocess.calibration import calibration_region
from melcore.preprocess.noise_level import AirBeside
from melcore.preprocess.oversampling import remove_readout_oversampling
from melcore.preprocess.whitening import whiten
from melcore.units import format_bytes

_BLOCK = 256  # lines that are whitened together


def load_k_space(
    path: str | os.PathLike[str],
    *,
    encoding: int = 0,
    noise: str | os.PathLike[str] | None = None,
    centre: int | None = None,
) -> tuple[KSpace, KSpace | None]:
    """Read a Cartesian scan.

    Slices become the batch. Whichever of phase, repetition, contrast and set varies becomes time; if several do, the
    others become elements of the batch too, after the slices. Averages are averaged. The result equals that of the
    standard chain (noise adjustment, oversampling, sorting).

    Parameters
    ----------
    path
        An ISMRMRD raw file.
    encoding
        Which of the encodings in its header.
    noise
        File with a separate noise scan to whiten by, instead of the exam's own.
    centre
        Keep only the fully sampled centre, at most so many lines along z and y: what coil maps need, in little memory.

    Returns
    -------
    k_space : KSpace
        The lines of the image.
    calibration : KSpace or None
        The lines flagged for calibration on the same grid, if there are any.

    Raises
    ------
    DataError
        If the file cannot be read, holds NaN, or is not a complete Cartesian scan; if the noise scan is not that of
        its coils.
    MemoryBudgetError
        If the k-space does not fit into memory.
    """
    with open_raw(path) as raw:
        headers = raw.headers()
        info = scan_info(raw.header, encoding)
        placement = place(raw.header, headers, encoding)
        if centre is not None:
            placement = _central(placement, centre)
        whitening = whitening_of(raw, headers, noise)
        matrix = whitening.matrix
        image = _Grid(placement, placement.imaging, int(headers["active_channels"][placement.first[0]]))
        calibration = _Grid(placement, placement.calibration, image.coils) if placement.calibration.any() else None
        air = AirBeside()
        for indices, lines in _blocks(raw, placement):
            values = torch.from_numpy(lines) if matrix is None else whiten(torch.from_numpy(lines), matrix)
            full = values.new_zeros(*values.shape[:-1], placement.readout)
            full[..., placement.columns] = values[..., placement.kept]
            if not whitening.noise.whitened:
                air.add(full, placement.recon_readout, values[..., placement.kept].shape[-1])
            reduced = remove_readout_oversampling(full, placement.recon_readout).numpy()
            for grid in (image, calibration):
                if grid is not None:
                    grid.add(indices, reduced)
        info = replace(
            info,
            geometry=tuple(scan_info(raw.header, encoding, headers[index]).geometry[0] for index in placement.first),
            provenance={
                "source": raw.path.name,
                "whitening": whitening.words,
                "readout_oversampling": f"{placement.readout / placement.recon_readout:g} removed",
                "time": placement.time_counter or "none",
            }
            | ({"lines": "; ".join(placement.remarks)} if placement.remarks else {})
            | noise_record(whitening.noise),
        )
    return (
        replace(image.k_space(info, whitening.noise), air=air.samples),
        None if calibration is None else calibration.k_space(info, whitening.noise),
    )


def _central(placement: Placement, size: int) -> Placement:
    """The same of the lines of the calibration region only; memory of other lines is never touched."""
    _, _, z, y = placement.shape

    def within(lines: Booleans) -> Booleans:
        if not lines.any():
            return lines
        mask = torch.from_numpy(placement.mask(lines))
        region = calibration_region(mask, (z, y, placement.recon_readout))
        for position, full, found in ((placement.z, z, region[0]), (placement.y, y, region[1])):
            used = min(found, size)
            start = full // 2 - used // 2
            lines = lines & (position >= start) & (position < start + used)
        return lines

    return replace(placement, imaging=within(placement.imaging), calibration=within(placement.calibration))


def _blocks(raw: RawFile, placement: Placement) -> Iterator[tuple[list[int], npt.NDArray[np.complex64]]]:
    """Numbers of the usable acquisitions, and their data ``(line, coil, sample)``, some at a time."""
    usable = placement.imaging | placement.calibration
    lines: Iterator[tuple[int, Acquisition]] = (
        (index, acquisition) for index, acquisition in enumerate(raw.acquisitions()) if usable[index]
    )
    while block := list(islice(lines, _BLOCK)):
        yield [index for index, _ in block], np.stack([acquisition.data for _, acquisition in block])


class _Grid:
    """K-space that grows line by line; lines that come more than once are averaged."""

    def __init__(self, placement: Placement, lines: Booleans, coils: int) -> None:
        self.placement, self.lines, self.coils = placement, lines, coils
        batch, time, z, y = placement.shape
        shape = (batch, coils, time, z, y, placement.recon_readout)
        try:
            self.data = np.zeros(shape, np.complex64)
        except (MemoryError, ValueError):
            size = format_bytes(8 * float(np.prod([float(n) for n in shape])))
            raise MemoryBudgetError(
                f"k-space of {shape} (batch, coil, time, z, y, x) needs {size} of memory."
            ) from None
        self.counts = np.zeros((batch, time, z, y), np.float32)

    def add(self, indices: list[int], values: Any) -> None:
        place = self.placement
        for index, line in zip(indices, values, strict=True):
            if self.lines[index]:
                batch, time, z, y = place.batch[index], place.time[index], place.z[index], place.y[index]
                self.data[batch, :, time, z, y] += line
                self.counts[batch, time, z, y] += 1

    def k_space(self, info: ScanInfo, noise: Noise) -> KSpace:
        batch, time, z, y = self.counts.shape
        if self.counts.max() > 1:
            self.data /= np.maximum(self.counts, 1).reshape(batch, 1, time, z, y, 1)
        mask = torch.from_numpy(self.placement.mask(self.lines))
        data = torch.from_numpy(self.data)
        if mask.shape[-1] > 1:
            # Removing oversampling spreads an asymmetric echo a little over its edge.
            data = data * mask
        return KSpace(data, mask, info, noise)
