"""Streaming reconstruction: what a Gadgetron server starts, and the same chains in process.

A server names a module and one of its attributes, ``<execute name="gadgets" target="reconstruct" type="python"/>``;
the attributes of this package that it may name are those of `gadgets.targets.TARGETS`. They load on first use.
"""

import importlib
import importlib.util
import sys
from typing import Any


def __getattr__(name: str) -> Any:
    if name.startswith("_") or importlib.util.find_spec(f"{__name__}.{name}") is not None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    targets = importlib.import_module(f"{__name__}.targets")
    # Under `python -m gadgetron` an AttributeError would end in silence at the scanner: a target that reports it then.
    launched = getattr(getattr(sys.modules.get("__main__"), "__spec__", None), "name", "") == "gadgetron.__main__"
    target = targets.find(name, report=launched)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return target
