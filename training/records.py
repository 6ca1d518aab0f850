"""What is finished of an evaluation, on disk: one small file for each case and method, under a digest of both.

An evaluation that was interrupted asks here first, and computes what is missing.
"""

import functools
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import melcore
from melcore.errors import DataError
from melcore.io.atomic import replacing

_VERSION = 1  # raise it when the same method comes to mean other figures


@dataclass(frozen=True)
class Record:
    """One method on one case.

    Attributes
    ----------
    figures
        JSON: regions with their metrics, setting, seconds, what was doubted.
    sections
        Planes through the image, complex ``(rows, columns)``, for pictures.
    """

    figures: dict[str, Any]
    sections: list[Tensor]


class Records:
    """A folder of records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"the folder {folder} cannot be made: {error.strerror}; name another with -o.") from None

    def read(self, *key: str) -> Record | None:
        """The record of a key, if it is there and whole."""
        from safetensors import SafetensorError, safe_open

        path = self._path(key)
        try:
            with safe_open(path, framework="pt") as file:
                figures = json.loads(file.metadata()["mel"])
                sections = [file.get_tensor(f"section{index}") for index in range(figures.pop("sections"))]
        except (OSError, SafetensorError, KeyError, TypeError, ValueError):
            return None  # absent, or damaged: made again
        return Record(figures, sections)

    def write(self, record: Record, *key: str) -> None:
        """Keep a record."""
        from safetensors.torch import save_file

        tensors = {f"section{index}": part.contiguous() for index, part in enumerate(record.sections)}
        content = json.dumps({**record.figures, "sections": len(tensors)})
        with replacing(self._path(key)) as temporary:
            save_file(tensors or {"none": torch.zeros(1)}, temporary, {"mel": content})

    def _path(self, key: tuple[str, ...]) -> Path:
        digest = hashlib.sha256(repr((_VERSION, *key)).encode()).hexdigest()[:24]
        return self.folder / f"{digest}.safetensors"


@functools.cache
def code_digest() -> str:
    """Of the source of melcore and of what judges: what they compute may differ once it does."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    judging = [here / f"{name}.py" for name in ("baselines", "comparison", "reference", "sweep")]
    for path in [*sorted(Path(str(melcore.__file__)).parent.rglob("*.py")), *judging]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
