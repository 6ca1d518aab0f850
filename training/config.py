"""Training configurations: a YAML file, changed by ``key=value`` on the command line, and checked before all else."""

import json
import re
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

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


def _at_least_one(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] < 1:
        raise ValueError(f"accelerations are at least 1, but this range is {list(pair)}")
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

    ``poisson`` and ``grid`` (every n-th along both): two phase-encoding directions, (z, y) in 3D and (y, x) of a plane.
    ``uniform lines`` and ``random lines``: along y. ``time lines``: random lines along y, interleaved over time.
    ``shifted lines``: every n-th line along y, moved by some lines from frame to frame. ``elliptical``: as ``poisson``,
    without the corners of k-space. The acceleration of patterns is that of their steps; others' counts the centre.
    """

    kind: Literal["poisson", "elliptical", "grid", "uniform lines", "random lines", "time lines", "shifted lines"]
    acceleration: Annotated[RealRange, AfterValidator(_at_least_one)]
    calibration: (
        Range  #: samples of the fully sampled centre along each phase-encoding direction (less where it would be all)
    )
    partial_fourier: Annotated[float, Field(ge=0, le=1)] = 0.0  #: how often up to 3/8 of one side of k-space is missing
    weight: Annotated[float, Field(gt=0)] = 1.0  #: how often, relative to the other kinds


class SourceSettings(Settings):
    """One source of anatomies in the mixture: a prepared folder, or simulation."""

    folder: Path | None = None  #: see `mel prepare`
    simulate: bool = False
    weight: Annotated[float, Field(gt=0)] = 1.0  #: how often, relative to the other sources
    zoom: RealRange | None = None  #: as `DataSettings.zoom`, for this source

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.folder is None) != self.simulate:
            raise ValueError("a source is either {folder: PATH} or {simulate: true}")
        return self


class DataSettings(Settings):
    """Examples, drawn without end. Every range is drawn from uniformly (`snr` and accelerations logarithmically)."""

    dimensions: Literal["2d", "3d", "2d+t"]
    sources: Annotated[list[SourceSettings], Field(min_length=1)] = [SourceSettings(simulate=True)]
    validation: Positive = 16  #: examples
    seed: Count = 1
    z: Range = (1, 1)  #: samples; sizes beyond 4 are rounded down to a multiple of 4
    y: Range
    x: Range
    frames: Range = (1, 1)
    #: how much larger the anatomy is than the field of view: 1 and less shows all of it, 2 a window of half its extent
    zoom: RealRange = (0.8, 1.0)
    coils: Range
    phase: Annotated[float, Field(ge=0)] = 0.6  #: in rad, local phase beyond the anatomy's smooth one; see `add_phase`
    snr: RealRange  #: of the fully sampled image; see `melcore.simulate.acquisition.scale_to_snr`
    correlation: Annotated[float, Field(ge=0, lt=1)] = 0.3  #: of the noise of any two coils, at most
    masks: Annotated[list[MaskSettings], Field(min_length=1)]
    #: examples of the same anatomy, coils and maps, each with a mask and noise of its own: what is slow is done once
    reuse: Positive = 4
    workers: Count = 2  #: processes that draw examples ahead; 0: none, they are drawn when they are asked for
    ahead: Positive = 12  #: examples that are kept ready


class PreparationSettings(Settings):
    """See `melcore.preprocess.preparation.Preparation`."""

    coils: Positive | None = None
    map_sets: Positive = 1
    map_method: Literal["espirit", "caldir"] = "espirit"
    calibration_size: Positive | None = None
    map_crop: Annotated[float, Field(ge=0, le=1)] = 0.8
    start: Literal["zero", "time average"] = "zero"
    start_iterations: Positive = 100
    start_weight: Annotated[float, Field(gt=0)] | None = None


class MemorySettings(Settings):
    """How the iterations are executed; changes memory and time, never results."""

    budget: str | None = None  #: for example ``12GiB``: the fastest plan for the largest example that fits is chosen
    executor: str = "plain"  #: without a budget: the same for all iterations, see `melcore.memory.IterationPlan`
    chunk: Positive | None = None  #: planes of a step of ``stream``, or the edge of a box of ``tile``


class SelfSupervisionSettings(Settings):
    """Learning without a truth: what was sampled is split anew at every step (SSDU).

    Yaman et al., Self-supervised learning of physics-guided reconstruction neural networks without fully sampled
    reference data, Magn Reson Med 84:3172 (2020).
    """

    fraction: Annotated[float, Field(gt=0, lt=1)] = (
        0.4  #: of the samples that the loss compares and the model never sees
    )
    centre: Count = (
        4  #: samples around the centre, along every axis that the mask undersamples, that the model always sees
    )


class LossSettings(Settings):
    """Weights of the terms; see `melcore.learning.ReconstructionLoss`."""

    l1: Annotated[float, Field(ge=0)] = 0.5
    nrmse: Annotated[float, Field(ge=0)] = 0.5
    l2: Annotated[float, Field(ge=0)] = 0.0
    ssim: Annotated[float, Field(ge=0)] = 0.0
    #: what every term is divided by: that of CG-SENSE with a weight for the noise, so that all noise levels and
    #: accelerations count alike; that of the start image; or the truth's size alone
    relative_to: Literal["cg_sense", "start", "truth"] = "cg_sense"
    region: Literal["image", "support"] = "image"  #: where L1, L2 and NRMSE count; SSIM is that of the support
    self_supervised: SelfSupervisionSettings | None = None  #: k-space is compared instead of images; no truth is used


class OptimiserSettings(Settings):
    """Adam, with a linear rise and a cosine decay of the learning rate."""

    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    warm_up: Count = 50  #: steps until the learning rate is reached
    final_fraction: Annotated[float, Field(ge=0, le=1)] = 0.01  #: of the learning rate, at the last step
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Annotated[float, Field(gt=0)] = 1.0  #: largest norm of the gradient
    frozen_steps: Count = 500  #: in which only the regulariser learns, and mu does not
    #: of the learning rate, for parameters whose names contain the key: ``{mu: 10}``; the first key that fits counts,
    #: then what the scheme itself proposes
    factors: dict[str, Annotated[float, Field(ge=0)]] = {}


class Stage(Settings):
    """Part of a curriculum: until some step, what differs from the rest of the training."""

    until_step: Positive
    iterations: Positive | None = None  #: the first so many of the model's; None: all
    readout_window: Positive | None = None  #: as `TrainingSettings.readout_window`; None: what holds afterwards


class TrainingSettings(Settings):
    """The loop. It ends after `steps`, or after `max_hours`, whichever comes first; the learning rate follows."""

    steps: Positive | None = None
    #: of all sessions together, preparation of the examples included. Steps then depend on the machine's speed: such a
    #: training cannot be repeated bit by bit
    max_hours: Annotated[float, Field(gt=0)] | None = None
    readout_window: Positive | None = (
        None  #: samples along the readout that a step sees, from a random place; None: all
    )
    batch: Positive = 1  #: examples whose gradients are averaged in one step
    seed: Count = 1
    device: str = "auto"
    tf32: bool = False
    precision: Literal["float32", "bfloat16"] = (
        "float32"  #: of the network; data consistency is always single precision
    )
    #: decay of the running average of the weights that is validated and becomes the bundle (0: the weights themselves)
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    scale_jitter: Annotated[float, Field(ge=0, lt=1)] = 0.1  #: examples are scaled by a random factor within 1 +- this
    #: the model is told a noise level that is wrong by a factor between 1 / (1 + this) and 1 + this (log-uniform)
    sigma_jitter: Annotated[float, Field(ge=0)] = 0.1
    curriculum: list[Stage] = []
    validation_interval: Positive = 250
    checkpoint_interval: Positive = 100

    @property
    def widest_window(self) -> int | None:
        """Samples along the readout that any step sees; None: all."""
        windows = [stage.readout_window for stage in self.curriculum if stage.readout_window is not None]
        return None if self.readout_window is None else max(self.readout_window, *windows, 1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.steps is None and self.max_hours is None:
            raise ValueError("a training needs an end: set training.steps or training.max_hours")
        ends = [stage.until_step for stage in self.curriculum]
        if ends != sorted(set(ends)):
            raise ValueError(f"the stages of a curriculum end one after another, but here at {ends}")
        return self


class OutputSettings(Settings):
    """Where results go."""

    directory: Path
    bundle: Path | None = None  #: by default NAME.safetensors in the directory
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

    @property
    def bundle(self) -> Path:
        """Where the bundle goes."""
        return self.output.bundle or self.output.directory / f"{self.name}.safetensors"

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
            lines = data.z[1] > 1 or all(kind.kind not in ("poisson", "elliptical", "grid") for kind in data.masks)
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
        YAML file, or the name of a configuration that ships.
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
    path = find(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
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
    most = max((stage.iterations or 1 for stage in config.training.curriculum), default=1)
    if most > len(model.order):
        raise ConfigError(
            f"{source}: a stage of training.curriculum has {most} iterations, but the model has {len(model.order)}."
        )
    return config


def shipped() -> dict[str, Path]:
    """Configurations that ship with the package, by name."""
    return {path.stem: path for path in sorted((Path(__file__).parent / "configs").glob("*.yaml"))}


def find(name: str | Path) -> Path:
    """The file of a configuration: a path as it is, or the name of one that ships.

    Raises
    ------
    DataError
        If a path leads nowhere.
    ConfigError
        If there is no such name; the message lists those there are.
    """
    path, known = Path(name), shipped()
    if path.is_file():
        return path
    if str(name) in known:
        return known[str(name)]
    if path.suffix in (".yaml", ".yml") or len(path.parts) > 1:
        raise DataError(f"the configuration {path} cannot be read: there is no such file. Shipped: {', '.join(known)}.")
    raise unknown("configuration", str(name), known)


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
