"""How fast data pass, how long an image takes, and whether a server keeps its pace and its memory.

throughput  messages per CPU-second through a TCP socket, read and written: by the `gadgetron` package, by ours, and by
            bare calls of the kernel on the same bytes, which nothing in Python can beat; interleaved, medians
latency     everything is acquired: how long until the first image, of a process that is started for it (`execute`
            node of a Gadgetron) and of a `mel serve` that is warm (`connect` node; client that sends raw data)
sustained   exams one after the other through a warm server: exams per hour, and its memory

    python benchmarks/streaming.py --small
    python benchmarks/streaming.py --output benchmarks/results/streaming
    python benchmarks/streaming.py --only latency --cases 3d --models none primal_dual_3d
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shlex
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from gadgets.chain import find_pipeline, read_pipeline
from gadgets.encode import message_parts
from gadgets.header import parse_header
from gadgets.messages import (
    ACQUISITION_HEADER,
    SAMPLING,
    Acquisition,
    Close,
    ConfigFile,
    ConfigScript,
    HeaderXml,
    Image,
    Message,
    ReconBit,
    ReconBuffer,
    ReconData,
)
from gadgets.wire import Wire

ROOT = Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
_TIMEOUT = 1800.0
_LARGE = 100 << 20  # bytes


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS), help="(all)")
    parser.add_argument("--small", action="store_true", help="small data and few repetitions: does it run?")
    parser.add_argument("--repeats", type=int, default=15, help="of the throughput (15)")
    parser.add_argument("--exams", type=int, default=200, help="sustained (200)")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES), help="of the latency (all)")
    parser.add_argument("--models", nargs="+", help="of the latency, instead of those of each case")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json and OUTPUT.md; parts not measured now are kept")
    options = parser.parse_args()
    if options.small:
        options.repeats, options.exams = 1, 3
    found: dict[str, Any] = {}
    if options.output and options.output.with_suffix(".json").exists():
        found = json.loads(options.output.with_suffix(".json").read_text())
    for part in options.only:
        measured = PARTS[part](options)
        kept = [row for row in found.get(part, {}).get("rows", []) if part == "latency" and _other(row, measured)]
        how = {"command": _command(), "date": f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}", "machine": _machine()}
        found[part] = how | {"rows": kept + measured}
        print(_table(part, found[part]))
        if options.output:
            options.output.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
            text = "\n".join(_table(name, found[name]) for name in PARTS if name in found)
            options.output.with_suffix(".md").write_text(text)


def _other(row: dict[str, Any], measured: list[dict[str, Any]]) -> bool:
    return all((row["exam"], row["model"], row["way"]) != (new["exam"], new["model"], new["way"]) for new in measured)


# Throughput.

# The other end of the socket: a process of its own, so that only one end is on the clock.
_SENDER = """
import socket, sys
prefix, body = open(sys.argv[2], "rb").read(), open(sys.argv[3], "rb").read()
s = socket.create_connection(("localhost", int(sys.argv[1])))
s.sendall(prefix)
for _ in range(int(sys.argv[4])):
    s.sendall(body)
s.sendall(b"\\4\\0")
s.recv(1)
"""
_TAKER = """
import socket, sys
s = socket.create_connection(("localhost", int(sys.argv[1])))
s.sendall(open(sys.argv[2], "rb").read())
block = bytearray(1 << 20)
while s.recv_into(block):
    pass
"""
_HEADER = (
    '<?xml version="1.0"?><ismrmrdHeader xmlns="http://www.ismrm.org/ISMRMRD"><experimentalConditions>'
    "<H1resonanceFrequency_Hz>123000000</H1resonanceFrequency_Hz></experimentalConditions></ismrmrdHeader>"
)


def throughput(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Messages per CPU-second."""
    scale = 50 if options.small else 1
    cases: list[tuple[str, Message, int]] = [
        (f"acquisition {samples}x{coils}", _acquisition(samples, coils), 64_000 // coils // scale)
        for samples, coils in ((128, 8), (256, 16), (256, 32))
    ]
    cases.append(("ReconData 256x256x16", _recon_data((256, 256, 1), 16), max(2, 40 // scale)))
    volume = (64, 32, 16) if options.small else (192, 160, 128)
    cases.append(("ReconData " + "x".join(map(str, (*volume, 8))), _recon_data(volume, 8), 2))
    rows = []
    for name, message, count in cases:
        raw = as_bytes(message)
        for direction, ways in (("read", _READ), ("written", _WRITE)):
            results: dict[str, list[float]] = {way: [] for way in ways}
            for _ in range(options.repeats):
                for way, measure in ways.items():
                    results[way].append(measure(message, raw, count))
            rate = {way: statistics.median(rates) for way, rates in results.items()}
            row: dict[str, Any] = {"message": name, "direction": direction, "megabytes": round(len(raw) / 1e6, 3)}
            row |= {f"{way}_per_cpu_second": float(f"{value:.4g}") for way, value in rate.items()}
            row |= {f"{way}_times_stock": round(rate[way] / rate["stock"], 2) for way in ("ours", "kernel")}
            row["ours_gigabytes_per_cpu_second"] = round(rate["ours"] * len(raw) / 1e9, 2)
            rows.append(row)
    return rows


def as_bytes(*messages: Message) -> bytes:
    """Messages as on the wire."""
    return b"".join(bytes(part) for message in messages for part in message_parts(message))


def _acquisition(samples: int, coils: int) -> Acquisition:
    header = np.zeros(1, ACQUISITION_HEADER)
    header["version"], header["number_of_samples"] = 1, samples
    header["active_channels"] = header["available_channels"] = coils
    return Acquisition(header[0], np.empty((samples, 0), np.float32), _noise(coils, samples))


def _recon_data(matrix: tuple[int, int, int], coils: int) -> ReconData:
    x, y, z = matrix
    headers = np.zeros((y, z, 1, 1, 1), ACQUISITION_HEADER, "F")
    headers["version"], headers["number_of_samples"], headers["active_channels"] = 1, x, coils
    data = _noise(1, 1, 1, coils, z, y, x).transpose()
    return ReconData((ReconBit(ReconBuffer(data, headers, np.zeros((), SAMPLING))),))


def _noise(*shape: int) -> Any:
    return np.random.default_rng(0).standard_normal((*shape, 2), np.float32).view(np.complex64)[..., 0]


@contextlib.contextmanager
def _connected(program: str, *arguments: str | bytes) -> Iterator[Any]:
    """A `Connection` of the `gadgetron` package to a process; texts are its arguments, bytes are files."""
    from gadgetron.external.connection import Connection

    # Its own reader; importing it has forgotten all earlier filters.
    warnings.filterwarnings("ignore", "A builtin ctypes object")
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("localhost", 0)) as server:
        words = []
        for number, argument in enumerate(arguments):
            if isinstance(argument, bytes):
                Path(folder, str(number)).write_bytes(argument)
                argument = str(Path(folder, str(number)))
            words.append(argument)
        command = [sys.executable, "-c", program, str(server.getsockname()[1]), *words]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        connection, _ = server.accept()
        try:
            with connection:
                yield Connection(connection)
        finally:
            process.kill()
            process.wait()


def _on_the_clock(count: int, work: Callable[[], object]) -> float:
    begin = time.thread_time()
    work()
    return count / (time.thread_time() - begin)


_PREFIX = as_bytes(ConfigScript(b"<configuration/>"), HeaderXml(_HEADER.encode()))


def _read(take: Callable[[Any, int], Iterator[object]]) -> Callable[[Message, bytes, int], float]:
    def measure(_message: Message, raw: bytes, count: int) -> float:
        # Memory that nobody has used before comes slowly, from a virtual machine's host above all: two are alive.
        before = 2 if len(raw) > _LARGE else 0
        with _connected(_SENDER, _PREFIX, raw, str(count + before)) as connection:
            messages = take(connection, len(raw))
            for _ in range(before):
                next(messages)
            return _on_the_clock(count, lambda: [None for _ in zip(range(count), messages, strict=False)])

    return measure


def _write(give: Callable[[Any, Any, bytes, int], object]) -> Callable[[Message, bytes, int], float]:
    def measure(message: Message, raw: bytes, count: int) -> float:
        item = _stock(message, raw) if give is _give_stock else message
        with _connected(_TAKER, _PREFIX) as connection:
            return _on_the_clock(count, lambda: give(connection, item, raw, count))

    return measure


def _stock(_message: Message, raw: bytes) -> Any:
    """The message as the package itself reads it."""
    with _connected(_SENDER, _PREFIX, raw, "1") as connection:
        return next(connection)[1]


def _take_stock(connection: Any, _size: int) -> Iterator[object]:
    return iter(connection)


def _take_ours(connection: Any, _size: int) -> Iterator[object]:
    return iter(Wire.take_over(connection))


def _take_kernel(connection: Any, size: int) -> Iterator[object]:
    block, receive, taken = memoryview(bytearray(1 << 21)), connection.socket.socket.recv_into, 0
    while True:
        while taken < size:
            taken += receive(block)
        while taken >= size:
            taken -= size
            yield None


def _give_stock(connection: Any, item: Any, _raw: bytes, count: int) -> None:
    for _ in range(count):
        connection.send(item)


def _give_ours(connection: Any, item: Message, _raw: bytes, count: int) -> None:
    wire = Wire.take_over(connection)
    for _ in range(count):
        wire.send_soon(item)
    wire.flush()


def _give_kernel(connection: Any, _item: Message, raw: bytes, count: int) -> None:
    together = raw * min(count, max(1, (1 << 19) // len(raw)))
    for _ in range(count * len(raw) // len(together)):
        connection.socket.socket.sendall(together)


_READ = {"stock": _read(_take_stock), "ours": _read(_take_ours), "kernel": _read(_take_kernel)}
_WRITE = {"stock": _write(_give_stock), "ours": _write(_give_ours), "kernel": _write(_give_kernel)}


# Latency.

# Matrix (z, y, x), frames, coils, acceleration, calibration (z, y), pipeline, models; then the matrix of --small.
CASES: dict[str, tuple[Any, ...]] = {
    "2d": ((1, 256, 256), 1, 16, 4.0, (0, 24), "mel_cartesian_2d", ["none", "primal_dual_2d"], (1, 48, 40)),
    "cine": ((1, 192, 160), 16, 12, 8.0, (0, 8), "mel_cine_2dt", ["none", "primal_dual_2dt"], (1, 40, 32)),
    "3d": ((128, 160, 192), 1, 8, 8.0, (24, 24), "mel_cartesian_3d", ["adjoint"], (16, 24, 20)),
}


def latency(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Seconds from the last acquisition to the first image."""
    from melcore.io.mrd import open_raw

    rows = []
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as server:
        for case in options.cases:
            pipeline, models = CASES[case][5:7]
            path, name = _exam(Path(folder), case, small=options.small)
            with open_raw(path) as raw:
                header, readouts = HeaderXml(raw.header_xml.encode()), list(raw.acquisitions())
            sorted_data = _sorted(header, readouts, pipeline)
            for model in models if options.models is None else options.models:
                script = ConfigScript(
                    f'<configuration><property name="model" value="{model}"/></configuration>'.encode()
                )
                chosen = ConfigScript(
                    script.xml.replace(b"<p", f'<property name="pipeline" value="{pipeline}"/><p'.encode(), 1)
                )
                node, client = (
                    as_bytes(script, header, *sorted_data, Close()),
                    as_bytes(chosen, header, *readouts, Close()),
                )
                for way, run in (
                    ("execute, process started", lambda raw=node: _executed(raw)),
                    ("connect, warm server", lambda raw=node: _served(server.port, raw)),
                    ("client, warm server, from raw data", lambda raw=client: _served(server.port, raw)),
                ):
                    # Once for the memory and the plan of this shape; large cases speak for themselves.
                    warm_up = [run()] if way.startswith("connect") and case != "3d" else []
                    runs = [run() for _ in range(1 if case == "3d" or options.small else 3)]
                    seconds = statistics.median(one for one, _ in runs)
                    row = {"exam": name, "model": model, "way": way, "path": runs[0][1], "seconds": round(seconds, 2)}
                    print(row, warm_up, file=sys.stderr, flush=True)
                    rows.append(row)
    return rows


def _exam(folder: Path, case: str, *, small: bool) -> tuple[Path, str]:
    from melcore.simulate.exam import write_exam
    from melcore.simulate.protocol import Protocol

    shape, frames, coils, acceleration, calibration, *_, little = CASES[case]
    if small:
        shape, frames, coils, acceleration, calibration = little, min(frames, 3), 3, 2.0, (8, 10)
    path = folder / f"{case}.h5"
    write_exam(path, Protocol(shape, shape[0] == 1, frames, coils, acceleration, calibration))
    matrix = "x".join(str(size) for size in (*shape[::-1], coils) if size > 1)
    return path, f"{case} {matrix}" + (f", {frames} frames" if frames > 1 else "")


def _sorted(header: HeaderXml, readouts: list[Acquisition], pipeline: str) -> list[Message]:
    """What the standard gadgets make of it."""
    parsed, stream = parse_header(header.xml), iter(readouts)
    for node in read_pipeline(find_pipeline(pipeline)):
        if not node.external:
            stream = node.stage.bind(node.values, node.name)(stream, parsed)
    return list(stream)


def _executed(raw: bytes) -> tuple[float, str]:
    """A process as a Gadgetron starts it."""
    begin = time.perf_counter()
    with socket.create_server(("localhost", 0)) as server:
        command = [sys.executable, "-m", "gadgetron", str(server.getsockname()[1]), "gadgets", "reconstruct"]
        process = subprocess.Popen(
            command, cwd=ROOT, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            connection, _ = server.accept()
            with connection:
                return _first_image(connection, raw, begin)
        finally:
            process.wait(_TIMEOUT)


def _served(port: int, raw: bytes) -> tuple[float, str]:
    begin = time.perf_counter()
    with socket.create_connection(("localhost", port)) as connection:
        return _first_image(connection, raw, begin)


def _first_image(connection: socket.socket, raw: bytes, begin: float) -> tuple[float, str]:
    """Seconds since `begin`, and the path that the image took."""
    sender = threading.Thread(target=connection.sendall, args=(raw,))
    sender.start()
    wire, first = Wire(connection, message_timeout=_TIMEOUT), (0.0, "")
    while not isinstance(message := wire.read(), Close):
        if not isinstance(message, Image):
            raise SystemExit(f"instead of an image came {message}")
        path = re.search(r"MEL_path_taken</name><value>([^<]*)", message.meta)
        first = first if first[0] else (time.perf_counter() - begin, path[1] if path else "")
    sender.join()
    return first


class _Server:
    """A `mel serve` of our own."""

    def __init__(self, process: "subprocess.Popen[str]", port: int) -> None:
        self.process, self.port = process, port

    def mebibytes(self) -> float:
        """Resident memory."""
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


@contextlib.contextmanager
def _server(folder: Path) -> Iterator[_Server]:
    command = [sys.executable, "-m", "melcore.cli", "serve", "--port", "0", "--spool", str(folder / "spool")]
    with (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = process.stdout.readline() if process.stdout else ""
        ready = re.search(r"ready on [\d.]+:(\d+)", line)
        if not ready:
            raise SystemExit(f"mel serve did not start: {line}{(folder / 'serve.log').read_text()}")
        yield _Server(process, int(ready[1]))
    finally:
        process.terminate()
        process.communicate()


# Sustained.


def sustained(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Exams per hour, and the memory of the server."""
    from melcore.io.mrd import open_raw
    from melcore.simulate.exam import write_exam
    from melcore.simulate.protocol import Protocol

    shape, coils = ((1, 48, 40), 3) if options.small else ((1, 128, 128), 8)
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as server:
        path = Path(folder, "exam.h5")
        write_exam(path, Protocol(shape, True, 1, coils, 3.0, (0, 16)))
        with open_raw(path) as raw:
            header, readouts = HeaderXml(raw.header_xml.encode()), list(raw.acquisitions())
        exam = as_bytes(ConfigFile("mel_cartesian_2d"), header, *readouts, Close())
        memory, begin = [server.mebibytes()], time.perf_counter()
        for number in range(options.exams):
            _served(server.port, exam)
            if number + 1 in (1, 10, options.exams // 2, options.exams):
                memory.append(server.mebibytes())
        seconds = time.perf_counter() - begin
    return [
        {
            "exam": "x".join(map(str, (*shape[:0:-1], coils))) + ", primal_dual_2d, from raw data",
            "exams": options.exams,
            "delivered": options.exams,
            "exams_per_hour": round(3600 * options.exams / seconds),
            "seconds_per_exam": round(seconds / options.exams, 2),
            **{
                f"mebibytes_after_{number}": round(value)
                for number, value in zip((0, 1, 10, options.exams // 2, options.exams), memory, strict=False)
            },
        }
    ]


# Results.

PARTS: dict[str, Callable[[argparse.Namespace], list[dict[str, Any]]]] = {
    "throughput": throughput,
    "latency": latency,
    "sustained": sustained,
}


def _command() -> str:
    return shlex.join(["python", "benchmarks/streaming.py", *sys.argv[1:]])


def _machine() -> str:
    model = platform.machine()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    return f"{model}, {os.cpu_count()} cores, one thread for each process, load {load}"


def _table(part: str, found: dict[str, Any]) -> str:
    rows = found["rows"]
    names = list(rows[0])
    lines = [f"## {part}", "", f"`{found['command']}`, {found['date']}, {found['machine']}", ""]
    lines += [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|" + "---|" * len(names)]
    lines += [
        f"| {' | '.join(f'{row[name]:,}' if isinstance(row[name], (int, float)) else row[name] for name in names)} |"
        for row in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
