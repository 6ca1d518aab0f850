"""What several tests share."""

import os
from pathlib import Path

import pytest

_OVERRIDES = {"data": "MEL_DATA", "gadgetron": "MEL_GADGETRON_TRACES"}


def shared(path: str) -> Path:
    """A file of the material for development beside the repository; the test is skipped where it is absent."""
    kind, _, rest = path.partition("/")
    root = os.environ.get(_OVERRIDES.get(kind, ""))
    found = Path(root) / rest if root else Path(__file__).parents[2] / "shared" / path
    if not found.exists():
        pytest.skip(f"{found} is absent (set {_OVERRIDES.get(kind, 'nothing')} to where it is)")
    return found
