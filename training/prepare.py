"""Prepare anatomies and fully sampled scans for training.

Reads raw data (ISMRMRD, BART's cfl, fastMRI's HDF5, numpy with --axes) and images (NIfTI, DICOM, pictures, numpy with
--axes), one exam after another on a cluster of processes, and writes a folder for data.sources of a configuration.
Subjects are split into training, validation and test by a digest of their names. A bad exam is reported and skipped; an
interrupted command is started again as it was, and goes on where it stopped.

Example:
  mel prepare scans/ -o runs/data/own --subject 'scans/([^/]+)' --licence 'own, consented'
  mel prepare labels/*.nii.gz --labels -o runs/data/labels
  mel prepare hearts/ --pairs 20 --subject '^(.*)-IM' -o runs/data/hearts
  mel prepare raw.npy --axes coil,y,x -o runs/data/raw --split test
"""

import argparse
import hashlib
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from melcore.errors import ConfigError, DataError, MelError
from training.anatomies import (
    SPLITS,
    Entry,
    Kind,
    check_splits,
    file_name,
    open_folder,
    read_record,
    split_of,
    write_manifest,
    write_subject,
)
from training.image_files import (
    UNKNOWN,
    Volume,
    Voxel,
    dicom_series,
    occupied,
    read_array,
    read_dicom,
    read_nifti,
    read_picture,
    read_stack,
    required,
    to_tensor,
)

_MARGIN = 3  # voxels of air that are kept around a volume
_PICTURES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp"}
_RAW = {".h5", ".hdf5", ".mrd", ".cfl"}
_ARRAYS = {".npy", ".npz"}


@dataclass(frozen=True)
class Options:
    """What every exam of one command has in common."""

    labels: bool = False
    pairs: int | None = None  #: phases of a slice
    undersampled: bool = False
    stack: bool = False  #: pictures of a folder are slices of a volume
    axes: tuple[str, ...] = ()
    voxel: Voxel = UNKNOWN
    split: str | None = None
    licence: str = ""
    origin: str = ""


@dataclass(frozen=True)
class Exam:
    """One file to be written."""

    subject: str
    name: str  #: of the file
    form: str  #: nifti, dicom, picture, stack, pairs, array, raw
    files: tuple[Path, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mel prepare``."""
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE", help="files, or folders of them")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="where prepared data go")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--labels", action="store_true", help="volumes are label maps, whose contrasts are drawn")
    kinds.add_argument(
        "--pairs", type=int, metavar="PHASES", help="pictures are two of so many phases of each slice of a heart"
    )
    kinds.add_argument(
        "--undersampled", action="store_true", help="raw data without a full reference, for learning without a truth"
    )
    kinds.add_argument("--stack", action="store_true", help="pictures in a folder are the slices of one volume")
    parser.add_argument(
        "--axes", default="", metavar="A,B,...", help="of numpy arrays: slice, coil, time, channel, z, y, x"
    )
    parser.add_argument("--voxel", default="", metavar="Z,Y,X", help="size of voxels in mm, where files do not tell")
    parser.add_argument(
        "--subject", metavar="REGEX", help="finds the subject in a path (its first group); by default the file's name"
    )
    parser.add_argument("--split", choices=SPLITS, help="of all subjects, instead of by their names")
    parser.add_argument("--licence", default="", help="of the data; goes into the manifest and into cards")
    parser.add_argument("--origin", default="", help="where the data come from")
    parser.add_argument("--workers", type=int, default=2, help="processes of the local cluster (0: none; default 2)")
    parser.add_argument("--scheduler", metavar="ADDRESS", help="of a running Dask cluster: tcp://host:8786")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Prepare; 0 when there is something usable in the folder."""
    options = Options(
        labels=arguments.labels,
        pairs=arguments.pairs,
        undersampled=arguments.undersampled,
        stack=arguments.stack,
        axes=tuple(name.strip() for name in arguments.axes.split(",") if name.strip()),
        voxel=_voxel(arguments.voxel),
        split=arguments.split,
        licence=arguments.licence,
        origin=arguments.origin,
    )
    if options.pairs is not None and options.pairs < 2:
        raise ConfigError(f"a heart beat has at least 2 phases, not {options.pairs} (--pairs).")
    if arguments.workers < 0:
        raise ConfigError(f"--workers must not be negative, but is {arguments.workers}.")
    folder: Path = arguments.output
    exams = find_exams(arguments.sources, folder, options, arguments.subject)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"the folder {folder} cannot be made: {error.strerror}.") from None
    todo = [exam for exam in exams if not done(folder, exam, options)]
    for exam in todo:
        for stale in folder.glob(f".{exam.name}.*.part"):  # of a command that was killed
            stale.unlink(missing_ok=True)
    bad: list[str] = []
    from tqdm import tqdm

    with tqdm(total=len(todo), desc="exams", disable=True if arguments.quiet else None) as bar:
        for exam, complaint in _prepared(folder, todo, options, arguments.workers, arguments.scheduler):
            bar.update()
            if complaint:
                bad.append(exam.subject)
                bar.write(f"mel prepare: skipped {exam.subject} ({exam.files[0]}): {complaint}", sys.stderr)
    entries = write_manifest(folder)
    if not entries:
        raise DataError(f"none of {len(exams)} exams could be used; {folder} holds nothing.")
    check_splits([open_folder(folder)])
    counts = ", ".join(f"{len({e.subject for e in entries if e.split == split})} {split}" for split in SPLITS)
    tqdm.write(
        f"{folder}: {len({entry.subject for entry in entries})} subjects ({counts}); {len(todo) - len(bad)} exams "
        f"prepared now, {len(exams) - len(todo)} already there, {len(bad)} bad"
    )
    return 0


def find_exams(sources: Sequence[Path], folder: Path, options: Options, pattern: str | None = None) -> list[Exam]:
    """What is to be read, in a fixed order, for a folder that may hold some of it already.

    Raises
    ------
    DataError
        If there is nothing, or a path does not exist.
    ConfigError
        If the pattern is no regular expression.
    """
    try:
        finder = re.compile(pattern) if pattern else None
    except re.error as error:
        raise ConfigError(f"--subject {pattern!r} is no regular expression: {error}.") from None
    groups: dict[tuple[str, str, str], list[Path]] = defaultdict(list)
    strays = 0
    for path in _files(sources):
        form = _form(path, options)
        if form is None:
            continue
        subject = re.sub(r"(\.nii)?(\.gz)?$", "", path.name) if form == "nifti" else path.stem
        if form in ("stack", "pairs") and finder is None:
            subject = path.parent.name
        if form == "dicom":
            subject = path.parent.name
        if finder is not None:
            found = finder.search(path.name) or finder.search(path.as_posix())
            if found is None:
                strays += 1
                continue
            subject = found.group(1) if finder.groups else found.group()
        # Pictures of a subject belong together; everything else is an exam by itself.
        single = "" if form in ("picture", "pairs") else str(path)
        if form == "stack":
            single = str(path.parent)
        if form == "dicom":
            single = dicom_series(path) or ""
        groups[subject, form, single].append(path)
    if not groups:
        hint = f"; --subject {pattern!r} fits none of {strays} files" if strays else ""
        raise DataError(f"nothing to prepare in {', '.join(map(str, sources))}{hint}.")
    exams, taken = [], set()
    for (subject, form, _), files in groups.items():
        stem = re.sub(r"\.nii$", "", files[0].stem)
        name = subject if form in ("picture", "pairs", "stack", "dicom") or stem == subject else f"{subject}-{stem}"
        exam = Exam(subject, _free_name(folder, name, files, taken), form, tuple(sorted(files)))
        taken.add(exam.name)
        exams.append(exam)
    return exams


def _free_name(folder: Path, name: str, files: Sequence[Path], taken: set[str]) -> str:
    """Name of a file that is not another exam's, of this command or of one before."""
    count = 1
    while True:
        found = file_name(name if count == 1 else f"{name}-{count}")
        if found not in taken and (not (folder / found).is_file() or _same_exam(folder / found, files)):
            return found
        count += 1


def _same_exam(path: Path, files: Sequence[Path]) -> bool:
    try:
        return bool(set(read_record(path).sources) & {file.name for file in files})
    except DataError:
        return True  # damaged: to be made again


def done(folder: Path, exam: Exam, options: Options) -> bool:
    """Whether an exam was prepared before, from the same files and in the same way."""
    path = folder / exam.name
    if not path.is_file():
        return False
    try:
        return read_record(path).recipe == recipe(exam, options)
    except DataError:
        return False


def recipe(exam: Exam, options: Options) -> str:
    """Digest of what a prepared file depends on."""
    files = [(path.name, path.stat().st_size) for path in exam.files]
    content = json.dumps([asdict(options), exam.subject, exam.form, files], sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def prepare_exam(folder: Path, exam: Exam, options: Options) -> str | None:
    """Read, convert and write one exam; what is wrong with it, or None."""
    torch.set_num_threads(1)
    try:
        _write(folder, exam, options)
    except MelError as error:
        return " ".join(str(error).split())
    except Exception as error:  # whatever a file does to its reader, others go on
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _write(folder: Path, exam: Exam, options: Options) -> None:
    kind: Kind
    voxel, box, noise = options.voxel, (), ""
    if exam.form == "raw" or (exam.form == "array" and "coil" in options.axes):
        from training.raw_files import read_raw

        raw = read_raw(exam.files[0], options.axes, undersampled=options.undersampled)
        kind, noise = "undersampled" if options.undersampled else "k-space", raw.noise
        names = ("k_space", "mask", "calibration", "calibration_mask")
        tensors = {name: found for name in names if (found := getattr(raw, name)) is not None}
    elif exam.form == "pairs":
        from training.heart_pairs import read_pairs

        kind, tensors = "pairs", read_pairs(exam.files, options.pairs or 20)
    elif exam.form == "picture":
        pictures = [read_picture(path) for path in exam.files]
        if len({picture.shape for picture in pictures}) > 1:
            raise DataError(
                f"pictures of {exam.subject} differ in shape ({', '.join(sorted({str(p.shape) for p in pictures}))}): "
                "make each a subject of its own with --subject."
            )
        kind, tensors = "planes", {"images": torch.stack([to_tensor(picture) for picture in pictures])}
    else:
        volume = _volume(exam, options)
        voxel = volume.voxel if min(volume.voxel) > 0 else options.voxel
        if options.labels:
            kind, tensors, box = "labels", *_labels(volume)
        elif volume.image.shape[1] == 1:
            kind, tensors = "planes", {"images": to_tensor(volume.image).transpose(0, 1)}
        else:
            kind, tensors = "volume", {"images": to_tensor(volume.image)}
            magnitude = tensors["images"].abs().float().amax(0).numpy()
            tensors, box = _cropped(tensors, occupied(magnitude, 0.08))
    main = next(iter(tensors.values()))
    write_subject(
        folder,
        Entry(
            exam.subject,
            options.split or split_of(exam.subject),  # type: ignore[arg-type]
            kind,
            exam.name,
            tuple(main.shape),
            voxel,
            box,
            noise,
            options.origin,
            options.licence,
            tuple(path.name for path in exam.files[:50]),
            recipe=recipe(exam, options),
        ),
        tensors,
    )


def _labels(volume: Volume) -> tuple[dict[str, torch.Tensor], tuple[tuple[int, int], ...]]:
    labels = volume.image[0]
    if np.iscomplexobj(labels) or not np.array_equal(labels, np.round(labels)) or labels.min() < 0:
        raise DataError("labels must be whole numbers from 0 on: leave out --labels for images.")
    if labels.max() > 32767:
        raise DataError(f"labels must be below 32768, but one is {labels.max():g}.")
    if not labels.any():
        raise DataError("the label map is zero everywhere.")
    return _cropped({"labels": torch.from_numpy(labels.astype(np.int16))}, occupied(labels, 0))


def _cropped(
    tensors: dict[str, torch.Tensor], box: tuple[tuple[int, int], ...]
) -> tuple[dict[str, torch.Tensor], tuple[tuple[int, int], ...]]:
    """Without the air around the box, but for a margin; and the box in the new indices."""
    sizes = next(iter(tensors.values())).shape[-3:]
    kept = [
        (max(0, first - _MARGIN), min(size, last + 1 + _MARGIN)) for (first, last), size in zip(box, sizes, strict=True)
    ]
    where = (..., *(slice(first, end) for first, end in kept))
    moved = tuple((first - start, last - start) for (first, last), (start, _) in zip(box, kept, strict=True))
    return {name: tensor[where] for name, tensor in tensors.items()}, moved


def _volume(exam: Exam, options: Options) -> Volume:
    if exam.form == "nifti":
        return read_nifti(exam.files[0])
    if exam.form == "dicom":
        return read_dicom(exam.files)
    if exam.form == "stack":
        return read_stack(exam.files, options.voxel)
    return read_array(exam.files[0], options.axes, options.voxel)


def _prepared(
    folder: Path, exams: Sequence[Exam], options: Options, workers: int, scheduler: str | None
) -> Iterator[tuple[Exam, str | None]]:
    """Exams as they are finished, each with what is wrong with it."""
    folder = folder.absolute()
    if scheduler is None and (workers == 0 or len(exams) < 2):
        for exam in exams:
            yield exam, prepare_exam(folder, exam, options)
        return
    distributed = required("distributed", "dask and distributed")
    exams = [_absolute(exam) for exam in exams]
    with _cluster(distributed, min(workers or 1, len(exams)), scheduler) as client:
        futures = {client.submit(prepare_exam, folder, exam, options, pure=False): exam for exam in exams}
        for future in distributed.as_completed(list(futures)):
            # A worker that is killed again and again by an exam: Dask gives that exam up.
            failure = future.exception()
            complaint = future.result() if failure is None else f"{type(failure).__name__}: {failure}"
            yield futures.pop(future), complaint


def _cluster(distributed: Any, workers: int, scheduler: str | None) -> Any:
    if scheduler is not None:
        try:
            return distributed.Client(scheduler, timeout="10s")
        except (OSError, ValueError, TimeoutError) as error:
            raise DataError(f"there is no Dask scheduler at {scheduler}: {' '.join(str(error).split())}.") from None
    return distributed.Client(
        n_workers=workers, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    )


def _absolute(exam: Exam) -> Exam:
    return Exam(exam.subject, exam.name, exam.form, tuple(path.absolute() for path in exam.files))


def _files(sources: Sequence[Path]) -> Iterator[Path]:
    for source in sources:
        if source.is_dir():
            yield from (path for path in sorted(source.rglob("*")) if path.is_file() and not path.name.startswith("."))
        elif source.is_file() or source.with_suffix(".cfl").is_file():
            yield source if source.is_file() else source.with_suffix(".cfl")
        else:
            raise DataError(f"{source} does not exist.")


def _form(path: Path, options: Options) -> str | None:
    """How a file is read; None for what is no data."""
    name = path.name.lower()
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if path.suffix.lower() in _PICTURES:
        return "pairs" if options.pairs else "stack" if options.stack else "picture"
    if path.suffix.lower() in _RAW:
        return "raw"
    if path.suffix.lower() in _ARRAYS:
        if not options.axes:
            raise ConfigError(
                f"the axes of {path} are unknown: name them, for example --axes coil,y,x or --axes z,y,x."
            )
        return "array"
    if path.suffix.lower() in (".dcm", ".ima", "") and _is_dicom(path):
        return "dicom"
    return None


def _is_dicom(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _voxel(text: str) -> Voxel:
    if not text:
        return UNKNOWN
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--voxel is three sizes in mm, as 3,1,1 (z, y, x), but is {text!r}.") from None
    return (z, y, x)
