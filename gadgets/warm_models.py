"""Models that stay loaded between exams, and reconstruct for several exams in turn."""

import contextlib
import copy
import dataclasses
import functools
import math
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gadgets.admission import Admission, StoppingError
from gadgets.chain import run_chain
from gadgets.reconstruct_stage import ReconstructSettings, reconstruct
from gadgets.stages import STAGES, Stage
from melcore.bundle import Bundle, shipped
from melcore.data import CoilMaps, KSpace
from melcore.errors import ConfigError, MemoryBudgetError, unknown
from melcore.preprocess.preparation import Preparation
from melcore.reconstruct import CONVENTIONAL, DeadlineExceededError, Reconstruction, Reconstructor

# What a reconstruction holds on the processor, as multiples of its k-space: sorted, compressed and scaled data, the
# maps, an image or two for each coil.
_COPIES = 6
# For the small exams that warm a model up, by the bundle's dimensions.
_PIPELINES = {"2d": "mel_cartesian_2d", "3d": "mel_cartesian_3d", "2d+t": "mel_cine_2dt"}

#: Is told of every reconstruction: what came out, and the seconds that it waited.
Observer = Callable[[Reconstruction, float], None]


@dataclass
class SharedReconstructor(Reconstructor):
    """A `Reconstructor` of one exam that waits for its turn; waiting counts for the deadline.

    Whose turn does not come before the deadline gets a conventional reconstruction, on the processor, one exam after
    the other.
    """

    admission: Admission = field(default_factory=lambda: Admission(1 << 62))
    observe: Observer = lambda _result, _seconds: None
    planning: threading.Lock = field(default_factory=threading.Lock)
    busy: threading.Lock = field(default_factory=threading.Lock)
    _waited: float = field(init=False, default=0.0)
    _granted: bool = field(init=False, default=True)

    @contextlib.contextmanager
    def room(self, shape: Sequence[int]) -> Iterator[None]:
        """Wait until there is memory for these data."""
        begin = time.monotonic()
        deadline = self.deadline if self.bundle is not None else None  # else there is nothing simpler to give instead
        with self.admission.place(self._needed(shape), deadline) as granted:
            self._granted, self._waited = granted, time.monotonic() - begin
            with contextlib.nullcontext() if granted else self.busy:
                if self._cancelled():
                    raise StoppingError
                yield

    def _needed(self, shape: Sequence[int]) -> int:
        """Bytes of the device that a reconstruction of such data takes."""
        readout, first, second, coils, frames, *_ = shape
        host = _COPIES * 8 * math.prod(shape) if self.device == "cpu" else 0
        if self.bundle is None or self.memory is None:
            return host
        settings = self.preparation or self.bundle.preparation
        coils = min(coils, settings.coils or coils)
        try:
            with self.planning:  # which uses torch's modes of the whole process
                plan = self.plan((second, first, readout), coils, frames=frames, sets=settings.map_sets)
        except MemoryBudgetError:
            return host  # the call will find out too, and fall back
        return host + (plan.predicted_peak_bytes or 0)

    def __call__(
        self, k_space: KSpace, coil_maps: CoilMaps | None = None, calibration: KSpace | None = None
    ) -> Reconstruction:
        """Reconstruct; see `Reconstructor`."""
        if self._granted:
            result = self._in_time()._reconstruct(k_space, coil_maps, calibration)
        else:
            words = f"the deadline of {self.deadline:g} s passed while other exams used the accelerator"
            if not self.fallback:
                raise DeadlineExceededError(words)
            simple = Reconstructor(
                "cg-sense",
                device="cpu",
                preparation=self.preparation or (self.bundle.preparation if self.bundle else Preparation()),
                weight=self.weight,
                iterations=self.iterations,
                map_timeout=self.map_timeout,
                cancel=self.cancel,
            )
            result = simple(k_space, coil_maps, calibration)
            result = dataclasses.replace(result, warning=f"{words}, this is CG-SENSE")
        self.observe(result, self._waited)
        return result

    def _reconstruct(self, k_space: KSpace, coil_maps: CoilMaps | None, calibration: KSpace | None) -> Reconstruction:
        return super().__call__(k_space, coil_maps, calibration)

    def _in_time(self) -> "SharedReconstructor":
        """Itself, with what is left of the deadline."""
        if self.deadline is None:
            return self
        twin = copy.copy(self)
        twin.deadline = max(self.deadline - self._waited, 1e-3)
        return twin


class WarmModels:
    """The models of a server.

    Parameters
    ----------
    device
        As `Reconstructor` takes it.
    memory
        Bytes that all reconstructions together may take on the device.
    admission
        The queue for them.
    bundles
        Name to file of the bundles that exams may ask for; by default those that ship.
    model
        Takes the place of the pipelines' own choice of model.
    deadline, map_timeout
        Seconds; the deadline is for exams that say nothing else.
    cancel
        When set, reconstructions fail soon.
    """

    def __init__(
        self,
        *,
        device: str,
        memory: int,
        admission: Admission,
        bundles: Mapping[str, Path] | None = None,
        model: str | None = None,
        deadline: float | None = None,
        map_timeout: float = 600.0,
        cancel: threading.Event | None = None,
    ) -> None:
        self.device, self.memory, self.admission = device, memory, admission
        self.model, self.deadline, self.map_timeout = model, deadline, map_timeout
        self.cancel = cancel or threading.Event()
        self.files = dict(shipped() if bundles is None else bundles)
        self._loaded: dict[str, Reconstructor] = {}
        self._loading, self._planning, self._busy = threading.Lock(), threading.Lock(), threading.Lock()
        if model is not None:
            self._known(model)

    def _known(self, name: str) -> str:
        name = "cg-sense" if name == "none" else name
        if name not in self.files and name not in CONVENTIONAL:
            raise unknown("model", name, [*self.files, *CONVENTIONAL, "none"])
        return name

    def load(self, name: str) -> Reconstructor:
        """The model of that name, loaded the first time.

        Raises
        ------
        ConfigError
            If there is none; those there are are listed.
        DataError
            If its file cannot be used.
        """
        name = self._known(name)
        with self._loading:
            if name not in self._loaded:
                model: Bundle | str = Bundle.load(self.files[name]) if name in self.files else name
                self._loaded[name] = Reconstructor(model, device=self.device, memory=self.memory)
                self.device = self._loaded[name].device
            return self._loaded[name]

    def warm_up(self) -> list[str]:
        """Load the models and reconstruct a small simulated exam with each; their names.

        Raises
        ------
        MelError
            If something that every exam needs is missing or does not work: a bundle, the device, BART.
        """
        names = [self._known(self.model)] if self.model is not None else list(self.files)
        for name in names:
            bundle = self.load(name).bundle
            self._rehearse(name, bundle.dimensions if bundle else "2d")
        return names

    def _rehearse(self, name: str, dimensions: str) -> None:
        from melcore.io.mrd import open_raw
        from melcore.simulate.exam import write_exam
        from melcore.simulate.protocol import Protocol

        if dimensions not in _PIPELINES:
            return
        flat = dimensions != "3d"
        protocol = Protocol(
            shape=(1, 32, 32) if flat else (16, 32, 32),
            time=4 if dimensions == "2d+t" else 1,
            coils=4,
            acceleration=1.5,
            calibration=(12, 16),
        )
        with tempfile.TemporaryDirectory(prefix="mel-serve-") as folder:
            path = Path(folder, "exam.h5")
            write_exam(path, protocol)
            with open_raw(path) as raw:
                stages = self.stages(lambda _result, _seconds: None)
                overrides = {"model": name, "fallback": "false", "deadline": "600"}
                chain = run_chain(
                    _PIPELINES[dimensions], raw.header_xml, raw.acquisitions(), overrides=overrides, stages=stages
                )
                for _image in chain:
                    pass

    def stages(self, observe: Observer) -> dict[str, Stage]:
        """The stages of an exam's chain, with these models behind them; `observe` is told of each reconstruction."""
        build = functools.partial(self._build, observe)
        return STAGES | {"reconstruct": Stage(functools.partial(reconstruct, build=build), ReconstructSettings)}

    def _build(
        self, observe: Observer, model: str, *, device: str, memory: int | None, **options: Any
    ) -> Reconstructor:
        """Stands for the class `Reconstructor` in the stage of an exam."""
        loaded = self.load(model)
        if device not in ("auto", loaded.device):
            raise ConfigError(f"this server computes on {loaded.device}, not on {device}: leave device out, or auto.")
        bundle = loaded.bundle
        if bundle is not None:
            # Weights are shared; the plan of memory, which the model carries, is this exam's own.
            bundle = dataclasses.replace(bundle, model=copy.copy(bundle.model))
        options["deadline"] = options.get("deadline") or self.deadline
        mine = SharedReconstructor(
            bundle or str(loaded.model),
            device=loaded.device,
            memory=min(memory or self.memory, self.memory),
            map_timeout=self.map_timeout,
            cancel=self.cancel,
            admission=self.admission,
            observe=observe,
            planning=self._planning,
            busy=self._busy,
            **options,
        )
        mine._plans = loaded._plans  # found once for all exams
        return mine


def device_of(device: str) -> str:
    """Resolve ``auto``.

    Raises
    ------
    ConfigError
        If the device cannot be used.
    """
    return Reconstructor("adjoint", device=device).device


def used_memory(device: str) -> int:
    """Bytes that torch holds on a GPU; 0 on the processor."""
    return torch.cuda.memory_reserved(device) if device.startswith("cuda") else 0
