"""Reconstruct an ISMRMRD raw file to ISMRMRD images.

The file is streamed through a Gadgetron pipeline in process: noise whitening, removal of readout oversampling, sorting,
coil maps by BART, reconstruction. The pipeline is chosen by the file (2D, 3D, 2D with cardiac phases) unless given.
Radial, spiral and other non-Cartesian files, whose readouts carry their trajectory, are reconstructed without pipeline
and without network.

    mel recon exam.h5 -o images.h5
    mel recon exam.h5 --model brain3d.safetensors -o images.h5
    mel recon exam.h5 --model none -o images.h5
    mel recon exam.h5 --model none --weight 0.01 --map-sets 2 -o images.h5
    mel recon exam.h5 --pipeline mel_cine_2dt --output-type complex -o images.h5

`--model none` is CG-SENSE, `--model adjoint` the zero-filled image. The weight of CG-SENSE follows the noise, which is
known from a noise scan and estimated otherwise.
"""

import argparse
import json
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gadgets.messages import Acquisition, Array, Image, Message
    from melcore.io.images import ImageSeries
    from melcore.io.mrd import RawFile


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel recon``."""
    parser.add_argument("raw", type=Path, metavar="RAW", help="ISMRMRD raw file (.h5)")
    parser.add_argument(
        "-o", "--output", type=Path, required=True, metavar="IMAGES", help="file of images to write (.h5)"
    )
    parser.add_argument(
        "--model", metavar="BUNDLE", help="bundle (path, or name of one that ships), none (CG-SENSE) or adjoint"
    )
    parser.add_argument("--pipeline", metavar="XML", help="pipeline (path, or name of one that ships)")
    parser.add_argument("--device", help="auto (the default), cpu, cuda, cuda:1")
    parser.add_argument("--memory", help="most memory that the reconstruction may use, for example 12GiB")
    parser.add_argument("--deadline", metavar="SECONDS", help="then a conventional, labelled image is made instead")
    parser.add_argument("--weight", help="of CG-SENSE's penalty; by default it follows the noise and the acceleration")
    parser.add_argument("--iterations", help="most steps of CG-SENSE; by default as many as it needs")
    parser.add_argument("--map-sets", metavar="SETS", help="sets of coil maps: 1, or 2 for a field of view too small")
    parser.add_argument("--output-type", choices=("magnitude", "complex"), help="magnitude is the default")
    parser.add_argument("--noise", type=Path, metavar="NOISE.h5", help="raw file with the noise scan to whiten by")
    parser.add_argument(
        "--partial-fourier",
        choices=("zero", "homodyne", "pocs"),
        help="how conventional methods fill a side of k-space that is missing (zero is the default)",
    )
    parser.add_argument(
        "--on-doubt",
        choices=("record", "warn", "fallback"),
        help="about a network's image that does not fit the data, or data unlike its training's (warn is the default)",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Reconstruct, write, summarise."""
    from gadgets.chain import find_pipeline, run_chain
    from gadgets.nonuniform import NAME as NONUNIFORM
    from gadgets.nonuniform import reconstruct_nonuniform
    from melcore.errors import DataError
    from melcore.io.images import write_images
    from melcore.io.mrd import open_raw
    from melcore.io.mrd_header import is_nonuniform
    from melcore.io.noise_scan import with_noise_scan

    begin = time.perf_counter()
    named = {
        "model": arguments.model,
        "device": arguments.device,
        "memory": arguments.memory,
        "deadline": arguments.deadline,
        "weight": arguments.weight,
        "iterations": arguments.iterations,
        "map_sets": arguments.map_sets,
        "output": arguments.output_type,
        "partial_fourier": arguments.partial_fourier,
        "on_doubt": arguments.on_doubt,
    }
    overrides = {name: value for name, value in named.items() if value is not None}
    if not arguments.output.absolute().parent.is_dir():
        raise DataError(f"the folder {arguments.output.absolute().parent} does not exist: create it first.")
    with open_raw(arguments.raw) as raw:
        if arguments.output.exists() and arguments.output.samefile(arguments.raw):
            raise DataError(f"{arguments.output} is the raw file itself: give another name for the images.")
        if arguments.pipeline is None and is_nonuniform(raw.header):
            name = NONUNIFORM
            images = list(reconstruct_nonuniform(raw, noise=arguments.noise, **_of_nonuniform(overrides)))
        else:
            pipeline = find_pipeline(arguments.pipeline or choose_pipeline(raw))
            name = pipeline.stem
            header_xml, readouts = raw.header_xml, raw.acquisitions()
            if arguments.noise is not None:
                header_xml, readouts = with_noise_scan(raw, arguments.noise)
            images = list(run_chain(pipeline, header_xml, _watched(readouts, raw.count), overrides=overrides))
        if not images:
            raise DataError(f"{arguments.raw} gave no image through {name}: it holds no complete image data.")
        series = collect_series(images)
        write_images(arguments.output, name, raw.header_xml, series)
    summary = summarise(arguments.output, name, images, time.perf_counter() - begin)
    sys.stdout.write((json.dumps(summary) if arguments.json else text_of(summary)) + "\n")


def _of_nonuniform(overrides: dict[str, Any]) -> dict[str, Any]:
    """Those of the command's options that non-Cartesian data know; others are refused rather than ignored."""
    from melcore.errors import ConfigError

    wrong = [name.replace("_", "-") for name in overrides if name not in ("model", "output")]
    if wrong:
        raise ConfigError(f"non-Cartesian data are reconstructed without --{' and --'.join(wrong)}: leave it out.")
    return overrides


def choose_pipeline(raw: "RawFile") -> str:
    """Name of the pipeline that fits a file.

    Raises
    ------
    DataError
        If no pipeline can reconstruct it: noise only, several encodings, not Cartesian.
    """
    import numpy as np

    from gadgets.header import parse_header
    from melcore.errors import DataError
    from melcore.io.mrd import NOT_IMAGING, has_any_flag

    header = parse_header(raw.header_xml.encode())
    headers = raw.headers()
    imaging = headers[~has_any_flag(headers, NOT_IMAGING)]
    if not len(imaging):
        raise DataError(f"{raw.path} holds {len(headers)} readouts, but none of an image (noise or navigators only).")
    spaces = np.unique(imaging["encoding_space_ref"]).tolist()
    if spaces != [0]:
        raise DataError(
            f"the readouts of {raw.path} belong to the encodings {spaces}: only the first encoding of a header can be "
            "reconstructed; split the file."
        )
    encoding = header.encodings[0]
    if encoding.trajectory != "cartesian":
        raise DataError(
            f"the trajectory of {raw.path} is {encoding.trajectory}: pipelines reconstruct Cartesian data only."
        )
    if encoding.encoded_matrix[2] > 1:
        return "mel_cartesian_3d"
    return "mel_cine_2dt" if len(np.unique(imaging["idx"]["phase"])) > 1 else "mel_cartesian_2d"


def _watched(readouts: "Iterator[Acquisition]", count: int) -> "Iterator[Message]":
    """Readouts with a bar; those of several averages count as repeated lines, which sorting averages."""
    from tqdm import tqdm

    # tqdm's None: shown on a terminal only.
    bar = tqdm(readouts, total=count, unit="readout", file=sys.stderr, disable=None, leave=False)
    with bar:
        for readout in bar:
            if readout.header["idx"]["average"]:
                readout.header["idx"]["average"] = 0
            yield readout


def collect_series(images: "Sequence[Image]") -> "list[ImageSeries]":
    """Images by their `image_series_index`.

    Raises
    ------
    DataError
        If the images of a series differ in shape or kind.
    """
    import numpy as np

    from melcore.errors import DataError
    from melcore.io.images import ImageSeries
    from melcore.io.mrd import IMAGE_HEADER

    groups: dict[int, list[Image]] = {}
    for image in images:
        groups.setdefault(int(image.header["image_series_index"]), []).append(image)
    series = []
    for index, members in sorted(groups.items()):
        kinds = {(image.data.shape, image.data.dtype) for image in members}
        if len(kinds) > 1:
            shapes = ", ".join(f"{shape} {dtype}" for shape, dtype in kinds)
            raise DataError(f"the images of series {index} differ: {shapes}. A series must have one shape.")
        headers: Array = np.array([image.header for image in members], IMAGE_HEADER)
        data = np.stack([image.data for image in members])
        series.append(ImageSeries(headers, data, tuple(image.meta for image in members)))
    return series


def summarise(path: Path, pipeline: str, images: "Sequence[Image]", seconds: float) -> dict[str, Any]:
    """What came out, and how."""
    metas = [_attributes(image.meta) for image in images]
    first, whitened = images[0], metas[0].get("MEL_whitened", "")
    return {
        "output": str(path),
        "pipeline": pipeline,
        "model": metas[0].get("MEL_model"),
        "path_taken": sorted({meta["MEL_path_taken"] for meta in metas if "MEL_path_taken" in meta}),
        "images": len(images),
        "matrix": [int(size) for size in first.data.shape[1:]],
        "field_of_view_m": [round(float(length) * 1e-3, 9) for length in first.header["field_of_view"][::-1]],
        "whitened": {"true": True, "false": False}.get(whitened, whitened),
        "quality": {
            name.removeprefix("MEL_quality_"): float(value)
            for name, value in metas[0].items()
            if name.startswith("MEL_quality_")
        },
        "warnings": sorted({meta["MEL_warning"] for meta in metas if "MEL_warning" in meta}),
        "seconds": round(seconds, 3),
    }


def _attributes(meta: str) -> dict[str, str]:
    if not meta:
        return {}
    entries = ElementTree.fromstring(meta.encode()).findall("meta")
    return {entry.findtext("name") or "": entry.findtext("value") or "" for entry in entries}


def text_of(summary: dict[str, Any]) -> str:
    """A summary in words."""
    matrix = "x".join(map(str, summary["matrix"]))
    view = " x ".join(f"{length * 1e3:g}" for length in summary["field_of_view_m"])
    paths = ", ".join(summary["path_taken"]) or "conventional"
    lines = [
        f"{summary['images']} image{'s' if summary['images'] > 1 else ''} {matrix} (z, y, x), {view} mm, "
        f"by {paths} ({summary['model'] or summary['pipeline']}) in {summary['seconds']:.1f} s -> {summary['output']}"
    ]
    if summary["whitened"] is False:
        lines.append("no noise scan came before the data: not whitened")
    elif str(summary["whitened"]).startswith("by the noise of the data"):
        lines.append("no noise scan came before the data: the noise was estimated from them, and whitened by that")
    lines += [f"warning: {warning}" for warning in summary["warnings"]]
    return "\n".join(lines)
