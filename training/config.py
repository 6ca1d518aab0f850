"""Training configurations: a YAML file, changed by ``key=value`` on the command line, and checked before all else."""

import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from melcore.errors import ConfigError, DataError, unknown
from melcore.memory import EXECUTORS, MemoryPlan, calibrate
from melcore.preprocess.preparation import Preparation
from melcore.units import parse_bytes
from melcore.unrolled import Unrolled, build
from melcore.unrolled.planning import plan


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError(f"a range is written [least, most], but this one is {list(pair)}")
    return pair


Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
Range = Annotated[tuple[Positive, Positive], AfterValidator(_ordered)]
RealRange = Annotated[tuple[Annotated[float, Field(ge=0)], Annotated[float, Field(ge=0)]], AfterValidator(_ordered)]


class Settings(BaseModel):
    """A section of the configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class MaskSettings(Settings):
    """One kind of sampling mask in the mixture.

    ``poisson``: two phase-encoding directions, (z, y) in 3D and (y, x) of a plane. ``grid``: every n-th along both of
    them. ``uniform lines`` and ``random lines``: along y. ``time lines``: random lines along y, interleaved over time.
    """

    kind: Literal["poisson", "grid", "uniform lines", "random lines", "time lines"]
    acceleration: RealRange
    calibration: (
        Range  #: samples of the fully sampled centre along each phase-encoding direction (less where it would be all)
    )
    weight: Annotated[float, Field(gt=0)] = 1.0  #: how often, relative to the other kinds


class DataSettings(Settings):
    """Simulated examples. Every range is drawn from uniformly (`snr` on a logarithmic scale)."""

    dimensions: Literal["2d", "3d", "2d+t"]
    examples: Positive
    validation: Positive = 16
    seed: Count = 1
    z: Range = (1, 1)  #: samples; sizes beyond 4 are rounded down to a multiple of 4
    y: Range
    x: Range
    frames: Range = (1, 1)
    zoom: RealRange = (1.0, 1.0)  #: the anatomy is simulated on a matrix so many times larger, and a window kept of it
    coils: Range
    phase: Annotated[float, Field(ge=0)] = 0.0  #: in rad, local phase beyond the anatomy's smooth one; see `add_phase`
    snr: RealRange  #: of the fully sampled image; see `melcore.simulate.acquisition.scale_to_snr`
    correlation: Annotated[float, Field(ge=0, lt=1)] = 0.3  #: of the noise of any two coils, at most
    masks: Annotated[list[MaskSettings], Field(min_length=1)]
    workers: Positive = 2
    cache: Path = Path("runs/cache")


class PreparationSettings(Settings):
    """See `melcore.preprocess.preparation.Preparation`."""

    coils: Positive | None = None
    map_sets: Positive = 1
    map_method: Literal["espirit", "caldir"] = "espirit"
    calibration_size: Positive | None = None
    map_crop: Annotated[float, Field(ge=0, le=1)] = 0.8
    start: Literal["zero", "time average"] = "zero"
    start_iterations: Positive = 8
    start_weight: Annotated[float, Field(gt=0)] = 0.02


class MemorySettings(Settings):
    """How the iterations are executed; changes memory and time, never results."""

    budget: str | None = None  #: for example ``12GiB``: the fastest plan for the largest example that fits is chosen
    executor: str = "plain"  #: without a budget: the same for all iterations, see `melcore.memory.IterationPlan`
    chunk: Positive | None = None  #: planes of a step of ``stream``, or the edge of a box of ``tile``


class LossSettings(Settings):
    """See `melcore.learning.ReconstructionLoss`."""

    l1: Annotated[float, Field(ge=0)] = 1.0
    l2: Annotated[float, Field(ge=0)] = 0.0
    ssim: Annotated[float, Field(ge=0)] = 0.0
    relative_to_start: bool = False  #: divide by the start image's loss: easy examples then weigh as much as hard ones


class OptimiserSettings(Settings):
    """Adam, with a linear rise and a cosine decay of the learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warm_up: Count = 50  #: steps until the learning rate is reached
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  #: of the learning rate, at the last step
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0  #: largest norm of the gradient
    frozen_steps: Count = 500  #: in which only the regulariser learns, and mu does not


class TrainingSettings(Settings):
    """The loop."""

    steps: Positive
    readout_window: Positive | None = (
        None  #: samples along the readout that a step sees, from a random place; None: all
    )
    batch: Positive = 1  #: examples whose gradients are averaged in one step
    seed: Count = 1
    device: str = "auto"
    tf32: bool = False
    scale_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1  #: examples are scaled by a random factor within 1 +- this
    validation_interval: Positive = 250
    checkpoint_interval: Positive = 100


class OutputSettings(Settings):
    """Where results go."""

    directory: Path
    bundle: Path
    notes: str = ""  #: goes into the card


class Config(Settings):
    """All that a training needs."""

    name: str
    data: DataSettings
    model: dict[str, Any]  #: for `melcore.unrolled.build`
    preparation: PreparationSettings = PreparationSettings()
    memory: MemorySettings = MemorySettings()
    loss: LossSettings = LossSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    training: TrainingSettings
    output: OutputSettings

    def to_preparation(self) -> Preparation:
        """The settings of `melcore.preprocess.preparation.prepare`."""
        return Preparation(**self.preparation.model_dump())

    def to_memory_plan(self, model: Unrolled, device: torch.device | str = "cpu") -> MemoryPlan:
        """The plan for the model and the largest example; `MemoryBudgetError` if the budget is too small for any.

        With a budget, `device` is probed for a moment.
        """
        if self.memory.budget is not None:
            data, window = self.data, self.training.readout_window
            x = data.x[1] if window is None else min(window, data.x[1])
            coils = min(data.coils[1], self.preparation.coils or data.coils[1])
            budget = parse_bytes(self.memory.budget)
            known = calibrate(device)
            lines = data.z[1] > 1 or all(kind.kind not in ("poisson", "grid") for kind in data.masks)
            return plan(
                model,
                (data.z[1], data.y[1], x),
                coils,
                budget,
                time=data.frames[1],
                sets=self.preparation.map_sets,
                sampled_readout=lines,
                host=torch.device(device).type != "cpu",  # there the host's memory is the device's
                fourier_cost=known.fourier_cost,
                convolution=known.convolution,
            )
        iterations = len(model.order)
        options = {} if self.memory.chunk is None else {"chunk": self.memory.chunk}
        return MemoryPlan.uniform(self.memory.executor, iterations, **options)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return self.model_dump(mode="json")


class _Loader(yaml.SafeLoader):
    """Reads ``1e-3`` as a number; YAML 1.1 takes it for text because it has no point."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+[eE][-+]?[0-9]+"), list("-+0123456789")
)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration.

    Parameters
    ----------
    path
        YAML file.
    overrides
        ``key=value`` with dotted keys, for example ``optimiser.learning_rate=1e-3`` or ``data.masks.0.weight=2``;
        values are read as YAML.

    Raises
    ------
    DataError
        If the file cannot be read.
    ConfigError
        If it is not valid; the message names the nearest known key.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise DataError(f"the configuration {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold sections such as data, model and training, but holds {type(content)}.")
    for override in overrides:
        _override(content, override)
    return parse(content, str(path))


def parse(content: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Check a configuration that is already read; see `load`."""
    _check_keys(Config, content, "")
    try:
        # By way of JSON, strict validation takes lists for tuples, but still no text for numbers.
        config = Config.model_validate_json(json.dumps(content), strict=True)
    except TypeError as error:
        raise ConfigError(f"{source}: {error}: write such values as plain text or numbers.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{source}: {where}: {first['msg']}, but got {first['input']!r}.") from None
    if config.memory.budget is not None:
        parse_bytes(config.memory.budget)
    if config.memory.executor not in EXECUTORS:
        raise unknown("executor", config.memory.executor, EXECUTORS)
    with torch.device("meta"):
        model = build(config.model)
    dimensions = model.iterations[0].regulariser.dimensions
    if dimensions != config.data.dimensions:
        raise ConfigError(
            f"{source}: the model is for {dimensions} data, but data.dimensions is {config.data.dimensions}."
        )
    sets = model.iterations[0].regulariser.sets
    if sets != config.preparation.map_sets:
        raise ConfigError(
            f"{source}: the model has {sets} map sets, but preparation.map_sets is {config.preparation.map_sets}."
        )
    return config


def _override(content: dict[str, Any], override: str) -> None:
    """Change one entry in place."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(
            f"an override is written key=value (for example training.steps=100), but this is {override!r}."
        )
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"the value of {override!r} is not YAML: {' '.join(str(error).split())}") from None
    *path, last = key.split(".")
    place: Any = content
    for part in path:
        place = place.setdefault(part, {}) if isinstance(place, dict) else _item(place, part, key)
    if isinstance(place, list):
        _item(place, last, key)
        place[int(last)] = value
    elif isinstance(place, dict):
        place[last] = value
    else:
        raise ConfigError(f"{key} cannot be set: {'.'.join(path)} is a plain value, {place!r}.")


def _item(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list) and part.isdecimal() and int(part) < len(place):
        return place[int(part)]
    size = f"a list of {len(place)} entries" if isinstance(place, list) else repr(place)
    raise ConfigError(f"{key} cannot be set: there is no entry {part!r} in {size}.")


def _check_keys(section: type[BaseModel], content: Mapping[str, Any], prefix: str) -> None:
    """Raise for unknown keys before pydantic does, which would not name the nearest."""
    for key, value in content.items():
        if key not in section.model_fields:
            raise unknown("setting", f"{prefix}{key}", [prefix + name for name in section.model_fields])
        for inner in _sections(section.model_fields[key].annotation):
            entries = enumerate(value) if isinstance(value, list) else [(None, value)]
            for index, entry in entries:
                if isinstance(entry, Mapping):
                    _check_keys(inner, entry, f"{prefix}{key}." + ("" if index is None else f"{index}."))


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Sections that a field holds: itself, or the entries of its list."""
    if isinstance(annotation, type) and not isinstance(annotation, types.GenericAlias):
        return [annotation] if issubclass(annotation, BaseModel) else []
    return [found for argument in typing.get_args(annotation) for found in _sections(argument)]
