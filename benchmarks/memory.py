"""What training costs in memory and time under every executor, side by side.

    python benchmarks/memory.py predict   bytes and work at full sizes, from tensors without memory (minutes)
    python benchmarks/memory.py run       real steps on this machine, with gradient errors (minutes)
    python benchmarks/memory.py bart      steps of BART's reconet beside ours in 2D (needs bart and GNU time)

Each writes benchmarks/results/memory_<name>.json and .md, with the command, the machine and the date in them.
"""

import argparse
import contextlib
import copy
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from melcore.errors import MemoryBudgetError
from melcore.memory import IterationPlan, MemoryPlan
from melcore.memory.costs import MARGIN, Costs
from melcore.memory.meter import Meter, fake_tensors
from melcore.memory.planner import choose
from melcore.networks import ResidualCNN, SpaceTimeCNN
from melcore.networks.noise_curve import weight_of
from melcore.physics import Sense
from melcore.unrolled import Encoding, MoDL, Unrolled
from melcore.unrolled.planning import costs

RESULTS = Path(__file__).parent / "results"
SWEEP: list[tuple[str, dict[str, Any]]] = [
    ("plain", {}),
    ("checkpoint", {}),
    ("store", {"keep_input": True}),
    ("nested", {}),
    ("tile 128", {"chunk": 128}),
    ("tile 64", {"chunk": 64}),
    ("keep", {"keep_input": True, "chunk": 16}),
    ("stream 32", {"chunk": 32}),
    ("stream 8", {"chunk": 8}),
    ("stream 8, physics twice", {"chunk": 8, "hold_physics": False}),
    ("stream 8, states on the host", {"chunk": 8, "keep_input": True, "states": "host"}),
    ("stream 8, 2 slots", {"chunk": 8, "hold_physics": False, "states": "slots"}),
]


def entry(name: str, options: dict[str, Any]) -> IterationPlan:
    """The plan that a row of the table is about."""
    return IterationPlan(name.replace(",", "").split()[0], **options)  # type: ignore[arg-type]


def predict() -> list[dict[str, Any]]:
    """Peak and work of every executor at the sizes that the engine is for."""
    full, small = (256, 320, 320), (160, 256, 256)
    network_3d = lambda: ResidualCNN(3, channels=64, layers=5)  # noqa: E731
    network_2dt = lambda: SpaceTimeCNN(2, channels=64, stages=3)  # noqa: E731
    dynamic = {"time": 25, "batch": 8}
    problems: list[tuple[str, Callable[[], Any], int, tuple[int, int, int], int, dict[str, int], float]] = [
        ("320x320x256, 8 coils, N=10", network_3d, 10, full, 8, {}, 9),
        ("320x320x256, 16 coils, N=10", network_3d, 10, full, 16, {}, 11),
        ("320x320x256, 8 coils, N=20", network_3d, 20, full, 8, {}, 10.5),
        ("256x256x160, 8 coils, N=10", network_3d, 10, small, 8, {}, 6),
        ("2D+time 200x180x25, 12 coils, N=10, batch 8", network_2dt, 10, (1, 180, 200), 12, dynamic, 12),
    ]
    rows = []
    for title, network, count, shape, coils, options, budget in problems:
        model = Unrolled.repeat(lambda network=network: MoDL(network()), count)
        with fake_tensors():
            measured, pure = (costs(model, shape, coils, fourier_cost=cost, **options) for cost in (10.0, 0.0))
            for part in ("physics", "tail"):
                pure.__dict__[part] = copy.copy(getattr(measured, part))
            plain = MemoryPlan.uniform("plain", count)
            plans = {name: MemoryPlan((entry(name, row_options),) * count) for name, row_options in SWEEP}
            for host in (False, True):
                places = "device or host" if host else "device"
                with contextlib.suppress(MemoryBudgetError):
                    found = choose(measured, int(budget * 1e9), host=host)
                    plans[f"the plan within {budget:g} GB, states on {places}: {_short(found)}"] = found
            for name, plan in plans.items():
                found = measured.predict(plan)
                rows.append(
                    {
                        "problem": title,
                        "executor": name,
                        "peak_gb": (found.predicted_peak_bytes or 0) / 1e9,
                        "time": found.relative_time,
                        "convolution_work": _convolution(pure, plan) / _convolution(pure, plain),
                    }
                )
                _say(rows[-1])
            peak, relative = _predicted_reversal(measured)
            rows.append(
                {
                    "problem": title,
                    "executor": "published reversal",
                    "peak_gb": peak * (1 + MARGIN) / 1e9,
                    "time": relative,
                    "convolution_work": 3.0,
                }
            )
    return rows


def _predicted_reversal(measured: Costs, fixed_point_steps: int = 5) -> tuple[int, float]:
    """Peak, without margin, and relative time of Wang et al. 2021.

    States are not kept but recovered: the data consistency's in closed form, the regulariser's by so many evaluations
    in a fixed-point iteration. Then the iteration is differentiated as a whole.
    """
    plain, physics = IterationPlan(), measured.physics
    network = measured.network(plain)
    graph = physics.kept + network.kept + 3 * measured.state
    peak = measured.fixed + graph + max(network.backward, physics.backward - network.kept)
    evaluations = 2 + fixed_point_steps
    once = evaluations * network.work + network.backward_work + 3 * physics.work + physics.backward_work
    return peak, measured.count * once / measured.work(MemoryPlan((plain,) * measured.count))


def _short(plan: MemoryPlan) -> str:
    """A plan in a few words."""
    words = [f"{name}, {kept} ({where})" for name, kept, where in (entry.describe() for entry in plan.iterations)]
    return "; ".join(f"{words.count(word)} x {word}" for word in dict.fromkeys(words))


def _convolution(pure: Any, plan: MemoryPlan) -> float:
    """Operations of convolutions alone."""
    parts = {name: getattr(pure, name) for name in ("physics", "tail")}
    pure.__dict__.update({name: replace(part, work=0.0, backward_work=0.0) for name, part in parts.items()})
    work = pure.work(plan)
    pure.__dict__.update(parts)
    return float(work)


def run() -> list[dict[str, Any]]:
    """Real training steps: peak of live bytes, processor time, error of the gradient against double precision."""
    torch.set_num_threads(1)
    three: Callable[[], Any] = lambda: ResidualCNN(3, channels=32, layers=5)  # noqa: E731
    two: Callable[[], Any] = lambda: ResidualCNN(2, channels=64, layers=5)  # noqa: E731
    dynamic: Callable[[], Any] = lambda: SpaceTimeCNN(2, channels=32, stages=3)  # noqa: E731
    return [
        *_run("3D 24x32x64, 32 channels, N=4", three, (24, 32, 64), 1),
        *_run("2D 192x256, 64 channels, N=4", two, (1, 192, 256), 1),
        *_run("2D+time 48x64x10, 32 channels, N=4", dynamic, (1, 48, 64), 10),
    ]


def _run(title: str, network: Callable[[], Any], matrix: tuple[int, int, int], frames: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    count = 4
    made = Unrolled.repeat(lambda: MoDL(network(), cg_iterations=8), count)
    problem = _problem(matrix, frames)
    exact = _gradient(copy.deepcopy(made).double(), _convert(problem, torch.complex128), None)
    plans: dict[str, MemoryPlan | None] = {"plain": None}
    for name, options in SWEEP[1:]:
        if not name.startswith("tile") and "host" not in name:  # here the host's memory is the device's
            plans[name] = MemoryPlan((entry(name, options),) * count)
    plans["stream 16"] = MemoryPlan.uniform("stream", count, chunk=16)
    plans["tile 32"] = MemoryPlan.uniform("tile", count, chunk=32)

    def step_of(plan: MemoryPlan | None) -> Callable[[], list[Tensor]]:
        return lambda: _gradient(made, problem, plan)

    steps = {name: step_of(plan) for name, plan in plans.items()}
    steps["torch checkpoint"] = lambda: _torch_checkpoint(made, problem)
    steps["published reversal"] = lambda: _published_reversal(made, problem)
    seconds: dict[str, float] = {}
    for _ in range(3):  # in turn, so that a busy machine disturbs all alike
        for name, step in steps.items():
            start = time.process_time()
            step()
            seconds[name] = min(seconds.get(name, float("inf")), time.process_time() - start)
    moments = [torch.zeros_like(parameter) for parameter in made.parameters() for _ in range(2)]
    images = [torch.zeros_like(problem.adjoint_data) for _ in range(2)]
    with fake_tensors():
        measured = costs(made, matrix, _COILS, time=frames)
        expected = {name: measured.peak(plan) / 1e6 for name, plan in plans.items() if plan is not None}
        expected["plain"] = measured.peak(MemoryPlan.uniform("plain", count)) / 1e6
    rows = []
    for name, step in steps.items():
        with Meter() as meter:
            # All that training holds, as `mel plan` counts it: Adam's moments, the target and the start image too.
            meter.hold(problem.adjoint_data, *problem.operator.buffers(), *made.parameters(), *moments, *images)
            meter.restart()
            found = step()
        scale = sum(float(b.square().sum()) for b in exact)
        difference = sum(float((a.double() - b).square().sum()) for a, b in zip(found, exact, strict=True))
        error = (difference / scale) ** 0.5
        rows.append(
            {
                "problem": title,
                "executor": name,
                "predicted_mb": expected.get(name, ""),
                "peak_mb": meter.peak / 1e6,
                "seconds": seconds[name],
                "time": seconds[name] / seconds["plain"],
                "gradient_error": error,
            }
        )
        _say(rows[-1])
    return rows


_COILS = 4


def _problem(matrix: tuple[int, int, int], frames: int, coils: int = _COILS) -> Encoding:
    axes = [torch.linspace(-1, 1, size) if size > 1 else torch.zeros(1) for size in matrix]
    z, y, x = torch.meshgrid(*axes, indexing="ij")
    maps = torch.stack(
        [torch.polar(torch.exp(-((y - a) ** 2) - (x - b) ** 2), a * z + b * y) for a, b in _CENTRES[:coils]]
    )
    maps = (maps / maps.abs().square().sum(0).sqrt())[None, None, :, None]
    mask = torch.rand(1, 1, frames, *matrix[:2], 1) > 0.7
    truth = torch.polar(((z**2 + y**2 + x**2) < 0.7).float(), 0.3 * y).expand(1, 1, frames, *matrix)
    operator = Sense(maps, mask, time=frames)
    return Encoding(operator, operator.adjoint(operator(truth.contiguous())), torch.tensor([_SIGMA]))


# Where the untrained weight of the regulariser, 30 sigma^2, is 0.05.
_SIGMA = (0.05 / 30) ** 0.5
_CENTRES = [(-1, -1), (-1, 1), (1, -1), (1, 1), (-1, 0), (1, 0), (0, -1), (0, 1)]


def _convert(problem: Encoding, dtype: torch.dtype) -> Encoding:
    operator = copy.deepcopy(problem.operator)
    for name, buffer in operator.named_buffers():
        setattr(operator, name, buffer.to(dtype if buffer.is_complex() else dtype.to_real()))
    assert problem.phase is not None
    sigma, phase = problem.sigma.to(dtype.to_real()), problem.phase.to(dtype)
    return Encoding(operator, problem.adjoint_data.to(dtype), sigma, phase)


def _gradient(made: Unrolled, problem: Encoding, plan: MemoryPlan | None) -> list[Tensor]:
    loss = made.refine(problem, problem.adjoint_data, memory=plan).abs().square().sum()
    return list(torch.autograd.grad(loss, list(made.parameters())))


def _torch_checkpoint(made: Unrolled, problem: Encoding) -> list[Tensor]:
    """`torch.utils.checkpoint` around each iteration, the usual remedy."""
    from torch.utils.checkpoint import checkpoint

    state = problem.adjoint_data
    for iteration in made.iterations:
        state = checkpoint(lambda x, i=iteration: i((x,), problem)[0], state, use_reentrant=False)
    return list(torch.autograd.grad(state.abs().square().sum(), list(made.parameters())))


def _published_reversal(made: Unrolled, problem: Encoding, steps: int = 5) -> list[Tensor]:
    """Wang et al. 2021: nothing is kept; the data consistency is inverted in closed form, the network by iteration."""
    parameters, iterations = list(made.parameters()), made.iterations
    with torch.no_grad():
        x = problem.adjoint_data
        for iteration in iterations:
            (x,) = iteration((x,), problem)
        gradient, sums = 2 * x, [torch.zeros_like(parameter) for parameter in parameters]
        for iteration in reversed(iterations):
            mu = weight_of(iteration.mu, problem.sigma)  # type: ignore[arg-type]
            z = (x + (problem.operator.normal(x) - problem.adjoint_data) / mu) / problem.network_unit
            earlier = z
            for _ in range(steps):
                earlier = z - (iteration.regulariser(earlier) - earlier)
            earlier = earlier * problem.network_unit
            with torch.enable_grad():
                leaf = earlier.detach().requires_grad_()
                (output,) = iteration((leaf,), problem)
            gradient, *found = torch.autograd.grad(output, [leaf, *parameters], gradient)
            sums = [a + b for a, b in zip(sums, found, strict=True)]
            x = earlier
    return sums


def bart() -> list[dict[str, Any]]:
    """BART's MoDL and ours: peak memory of the process and processor time of a step, by the number of iterations."""
    return [row for size in (96, 320) for row in _beside_bart(size)]


def _beside_bart(size: int) -> Iterator[dict[str, Any]]:
    idle = _measured(["bart", "version"], ".")[0]
    with tempfile.TemporaryDirectory() as folder:

        def tool(*arguments: str) -> None:
            subprocess.run(["bart", *arguments], check=True, capture_output=True, cwd=folder)

        tool("phantom", "-x", str(size), "-s", "8", "-k", "full")
        tool("phantom", "-x", str(size), "-S", "8", "maps")
        tool("phantom", "-x", str(size), "image")
        tool("upat", "-Y", str(size), "-Z", "1", "-y", "4", "-c", "24", "pattern")
        tool("fmac", "full", "pattern", "k")
        for name in ("k", "maps", "image", "pattern"):  # reconet wants a batch of at least two
            tool("join", "15", name, name, f"{name}2")
        for count in (1, 5, 10, 20):
            for mode in ("", "--lowmem"):
                # The difference of one and two epochs of two steps each; one epoch alone where that takes minutes.
                epochs = (1, 2) if size < 200 else (1,)
                usage = [_bart_usage(folder, count, mode, number) for number in epochs]
                seconds = usage[1][1] - usage[0][1] if len(usage) > 1 else usage[0][1]
                yield _said(size, count, f"bart reconet {mode}".strip(), usage[-1][0], idle, seconds / 2)
            for chunk in (16, 64):
                peak, above, seconds = _ours(count, chunk, size)
                yield _said(size, count, f"MEL stream {chunk}", peak, peak - above, seconds)


def _said(size: int, count: int, method: str, peak: float, idle: float, seconds: float) -> dict[str, Any]:
    row = {
        "image": f"{size}x{size}, 8 coils",
        "iterations": count,
        "method": method,
        "peak_mb": peak,
        "above_idle_mb": peak - idle,  # of the same process that does nothing yet
        "seconds_per_step": seconds,
    }
    _say(row)
    return row


def _measured(command: list[str], folder: str) -> tuple[float, float]:
    """Peak resident memory (MB) and processor time of a process, by GNU time.

    Waiting for the process here would count this interpreter's memory: the kernel carries it over from the fork.
    """
    with tempfile.NamedTemporaryFile("r") as report:
        timed = ["/usr/bin/time", "-f", "%M %U %S", "-o", report.name, *command]
        result = subprocess.run(timed, cwd=folder, capture_output=True, check=False)
        if result.returncode:
            raise SystemExit(f"{' '.join(command)} failed: {result.stderr.decode()[-500:]}")
        peak, user, system = (float(word) for word in report.read().split())
    return peak / 1e3, user + system


def _bart_usage(folder: str, count: int, mode: str, epochs: int) -> tuple[float, float]:
    command = ["bart", "reconet", "--network", "modl", f"--iterations={count}", "--shared-weights", "--train"]
    command += ["-T", f"epochs={epochs}", "-b", "1", "--normalize", *([mode] if mode else [])]
    command += ["--resnet-block", "F=32,L=5,no-batch-normalization", "--pattern=pattern2"]
    return _measured([*command, "k2", "maps2", "weights", "image2"], folder)


def _ours(count: int, chunk: int, size: int) -> tuple[float, float, float]:
    """The same network (5 layers of 32 channels, 10 steps of CG) in a process of its own."""
    command = [sys.executable, __file__, "ours", str(count), str(chunk), str(size)]
    usage = [_measured([*command, str(steps)], ".") for steps in (0, 1, 6)]
    return usage[2][0], usage[2][0] - usage[0][0], (usage[2][1] - usage[1][1]) / 5


def _train(count: int, chunk: int, size: int, steps: int) -> None:
    torch.set_num_threads(1)
    problem = _problem((1, size, size), 1, coils=8)
    made = Unrolled.repeat(lambda: MoDL(ResidualCNN(2, channels=32, layers=5)), count)
    memory = MemoryPlan.uniform("stream", count, chunk=chunk)
    optimiser = torch.optim.Adam(made.parameters(), 1e-3)
    for _ in range(steps):
        optimiser.zero_grad()
        made.refine(problem, problem.adjoint_data, memory=memory).abs().square().sum().backward()
        optimiser.step()


def _say(row: dict[str, Any]) -> None:
    print({key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}, flush=True)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    """Results as JSON and as a table."""
    RESULTS.mkdir(exist_ok=True)
    machine = f"{_processor()}, {os.cpu_count()} cores, torch {torch.__version__}, no GPU used"
    about = {
        "command": f"python benchmarks/memory.py {name}",
        "machine": machine,
        "date": datetime.date.today().isoformat(),
    }
    (RESULTS / f"memory_{name}.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    keys = list(rows[0])
    lines = [f"`{about['command']}`, {about['date']}, {machine}", "", "| " + " | ".join(keys) + " |"]
    lines.append("|" + "---|" * len(keys))
    for row in rows:
        cells = [f"{row[key]:.3g}" if isinstance(row[key], float) else str(row[key]) for key in keys]
        lines.append("| " + " | ".join(cells) + " |")
    (RESULTS / f"memory_{name}.md").write_text("\n".join(lines) + "\n")


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
        return next(line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    """Run the benchmark that the command line names."""
    if sys.argv[1:2] == ["ours"]:
        _train(*(int(argument) for argument in sys.argv[2:]))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["predict", "run", "bart"])
    which = parser.parse_args().which
    write(which, {"predict": predict, "run": run, "bart": bart}[which]())


if __name__ == "__main__":
    main()
