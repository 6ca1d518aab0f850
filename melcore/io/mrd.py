"""ISMRMRD raw data: files read and written in bulk.

The `ismrmrd` package reads one acquisition at a time, which takes some hundred times longer than reading slices of the
HDF5 table as here. An acquisition is a triple of its 340-byte header, exactly as on the wire of a Gadgetron, its
trajectory and its samples.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import h5py
import numpy as np
import numpy.typing as npt

from melcore.errors import DataError
from melcore.io.atomic import replacing
from melcore.io.checks import all_finite
from melcore.io.hdf5_rows import stored_headers
from melcore.io.mrd_header import parse_header, scan_info
from melcore.io.mrd_types import (
    ACQUISITION_HEADER,
    IMAGE_HEADER,
    NOT_IMAGING,
    WAVEFORM_HEADER,
    Acquisition,
    Waveform,
    has_any_flag,
    has_flag,
)

__all__ = [
    "ACQUISITION_HEADER",
    "IMAGE_HEADER",
    "NOT_IMAGING",
    "WAVEFORM_HEADER",
    "Acquisition",
    "RawFile",
    "Waveform",
    "has_any_flag",
    "has_flag",
    "open_hdf5",
    "open_raw",
    "parse_header",
    "scan_info",
    "write_raw",
]

_FLOATS = h5py.vlen_dtype(np.dtype("<f4"))
_ACQUISITION_ROW = np.dtype([("head", ACQUISITION_HEADER), ("traj", _FLOATS), ("data", _FLOATS)])
_WAVEFORM_ROW = np.dtype([("head", WAVEFORM_HEADER), ("data", h5py.vlen_dtype(np.dtype("<u4")))])
_CHUNK_BYTES = 8 << 20
_FIRST = 16  # rows, from which the size of the others is guessed


class RawFile:
    """An open ISMRMRD file; use `open_raw`.

    Attributes
    ----------
    path : pathlib.Path
    header : ismrmrd.xsd.ismrmrdHeader
    header_xml : str
    count, waveform_count : int
        Number of acquisitions, and of waveforms.
    """

    def __init__(self, path: Path, file: h5py.File, group: str) -> None:
        self.path = path
        self._file = file
        self._group = file[group]
        xml = self._group["xml"][0]
        self.header_xml: str = xml.decode("utf-8", "replace") if isinstance(xml, bytes) else str(xml)
        self.header: Any = parse_header(self.header_xml.encode(), f"the header of {path}")
        self.count: int = self._group["data"].shape[0]
        self.waveform_count: int = self._group["waveforms"].shape[0] if "waveforms" in self._group else 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def headers(self) -> npt.NDArray[np.void]:
        """Headers of all acquisitions; of most files without reading any samples."""
        found = stored_headers(self._group["data"])
        if found is None:
            parts = [rows["head"] for _, rows in self._blocks(1024)]
            found = np.concatenate(parts).astype(ACQUISITION_HEADER, copy=False)
        return found

    def acquisitions(self, chunk: int = 1024) -> Iterator[Acquisition]:
        """Iterate over the acquisitions in the order of the file.

        Parameters
        ----------
        chunk
            How many are in memory at once; fewer where they are large.

        Raises
        ------
        DataError
            If one is damaged, holds NaN or infinity, or has another number of coils than the imaging ones before it.
        """
        coils: tuple[int, int] | None = None
        for start, rows in self._blocks(chunk):
            coils = self._check_coils(rows["head"], start, coils)
            for index, row in enumerate(rows, start):
                yield self._acquisition(row, index)

    def _blocks(self, chunk: int) -> Iterator[tuple[int, npt.NDArray[np.void]]]:
        """Rows of the table, so many at a time that they stay small, and the number of the first of them."""
        step, start = min(chunk, _FIRST), 0
        while start < self.count:
            rows = self._rows("data", _ACQUISITION_ROW, start, min(start + step, self.count))
            yield start, rows
            start += len(rows)
            largest = max(rows["data"], key=len).nbytes
            step = max(1, min(chunk, _CHUNK_BYTES // max(largest, 1)))

    def acquisitions_at(self, indices: Iterable[int]) -> Iterator[Acquisition]:
        """Those of some numbers, which ascend; for a few ones, as a noise scan is. Errors as `acquisitions`."""
        for index in map(int, indices):
            (row,) = self._rows("data", _ACQUISITION_ROW, index, index + 1)
            yield self._acquisition(row, index)

    def waveforms(self, chunk: int = 1024) -> Iterator[Waveform]:
        """Iterate over the waveforms (ECG and the like), if there are any."""
        count = self.waveform_count
        for start in range(0, count, chunk):
            for row in self._rows("waveforms", _WAVEFORM_ROW, start, min(start + chunk, count)):
                channels, samples = int(row["head"]["channels"]), int(row["head"]["number_of_samples"])
                if row["data"].size != channels * samples:
                    raise DataError(
                        f"a waveform of {self.path} is damaged: {row['data'].size} values, not {channels}x{samples}."
                    )
                yield Waveform(row["head"], row["data"].astype(np.uint32, copy=False).reshape(channels, samples))

    def _rows(self, name: str, dtype: np.dtype[Any], start: int, stop: int) -> Any:
        try:
            # HDF5 finds the fields by name, whatever padding or order the writing program gave them.
            return self._group[name].astype(dtype)[start:stop]
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"acquisitions {start} to {stop - 1} of {self.path} cannot be read, the file is damaged: {reason}"
            ) from None

    def _check_coils(
        self, headers: npt.NDArray[np.void], start: int, known: tuple[int, int] | None
    ) -> tuple[int, int] | None:
        """Compare the numbers of coils of imaging acquisitions with the first one's, ``(acquisition, coils)``."""
        imaging = np.flatnonzero(~has_any_flag(headers, NOT_IMAGING))
        if not imaging.size:
            return known
        coils = headers["active_channels"][imaging]
        known = known or (start + int(imaging[0]), int(coils[0]))
        other = np.flatnonzero(coils != known[1])
        if other.size:
            raise DataError(
                f"acquisition {start + imaging[other[0]]} of {self.path} has {coils[other[0]]} coils, but acquisition "
                f"{known[0]} has {known[1]}: the coils of an exam must not change; split the file, or drop the others."
            )
        return known

    def _acquisition(self, row: Any, index: int) -> Acquisition:
        head, values, trajectory = row["head"], row["data"], row["traj"]
        coils, samples = int(head["active_channels"]), int(head["number_of_samples"])
        dimensions = int(head["trajectory_dimensions"])
        if values.size != 2 * coils * samples:
            raise DataError(
                f"acquisition {index} of {self.path} is damaged: its header announces {coils} coils x {samples} "
                f"samples, but it holds {values.size // 2} complex values."
            )
        if trajectory.size != dimensions * samples:
            # Some converters announce a trajectory that they do not write.
            if trajectory.size:
                raise DataError(
                    f"acquisition {index} of {self.path} is damaged: its header announces a trajectory of {samples} x "
                    f"{dimensions} values, but it holds {trajectory.size}."
                )
            dimensions = 0
        if not all_finite(values):
            raise DataError(
                f"acquisition {index} of {self.path} holds NaN or infinity: find out where they come from, or drop it."
            )
        return Acquisition(
            head, trajectory.reshape(samples, dimensions), values.view(np.complex64).reshape(coils, samples)
        )


def open_raw(path: str | os.PathLike[str], group: str = "dataset") -> RawFile:
    """Open an ISMRMRD file for reading.

    Parameters
    ----------
    path
        An HDF5 file.
    group
        Where in it the raw data lie.

    Raises
    ------
    DataError
        If the file is missing, damaged, not HDF5 or not ISMRMRD, if its header cannot be read or has no encoding, or if
        it has no acquisitions.
    """
    name = Path(path)
    file = open_hdf5(name)
    try:
        if group not in file or not isinstance(file[group], h5py.Group):
            groups = ", ".join(file) or "nothing"
            raise DataError(f"{name} is not an ISMRMRD raw file: it holds {groups}, but no group {group!r}.")
        for table in ("xml", "data"):
            if table not in file[group] or file[group][table].ndim != 1 or not file[group][table].shape[0]:
                what = "header (xml)" if table == "xml" else "acquisitions (data)"
                raise DataError(f"{name} has no {what} in its group {group!r}: it holds no raw data to reconstruct.")
        if file[group]["data"].dtype.names is None or not {"head", "data"} <= set(file[group]["data"].dtype.names):
            raise DataError(f"{name} is not an ISMRMRD raw file: {group}/data is no table of acquisitions.")
        return RawFile(name, file, group)
    except BaseException:
        file.close()
        raise


def open_hdf5(path: Path) -> h5py.File:
    """Open an HDF5 file for reading, with errors that say what is wrong with it."""
    if not path.exists():
        raise DataError(f"{path} does not exist.")
    if path.is_dir():
        raise DataError(f"{path} is a folder: give an ISMRMRD file (.h5).")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = str(error)
        if "truncated" in reason:
            raise DataError(f"{path} is truncated: it was not completely copied or written; copy it again.") from None
        if "signature" in reason:
            raise DataError(f"{path} is not an HDF5 file, hence not ISMRMRD: convert it first.") from None
        raise DataError(f"{path} cannot be opened: {' '.join(reason.split())}") from None


def write_raw(
    path: str | os.PathLike[str],
    header_xml: str,
    acquisitions: Iterable[Acquisition],
    waveforms: Iterable[Waveform] = (),
) -> None:
    """Write an ISMRMRD file: complete, or not at all.

    Parameters
    ----------
    path
        Replaced if it exists.
    header_xml
        Checked first.
    acquisitions, waveforms
        Consumed piece by piece, so that they need not fit into memory.

    Raises
    ------
    DataError
        If the header cannot be read, an acquisition does not fit its own header, or the file cannot be written.
    """
    parse_header(header_xml.encode(), "the header to write")
    with replacing(path) as temporary, h5py.File(temporary, "w") as file:
        group = file.create_group("dataset")
        group.create_dataset("xml", data=[header_xml.encode()], dtype=h5py.special_dtype(vlen=bytes))
        rows = (_checked_row(acquisition) for acquisition in acquisitions)
        _write_table(group, "data", rows, _ACQUISITION_ROW, always=True)
        _write_table(
            group, "waveforms", ((w.header, w.data.reshape(-1)) for w in waveforms), _WAVEFORM_ROW, always=False
        )


def _checked_row(acquisition: Acquisition) -> tuple[Any, ...]:
    head, data, trajectory = acquisition.header, acquisition.data, acquisition.trajectory
    expected = (int(head["active_channels"]), int(head["number_of_samples"]))
    if data.shape != expected or trajectory.size != expected[1] * int(head["trajectory_dimensions"]):
        raise DataError(
            f"an acquisition announces {expected} (coil, samples) and a trajectory of {head['trajectory_dimensions']} "
            f"dimensions, but has data {data.shape} and trajectory {trajectory.shape}: correct its header."
        )
    samples = np.ascontiguousarray(data, np.complex64).view(np.float32).reshape(-1)
    return head, np.ascontiguousarray(trajectory, np.float32).reshape(-1), samples


def _write_table(
    group: h5py.Group, name: str, rows: Iterator[tuple[Any, ...]], dtype: np.dtype[Any], *, always: bool
) -> None:
    table = None
    while block := _block(rows):
        array = np.empty(len(block), dtype)
        for index, row in enumerate(block):
            array[index] = row
        if table is None:
            table = group.create_dataset(name, (0,), maxshape=(None,), chunks=(256,), dtype=dtype)
        table.resize(len(table) + len(block), axis=0)
        table[-len(block) :] = array
    if table is None and always:
        group.create_dataset(name, (0,), maxshape=(None,), chunks=(256,), dtype=dtype)


def _block(rows: Iterator[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """The next rows, as many as are written at once."""
    block, size = [], 0
    for row in islice(rows, 512):
        block.append(row)
        size += row[-1].nbytes
        if size >= _CHUNK_BYTES:
            break
    return block
