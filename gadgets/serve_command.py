"""Serve reconstructions to Gadgetrons and to clients of the MRD protocol, with the models loaded.

Pipelines of a Gadgetron reach it by a connect node; clients (gadgetron_ismrmrd_client, those of scanners) name one of
the pipelines that ship, as their configuration. Raw data are kept in the spool until their images are delivered:
mel replay reconstructs an exam again.

    mel serve
    mel serve --host 0.0.0.0 --spool /data/spool --deadline 30 --metrics 9100 --log-format json
    mel serve --bundles ~/bundles --model brain3d --memory 12GiB
    gadgetron_ismrmrd_client -f exam.h5 -c mel_cartesian_3d -p 18000

It stops on SIGTERM and SIGINT: running exams may end within --grace seconds, the others can be replayed.
"""

import argparse
import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from melcore.cli.doctor import PORT

if TYPE_CHECKING:
    from gadgets.exam_session import Parts
    from gadgets.server import Server

# Of what is free: other programs need memory too, and what a plan predicts is not all that there is.
_SHARE = 0.8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``mel serve``."""
    parser.add_argument("--host", default="localhost", help="address to listen on (localhost: this machine alone)")
    parser.add_argument("--port", type=int, default=PORT, help=f"({PORT}; 0: any that is free)")
    parser.add_argument("--model", metavar="NAME", help="take this model for all exams whose request names none")
    parser.add_argument("--bundles", type=Path, metavar="FOLDER", help="further bundles that exams may name")
    parser.add_argument("--device", default="auto", help="auto (the default), cpu, cuda, cuda:1")
    parser.add_argument("--memory", metavar="SIZE", help="for all reconstructions together (80 %% of what is free)")
    parser.add_argument("--deadline", type=float, metavar="SECONDS", help="then a conventional image is sent")
    parser.add_argument("--at-a-time", type=int, default=4, metavar="N", help="most reconstructions at a time (4)")
    parser.add_argument("--connections", type=int, default=32, metavar="N", help="most connections (32)")
    parser.add_argument("--idle", type=float, default=600.0, metavar="SECONDS", help="longest pause of a scan (600)")
    parser.add_argument(
        "--grace", type=float, default=30.0, metavar="SECONDS", help="for running exams at the end (30)"
    )
    parser.add_argument("--spool", type=Path, metavar="FOLDER", help="where raw data are kept (MEL_SPOOL)")
    parser.add_argument(
        "--keep",
        choices=("failed", "all"),
        default="failed",
        help="raw data of all exams, or of those that failed or fell back (the default); these always stay",
    )
    parser.add_argument("--spool-limit", metavar="SIZE", help="beyond it the oldest delivered exams are removed")
    parser.add_argument("--spool-days", type=float, metavar="DAYS", help="after them delivered exams are removed")
    parser.add_argument("--metrics", type=int, metavar="PORT", help="answer a Prometheus on this port (0: any)")
    parser.add_argument("--log-format", choices=("text", "json"), default="text", help="of the lines on stderr")


def run(arguments: argparse.Namespace) -> int:
    """Warm up, listen, serve until stopped."""
    from gadgets.exam_logging import set_up
    from gadgets.server import Server
    from melcore.units import format_bytes

    set_up(arguments.log_format)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    parts = _parts(arguments)
    names = parts.models.warm_up()
    gc.collect()
    gc.freeze()  # what is loaded now stays: the collections after each exam need not look through it
    if stop.is_set():
        return 0
    server = Server(arguments.host, arguments.port, parts, connections=arguments.connections)
    metrics = _metrics(arguments, server, parts)
    where = ", ".join(f"{address}:{server.port}" for address in server.addresses)
    sys.stdout.write(
        f"mel serve: ready on {where}; models {', '.join(names)} on {parts.models.device}, "
        f"{format_bytes(parts.models.memory)}; spool {parts.spool.folder}{metrics}\n"
    )
    sys.stdout.flush()
    server.serve(stop)
    ended = server.shut_down(arguments.grace)
    parts.metrics.close()
    sys.stdout.write("mel serve: stopped\n")
    sys.stdout.flush()
    if not ended:
        # A thread is deep in a computation that cannot be interrupted; its raw data are in the spool.
        os._exit(0)
    return 0


def _parts(arguments: argparse.Namespace) -> "Parts":
    from gadgets.admission import Admission
    from gadgets.exam_session import Parts
    from gadgets.spool import Spool
    from gadgets.warm_models import WarmModels, device_of
    from melcore.bundle import SUFFIX, shipped
    from melcore.errors import ConfigError
    from melcore.machine import available_memory, default_spool
    from melcore.units import parse_bytes

    for name in ("at_a_time", "connections", "idle"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be positive, but is {getattr(arguments, name)}.")
    if arguments.deadline is not None and not arguments.deadline > 0:
        raise ConfigError(f"the deadline must be a positive number of seconds, but is {arguments.deadline}.")
    if not 0 <= arguments.port < 1 << 16:
        raise ConfigError(f"--port must be within 0 and 65535, but is {arguments.port}.")
    bundles = shipped()
    if arguments.bundles is not None:
        if not arguments.bundles.is_dir():
            raise ConfigError(f"--bundles names {arguments.bundles}, which is no folder.")
        bundles |= {path.stem: path for path in sorted(arguments.bundles.glob(f"*{SUFFIX}"))}
    limit = parse_bytes(arguments.spool_limit) if arguments.spool_limit else None
    spool = Spool(arguments.spool or default_spool(), keep=arguments.keep, limit=limit, days=arguments.spool_days)
    spool.tidy()
    device = device_of(arguments.device)
    free = available_memory(device) or 4 << 30
    memory = parse_bytes(arguments.memory) if arguments.memory else int(_SHARE * free)
    admission = Admission(memory, arguments.at_a_time)
    models = WarmModels(
        device=device,
        memory=memory,
        admission=admission,
        bundles=bundles,
        model=arguments.model,
        deadline=arguments.deadline,
    )
    largest = max(1 << 28, (available_memory() or 4 << 30) // 2)
    return Parts(models, admission, spool, idle=arguments.idle, largest_array=largest)


def _metrics(arguments: argparse.Namespace, server: "Server", parts: "Parts") -> str:
    """Begin to answer a Prometheus, if wanted; words for the line that says where."""
    if arguments.metrics is None:
        return ""
    from gadgets.metrics import PrometheusMetrics
    from gadgets.warm_models import used_memory

    gauges = {
        ("mel_exams_running", "Exams being received or reconstructed"): server.running,
        ("mel_reconstructions_running", "Reconstructions that use the device"): lambda: parts.admission.running,
        ("mel_reconstructions_queued", "Reconstructions that wait for the device"): lambda: parts.admission.queued,
        ("mel_device_memory_bytes", "Memory held on a GPU"): lambda: used_memory(parts.models.device),
        ("mel_spool_bytes", "Raw data that are kept"): parts.spool.size,
    }
    host = "127.0.0.1" if arguments.host == "localhost" else arguments.host
    metrics = PrometheusMetrics(host, arguments.metrics, gauges)
    parts.metrics = metrics
    return f"; metrics on {host}:{metrics.port}"
