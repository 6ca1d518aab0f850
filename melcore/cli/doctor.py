"""Check that everything MEL needs is here, and say how to get what is not.

Run it as the user and in the environment of the server that will use MEL: a Gadgetron starts the first python on its
PATH, and mel serve needs its port and its spool. Exits with 1 if something necessary is missing.

    mel doctor
    mel doctor --port 18001 --json
"""

import argparse
import json
import os
import platform
import shutil
import socket
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

_PACKAGES = ("numpy", "h5py", "ismrmrd", "gadgetron", "safetensors", "yaml", "tqdm")
_EXTRAS = {"pydantic": "train", "tensorboard": "train", "matplotlib": "figures", "prometheus_client": "serve"}
_DISTRIBUTIONS = {"yaml": "pyyaml"}


PORT = 18000  #: of `mel serve`, unless told otherwise


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and whether that will do."""

    name: str
    found: str
    state: str = "ok"  #: ok, note or missing
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel doctor``."""
    parser.add_argument("--port", type=int, default=PORT, help=f"of mel serve ({PORT})")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if something necessary is missing."""
    findings = [_python(), *_torch(), _bart(), _processor(), _memory(), _scratch(), *_packages(), _bundles()]
    findings += [_gadgetron_python(), _port(arguments.port), _spool()]
    missing = [finding for finding in findings if finding.state == "missing"]
    if arguments.json:
        print(json.dumps({"ok": not missing, "findings": [asdict(finding) for finding in findings]}))
    else:
        width = max(len(finding.name) for finding in findings) + 2
        for finding in findings:
            advice = f"  -> {finding.advice}" if finding.advice else ""
            print(f"{finding.state:8}{finding.name:{width}}{finding.found}{advice}")
        print("everything needed is here" if not missing else f"missing: {', '.join(f.name for f in missing)}")
    return 1 if missing else 0


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def _torch() -> list[Finding]:
    try:
        import torch
    except (ImportError, OSError) as error:
        return [Finding("torch", str(error), "missing", "pip install torch (see README for the CPU-only build)")]
    findings = [Finding("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        from melcore.units import format_bytes

        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            findings.append(Finding(f"cuda:{index}", f"{device.name}, {format_bytes(device.total_memory)}"))
    else:
        findings.append(Finding("cuda", "no device: computing on the CPU", "note"))
    return findings


def _bart() -> Finding:
    from melcore.errors import MelError
    from melcore.io.toolbox import executable, version

    try:
        return Finding("bart", f"{version()} ({executable()})")
    except MelError as error:
        return Finding("bart", "not usable", "missing", str(error))


def _processor() -> Finding:
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS")
    return Finding("processor", f"{count} cores, OMP_NUM_THREADS {threads or 'not set'}")


def _memory() -> Finding:
    from melcore.machine import available_memory
    from melcore.units import format_bytes

    free = available_memory()
    if free is None:
        return Finding("memory", "unknown on this system", "note")
    return Finding("memory", f"{format_bytes(free)} available")


def _scratch() -> Finding:
    from melcore.errors import MelError
    from melcore.io.toolbox import scratch_folder
    from melcore.units import format_bytes

    try:
        folder = scratch_folder()
    except MelError as error:
        return Finding("scratch", "not usable", "missing", str(error))
    free = shutil.disk_usage(folder).free
    small = free < 2 << 30
    advice = "BART needs room for its files: set MEL_SCRATCH to a folder with more" if small else ""
    return Finding("scratch", f"{folder}, {format_bytes(free)} free", "note" if small else "ok", advice)


def _packages() -> list[Finding]:
    return [
        *(_package(name, "missing", f"pip install {_DISTRIBUTIONS.get(name, name)}") for name in _PACKAGES),
        *(_package(name, "note", f"pip install 'melcore[{extra}]'") for name, extra in _EXTRAS.items()),
    ]


def _package(name: str, otherwise: str, advice: str) -> Finding:
    if util.find_spec(name) is None:
        return Finding(name, "not installed", otherwise, advice)
    try:
        return Finding(name, metadata.version(_DISTRIBUTIONS.get(name, name)))
    except metadata.PackageNotFoundError:
        return Finding(name, "installed, version unknown")


def _bundles() -> Finding:
    # The bundles that ship are data beside the pipelines: looked up, not imported.
    spec = util.find_spec("pipelines")
    places = list(spec.submodule_search_locations or ()) if spec is not None else []
    names = sorted(file.stem for place in places for file in Path(place, "bundles").glob("*.safetensors"))
    if not names:
        return Finding("bundles", "none", "note", "train one: mel fit CONFIG.yaml")
    return Finding("bundles", ", ".join(names))


def _gadgetron_python() -> Finding:
    """Whether the python that a Gadgetron starts finds our gadgets, from any folder and without standard input."""
    name = "gadgetron's python"
    program = shutil.which("python") or shutil.which("python3")
    if program is None:
        return Finding(name, "neither python nor python3 is on the PATH", "note", "a Gadgetron here could start none")
    code = "import gadgetron, gadgets, pipelines, torch; gadgets.reconstruct; print(gadgets.__file__)"
    advice = "for <execute> nodes start the Gadgetron with the environment of MEL first on its PATH, or set PYTHONPATH"
    try:
        found = subprocess.run(
            [program, "-c", code], cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(name, f"{program}: {error}", "note", advice)
    if found.returncode:
        reason = (found.stderr.strip().splitlines() or ["it gave no reason"])[-1]
        return Finding(name, f"{program}: {reason}", "note", advice)
    return Finding(name, f"{program}, gadgets in {Path(found.stdout.strip()).parent}")


def _port(port: int) -> Finding:
    name = f"port {port}"
    try:
        # As mel serve does: a connection of a server that has just ended does not hinder the next one.
        socket.create_server(("127.0.0.1", port)).close()
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        return Finding(name, reason, "note", "mel serve runs here already, or needs another --port")
    return Finding(name, "free for mel serve")


def _spool() -> Finding:
    from melcore.machine import default_spool
    from melcore.units import format_bytes

    folder = default_spool()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        return Finding("spool", f"{folder} cannot be written", "note", "set MEL_SPOOL, or give mel serve --spool")
    exams = sum(1 for _ in folder.glob("*/exam.json")) if there == folder else 0
    free = format_bytes(shutil.disk_usage(there).free)
    return Finding("spool", f"{folder}, {free} free" + (f", exams kept: {exams}" if exams else ""))
