"""Judge bundles and conventional methods against fully sampled exams.

Exams (prepared folders, or fully sampled raw data of ISMRMRD, fastMRI, BART or numpy) are sampled again with the stated
masks, with noise added on top, and reconstructed by every method from the same data: zero-filled, the product's
CG-SENSE, CG-SENSE and BART's pics with the best weight for that very exam, and the bundles. Writes evaluation.json,
panels and curves as PNG, and one page, evaluation.html, that needs no other file. What is finished stays in the folder:
interrupt it as you like, and the same command continues.

Example:
  mel evaluate primal_dual_2d --data exam.h5 --acceleration 2,4,8 --snr 10,40,160 -o evaluation
  mel evaluate mine.safetensors primal_dual_2d --data prepared --baselines cg -o evaluation
  mel evaluate --data prepared -o conventional
"""

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from melcore.bundle import Bundle
    from training.cases import Case, Exam
    from training.comparison import Row, Setup

_BASELINES = ("cg", "pics")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mel evaluate``."""
    parser.add_argument("bundles", nargs="*", metavar="BUNDLE", help="bundles to judge: paths, or names that ship")
    parser.add_argument(
        "--data", nargs="+", required=True, metavar="PATH", help="prepared folders, or raw files: .h5, .cfl, .npy"
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER", help="for all results")
    parser.add_argument("--acceleration", default="4,8", metavar="R,...", help="default 4,8")
    parser.add_argument(
        "--snr",
        default="10,40,160",
        metavar="SNR,...",
        help="of the fully sampled image, reached by adding noise; own: as measured (default 10,40,160)",
    )
    parser.add_argument(
        "--mask",
        default="auto",
        metavar="KIND",
        help="poisson, lines, uniform-lines, grid, time-lines; by default lines in 2D, poisson in 3D, time-lines else",
    )
    parser.add_argument("--baselines", default="cg,pics", metavar="NAME,...", help="cg, pics or none (default cg,pics)")
    parser.add_argument("--noise", choices=("known", "estimated"), default="known", help="what methods are told of it")
    parser.add_argument("--split", default="test", help="of prepared folders: test, validation, train or all")
    parser.add_argument("--slices", type=int, default=4, metavar="N", help="of a file or subject at most (default 4)")
    parser.add_argument("--matrix", metavar="Z,Y,X", help="of exams that are drawn from prepared images")
    parser.add_argument("--axes", default="", metavar="A,B,...", help="of numpy arrays: slice, coil, time, z, y, x")
    parser.add_argument("--seed", type=int, default=0, help="of masks and noise (default 0)")
    parser.add_argument("--device", default="auto", help="of the bundles (default: a GPU where there is one)")
    parser.add_argument("--json", action="store_true", help="print the JSON instead of the table")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; 0 when at least one case was judged and no method failed."""
    from melcore.bundle import Bundle
    from melcore.errors import ConfigError, DataError, unknown
    from training.comparison import Setup
    from training.figures import require

    require()
    named = [name for name in arguments.baselines.split(",") if name not in ("", "none")]
    for name in named:
        if name not in _BASELINES:
            raise unknown("baseline", name, (*_BASELINES, "none"))
    if arguments.slices < 1:
        raise ConfigError(f"--slices must be at least 1, but is {arguments.slices}.")
    accelerations = _numbers(arguments.acceleration, "--acceleration", 1)
    levels = [None if word == "own" else _numbers(word, "--snr", 0)[0] for word in arguments.snr.split(",")]
    bundles = [Bundle.load(name) for name in arguments.bundles]
    setup = Setup(bundles, frozenset(named), arguments.output, arguments.device)
    skipped: list[dict[str, str]] = []
    cases = _cases(_exams(arguments, bundles, skipped), accelerations, levels, arguments, skipped)
    rows = evaluate(cases, setup, skipped, _command(), quiet=arguments.quiet, as_json=arguments.json)
    if not rows:
        reason = skipped[0]["reason"] if skipped else "there is no exam"
        raise DataError(f"nothing could be judged: {reason}")
    found = {row.figures["dimensions"] for row in rows}
    unused = [one.name for one in bundles if one.dimensions not in found]
    if unused:
        raise ConfigError(
            f"no exam was for {', '.join(unused)}: they are {', '.join(sorted(found))}; all else is done."
        )
    return int(any("failed" in one for row in rows for one in row.figures["methods"].values()))


def evaluate(
    cases: Iterator["Case"],
    setup: "Setup",
    skipped: list[dict[str, str]],
    command: str,
    *,
    quiet: bool = False,
    as_json: bool = False,
) -> "list[Row]":
    """Judge cases one after the other, and report on those that are finished, also when interrupted."""
    from tqdm import tqdm

    from melcore.errors import MelError
    from training.comparison import compare
    from training.results import report

    rows: list[Row] = []
    with tqdm(desc="cases", disable=quiet or not sys.stderr.isatty(), file=sys.stderr) as bar:
        try:
            for case in cases:
                try:
                    rows.append(compare(case, setup, lambda name, c=case: bar.set_postfix_str(f"{c.name}: {name}")))
                except MelError as error:
                    skipped.append({"name": case.name, "reason": " ".join(str(error).split())})
                bar.update()
        except KeyboardInterrupt:
            bar.close()
            if rows:
                report(rows, setup, skipped, command)
            tqdm.write(f"{len(rows)} cases are finished and kept: the same command continues.", file=sys.stderr)
            raise
    if rows:
        text, content = report(rows, setup, skipped, command)
        sys.stdout.write(json.dumps(content) + "\n" if as_json else text)
        for one in skipped:
            tqdm.write(f"left out: {one['name']}: {one['reason']}", file=sys.stderr)
        tqdm.write(f"{setup.folder / 'evaluation.html'}", file=sys.stderr)
    return rows


def _exams(
    arguments: argparse.Namespace, bundles: "Sequence[Bundle]", skipped: list[dict[str, str]]
) -> "Iterator[Exam]":
    """Exams of all paths; one that cannot be read is reported and left out."""
    from melcore.errors import ConfigError, MelError
    from training.exams import read_exams

    matrix = None
    if arguments.matrix:
        sizes = [int(size) for size in _numbers(arguments.matrix, "--matrix", 1)]
        if len(sizes) != 3:
            raise ConfigError(f"--matrix takes three sizes along z,y,x, but got {arguments.matrix!r}.")
        matrix = (sizes[0], sizes[1], sizes[2])
    dimensions = list(dict.fromkeys(one.dimensions for one in bundles)) or ["2d"]
    for path in arguments.data:
        try:
            yield from read_exams(
                path,
                dimensions=dimensions,
                split=arguments.split,
                most=arguments.slices,
                matrix=matrix,
                axes=[axis for axis in arguments.axes.split(",") if axis],
                seed=arguments.seed,
            )
        except ConfigError:
            raise
        except MelError as error:
            skipped.append({"name": str(path), "reason": " ".join(str(error).split())})


def _cases(
    exams: "Iterator[Exam]",
    accelerations: Sequence[float],
    levels: Sequence[float | None],
    arguments: argparse.Namespace,
    skipped: list[dict[str, str]],
) -> "Iterator[Case]":
    """Every exam with every mask and noise; where all the noise that can be added is too little, with its own."""
    from melcore.errors import ConfigError
    from training.cases import make_case

    for exam in exams:
        reached = [level for level in levels if level is None or level < exam.snr]
        for level in levels:
            if level is not None and level not in reached:
                reason = f"the exam itself has an SNR of {exam.snr:.3g}, and noise can only be added"
                skipped.append({"name": f"{exam.name}, SNR {level:g}", "reason": reason})
        for acceleration in accelerations:
            for level in reached or [None]:
                try:
                    yield make_case(
                        exam,
                        acceleration=acceleration,
                        snr=level,
                        mask=arguments.mask,
                        seed=arguments.seed,
                        noise_known=arguments.noise == "known",
                    )
                except ConfigError as error:
                    name = f"{exam.name}, R={acceleration:g}, SNR {'own' if level is None else f'{level:g}'}"
                    skipped.append({"name": name, "reason": " ".join(str(error).split())})


def _numbers(words: str, option: str, least: float) -> list[float]:
    from melcore.errors import ConfigError

    try:
        values = [float(word) for word in words.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value < float("inf") and value > 0 for value in values):
        raise ConfigError(f"{option} takes numbers of at least {least:g} with commas between them, but got {words!r}.")
    return list(dict.fromkeys(values))


def _command() -> str:
    return shlex.join(["mel", *sys.argv[1:]])
