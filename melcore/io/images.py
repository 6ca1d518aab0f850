"""ISMRMRD image series, laid out as Gadgetron's own client writes them.

A file holds groups (one for each run), a group holds series ``image_<series index>``, and a series the datasets
``data (n, channel, z, y, x)``, ``header`` and ``attributes``. `ismrmrd.Dataset(path, group).read_image` reads them.
"""

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import numpy.typing as npt

from melcore.errors import DataError, ShapeError
from melcore.io.atomic import replacing
from melcore.io.mrd import IMAGE_HEADER, open_hdf5

_SERIES = re.compile(r"image_(\d+)")
_TEXT = h5py.special_dtype(vlen=str)
# ISMRMRD's names for the parts of a complex number; h5py's own are r and i.
_COMPLEX = np.dtype([("real", "<f4"), ("imag", "<f4")])
_FLOAT_TYPE, _COMPLEX_TYPE = 5, 7  # numbers of ISMRMRD's data types


class ImageSeries(NamedTuple):
    """Images of one kind and shape.

    Attributes
    ----------
    headers
        ``(n,)`` of `melcore.io.mrd.IMAGE_HEADER`, all with the same ``image_series_index``.
    data
        ``(n, channel, z, y, x)``, complex64 or float32.
    metas
        ISMRMRD meta XML of each image, or empty strings; none at all means empty.
    """

    headers: npt.NDArray[np.void]
    data: npt.NDArray[Any]
    metas: Sequence[str] = ()


def write_images(
    path: str | os.PathLike[str],
    group: str,
    header_xml: str,
    series: Sequence[ImageSeries],
    *,
    append: bool = False,
) -> None:
    """Write series of images: all of them, or none.

    What a header says of its own data (type, channels, matrix, length of the meta) is taken from the data.

    Parameters
    ----------
    path
        Replaced if it exists, unless `append`.
    group
        Usually the name of the configuration that made the images.
    header_xml
        ISMRMRD header of the measurement, kept beside the images; may be empty.
    series
        With different series indices.
    append
        Keep what the file holds, save for this group. The file is copied for it, so that it is never half-written.

    Raises
    ------
    ShapeError
        If headers, data and metas of a series do not match.
    DataError
        If there is nothing to write, two series have one index, or the file cannot be written.
    """
    prepared = [_prepare(one) for one in series]
    indices = [int(one.headers["image_series_index"][0]) for one in prepared]
    if not prepared or len(set(indices)) != len(indices):
        raise DataError(f"expected one or more image series with different indices, but got the indices {indices}.")
    with replacing(path) as temporary:
        if append:
            open_hdf5(Path(path)).close()
            shutil.copyfile(path, temporary)
        with h5py.File(temporary, "r+" if append else "w") as file:
            if group in file:
                del file[group]
            place = file.create_group(group)
            if header_xml:
                place.create_dataset("xml", data=[header_xml.encode()], dtype=h5py.special_dtype(vlen=bytes))
            for index, one in zip(indices, prepared, strict=True):
                _write_series(place.create_group(f"image_{index}"), one)


def _prepare(series: ImageSeries) -> ImageSeries:
    headers, data = np.atleast_1d(np.array(series.headers, IMAGE_HEADER)), np.asarray(series.data)
    metas = tuple(series.metas) or ("",) * len(headers)
    if data.ndim != 5 or not len(data) == len(headers) == len(metas) or 0 in data.shape:
        raise ShapeError(
            f"an image series needs data (n, channel, z, y, x), n headers and n metas, but has data {data.shape}, "
            f"{len(headers)} headers and {len(metas)} metas."
        )
    if len(set(headers["image_series_index"].tolist())) != 1:
        raise DataError("all images of a series must have one image_series_index.")
    complex_data = np.iscomplexobj(data)
    headers["data_type"] = _COMPLEX_TYPE if complex_data else _FLOAT_TYPE
    headers["channels"] = data.shape[1]
    headers["matrix_size"] = data.shape[:1:-1]
    headers["attribute_string_len"] = [len(meta.encode()) for meta in metas]
    return ImageSeries(headers, np.ascontiguousarray(data, np.complex64 if complex_data else np.float32), metas)


def _write_series(place: h5py.Group, series: ImageSeries) -> None:
    data = series.data.view(_COMPLEX) if np.iscomplexobj(series.data) else series.data
    place.create_dataset("data", data=data, maxshape=(None, *data.shape[1:]), chunks=(1, *data.shape[1:]))
    place.create_dataset("header", data=series.headers, maxshape=(None,), chunks=(1,))
    place.create_dataset("attributes", data=list(series.metas), dtype=_TEXT, maxshape=(None,), chunks=(1,))


def read_images(path: str | os.PathLike[str], group: str | None = None) -> list[ImageSeries]:
    """Read the series of one group, ordered by their index.

    Parameters
    ----------
    path
        Written by `write_images`, by Gadgetron's client or by the `ismrmrd` package.
    group
        May be left out where only one group holds images.

    Raises
    ------
    DataError
        If the file is missing or damaged, or there is no such group, or more than one to choose from.
    """
    name = Path(path)
    with open_hdf5(name) as file:
        groups = [key for key in file if isinstance(file[key], h5py.Group) and any(map(_SERIES.fullmatch, file[key]))]
        if group is None and len(groups) == 1:
            group = groups[0]
        if group not in groups:
            found = ", ".join(map(repr, groups)) or "none"
            wanted = "name the group" if group is None else f"there is no group {group!r}"
            raise DataError(f"{name}: {wanted}; its groups with images are: {found}.")
        place = file[group]
        indices = sorted(int(match[1]) for match in map(_SERIES.fullmatch, place) if match)
        try:
            return [_read_series(place[f"image_{index}"]) for index in indices]
        except (KeyError, OSError, ValueError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())
            raise DataError(
                f"the images in group {group!r} of {name} cannot be read, the file is damaged: {reason}"
            ) from None


def _read_series(place: h5py.Group) -> ImageSeries:
    data = place["data"][...]
    if data.dtype.names:
        parts = np.dtype(list(zip(("real", "imag"), (data.dtype[n] for n in data.dtype.names), strict=True)))
        data = data.view(parts)["real"] + 1j * data.view(parts)["imag"]
    headers = place["header"].astype(IMAGE_HEADER)[...]
    # The ismrmrd package writes the C string's closing zero.
    return ImageSeries(headers, data, tuple(text.rstrip("\0") for text in place["attributes"].asstr()[...]))
