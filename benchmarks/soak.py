"""Exams back to back through `mel serve`, with random faults: none may be lost, memory must not grow.

Each exam either gets its images, or is in the spool with every readout that was sent, bit for bit. Those that were
complete are replayed in the end.

    python benchmarks/soak.py --exams 40
    python benchmarks/soak.py --exams 200 --output benchmarks/results/soak.json
"""

import argparse
import json
import os
import platform
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

from gadgets.codec import TransportError, message_parts
from gadgets.exam_log import LogReader, being_written
from gadgets.messages import Acquisition, Close, ConfigScript, HeaderXml, Image, Message
from gadgets.spool import Exam, Spool
from gadgets.wire import Wire
from melcore.bundle import Bundle
from melcore.cli import main as mel
from melcore.io.mrd import open_raw
from melcore.preprocess.preparation import Preparation
from melcore.simulate.exam import write_exam
from melcore.simulate.protocol import Protocol
from melcore.unrolled import build

# How often each happens, of 100 exams; the server itself is killed twice, whatever their number.
FAULTS = {
    "none": 48,
    "client gone": 8,
    "client reset": 6,
    "half a message": 6,
    "garbage": 6,
    "wrong pipeline": 5,
    "NaN": 5,
    "BART killed": 6,
    "BART hangs": 4,
    "no memory": 6,
}
_BART = """#!/bin/sh
case "$(cat "$0.mode" 2>/dev/null)" in die) kill -9 $$ ;; hang) sleep 1000 ;; esac
exec {bart} "$@"
"""
_PATIENCE = 60.0


class Soak:
    """A server, its exams, and what became of them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.random = folder, random.Random(seed)
        self.spool = Spool(folder / "spool")
        self.bart = folder / "bart"
        self.bart.write_text(_BART.format(bart=os.environ.get("MEL_BART") or shutil.which("bart")))
        self.bart.chmod(0o755)
        _tiny_bundle(folder / "bundles" / "tiny.safetensors")
        self.exams = [_exam(folder / f"exam{index}.h5", index) for index in range(3)]
        self.outcomes: list[dict[str, Any]] = []
        self.memory: list[tuple[int, int]] = []  # exams so far, MiB
        self.starts = 0
        self.start()

    def start(self) -> None:
        """Start the server, and wait until it is ready."""
        self.log = self.folder / f"serve{self.starts}.log"
        self.starts += 1
        command = [sys.executable, "-m", "melcore.cli", "serve", "--port", "0", "--spool", str(self.spool.folder)]
        command += ["--bundles", str(self.folder / "bundles"), "--model", "tiny"]
        self.server = subprocess.Popen(
            command,
            env=os.environ | {"MEL_BART": str(self.bart)},
            stdout=subprocess.PIPE,
            stderr=self.log.open("w"),
            text=True,
        )
        assert self.server.stdout is not None
        line = self.server.stdout.readline()
        found = re.search(r"ready on 127\.0\.0\.1:(\d+)", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line}{self.log.read_text()}")
        self.port = int(found[1])

    def run(self, count: int) -> None:
        """Send so many exams."""
        killed = {count // 5, count // 4}
        names, weights = zip(*FAULTS.items(), strict=True)
        for number in range(count):
            fault = "server killed" if number in killed else self.random.choices(names, weights)[0]
            self.outcomes.append(self.one(fault))
            if number % 20 == 19 or number == count - 1:
                self.memory.append((number + 1, _resident(self.server.pid)))

    def one(self, fault: str) -> dict[str, Any]:
        """Send an exam with that fault; what came of it."""
        header, messages = self.random.choice(self.exams)
        messages = list(messages)
        values = {"pipeline": "mel_cartesian_2d"}
        if fault == "wrong pipeline":
            values["pipeline"] = "mel_cartesian_4d"
        if fault == "BART hangs":
            values["deadline"] = "0.5"
        if fault == "no memory":
            values |= {"memory": "1000", "fallback": "false"}
        if fault == "NaN":
            index = self.random.randrange(5, len(messages))
            data = messages[index].data.copy()
            data[0, 1] = np.nan
            messages[index] = Acquisition(messages[index].header, messages[index].trajectory, data)
        mode = {"BART killed": "die", "BART hangs": "hang"}.get(fault, "")
        self.bart.with_name("bart.mode").write_text(mode)
        if fault in ("client gone", "client reset", "half a message", "garbage", "server killed"):
            messages = messages[: self.random.randrange(2, len(messages))]
        known = {exam.record.id for exam in self.spool.exams()}
        begin = time.perf_counter()
        images, words = self._send(fault, [_script(values), header], messages)
        seconds = time.perf_counter() - begin
        new = self._new(known, wanted=not images)
        kept = new is not None and _holds(new, messages)
        return {
            "fault": fault,
            "delivered": bool(images),
            "spooled": kept,
            "state": new.record.state if new else "delivered",
            "id": new.record.id if new else "",
            "seconds": seconds,
            "words": words,
        }

    def _send(self, fault: str, opening: list[Message], messages: list[Acquisition]) -> tuple[int, str]:
        raw = _bytes([*opening, *messages])
        ends = {"half a message": _bytes(messages[:1])[:-7], "garbage": b"\xff\xff" * 500}
        whole = fault not in ("client gone", "client reset", "half a message", "garbage", "server killed")
        end = _bytes([Close()]) if whole else ends.get(fault, b"")
        with socket.create_connection(("127.0.0.1", self.port), timeout=_PATIENCE) as connection:
            sender = threading.Thread(target=_send_all, args=(connection, raw + end))
            sender.start()
            if not whole and fault != "garbage":
                sender.join()
                # What is still on its way is lost in a reset, and in a killed server: that is the network's part.
                _until(lambda: self._logged() >= len(raw))
                if fault == "server killed":
                    self.server.kill()
                    self.server.wait()
                    self.start()
                if fault == "client reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                return 0, ""
            answer = _answer(connection)
            sender.join()
        words = next((message.text for message in answer if hasattr(message, "text")), "")
        done = bool(answer) and isinstance(answer[-1], Close) and not words
        return sum(isinstance(message, Image) for message in answer) if done else 0, words

    def _logged(self) -> int:
        """Bytes of raw data of the exam that is being received."""
        running = [exam for exam in self.spool.exams() if exam.record.state == "running"]
        return max(((exam.folder / "raw.log").stat().st_size for exam in running), default=0)

    def _new(self, known: set[str], *, wanted: bool) -> Exam | None:
        """The exam that was added to the spool, when the server is done with it."""

        def added() -> list[Exam]:
            new = [exam for exam in self.spool.exams() if exam.record.id not in known]
            return [exam for exam in new if not being_written(exam.folder / "raw.log")]

        _until(lambda: added() or not (wanted or self._logged()), 10)
        return next(iter(added()), None)

    def replay(self) -> tuple[int, int]:
        """Replay what was complete and sound; how many were, and how many gave images."""
        wanted = [
            one["id"]
            for one in self.outcomes
            if not one["delivered"] and one["fault"] in ("wrong pipeline", "BART killed", "no memory")
        ]
        self.bart.with_name("bart.mode").write_text("")
        target = str(self.folder / "images.h5")
        options = ["--spool", str(self.spool.folder), "-o", target, "--pipeline", "mel_cartesian_2d"]
        good = 0
        for exam in wanted:
            with redirect_stdout(StringIO()):
                good += mel(["replay", exam, *options, "--model", "adjoint"]) == 0
        return len(wanted), good

    def stop(self) -> dict[str, Any]:
        """Stop the server; how it ended, and what it left."""
        children = _children(self.server.pid)
        self.server.terminate()
        code = self.server.wait(_PATIENCE)
        return {"exit_code": code, "processes_left": len(children)}


def _tiny_bundle(path: Path) -> None:
    torch.manual_seed(0)
    regulariser = {"name": "resnet", "dimensions": 2, "channels": 4, "layers": 2}
    architecture = {"iterations": 2, "cg_iterations": 3, "regulariser": regulariser}
    Bundle(build(architecture), architecture, Preparation()).save(path)


def _exam(path: Path, seed: int) -> tuple[HeaderXml, list[Acquisition]]:
    shape = ((1, 32, 28), (2, 28, 32), (1, 36, 30))[seed]
    write_exam(path, Protocol(shape, slices=True, coils=3, acceleration=1.4, calibration=(12, 12), seed=seed))
    with open_raw(path) as raw:
        return HeaderXml(raw.header_xml.encode()), list(raw.acquisitions())


def _script(values: dict[str, str]) -> ConfigScript:
    lines = "".join(f'<property name="{name}" value="{value}"/>' for name, value in values.items())
    return ConfigScript(f"<configuration>{lines}</configuration>".encode())


def _bytes(messages: list[Any]) -> bytes:
    return b"".join(bytes(part) for message in messages for part in message_parts(message))


def _send_all(connection: socket.socket, raw: bytes) -> None:
    with suppress(OSError):
        connection.sendall(raw)


def _answer(connection: socket.socket) -> list[Message]:
    wire, found = Wire(connection, message_timeout=_PATIENCE), []
    with suppress(TransportError):
        while not found or not isinstance(found[-1], Close):
            found.append(wire.read())
    return found


def _holds(exam: Exam, messages: list[Acquisition]) -> bool:
    """Whether an exam's raw data are those messages, bit for bit."""
    raw = exam.raw
    if raw is None:
        return False
    if raw.suffix == ".log":
        with LogReader(raw) as reader:
            found = [message for message in reader.messages() if isinstance(message, Acquisition)]
            return _bytes(found) == _bytes(messages)
    # Not by `open_raw`, which refuses NaN.
    with h5py.File(raw) as file:
        rows = file["dataset/data"]["data"]
    return [row.tobytes() for row in rows] == [message.data.tobytes() for message in messages]


def _until(condition: Callable[[], object], seconds: float = _PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _resident(process: int) -> int:
    pages = int(Path(f"/proc/{process}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") >> 20


def _children(process: int) -> list[int]:
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError, IndexError):
            if status.read_text().rpartition(")")[2].split()[1] == str(process):
                found.append(int(status.parent.name))
    return found


def _processor() -> str:
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.machine()


def _table(summary: dict[str, Any]) -> str:
    lines = [
        f"`{summary['command']}`, {summary['date']}, {summary['machine']}",
        "",
        "| fault | exams | delivered | in the spool | lost |",
        "|---|---|---|---|---|",
    ]
    for fault, row in summary["faults"].items():
        lines.append(f"| {fault} | {row['exams']} | {row['delivered']} | {row['spooled']} | {row['lost']} |")
    total = {name: summary[name] for name in ("exams", "delivered", "spooled", "lost")}
    lines.append(f"| all | {' | '.join(str(value) for value in total.values())} |")
    memory = ", ".join(f"{mebibytes} after {count}" for count, mebibytes in summary["resident_mib"])
    lines += [
        "",
        f"{summary['seconds']:.0f} s; an exam without fault took {summary['median_seconds']:.2f} s (median). "
        f"Replayed: {summary['replayed']} of {summary['replayable']} that were complete. Resident memory in MiB: "
        f"{memory} exams (the server was killed and started again after {summary['restarts']}). Its exit code "
        f"{summary['exit_code']}, processes left {summary['processes_left']}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Run; 0 if no exam was lost, all replays gave images, and nothing stayed behind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exams", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for everything that is made (a temporary one)")
    parser.add_argument("--output", type=Path, help="JSON file of results; a table goes beside it")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mel-soak-") as temporary:
        soak = Soak(arguments.folder or Path(temporary), arguments.seed)
        try:
            begin = time.perf_counter()
            soak.run(arguments.exams)
            seconds = time.perf_counter() - begin
            replayable, replayed = soak.replay()
            ended = soak.stop()
        finally:
            soak.server.kill()
            soak.server.wait()
    rows: dict[str, Counter[str]] = {}
    for one in soak.outcomes:
        row = rows.setdefault(one["fault"], Counter(exams=0, delivered=0, spooled=0, lost=0))
        what = "delivered" if one["delivered"] else "spooled" if one["spooled"] else "lost"
        row.update(["exams", what])
    sound = sorted(one["seconds"] for one in soak.outcomes if one["fault"] == "none")
    totals = {name: sum(row[name] for row in rows.values()) for name in ("exams", "delivered", "spooled", "lost")}
    summary = {
        "command": f"python benchmarks/soak.py --exams {arguments.exams} --seed {arguments.seed}",
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}",
        **totals,
        "faults": {fault: dict(rows[fault]) for fault in sorted(rows)},
        "seconds": round(seconds, 1),
        "median_seconds": round(sound[len(sound) // 2], 3) if sound else None,
        "replayable": replayable,
        "replayed": replayed,
        "resident_mib": soak.memory,
        "restarts": sorted({arguments.exams // 5, arguments.exams // 4}),
        **ended,
    }
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(summary, indent=1) + "\n")
        arguments.output.with_suffix(".md").write_text(_table(summary))
    lost = [one for one in soak.outcomes if not one["delivered"] and not one["spooled"]]
    for one in lost:
        print(f"lost: {one}", file=sys.stderr)
    print(json.dumps(summary) if arguments.json else _table(summary))
    good = not lost and replayed == replayable and not ended["exit_code"] and not ended["processes_left"]
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
