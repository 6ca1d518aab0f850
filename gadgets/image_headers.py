"""Headers and meta attributes of images, made from the acquisitions behind them."""

import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence

import numpy as np

from gadgets.messages import IMAGE_DTYPES, IMAGE_HEADER, ImageType

# What an image inherits unchanged from the acquisition at the centre of its k-space.
_INHERITED = (
    "measurement_uid",
    "position",
    "read_dir",
    "phase_dir",
    "slice_dir",
    "patient_table_position",
    "acquisition_time_stamp",
    "physiology_time_stamp",
    "user_int",
    "user_float",
)
_COUNTERS = ("average", "slice", "contrast", "phase", "repetition", "set")
_TYPE_OF_DATA = {ImageType.COMPLEX: np.dtype("<c8")}


def image_header(
    acquisition: np.void,
    shape: Sequence[int],
    field_of_view: Sequence[float],
    image_type: ImageType,
    *,
    index: int,
    series: int,
) -> np.void:
    """Header of an image.

    Parameters
    ----------
    acquisition
        Header of a readout that was really taken for this image.
    shape
        ``(channel, z, y, x)``.
    field_of_view
        Along x, y, z, in mm.
    image_type
        Complex images are complex64, all others float32.
    index, series
        `image_index` from 1, and `image_series_index`: all images of a series have one shape and type.
    """
    header = np.zeros((), IMAGE_HEADER)
    header["version"] = 1
    for name in _INHERITED:
        header[name] = acquisition[name]
    for name in _COUNTERS:
        header[name] = acquisition["idx"][name]
    dtype = _TYPE_OF_DATA.get(image_type, np.dtype("<f4"))
    header["data_type"] = next(number for number, known in IMAGE_DTYPES.items() if known == dtype)
    header["matrix_size"] = tuple(shape)[:0:-1]
    header["channels"] = shape[0]
    header["field_of_view"] = field_of_view
    header["image_type"] = image_type
    header["image_index"] = index & 0xFFFF
    header["image_series_index"] = series
    record: np.void = header.reshape(1)[0]
    return record


def image_meta(attributes: Mapping[str, str]) -> str:
    """ISMRMRD meta attributes as XML; empty for none, which is what a server accepts."""
    if not attributes:
        return ""
    root = ElementTree.Element("ismrmrdMeta")
    for name, value in attributes.items():
        entry = ElementTree.SubElement(root, "meta")
        ElementTree.SubElement(entry, "name").text = name
        # Control characters cannot be written in XML at all.
        ElementTree.SubElement(entry, "value").text = "".join(c if c.isprintable() else " " for c in value)
    body = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{body}'


def with_attributes(meta: str, attributes: Mapping[str, str]) -> str:
    """Meta attributes with further ones; words are added to those of the same name."""
    new = {name: value for name, value in attributes.items() if value}
    if not new:
        return meta
    root = ElementTree.fromstring(meta.encode()) if meta else ElementTree.Element("ismrmrdMeta")
    for entry in root.findall("meta"):
        name, value = entry.findtext("name") or "", entry.find("value")
        if name in new and value is not None:
            value.text = "; ".join(filter(None, (value.text, new.pop(name))))
    added = ElementTree.fromstring((image_meta(new) or "<ismrmrdMeta/>").encode())
    root.extend(added)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ElementTree.tostring(root, encoding="unicode")}'
