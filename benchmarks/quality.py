"""Image quality of bundles, beside conventional methods with the best weight for the very data they are judged on.

    python benchmarks/quality.py                                    some rows of every section: 15 minutes of one core
    python benchmarks/quality.py measured cine volume --complete    every row of some sections
    python benchmarks/quality.py grid-2d grid-3d grid-cine --complete

measured   k-space of brains that was measured, sampled again; the references have the noise of the scans
cine       a pig's heart in motion, simulated coils
volume     heads in 3D, simulated coils
grid-...   never worse? SNR 5 to 1000 by R 1 to 12, against the product's CG-SENSE and one with an oracle's weight;
           the references are far cleaner than the exams

Rows that were judged before stay in benchmarks/results/quality.json and .md until they are judged again. What is
finished is kept in --work, with panels to look at and a page for each section.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import real_scans
from melcore.bundle import Bundle, shipped
from melcore.errors import ConfigError, MelError
from training.baselines import pics_kinds
from training.cases import Case, Exam, MaskKind, make_case
from training.comparison import CG_SENSE, ORACLE, Setup, compare
from training.results import about, report
from training.summary import BEST_PICS, TOLERANCE, with_best

RESULTS = Path(__file__).parent / "results"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """Cases, and what they are judged against."""

    cases: Callable[[Path, bool], Iterator[Case]]
    baselines: frozenset[str] = frozenset({"cg", "pics"})

    @property
    def is_grid(self) -> bool:
        """Whether it asks for "never worse" rather than for rows."""
        return "pics" not in self.baselines


def measured(data: Path, _complete: bool) -> Iterator[Case]:
    """The three measured brains."""
    return real_scans.measured_brains(data)


def cine(data: Path, complete: bool) -> Iterator[Case]:
    """The pig's heart."""
    return real_scans.hearts(data, (4, 8, 12) if complete else (8,))


def volume(data: Path, complete: bool) -> Iterator[Case]:
    """Heads."""
    return real_scans.heads(
        data, (("chris_t1", 8), ("chris_t1", 12), ("spm152", 8)) if complete else (("chris_t1", 8),)
    )


def grid_2d(data: Path, complete: bool) -> Iterator[Case]:
    """Slices by SNR, acceleration and mask."""
    exams = [real_scans.slice_of_head(data, "chris_t1")]
    if complete:
        exams += [
            real_scans.brain_of_32_coils(data),
            real_scans.slice_of_head(data, "spm152", 0.5),
            real_scans.measured_brain(data),
        ]
    rates: tuple[float, ...] = (1, 1.5, 2, 3, 4, 6, 8, 12) if complete else (1, 2, 4, 8)
    levels = (5, 10, 20, 50, 100, 200, 500, 1000) if complete else (5, 30, 1000)
    yield from _grid(exams, rates, levels, "poisson")
    yield from _grid(exams, (2, 3, 4) if complete else (3,), levels, "lines")


def grid_3d(data: Path, complete: bool) -> Iterator[Case]:
    """Volumes by SNR and acceleration."""
    exams = [real_scans.head(data, name, 3.5) for name in (("chris_t1", "spm152") if complete else ("chris_t1",))]
    rates: tuple[float, ...] = (1, 2, 4, 6, 8, 12) if complete else (2, 8)
    yield from _grid(exams, rates, (5, 10, 20, 50, 100, 300, 1000) if complete else (5, 30, 1000), "poisson")


def grid_cine(data: Path, complete: bool) -> Iterator[Case]:
    """Series by SNR and acceleration."""
    exams = [real_scans.heart(data, index, 12, 96) for index in ((5, 8, 12) if complete else (8,))]
    rates: tuple[float, ...] = (1, 2, 4, 6, 8, 12) if complete else (2, 8)
    yield from _grid(exams, rates, (5, 10, 20, 50, 100, 300, 1000) if complete else (5, 30, 1000), "time-lines")


def _grid(exams: Sequence[Exam], rates: Sequence[float], levels: Sequence[float], mask: MaskKind) -> Iterator[Case]:
    for exam in exams:
        for snr in levels:
            if snr > 0.3 * exam.snr:
                continue  # the reference must be far cleaner
            for rate in rates:
                yield make_case(exam, acceleration=rate, snr=snr, mask=mask, seed=1)


_CG = frozenset({"cg"})
SECTIONS = {
    "measured": Section(measured),
    "cine": Section(cine),
    "volume": Section(volume),
    "grid-2d": Section(grid_2d, _CG),
    "grid-3d": Section(grid_3d, _CG),
    "grid-cine": Section(grid_cine, _CG),
}


def main() -> None:
    """Judge the chosen sections."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(SECTIONS)} (default: all)")
    parser.add_argument("--data", type=Path, default=Path(os.environ.get("MEL_DATA", "../shared/data")))
    parser.add_argument("--bundles", help="paths or names with commas between them (default: those that ship); none")
    parser.add_argument("--complete", action="store_true", help="every row")
    parser.add_argument("--only", default="", help="cases whose name contains this text")
    parser.add_argument("--work", type=Path, default=Path("runs/quality"), help="folder for what is finished")
    parser.add_argument("--output", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.sections if name not in SECTIONS]
    if unknown:
        parser.error(f"there is no section {unknown[0]!r}: {', '.join(SECTIONS)}")
    torch.set_num_threads(1)
    named = list(shipped()) if arguments.bundles is None else arguments.bundles.split(",")
    bundles = [Bundle.load(name) for name in named if name not in ("", "none")]
    for name in arguments.sections or SECTIONS:
        judge(name, bundles, arguments)


def judge(name: str, bundles: Sequence[Bundle], arguments: argparse.Namespace) -> None:
    """Judge one section and enter its rows into the results."""
    section, begin = SECTIONS[name], time.perf_counter()
    folder = arguments.work / name
    # Three sweeps of a volume take most of the time, and the third has never been the best by more than .1 dB.
    leave_out = frozenset() if arguments.complete or name != "volume" else frozenset({list(pics_kinds("3d"))[-1]})
    setup = Setup(bundles, section.baselines, folder, arguments.device, leave_out=leave_out)
    rows, skipped = [], []
    for case in section.cases(arguments.data, arguments.complete):
        if arguments.only not in case.name:
            continue
        try:
            row = compare(case, setup)
        except MelError as error:
            skipped.append({"name": case.name, "reason": " ".join(str(error).split())})
            print(f"{case.name}: left out: {error}", flush=True)
            continue
        rows.append(row)
        words = ", ".join(
            f"{method} {found['object']['nrmse_db']:.2f}/{found['support']['nrmse_db']:.2f}"
            if "failed" not in found
            else f"{method} FAILED: {found['failed']}"
            for method, found in row.figures["methods"].items()
        )
        print(f"{name}: {case.name} ({time.perf_counter() - begin:.0f} s): {words}", flush=True)
    if not rows:
        raise ConfigError(f"no case of {name} was judged.")
    command = shlex.join(["python", "benchmarks/quality.py", *sys.argv[1:]])
    report(rows, setup, skipped, command)
    load = ", ".join(f"{one:.1f}" for one in os.getloadavg())
    entry = {
        **about(setup, command),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread, load {load}",
        "seconds": round(time.perf_counter() - begin),
    }
    # Another process may judge another section at the same time.
    content = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    sections = content.get("sections", {})
    before = {row["name"]: row for row in sections.get(name, {}).get("rows", [])}
    now = {row.figures["name"]: {**row.figures, "by": len(sections.get(name, {}).get("runs", []))} for row in rows}
    runs = [*sections.get(name, {}).get("runs", []), entry]
    sections[name] = _pruned({"runs": runs, "rows": list({**before, **now}.values()), "skipped": skipped})
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps({"sections": sections}, indent=1) + "\n")
    arguments.output.with_suffix(".md").write_text(markdown(sections))


def _pruned(section: Figures) -> Figures:
    """Without runs of which no row is left."""
    used = sorted({row["by"] for row in section["rows"]})
    rows = [{**row, "by": used.index(row["by"])} for row in section["rows"]]
    return {**section, "runs": [section["runs"][index] for index in used], "rows": rows}


def markdown(sections: Figures) -> str:
    """All sections as tables."""
    lines = [
        "# Image quality",
        "",
        "Complex NRMSE in dB in the support of the signal (in the object in brackets); SSIM of magnitudes in the "
        "support. Conventional methods but CG-SENSE itself have the best weight for the very case, swept until it is "
        "inside the grid. `python benchmarks/quality.py --help` says what the sections are.",
    ]
    for name, section in sections.items():
        lines += ["", f"## {name}", ""]
        for number, run in enumerate(section["runs"]):
            bundles = ", ".join(f"{one['name']}@{one['digest']}" for one in run["bundles"]) or "no bundle"
            lines.append(
                f"- {_letter(number)}: `{run['command']}`, {run['date']}, {run['machine']}, "
                f"{run['seconds']} s; {bundles}"
            )
        lines.append("")
        rows = [with_best(row) for row in section["rows"]]
        lines += _never_worse(rows) if SECTIONS[name].is_grid else _rows(rows)
    return "\n".join(lines) + "\n"


def _rows(rows: Sequence[Figures]) -> list[str]:
    """One line for each case."""
    learned = list(dict.fromkeys(name for row in rows for name in row["methods"] if name.startswith("learned")))
    methods = ["zero-filled", CG_SENSE, ORACLE, BEST_PICS, *learned]
    lines = [f"| case | {' | '.join(methods)} | floor | run |", "|---" * (len(methods) + 3) + "|"]
    for row in rows:
        cells = [_cell(row["methods"].get(method)) for method in methods]
        floor = row["floor_db"]["support"]
        cells += ["none" if floor is None else f"{floor:.1f}", _letter(row["by"])]
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    floored = "The floor is the error that the true image would have: the references have the noise of their scans."
    return [*lines, "", floored] if any(row["floor_db"]["support"] is not None for row in rows) else lines


def _cell(found: Figures | None) -> str:
    if found is None:
        return "-"
    if "failed" in found:
        return "failed"
    text = f"{found['support']['nrmse_db']:.2f} ({found['object']['nrmse_db']:.2f}), {found['support']['ssim']:.3f}"
    setting = found["setting"].partition(": ")[0] if found["setting"].startswith("pics") else ""
    return text + (f"<br>{setting}" if setting else "") + (" (edge)" if found.get("inside") is False else "")


def _never_worse(rows: Sequence[Figures]) -> list[str]:
    """Learned minus the better of both CG-SENSE, the worst over object and support and over exams, by SNR and R."""
    lines: list[str] = []
    learned = [name for name in dict.fromkeys(m for row in rows for m in row["methods"]) if name.startswith("learned")]
    for method in learned:
        there = [row for row in rows if "failed" not in row["methods"].get(method, {"failed": ""})]
        losses = [(max(_loss(row, method, region) for region in ("object", "support")), row) for row in there]
        bad = [row for loss, row in losses if loss > TOLERANCE]
        lines += [
            f"{method}: worse than the better CG-SENSE by over {TOLERANCE:g} dB in the object or in the support in "
            f"{len(bad)} of {len(there)} cases. The largest loss (positive) over exams and regions, in dB:",
            "",
        ]
        for mask in dict.fromkeys(row["mask"] for row in there):
            lines += _by_cell([(loss, row) for loss, row in losses if row["mask"] == mask], mask)
    gaps = [(max(_loss(row, CG_SENSE, region) for region in ("object", "support")), row) for row in rows]
    lines += [f"{CG_SENSE} itself against the better of both (largest over exams and regions), in dB:", ""]
    for mask in dict.fromkeys(row["mask"] for row in rows):
        lines += _by_cell([(loss, row) for loss, row in gaps if row["mask"] == mask], mask)
    return lines


def _by_cell(losses: Sequence[tuple[float, Figures]], mask: str) -> list[str]:
    rates = sorted({round(row["acceleration"], 1) for _, row in losses})
    levels = sorted({round(row["snr"], 1) for _, row in losses})
    lines = [f"| {mask}, SNR | " + " | ".join(f"R={rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for level in levels:
        cells = []
        for rate in rates:
            found = [
                loss for loss, row in losses if (round(row["acceleration"], 1), round(row["snr"], 1)) == (rate, level)
            ]
            worst = max(found, default=None)
            cells.append("" if worst is None else f"**{worst:+.2f}**" if worst > TOLERANCE else f"{worst:+.2f}")
        lines.append(f"| {level:g} | " + " | ".join(cells) + " |")
    return [*lines, ""]


def _loss(row: Figures, method: str, region: str) -> float:
    found = row["methods"]
    rival = min(found[name][region]["nrmse_db"] for name in (CG_SENSE, ORACLE) if "failed" not in found[name])
    return float(found[method][region]["nrmse_db"] - rival)


def _letter(number: int) -> str:
    return f"run {number + 1}"


if __name__ == "__main__":
    main()
