"""Prepared folders: anatomies and measured scans by subject, each one file, beside a manifest that says what they are.

A folder holds ``NAME.safetensors`` for each subject and ``manifest.json``. A file is complete or absent, and carries
its own record in its header, so that a manifest can always be made from the files (`write_manifest`). Subjects belong
to one split each, by a digest of their names: adding subjects never moves another.

=============  =====================================  =========================================================
kind           tensors                                what they are
=============  =====================================  =========================================================
planes         ``images`` (plane, channel, y, x)      pictures: channels are colours or contrasts of one thing
volume         ``images`` (channel, z, y, x)          magnitude or complex, in any unit
labels         ``labels`` (z, y, x)                   whole numbers: tissues, whose contrast is drawn
pairs          ``first``, ``second`` (slice, y, x),   two phases of a beating heart, and the optical flows between
               ``forward``, ``backward``              them: ``second(p + forward(p)) = first(p)``, and the other way
               (slice, 2, y, x)                       round, in voxels along y and x
k-space        ``k_space``                            fully sampled, whitened (noise of complex variance 2), without
               (slice, coil, time, z, y, x)           readout oversampling
undersampled   ``k_space``, ``mask``, and maybe       the same, not fully sampled, with what was sampled, and
               ``calibration``, ``calibration_mask``  separate calibration lines: for learning without a truth
=============  =====================================  =========================================================
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from melcore.errors import DataError
from melcore.io.atomic import replacing

Split = Literal["train", "validation", "test"]
Kind = Literal["planes", "volume", "labels", "pairs", "k-space", "undersampled"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
MANIFEST = "manifest.json"
_FORMAT = "mel-anatomies"
_VERSION = 1
# Of the subjects, on average.
_SHARES = (0.8, 0.1, 0.1)


@dataclass(frozen=True)
class Entry:
    """One subject of a prepared folder.

    Attributes
    ----------
    subject
        Whose anatomy it is; the unit of splits.
    file
        Name in the folder.
    shape
        Of the main tensor.
    voxel
        Size along z, y and x in mm; 0 if unknown.
    box
        Of volumes and labels: first and last index along z, y and x between which there is something.
    noise
        Of k-space: ``scan`` (whitened by a noise scan or by the file), ``estimated``.
    sources
        Names of the files it was made from.
    digest
        Of the tensors: the same content under two names is found.
    recipe
        Digest of the files and the settings it was made from.
    """

    subject: str
    split: Split
    kind: Kind
    file: str
    shape: tuple[int, ...]
    voxel: tuple[float, float, float] = (0.0, 0.0, 0.0)
    box: tuple[tuple[int, int], ...] = ()
    noise: str = ""
    origin: str = ""
    licence: str = ""
    sources: tuple[str, ...] = ()
    digest: str = ""
    recipe: str = ""


@dataclass(frozen=True)
class Folder:
    """A prepared folder that was opened."""

    path: Path
    entries: tuple[Entry, ...]
    _open: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def read(self, entry: Entry, name: str, *where: slice | int) -> Tensor:
        """A tensor of an entry, or the part of it that `where` selects; only that part is read from disk.

        Raises
        ------
        DataError
            If the file is missing or damaged.
        """
        from safetensors import SafetensorError

        file = self._file(entry)
        try:
            part: Tensor = file.get_slice(name)[where] if where else file.get_tensor(name)
            return part
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path / entry.file} is missing or damaged ({error}): prepare it again.") from None

    def holds(self, entry: Entry, name: str) -> bool:
        """Whether an entry has a tensor of this name."""
        return name in set(self._file(entry).keys())

    def _file(self, entry: Entry) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            if entry.file not in self._open:
                self._open[entry.file] = safe_open(self.path / entry.file, framework="pt")
            return self._open[entry.file]
        except (OSError, SafetensorError) as error:
            raise DataError(f"{self.path / entry.file} is missing or damaged ({error}): prepare it again.") from None

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "entries": self.entries, "_open": {}}  # open files do not travel


def split_of(subject: str, shares: Sequence[float] = _SHARES) -> Split:
    """Split of a subject: a digest of its name, between 0 and 1, falls into one of the shares."""
    number = int.from_bytes(hashlib.sha256(subject.encode()).digest()[:6]) / 256**6
    for split, end in zip(SPLITS, (shares[0], shares[0] + shares[1], math.inf), strict=True):
        if number < end:
            return split
    raise AssertionError("the last share has no end")


def file_name(subject: str) -> str:
    """Name of a subject's file; names that differ stay different."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", subject).lstrip(".") or "_"
    if plain != subject or len(plain) > 80:
        plain = f"{plain[:80]}-{hashlib.sha256(subject.encode()).hexdigest()[:8]}"
    return f"{plain}.safetensors"


def write_subject(folder: Path, entry: Entry, tensors: Mapping[str, Tensor]) -> Entry:
    """Write one subject, complete or not at all, and return its record with the digest of what was written."""
    from safetensors.torch import save_file

    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    record = asdict(entry) | {"digest": digest.hexdigest()[:32]}
    metadata = {"format": _FORMAT, "version": str(_VERSION), "entry": json.dumps(record)}
    with replacing(folder / entry.file) as temporary:
        save_file({name: t.contiguous() for name, t in tensors.items()}, temporary, metadata)
    return _entry(record)


def read_record(path: Path) -> Entry:
    """Record in the header of a subject's file.

    Raises
    ------
    DataError
        If the file is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return _entry(json.loads(metadata["entry"]))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"{path} is no prepared subject, or damaged ({error}): remove it and prepare it again."
        ) from None


def write_manifest(folder: Path) -> tuple[Entry, ...]:
    """Write the manifest of all subjects in a folder, and return them."""
    entries = tuple(read_record(path) for path in sorted(folder.glob("*.safetensors")))
    content = {"format": _FORMAT, "version": _VERSION, "entries": [asdict(entry) for entry in entries]}
    with replacing(folder / MANIFEST) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return entries


def open_folder(path: str | os.PathLike[str]) -> Folder:
    """Open a prepared folder.

    Raises
    ------
    DataError
        If it is missing, was not finished, or is damaged; the message tells the command that makes it.
    """
    folder = Path(path)
    try:
        content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        entries = tuple(_entry(record) for record in content["entries"])
    except FileNotFoundError:
        what = "was not finished" if folder.is_dir() else "does not exist"
        raise DataError(
            f"the prepared folder {folder} {what}: make it with mel prepare SOURCE... -o {folder} (see README.md)."
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{folder / MANIFEST} is damaged ({error}): run mel prepare again.") from None
    if content.get("format") != _FORMAT or content.get("version") != _VERSION:
        raise DataError(f"{folder / MANIFEST} is not of version {_VERSION} of {_FORMAT}: run mel prepare again.")
    absent = [entry.file for entry in entries if not (folder / entry.file).is_file()]
    if absent:
        raise DataError(f"{folder} lacks {absent[0]}, which its manifest lists: run mel prepare again.")
    return Folder(folder, entries)


def check_splits(folders: Sequence[Folder]) -> None:
    """Refuse subjects, or the same content under two names, that are in more than one split.

    Raises
    ------
    DataError
        Naming both.
    """
    seen: dict[tuple[str, str], tuple[Entry, Path]] = {}
    for folder in folders:
        for entry in folder.entries:
            for key in (("subject", entry.subject), ("content", entry.digest)):
                if not key[1]:
                    continue
                other, where = seen.setdefault(key, (entry, folder.path))
                if other.split != entry.split:
                    raise DataError(
                        f"a leak between splits: {folder.path / entry.file} ({entry.split}) has the {key[0]} of "
                        f"{where / other.file} ({other.split}): prepare both with the same --subject and --split."
                    )


def _entry(record: Mapping[str, Any]) -> Entry:
    values = dict(record)
    for name in ("shape", "voxel", "sources"):
        values[name] = tuple(values.get(name, ()))
    values["box"] = tuple((int(first), int(last)) for first, last in values.get("box", ()))
    if values["split"] not in SPLITS:
        raise ValueError(f"split {values['split']!r}")
    return Entry(**values)
