"""Memory plans: for every iteration, how its backward gets what the forward did not keep."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from melcore.errors import ConfigError
from melcore.units import format_bytes

Executor = Literal["plain", "checkpoint", "store", "keep", "nested", "tile", "stream", "reverse"]
States = Literal["device", "host", "slots"]
Precision = Literal["full", "bfloat16"]
Axis = Literal["readout", "time"]
Way = Literal["channels_last", "contiguous", "sliced"]

EXECUTORS: tuple[Executor, ...] = get_args(Executor)


@dataclass(frozen=True)
class IterationPlan:
    """How one iteration is executed in training.

    Attributes
    ----------
    executor
        ``plain``: automatic differentiation keeps everything. ``checkpoint``: the iteration is computed again in the
        backward, as one piece; works for any module. ``store``: the same, but the network and the data consistency are
        differentiated one after the other, never both at once. ``keep``: the activations of the network stay in
        memory and are not computed again. ``nested``: layers are computed again one by one, so that few activations
        exist at a time. ``tile``: the volume is processed in boxes with a halo. ``stream``: a wavefront of planes
        along the readout, or of frames along time; exact, without halo work. ``reverse``: a network of invertible
        blocks is undone block by block, certified against its known input.
    chunk
        Planes or frames of a step of ``stream`` and ``keep``, or the edge of a box of ``tile``.
    keep_input
        Keep the regulariser's input too (8 bytes a voxel). Otherwise the data consistency before it is recomputed
        first and its intermediate results wait while the network is differentiated.
    hold_physics
        Whether those intermediate results wait, 8 bytes a voxel for each step of conjugate gradients; otherwise they
        are dropped, and computed once more after the network. Without effect where the input is kept.
    kept_layers
        For ``keep``: how many layers keep their activations, the last ones first; None is all of them.
    precision
        For ``keep``: in which precision activations are kept; ``"bfloat16"`` halves them and makes gradients inexact.
    states
        Where what the forward keeps of this iteration waits for the backward: on the ``device``, in pinned ``host``
        memory, or in ``slots``: not at all, to be computed again from the nearest one that was kept.
    axis
        Along which ``stream`` and ``keep`` advance: the ``readout``, or ``time``, for series of many frames.
    convolution
        How ``stream`` and ``keep`` convolve: with the ``channels_last``, as planes are stored; on ``contiguous``
        copies with the channels first; or ``sliced``, a convolution over three axes as a sum of some over two. All
        give the same numbers up to rounding; which is fastest, `melcore.memory.calibrate` finds out.
    """

    executor: Executor = "plain"
    chunk: int = 16
    keep_input: bool = False
    hold_physics: bool = True
    kept_layers: int | None = None
    precision: Precision = "full"
    states: States = "device"
    axis: Axis = "readout"
    convolution: Way = "channels_last"

    def __post_init__(self) -> None:
        for what, value, known in (
            ("executor", self.executor, EXECUTORS),
            ("place for states", self.states, get_args(States)),
            ("precision", self.precision, get_args(Precision)),
            ("axis to stream along", self.axis, get_args(Axis)),
            ("way to convolve", self.convolution, get_args(Way)),
        ):
            if value not in known:
                raise ConfigError(f"there is no {what} {value!r}: choose one of {', '.join(known)}.")
        if self.states == "slots" and (self.keep_input or self.executor in ("plain", "keep", "reverse")):
            raise ConfigError(f"states in slots are computed again, but {self.executor} is to keep more than a state.")
        if self.chunk < 1:
            raise ConfigError(f"a chunk has at least 1 plane, but {self.chunk} were asked for.")

    def describe(self) -> tuple[str, str, str]:
        """In words: the executor, what is kept, where it waits."""
        name = f"{self.executor} {self.chunk}" if self.executor in ("stream", "tile") else self.executor
        if self.axis == "time" and self.executor in ("stream", "keep"):
            name += " along time"
        if self.executor == "plain":
            return name, "everything", "device"
        kept = "input and output" if self.keep_input else "output"
        if self.executor == "keep":
            layers = "all layers" if self.kept_layers is None else f"last {self.kept_layers} layers"
            kept += f", activations of {layers}" + (" in bfloat16" if self.precision == "bfloat16" else "")
        return name, kept, self.states


@dataclass(frozen=True)
class MemoryPlan:
    """The plan of a whole model, one entry for each iteration, with what was predicted for it.

    Attributes
    ----------
    iterations
        The plan of each iteration, in the order of execution. Iterations with their states in slots come first.
    slots
        How many states the slots hold, besides the first.
    predicted_peak_bytes
        Everything that training holds at its peak, or None where nobody measured it.
    relative_time
        Time of a step relative to plain backpropagation of the same problem.
    notes
        Why the plan is as it is, where somebody should know.
    """

    iterations: tuple[IterationPlan, ...]
    slots: int = 2
    predicted_peak_bytes: int | None = None
    relative_time: float | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        in_slots = [entry.states == "slots" for entry in self.iterations]
        if in_slots != sorted(in_slots, reverse=True):
            raise ConfigError("iterations whose states are in slots must come before all others.")
        if self.slots < 0:
            raise ConfigError(f"the number of slots cannot be negative, but is {self.slots}.")

    @classmethod
    def uniform(cls, executor: Executor, count: int, **options: Any) -> "MemoryPlan":
        """The same executor, with the same options of `IterationPlan`, for `count` iterations."""
        return cls((IterationPlan(executor, **options),) * count)

    def with_prediction(self, peak: int, relative_time: float, notes: Sequence[str] = ()) -> "MemoryPlan":
        """The same plan with what was found out about it."""
        return replace(self, predicted_peak_bytes=peak, relative_time=relative_time, notes=(*self.notes, *notes))

    def to_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and mappings only, for JSON and for a bundle's card."""
        rows = []
        for number, iteration in enumerate(self.iterations, start=1):
            _, kept, where = iteration.describe()
            rows.append({"iteration": number, **asdict(iteration), "kept": kept, "where": where})
        return {
            "predicted_peak_bytes": self.predicted_peak_bytes,
            "relative_time": self.relative_time,
            "iterations": rows,
            "slots": self.slots,
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "MemoryPlan":
        """The plan that `to_dict` described."""
        names = [field.name for field in fields(IterationPlan)]
        rows = [{name: row[name] for name in names if name in row} for row in content["iterations"]]
        entries = tuple(IterationPlan(**row) for row in rows)
        peak, time = content["predicted_peak_bytes"], content["relative_time"]
        return cls(entries, content["slots"], peak, time, tuple(content["notes"]))

    def __str__(self) -> str:
        """A table, equal neighbours in one row."""
        rows: list[tuple[str, str, str, str]] = []
        start = 0
        for end in range(1, len(self.iterations) + 1):
            if end == len(self.iterations) or self.iterations[end] != self.iterations[start]:
                span = f"{start + 1}" if end == start + 1 else f"{start + 1}-{end}"
                rows.append((span, *self.iterations[start].describe()))
                start = end
        table = [("iterations", "executor", "kept for the backward", "where"), *rows]
        widths = [max(len(row[column]) for row in table) for column in range(4)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        peak = "unknown" if self.predicted_peak_bytes is None else format_bytes(self.predicted_peak_bytes)
        time = "unknown" if self.relative_time is None else f"{self.relative_time:.2f} x plain backpropagation"
        return "\n".join([*lines, f"predicted peak: {peak}", f"predicted time: {time}", *self.notes])
