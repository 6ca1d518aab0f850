"""Reconstruct an exam again that `mel serve` kept, or any ISMRMRD raw file.

The raw data go through the chain that was asked for when they came, with another model if one is given. An exam that
broke off, because the scanner or the server stopped, is reconstructed as far as its images are complete, and labelled.

    mel replay --list
    mel replay 20261122T134501-123-3fa9
    mel replay 20261122T134501-123-3fa9 --model brain3d.safetensors -o images.h5
    mel replay /data/spool/20261122T134501-123-3fa9/raw.log --incomplete -o images.h5
    mel replay exam.h5 --model none -o images.h5
"""

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gadgets.replay import Material, Replay
    from gadgets.spool import Exam, Spool


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel replay``."""
    parser.add_argument("exam", nargs="?", metavar="EXAM", help="id of an exam (or its beginning), or a file")
    parser.add_argument("--list", action="store_true", help="list the exams of the spool")
    parser.add_argument("--spool", type=Path, metavar="FOLDER", help="the server's spool (MEL_SPOOL)")
    parser.add_argument("-o", "--output", type=Path, metavar="IMAGES", help="file of images (EXAM_images.h5)")
    parser.add_argument("--model", metavar="BUNDLE", help="another model: bundle, none (CG-SENSE) or adjoint")
    parser.add_argument("--pipeline", metavar="XML", help="another pipeline (path, or name of one that ships)")
    parser.add_argument("--device", help="auto (the default), cpu, cuda, cuda:1")
    parser.add_argument("--memory", help="most memory that the reconstruction may use, for example 12GiB")
    parser.add_argument("--incomplete", action="store_true", help="reconstruct also images that are not complete")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> None:
    """Reconstruct, write, and note it in the spool; or list."""
    from gadgets.exam_record import LOG
    from gadgets.replay import material_of, material_of_file, material_of_log
    from melcore.errors import ConfigError

    if arguments.list:
        sys.stdout.write(_listing(_spool(arguments), as_json=arguments.json) + "\n")
        return
    if not arguments.exam:
        raise ConfigError("name an exam or a file; mel replay --list shows the exams of the spool.")
    path = Path(arguments.exam)
    exam: Exam | None = None
    if path.is_file():
        material = material_of_log(path, str(path)) if path.suffix == Path(LOG).suffix else material_of_file(path)
    else:
        exam = _find(arguments, path)
        material = material_of(exam)
    _replay(arguments, material, exam)


def _find(arguments: argparse.Namespace, path: Path) -> "Exam":
    from gadgets.exam_record import read_record
    from gadgets.spool import Exam

    if path.is_dir() and Exam(path, read_record(path)).raw is not None:
        return Exam(path, read_record(path))
    return _spool(arguments).find(arguments.exam)


def _spool(arguments: argparse.Namespace) -> "Spool":
    from gadgets.spool import Spool
    from melcore.errors import ConfigError
    from melcore.machine import default_spool

    folder = arguments.spool or default_spool()
    if not folder.is_dir():
        raise ConfigError(f"there is no spool {folder}: give the server's folder with --spool.")
    return Spool(folder)


def _replay(arguments: argparse.Namespace, material: "Material", exam: "Exam | None") -> None:
    from gadgets.recon_command import collect_series, summarise, text_of
    from gadgets.replay import replay
    from melcore.errors import DataError
    from melcore.io.images import write_images

    begin = time.perf_counter()
    title = exam.record.id if exam is not None else Path(arguments.exam).stem
    output: Path = arguments.output or Path(f"{title}_images.h5")
    if not output.absolute().parent.is_dir():
        raise DataError(f"the folder {output.absolute().parent} does not exist: create it first.")
    if output.exists() and exam is None and output.samefile(arguments.exam):
        raise DataError(f"{output} is the raw file itself: give another name for the images.")
    named = {"model": arguments.model, "device": arguments.device, "memory": arguments.memory}
    overrides = {name: value for name, value in named.items() if value is not None}
    pipeline = arguments.pipeline
    if pipeline is None and material.request is None:
        pipeline = _chosen(exam, arguments.exam)
    result = replay(material, pipeline=pipeline, overrides=overrides, incomplete=arguments.incomplete)
    write_images(output, result.name, material.header_xml.decode(errors="replace"), collect_series(result.images))
    summary = summarise(output, result.name, result.images, time.perf_counter() - begin)
    if exam is not None:
        _note(exam, result, summary)
        summary["exam"] = exam.record.id
    sys.stdout.write((json.dumps(summary) if arguments.json else text_of(summary)) + "\n")


def _chosen(exam: "Exam | None", name: str) -> str | None:
    """The pipeline that fits a file of readouts."""
    from gadgets.recon_command import choose_pipeline
    from melcore.io.mrd import open_raw

    path = exam.raw if exam is not None else Path(name)
    if path is None or path.suffix != ".h5":
        return None
    with open_raw(path) as raw:
        return choose_pipeline(raw)


def _note(exam: "Exam", result: "Replay", summary: dict[str, object]) -> None:
    """Nothing more is owed once the images are what was asked for, of a complete exam."""
    from gadgets.exam_record import write_record

    record = exam.record
    if record.complete and not result.remark and not summary["warnings"]:
        record.state = "replayed"
    kept = {name: summary[name] for name in ("output", "model", "path_taken", "images", "warnings")}
    record.replays.append({"time": time.time(), **kept})
    write_record(exam.folder, record)


def _listing(spool: "Spool", *, as_json: bool) -> str:
    from melcore.units import format_bytes

    exams = spool.exams()
    if as_json:
        return json.dumps([dataclasses.asdict(exam.record) | {"bytes": exam.size} for exam in exams])
    if not exams:
        return f"the spool {spool.folder} holds no exam"
    lines = []
    for exam in exams:
        record = exam.record
        began = time.strftime("%Y-%m-%d %H:%M", time.localtime(record.began)) if record.began else "-"
        words = [record.id, began, f"{record.state:11}", f"{format_bytes(exam.size):>9}"]
        words += [record.name or "-", record.protocol or "-", record.reason]
        lines.append("  ".join(words).rstrip())
    return "\n".join(lines)
