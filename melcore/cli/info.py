"""Describe an ISMRMRD raw file or a model bundle.

Reads headers only, so that a file of many GB takes a second.

    mel info exam.h5
    mel info exam.h5 --json
    mel info brain3d.safetensors
"""

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel info``."""
    parser.add_argument("file", type=Path, metavar="FILE", help="ISMRMRD raw file (.h5) or model bundle (.safetensors)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Print what the file says."""
    if arguments.file.suffix == ".safetensors":
        print(json.dumps(_describe_bundle(arguments.file), indent=None if arguments.json else 2))
        return
    description = _describe(arguments.file)
    if arguments.json:
        print(json.dumps(description))
        return
    lines = {_label(key): _text(key, value) for key, value in description.items()}
    width = max(map(len, lines)) + 2
    for label, text in lines.items():
        print(f"{label:{width}}{text}")


def _describe_bundle(path: Path) -> dict[str, Any]:
    from melcore.bundle import Bundle

    bundle = Bundle.load(path)
    return {
        "bundle": bundle.name,
        "digest": bundle.digest,
        "dimensions": bundle.dimensions,
        "architecture": dict(bundle.architecture),
        "preparation": asdict(bundle.preparation),
        "card": dict(bundle.card),
    }


def _describe(path: Path) -> dict[str, Any]:
    """Collect what is known; lengths in m, times in s, matrices along z, y, x."""
    from melcore.errors import DataError
    from melcore.io.mrd import open_raw, scan_info
    from melcore.io.placement import place

    with open_raw(path) as raw:
        headers, header = raw.headers(), raw.header
        waveforms = raw.waveform_count
    encodings = sorted({int(number) for number in headers["encoding_space_ref"]})
    info = scan_info(header)
    system = header.acquisitionSystemInformation
    description: dict[str, Any] = {
        "file": str(path),
        "protocol": info.protocol or None,
        "system": " ".join(filter(None, (getattr(system, "systemVendor", None), getattr(system, "systemModel", None))))
        or None,
        "field_strength_t": info.field_strength,
        "trajectory": info.trajectory,
        "encodings": len(header.encoding),
        "encoded_matrix": info.encoded_matrix,
        "recon_matrix": info.recon_matrix,
        "encoded_field_of_view_m": info.encoded_field_of_view[::-1],
        "recon_field_of_view_m": info.geometry[0].field_of_view[::-1],
        "coils": sorted({int(n) for n in headers["active_channels"]}),
        "acquisitions": len(headers),
        "samples_per_readout": sorted({int(n) for n in headers["number_of_samples"]}),
        "dwell_time_s": sorted({round(float(t) * 1e-6, 10) for t in headers["sample_time_us"]}),
        "waveforms": waveforms,
        "counters": _counters(headers),
        "flags": _flags(headers),
    }
    try:
        description |= _sampling(place(header, headers, encodings[0]), header.encoding[encodings[0]])
    except DataError as error:  # a radial scan has no grid, but the rest is worth knowing
        description["not_placed_on_a_grid"] = str(error)
    return description


def _counters(headers: Any) -> dict[str, int]:
    """Sizes of the counters that vary, over lines of the image."""
    import numpy as np

    from melcore.io.mrd import NOT_IMAGING, has_any_flag

    counters = headers["idx"][~has_any_flag(headers, NOT_IMAGING)]
    found = {name: len(np.unique(counters[name])) for name in counters.dtype.names if name != "user"}
    return {name: count for name, count in found.items() if count > 1}


def _flags(headers: Any) -> dict[str, int]:
    from melcore.io.mrd import has_flag
    from melcore.io.mrd_types import FLAG_NAMES

    counts = {name: int(has_flag(headers, flag).sum()) for flag, name in FLAG_NAMES.items()}
    return {name: count for name, count in counts.items() if count}


def _sampling(placement: Any, encoding: Any) -> dict[str, Any]:
    import torch

    from melcore.preprocess.calibration import calibration_region

    batch, time, z, y = placement.shape
    mask = torch.from_numpy(placement.mask(placement.imaging))
    grid = (z, y, placement.recon_readout)
    region = calibration_region(mask, grid)
    if placement.calibration.any():
        separate = calibration_region(torch.from_numpy(placement.mask(placement.calibration)), grid)
        region = max(region, separate, key=lambda sizes: sizes[0] * sizes[1] * sizes[2])
    parallel = encoding.parallelImaging
    factor = parallel.accelerationFactor if parallel is not None else None
    return {
        "noise_scan": bool(placement.noise.any()),
        "slices": batch,
        "frames": time,
        "time_axis": placement.time_counter or None,
        "readout_oversampling": round(placement.readout / placement.recon_readout, 4),
        "acceleration_in_header": (factor.kspace_encoding_step_2, factor.kspace_encoding_step_1) if factor else None,
        "acceleration": round(1 / float(mask.float().mean()), 2),
        "calibration_region": region,
    }


_UNITS = {"field_strength_t": "T", "dwell_time_s": "us", "encoded_field_of_view_m": "mm", "recon_field_of_view_m": "mm"}
_AXES = {2: " (z, y)", 3: " (z, y, x)"}
_FACTORS = {"us": 1e6, "mm": 1e3}


def _label(key: str) -> str:
    # The unit, in the names of JSON, is told by the value here.
    return (key.rpartition("_")[0] if key in _UNITS else key).replace("_", " ")


def _text(key: str, value: Any) -> str:
    """Write a value for people: lengths in mm, x between sizes."""
    unit = _UNITS.get(key, "")
    if value is None or value in ([], {}, False):
        return "none"
    if value is True:
        return "yes"
    if isinstance(value, dict):
        return ", ".join(f"{name} {count}" for name, count in value.items())
    if isinstance(value, (tuple, list)):
        items = [f"{item * _FACTORS.get(unit, 1):g}" for item in value]
        joined = " x ".join(items) if isinstance(value, tuple) else ", ".join(items)
        return f"{joined} {unit}".rstrip() + (_AXES[len(value)] if isinstance(value, tuple) else "")
    return f"{value:g} {unit}".rstrip() if isinstance(value, float) else str(value)
