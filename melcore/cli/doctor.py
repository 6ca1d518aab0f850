"""Check that everything MEL needs is here, and say how to get what is not.

Exits with 1 if something necessary is missing.

    mel doctor
    mel doctor --json
"""

import argparse
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from importlib import metadata, util
from pathlib import Path

_PACKAGES = ("numpy", "h5py", "ismrmrd", "gadgetron", "safetensors", "yaml", "tqdm")
_EXTRAS = {"pydantic": "train", "tensorboard": "train", "matplotlib": "figures"}
_DISTRIBUTIONS = {"yaml": "pyyaml"}


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked at, what was found, and whether that will do."""

    name: str
    found: str
    state: str = "ok"  #: ok, note or missing
    advice: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel doctor``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; 1 if something necessary is missing."""
    findings = [_python(), *_torch(), _bart(), _processor(), _memory(), _scratch(), *_packages(), _bundles()]
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
    from melcore.units import format_bytes

    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return Finding("memory", "unknown on this system", "note")
    # A container's own limit, where it has one, lies below what the machine has.
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text(encoding="ascii").strip() if limit.is_file() else "max"
    free = min(free, int(text)) if text.isdigit() else free
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
