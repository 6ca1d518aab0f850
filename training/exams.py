"""Test exams from prepared folders and from fully sampled raw files."""

import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from melcore.data import KSpace, Noise, ScanInfo
from melcore.errors import ConfigError, DataError
from melcore.physics.fourier import fft
from melcore.simulate.coils import coil_maps
from training.anatomies import MANIFEST, SPLITS, Entry, Folder, open_folder
from training.cases import Exam, exam_of

Matrix = tuple[int, int, int]
# Of exams that are drawn from images: (z, y, x) and frames, as small as shows what a method can do.
MATRICES: dict[str, tuple[Matrix, int]] = {"2d": ((1, 128, 128), 1), "3d": ((48, 64, 64), 1), "2d+t": ((1, 96, 96), 12)}
_COILS = 8
_RAW = (".h5", ".hdf5", ".mrd", ".cfl", ".npy")
_PHASE = 0.5  # rad; see `training.fields.add_phase`


def read_exams(
    path: str | os.PathLike[str],
    *,
    dimensions: Sequence[str],
    split: str = "test",
    most: int = 4,
    matrix: Matrix | None = None,
    axes: Sequence[str] = (),
    seed: int = 0,
) -> Iterator[Exam]:
    """Exams of a prepared folder or of a raw file, one after the other.

    Parameters
    ----------
    path
        A folder that ``mel prepare`` made, ISMRMRD or fastMRI's HDF5 (``.h5``), BART's ``.cfl``, or ``.npy``.
    dimensions
        ``2d``, ``3d``, ``2d+t``: which exams are wanted of images, from which any can be drawn. Raw data are what they
        are.
    split
        Which subjects of a prepared folder; ``all`` takes every one.
    most
        Slices of a file or subject at most, evenly spaced.
    matrix
        Of exams that are drawn from images, instead of `MATRICES`.
    axes
        Of numpy arrays; see `training.raw_files.AXES`.
    seed
        Of what is drawn: window, phase and coils.

    Raises
    ------
    DataError
        If the file is missing, of another kind, undersampled, or the folder has no such subject.
    """
    place = Path(path)
    if place.is_dir() and (place / MANIFEST).is_file():
        yield from _prepared(open_folder(place), dimensions, split, most, matrix, seed)
    elif place.is_dir():
        raise DataError(
            f"{place} is a folder without {MANIFEST}: prepare it first (mel prepare {place} -o FOLDER), or name files."
        )
    elif place.suffix.lower() in _RAW and place.is_file():
        yield from _raw(place, most, axes)
    elif not place.exists():
        raise DataError(f"there is no {place}: give a prepared folder or a raw file ({', '.join(_RAW)}).")
    else:
        raise DataError(f"{place} is of a kind that mel prepare reads: prepare it, and evaluate the prepared folder.")


def simulated_exam(name: str, image: Tensor, *, subject: str = "", coils: int = _COILS, seed: int = 0) -> Exam:
    """An exam without noise: complex images ``(time, z, y, x)`` seen by simulated coils."""
    _, z, y, x = image.shape
    maps = coil_maps((z, y, x), coils, seed=seed)
    complete = fft(maps[None, :, None] * image.to(torch.complex64)[None, None])
    info = ScanInfo((z, y, x), (z, y, x))
    return Exam(name, subject or name, complete, 0.0, info, origin="images seen by simulated coils")


def _raw(path: Path, most: int, axes: Sequence[str]) -> Iterator[Exam]:
    from training.raw_files import read_raw

    raw = read_raw(path, axes)
    source: Literal["scan", "estimated"] = "scan" if raw.noise == "scan" else "estimated"
    yield from _slices(path.stem, raw.k_space, source, most, path.name, path.stem)


def _slices(
    name: str, data: Tensor, source: Literal["scan", "estimated"], most: int, origin: str, subject: str
) -> Iterator[Exam]:
    """Slices of white k-space ``(slice, coil, time, z, y, x)`` as exams."""
    for index in _spread(len(data), most):
        one = data[index : index + 1]
        info = ScanInfo(_grid(one), _grid(one))
        everywhere = torch.ones(1, 1, 1, 1, 1, 1, dtype=torch.bool)
        k_space = KSpace(one, everywhere, info, Noise(whitened=True, source=source))
        yield exam_of(f"{name} {index}" if len(data) > 1 else name, k_space, subject=subject, origin=origin)


def _grid(data: Tensor) -> Matrix:
    z, y, x = data.shape[-3:]
    return z, y, x


def _prepared(
    folder: Folder, dimensions: Sequence[str], split: str, most: int, matrix: Matrix | None, seed: int
) -> Iterator[Exam]:
    if split not in (*SPLITS, "all"):
        raise ConfigError(f"the split is one of {', '.join(SPLITS)} or all, not {split!r}.")
    chosen = [entry for entry in folder.entries if split in ("all", entry.split)]
    if not chosen:
        found = ", ".join(sorted({entry.split for entry in folder.entries})) or "none"
        raise DataError(
            f"{folder.path} has no subject in the {split} split (it has: {found}): choose another with --split."
        )
    for entry in chosen:
        origin = f"{folder.path.name}/{entry.file}" + (f", {entry.origin}" if entry.origin else "")
        if entry.kind == "k-space":
            source: Literal["scan", "estimated"] = "scan" if entry.noise == "scan" else "estimated"
            data = folder.read(entry, "k_space")
            yield from _slices(entry.subject, data, source, most, origin, entry.subject)
        else:
            yield from (replace(exam, origin=origin) for exam in _drawn(folder, entry, dimensions, matrix, seed))


def _drawn(folder: Folder, entry: Entry, dimensions: Sequence[str], matrix: Matrix | None, seed: int) -> Iterator[Exam]:
    """One exam for each of the dimensions that can be drawn from a subject."""
    from training.anatomy import draw_anatomy
    from training.cine import draw_cine
    from training.sources import usable

    for wanted in dimensions:
        if wanted not in MATRICES or not usable(entry, wanted):  # type: ignore[arg-type]
            continue
        size, frames = MATRICES[wanted]
        size = matrix or size
        if (size[0] > 1) != (wanted == "3d"):
            raise ConfigError(f"--matrix {','.join(map(str, size))} (z,y,x) is no matrix of a {wanted} exam.")
        number = zlib.crc32(f"{seed} {entry.subject} {wanted}".encode())
        rng = np.random.default_rng(number)
        if wanted.endswith("+t"):
            image = draw_cine(folder, entry, size, frames, 1.0, _PHASE, rng)
        else:
            image = draw_anatomy(folder, entry, size, 1.0, _PHASE, rng)
        yield simulated_exam(f"{entry.subject} {wanted}", image, subject=entry.subject, seed=number)


def _spread(count: int, most: int) -> list[int]:
    """At most so many indices, evenly spaced, none at the ends where there is a choice."""
    if count <= most:
        return list(range(count))
    return [int((index + 0.5) * count / most) for index in range(most)]
