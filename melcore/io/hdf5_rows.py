"""Acquisition headers of an HDF5 table without its samples.

Asked for one field of a table, HDF5 reads the variable-length fields beside it too, all the samples of the file, and
(2.0.0) never frees them. So the table's chunks are read as they lie in the file, where a row holds its header and
references to the rest.
"""

from typing import Any

import h5py
import numpy as np
import numpy.typing as npt

from melcore.io.mrd_types import ACQUISITION_HEADER


def stored_headers(table: h5py.Dataset) -> npt.NDArray[np.void] | None:
    """Headers of all acquisitions, or None where the table is not stored in plain chunks.

    Parameters
    ----------
    table
        ``dataset/data`` of an ISMRMRD file.
    """
    creation, kind = table.id.get_create_plist(), table.id.get_type()
    if table.chunks is None or creation.get_nfilters() or not isinstance(kind, h5py.h5t.TypeCompoundID):
        return None
    offset = kind.get_member_offset(kind.get_member_index(b"head"))
    # A reference to samples takes 16 bytes in the file and in memory, so that the row's size is known.
    row = np.dtype(
        {"names": ["head"], "formats": [table.dtype["head"]], "offsets": [offset], "itemsize": kind.get_size()}
    )
    (size,) = table.chunks
    headers = np.zeros(len(table), ACQUISITION_HEADER)
    for start in range(0, len(table), size):
        try:
            _, content = table.id.read_direct_chunk((start,))
        except (OSError, ValueError, RuntimeError):
            return None  # reading in the usual way tells what is wrong
        if len(content) != size * row.itemsize:
            return None
        count = min(size, len(table) - start)
        _assign(headers[start : start + count], np.frombuffer(content, row, count)["head"])
    return headers


def _assign(target: npt.NDArray[Any], source: npt.NDArray[Any]) -> None:
    """Copy by the names of the fields, whatever their order and padding."""
    for name in target.dtype.names or ():
        if target.dtype[name].names:
            _assign(target[name], source[name])
        else:
            target[name] = source[name]
