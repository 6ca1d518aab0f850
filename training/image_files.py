"""Reads what images come in: NIfTI, pictures, DICOM series and numpy arrays, as anatomies for `training.anatomies`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from melcore.errors import DataError, MissingDependencyError

Array = npt.NDArray[Any]
Voxel = tuple[float, float, float]
UNKNOWN: Voxel = (0.0, 0.0, 0.0)

_AXES = ("channel", "z", "y", "x")


@dataclass(frozen=True)
class Volume:
    """An image ``(channel, z, y, x)``, and the size of its voxels along z, y and x in mm (0: unknown)."""

    image: Array
    voxel: Voxel = UNKNOWN


def required(module: str, package: str) -> Any:
    """An optional module.

    Raises
    ------
    MissingDependencyError
        If it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError:
        raise MissingDependencyError(f"reading these files needs {package}: pip install 'melcore[prepare]'.") from None


def read_nifti(path: Path) -> Volume:
    """A NIfTI file, its axes turned to left-right, posterior-anterior, inferior-superior; a fourth axis is channels."""
    nibabel = required("nibabel", "nibabel")
    try:
        file = nibabel.as_closest_canonical(nibabel.load(path))
        data = np.asanyarray(file.dataobj)
        x, y, z = (float(size) for size in file.header.get_zooms()[:3])
    except (OSError, EOFError, ValueError, nibabel.filebasedimages.ImageFileError) as error:
        raise DataError(f"{path} cannot be read as NIfTI: {_words(error)}.") from None
    data = data.reshape(*data.shape[:3], -1)
    return Volume(np.ascontiguousarray(data.transpose(3, 2, 1, 0)), (z, y, x))


def read_picture(path: Path) -> Array:
    """A picture, ``(channel, y, x)``; colours are channels."""
    image = required("PIL.Image", "pillow")
    try:
        with image.open(path) as picture:
            if picture.mode not in ("L", "RGB", "I", "F", "I;16"):
                picture = picture.convert("RGB" if "A" in picture.mode or picture.mode == "P" else "L")
            data = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{path} cannot be read as a picture: {_words(error)}.") from None
    return data[None] if data.ndim == 2 else np.ascontiguousarray(data.transpose(2, 0, 1))


def read_stack(paths: Sequence[Path], voxel: Voxel = UNKNOWN) -> Volume:
    """Pictures, in the order of their names, as the slices of a volume."""
    slices = [read_picture(path)[0] for path in sorted(paths)]
    _same([one.shape for one in slices], paths)
    return Volume(np.stack(slices)[None], voxel)


def dicom_series(path: Path) -> str | None:
    """Identifier of the series that a file belongs to; None if it is no DICOM image."""
    pydicom = required("pydicom", "pydicom")
    try:
        header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["SeriesInstanceUID", "Rows"])
    except (OSError, pydicom.errors.InvalidDicomError):
        return None
    return str(header.get("SeriesInstanceUID", path.parent)) if header.get("Rows") else None


def read_dicom(paths: Sequence[Path]) -> Volume:
    """One DICOM series: its slices, in the order of their positions."""
    pydicom = required("pydicom", "pydicom")
    found: list[tuple[float, Array]] = []
    spacing, thickness = (0.0, 0.0), 0.0
    for number, path in enumerate(sorted(paths)):
        try:
            file = pydicom.dcmread(path)
            pixels = np.asarray(file.pixel_array, np.float32)
        except Exception as error:  # pydicom's decoders raise whatever they like
            raise DataError(f"{path} cannot be read as DICOM: {_words(error)}.") from None
        pixels = pixels * float(file.get("RescaleSlope", 1) or 1) + float(file.get("RescaleIntercept", 0) or 0)
        spacing = tuple(float(size) for size in file.get("PixelSpacing", (0, 0)))
        thickness = float(file.get("SpacingBetweenSlices", 0) or file.get("SliceThickness", 0) or 0)
        position = float(number)
        if file.get("ImagePositionPatient") and file.get("ImageOrientationPatient"):
            turn = np.array(file.ImageOrientationPatient, float)
            position = float(np.cross(turn[:3], turn[3:]) @ np.array(file.ImagePositionPatient, float))
        frames = pixels if pixels.ndim == 3 else pixels[None]
        found += [(position + frame * thickness, one) for frame, one in enumerate(frames)]
    _same([one.shape for _, one in found], paths)
    found.sort(key=lambda item: item[0])
    positions = [position for position, _ in found]
    if len(set(positions)) < len(positions):
        # Echoes or phases at the same place: each of them a channel.
        repeats = positions.count(positions[0])
        if any(positions.count(position) != repeats for position in positions):
            raise DataError(f"the DICOM series in {paths[0].parent} has places with different numbers of images.")
        stack = np.stack([one for _, one in found])
        stack = stack.reshape(len(found) // repeats, repeats, *stack.shape[1:]).swapaxes(0, 1)
    else:
        stack = np.stack([one for _, one in found])[None]
        if len(found) > 1:
            thickness = abs(positions[1] - positions[0]) or thickness
    return Volume(np.ascontiguousarray(stack), (thickness, spacing[0], spacing[1]))


def read_array(path: Path, axes: Sequence[str], voxel: Voxel = UNKNOWN) -> Volume:
    """A numpy array whose axes are named, as ``z, y, x``."""
    return Volume(in_order(load_array(path), axes, _AXES, path), voxel)


def load_array(path: Path) -> Array:
    """The array of an ``.npy`` file, or the only one (or the largest) of an ``.npz`` file."""
    try:
        content = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as numpy: {_words(error)}.") from None
    if isinstance(content, np.ndarray):
        return content
    with content:
        return max((content[name] for name in content.files), key=lambda array: int(array.size))


def in_order(array: Array, axes: Sequence[str], wanted: Sequence[str], path: Path) -> Array:
    """An array with its named axes in another order, axes of one sample where it lacks one.

    Raises
    ------
    DataError
        If the names do not fit the array.
    """
    strange = [name for name in axes if name not in wanted]
    if len(axes) != array.ndim or strange or len(set(axes)) < len(axes):
        raise DataError(
            f"{path} has the shape {array.shape}, but --axes names {', '.join(axes) or 'nothing'}: name each of its "
            f"{array.ndim} axes once, of {', '.join(wanted)}."
        )
    present = [name for name in wanted if name in axes]
    array = np.transpose(array, [list(axes).index(name) for name in present])
    return array.reshape([array.shape[present.index(name)] if name in axes else 1 for name in wanted])


def to_tensor(image: Array) -> Tensor:
    """Magnitudes as float16 with bright tissue at about 1; complex images as complex64.

    Raises
    ------
    DataError
        If there is nothing to see, or NaN or infinity.
    """
    if not np.isfinite(image).all():
        raise DataError("the image holds NaN or infinity.")
    magnitude = np.abs(image)
    bright = magnitude[magnitude > 0.1 * magnitude.max()]
    if bright.size == 0:
        raise DataError("the image is zero everywhere.")
    level = float(np.percentile(bright, 99))
    if np.iscomplexobj(image):
        return torch.from_numpy((image / level).astype(np.complex64))
    return torch.from_numpy((image.astype(np.float32) / level).clip(0, 100).astype(np.float16))


def occupied(image: Array, least: float) -> tuple[tuple[int, int], ...]:
    """First and last index along z, y and x of planes in which more than 1 % of the voxels are above `least`."""
    some = image > least
    box = []
    for axis in range(3):
        others = tuple(other for other in range(3) if other != axis)
        planes = np.flatnonzero(some.mean(axis=others) > 0.01)
        box.append((int(planes[0]), int(planes[-1])) if planes.size else (0, image.shape[axis] - 1))
    return tuple(box)


def _same(shapes: Sequence[tuple[int, ...]], paths: Sequence[Path]) -> None:
    if len(set(shapes)) > 1:
        raise DataError(f"the images in {paths[0].parent} differ in size: {sorted(set(shapes))}.")


def _words(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
