"""Plan how a model trains within a memory budget.

Measures every way to execute the configured model on tensors without memory, and shows the fastest plan that fits: what
is kept where, the predicted peak of everything that training holds, and the time relative to plain backpropagation.
Neither a GPU nor the data are needed, and nothing large is allocated.

    mel plan training/configs/modl_3d_full.yaml --shape 256,320,320 --coils 8 --memory 12GiB
    mel plan training/configs/modl_3d_full.yaml --shape 256,320,320 --coils 8 --memory 12GiB model.iterations=20 --json
    mel plan training/configs/primal_dual_2dt.yaml --shape 1,180,200 --time 25 --coils 12 --memory 8GiB --curve c.png
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from melcore.memory import MemoryPlan
    from melcore.memory.costs import Costs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of ``mel plan``."""
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file; see training/configs")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: model.iterations=20")
    parser.add_argument("--shape", required=True, metavar="Z,Y,X", help="image matrix; x is the readout")
    parser.add_argument("--coils", required=True, type=int, help="coils, after compression")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="budget on the device, for example 12GiB")
    parser.add_argument("--time", type=int, default=1, help="frames (default 1)")
    parser.add_argument("--batch", type=int, default=1, help="examples in one step (default 1)")
    parser.add_argument(
        "--probe", metavar="DEVICE", help="compare operations by their times on this device (cpu, cuda)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--curve", type=Path, metavar="PNG", help="draw time against memory into this file")
    allow_settings_anywhere(parser)


def allow_settings_anywhere(parser: argparse.ArgumentParser) -> None:
    """Let key=value stand behind options too: argparse alone takes them only right behind CONFIG."""
    plain = parser.parse_known_args

    def intermixed(*arguments: Any) -> Any:
        parser.parse_known_args = plain  # type: ignore[method-assign]  # the intermixed parser calls it itself
        try:
            return parser.parse_known_intermixed_args(*arguments)
        finally:
            parser.parse_known_args = intermixed  # type: ignore[method-assign, assignment]

    parser.parse_known_args = intermixed  # type: ignore[method-assign, assignment]


def run(arguments: argparse.Namespace) -> None:
    """Print the plan."""
    from melcore.errors import ConfigError, MissingDependencyError
    from melcore.memory.meter import fake_tensors
    from melcore.memory.planner import choose
    from melcore.units import format_bytes, parse_bytes
    from melcore.unrolled import build
    from melcore.unrolled.planning import costs

    try:
        from training.config import load
    except ImportError as error:
        raise MissingDependencyError(
            f"mel plan reads configurations with {error.name}: pip install 'melcore[train]'"
        ) from error

    shape = _shape(arguments.shape)
    for name in ("coils", "time", "batch"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name} must be at least 1, but is {getattr(arguments, name)}.")
    budget = parse_bytes(arguments.memory)
    config = load(arguments.config, arguments.overrides)
    model = build(config.model)
    sets = int(getattr(model.iterations[0].regulariser, "sets", 1))
    known = {} if arguments.probe is None else _probe(arguments.probe)
    problem = {"time": arguments.time, "batch": arguments.batch, "sets": sets}
    with fake_tensors():
        measured = costs(model, shape, arguments.coils, **problem, **known)
        chosen = choose(measured, budget)
        if arguments.curve is not None:
            _draw(arguments.curve, measured, chosen, budget)
    if arguments.json:
        asked = {"memory_bytes": budget, "shape": shape, "coils": arguments.coils, **problem}
        sys.stdout.write(json.dumps({**chosen.to_dict(), **asked}) + "\n")
        return
    size = f"image {' x '.join(map(str, shape))} (z, y, x), {arguments.coils} coils, frames {arguments.time}"
    title = f"{arguments.config.name}, {size}, batch {arguments.batch}, within {format_bytes(budget)}:"
    sys.stdout.write(f"{title}\n{chosen}\n")


def _probe(device: str) -> dict[str, Any]:
    """What is known of a device, for `costs`."""
    from melcore.errors import ConfigError
    from melcore.memory import calibrate

    try:
        found = calibrate(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the device {device!r} cannot be probed here ({reason}): leave out --probe.") from None
    return {"fourier_cost": found.fourier_cost, "convolution": found.convolution}


def _shape(text: str) -> tuple[int, int, int]:
    from melcore.errors import ConfigError

    try:
        z, y, x = (int(part) for part in text.split(","))
    except ValueError:
        z = y = x = 0
    if min(z, y, x) < 1:
        raise ConfigError(f"--shape takes three sizes of at least 1, as 256,320,320 along z,y,x, but got {text!r}.")
    return z, y, x


def _draw(path: Path, costs: "Costs", chosen: "MemoryPlan", budget: int) -> None:
    """Time against memory: the fastest plan for every budget, and what others do."""
    from melcore.errors import MemoryBudgetError, MissingDependencyError
    from melcore.memory import MemoryPlan
    from melcore.memory.planner import choose

    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("--curve needs matplotlib: pip install 'melcore[figures]'") from error

    def predicted(plan: MemoryPlan) -> tuple[float, float]:
        plan = costs.predict(plan)
        return (plan.predicted_peak_bytes or 0) / 2**30, plan.relative_time or 0

    marks: dict[str, tuple[float, float]] = {
        "plain": predicted(MemoryPlan.uniform("plain", costs.count)),
        "checkpoint": predicted(MemoryPlan.uniform("checkpoint", costs.count)),
        "this plan": ((chosen.predicted_peak_bytes or 0) / 2**30, chosen.relative_time or 0),
    }
    points: list[tuple[float, float]] = []
    size = marks["plain"][0] * 2**30
    while True:
        try:
            points.append(predicted(choose(costs, int(size))))
        except MemoryBudgetError:
            break
        size *= 0.8
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes: Any = figure.add_subplot()
    # From few bytes to many: a plan stays the fastest until there is room for the next.
    axes.plot(*zip(*reversed(points), strict=True), drawstyle="steps-post", color="0.4", label="fastest plan")
    for label, (memory, time) in marks.items():
        axes.plot(memory, time, "o", label=label)
    axes.axvline(budget / 2**30, color="0.8", zorder=0)
    axes.set(xscale="log", xlabel="memory (GiB)", ylabel="time relative to plain backpropagation")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend(frameon=False)
    temporary = path.with_name(f".{path.name}.part.png")
    figure.savefig(temporary, dpi=150)
    temporary.replace(path)
