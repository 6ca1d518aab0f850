"""k-space and a model to an image: the one entrance for files, gadgets and scripts."""

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from melcore.bundle import Bundle
from melcore.data import CoilMaps, Image, KSpace
from melcore.defects import defects, residuals
from melcore.errors import ConfigError, DataError, MelError, ToolError, unknown
from melcore.memory import MemoryPlan
from melcore.physics import LinearOperator, ifft
from melcore.preprocess.partial_fourier import METHODS, Method, treat_image
from melcore.preprocess.preparation import Preparation, Prepared, prepare, start_image
from melcore.quality import acceleration, data_residual, departures, doubts, map_support, noise_part
from melcore.unrolled import Encoding
from melcore.unrolled.planning import plan_inference

Conventional = Literal["cg-sense", "adjoint"]
OnDoubt = Literal["record", "warn", "fallback"]
CONVENTIONAL: tuple[Conventional, ...] = ("cg-sense", "adjoint")

_CG_ITERATIONS = Preparation().start_iterations


class DeadlineExceededError(MelError, TimeoutError):
    """The learned reconstruction would have come too late."""


@dataclass(frozen=True)
class Reconstruction:
    """An image, and how it came about.

    Attributes
    ----------
    image
        In the units of the whitened k-space.
    quality
        Figures of `melcore.quality`, and ``scale`` and ``retained_energy`` of the preparation.
    timings
        Seconds of each step.
    path_taken
        ``learned``, ``cg-sense``, ``adjoint`` or ``root-sum-of-squares``: what the image really is.
    warning
        Why it is not what was asked for, or empty.
    remarks
        What else a reader of the image should know, one line each.
    doubts
        Why a network's image was looked at with suspicion; see `melcore.quality.doubts`.
    """

    image: Image
    quality: dict[str, float]
    timings: dict[str, float]
    path_taken: str
    warning: str = ""
    remarks: tuple[str, ...] = ()
    doubts: tuple[str, ...] = ()


@dataclass
class Reconstructor:
    """Reconstructs k-space with a model bundle or a conventional method.

    Parameters
    ----------
    model
        A bundle, the path or name of one, or ``"cg-sense"`` or ``"adjoint"`` (``"none"`` is ``"cg-sense"``).
    device
        ``"auto"`` takes a GPU where there is one.
    memory
        Bytes that the network may take on the device, its data included; None sets no limit. A network that would need
        more is streamed through the volume plane by plane, with the same result.
    deadline
        Seconds after which a learned reconstruction is given up, and soon enough before that CG-SENSE can still be
        ready by then. Where only the time for a zero-filled image is left, it is that; where the coil maps are late, it
        is the root of the sum of squares of the zero-filled coil images.
    fallback
        Where the learned reconstruction fails or is late: give a conventional one, labelled, with a warning. Errors of
        the data (`MelError`) are raised in any case, for no method could help.
    preparation
        Replaces the bundle's (or the default) preparation.
    weight, iterations
        Of CG-SENSE: weight of its penalty on an image in units of what is expected of it
        (`melcore.preprocess.preparation.cg_sense`), and most steps of conjugate gradients. By default the weight
        follows the noise and the acceleration, and as many steps are taken as are needed.
    partial_fourier
        What conventional methods do about k-space that is one-sided (`melcore.preprocess.partial_fourier`): ``"zero"``
        leaves zeros and remarks on it, ``"homodyne"`` and ``"pocs"`` fill it after parallel imaging. A network knows
        the mask, and is left to fill it. The image's provenance says what was done.
    on_doubt
        What to do about a network's image that does not fit the data, or data unlike those of its training
        (`melcore.quality.doubts`): only ``"record"`` it, ``"warn"`` too, or give the ``"fallback"``.
    map_timeout
        Seconds for the estimation of coil maps, after which it fails; None for no limit but the deadline's.
    cancel
        When set from another thread, the reconstruction fails soon.
    """

    model: Bundle | str | Path
    device: str = "auto"
    memory: int | None = None
    deadline: float | None = None
    fallback: bool = True
    preparation: Preparation | None = None
    weight: float | None = None
    iterations: int | None = None
    partial_fourier: Method = "zero"
    on_doubt: OnDoubt = "warn"
    map_timeout: float | None = None
    cancel: threading.Event | None = None
    _plans: dict[tuple[int, ...], MemoryPlan] = field(init=False, default_factory=dict)
    bundle: Bundle | None = field(init=False, default=None)  #: the model, loaded; None for conventional methods

    def __post_init__(self) -> None:
        if isinstance(self.model, str) and self.model == "none":
            self.model = "cg-sense"
        if isinstance(self.model, Bundle):
            self.bundle = self.model
        elif self.model not in CONVENTIONAL:
            self.bundle = Bundle.load(self.model)
        if self.partial_fourier not in METHODS:
            raise unknown("partial Fourier method", self.partial_fourier, METHODS)
        if self.on_doubt not in get_args(OnDoubt):
            raise unknown("answer to doubts", self.on_doubt, get_args(OnDoubt))
        if self.deadline is not None and self.deadline <= 0:
            raise ConfigError(f"the deadline must be a positive number of seconds, but is {self.deadline}.")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ConfigError(f"the weight of CG-SENSE must be a positive number, but is {self.weight}.")
        if self.iterations is not None and self.iterations < 1:
            raise ConfigError(f"CG-SENSE takes 1 iteration at least, not {self.iterations}.")
        if self.device == "auto":
            self.device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            torch.empty(0, device=self.device)
        except (RuntimeError, AssertionError) as error:
            raise ConfigError(f"the device {self.device!r} cannot be used here: {error}") from error
        if self.bundle is not None:
            self.bundle.model.to(self.device)

    @property
    def name(self) -> str:
        """What images are labelled with: the bundle's name and digest, or the method."""
        return f"{self.bundle.name}@{self.bundle.digest}" if self.bundle else str(self.model)

    def __call__(
        self, k_space: KSpace, coil_maps: CoilMaps | None = None, calibration: KSpace | None = None
    ) -> Reconstruction:
        """Reconstruct whitened k-space without readout oversampling.

        Parameters
        ----------
        k_space
            See `melcore.data.KSpace`.
        coil_maps
            Maps, where they are known; else BART estimates them.
        calibration
            Separate calibration data on the same grid.

        Raises
        ------
        DataError
            If the data cannot be used (see `prepare`), or are of another dimensionality than the bundle.
        """
        begin = time.perf_counter()
        settings = self.preparation or (self.bundle.preparation if self.bundle else Preparation())
        if self.bundle is not None:
            _check_dimensions(self.bundle, k_space)
        try:
            prepared = prepare(
                k_space,
                calibration=calibration,
                coil_maps=coil_maps,
                settings=settings,
                timeout=self._seconds_for_maps(),
                cancel=self.cancel,
            )
        except ToolError as error:
            if self.bundle is None or not self.fallback or not self._late(begin):
                raise
            return _without_maps(k_space, time.perf_counter() - begin, error)
        timings = {"prepare": time.perf_counter() - begin}
        path, warning = "learned", ""
        ready = self._cg_sense_ready(settings)
        if self.bundle is None:
            path = str(self.model)
            image = self._conventional(prepared, self.model, ready=ready)
        else:
            spare = 0.0
            if self.deadline is not None and not ready:
                spare = _seconds_of_cg_sense(prepared, self.iterations or _CG_ITERATIONS)
            try:
                image = self._learned(self.bundle, prepared, begin, spare)
            except Exception as error:  # whatever it is: the data are sound, so a patient's exam can still be saved
                if not self.fallback or self._cancelled():
                    raise
                # After the deadline nothing comes in time: then the better image is worth more than the quicker one.
                path = "adjoint" if self._late(begin, spare) and not self._late(begin) else "cg-sense"
                words = "CG-SENSE" if path == "cg-sense" else "the zero-filled image"
                warning = f"the learned reconstruction failed, this is {words}: {' '.join(str(error).split())}"
                image = self._conventional(prepared, path, ready=ready)
        quality, found = self._judge(image, prepared, path)
        if found and path == "learned" and self.on_doubt == "fallback":
            path, warning = "cg-sense", f"the network's image is in doubt, this is CG-SENSE: {'; '.join(found)}"
            image = self._conventional(prepared, path, ready=ready)
            quality["data_residual"] = data_residual(image, prepared)
        treated = treat_image(image, k_space.mask, None if path == "learned" else self.partial_fourier)
        image = treated.image
        timings["reconstruct"] = time.perf_counter() - begin - timings["prepare"]
        image = image.cpu() * prepared.scale.view(-1, 1, 1, 1, 1, 1)
        info = prepared.k_space.info
        if treated.record:
            info = replace(info, provenance={**info.provenance, "partial_fourier": treated.record})
        remarks = [treated.record] if treated.warning else []
        if self.on_doubt == "warn" and not warning:
            remarks += found
        timings["total"] = time.perf_counter() - begin
        return Reconstruction(Image(image, info), quality, timings, path, warning, tuple(remarks), tuple(found))

    def _judge(self, image: Tensor, prepared: Prepared, path: str) -> tuple[dict[str, float], list[str]]:
        """Figures of an image, and what is doubtful about it and its data."""
        figures = {
            "acceleration": acceleration(prepared),
            "data_residual": data_residual(image, prepared),
            "map_support": map_support(prepared),
            "retained_energy": prepared.retained_energy,
            "noise_part": noise_part(prepared),
            "scale": float(prepared.scale.mean()),
            "sigma": float(prepared.sigma.mean()),
            "signal_in_maps": prepared.signal_in_maps,
        }
        if path == "adjoint":
            return figures, []  # whoever asks for so little would not wait for a better image to compare it with
        reference = prepared.initial
        if not _is_cg_sense(self.preparation or (self.bundle.preparation if self.bundle else Preparation())):
            reference = start_image(prepared.k_space, prepared.coil_maps, prepared.sigma, prior=prepared.prior)
        left = residuals(reference, prepared)
        figures["cg_sense_residual"] = math.sqrt(sum(one.relative**2 for one in left) / len(left))
        figures["unexplained"] = max(one.unexplained for one in left)
        found = defects(prepared, left)
        if path == "learned" and self.bundle is not None:
            found = [*departures(residuals(image, prepared), left), *found]
            found += doubts(figures, prepared, self.bundle.card)
        return figures, found

    def _cg_sense_ready(self, settings: Preparation) -> bool:
        """Whether the start image is the CG-SENSE that would be given."""
        return _is_cg_sense(settings) and self.weight is None and self.iterations is None

    @contextlib.contextmanager
    def room(self, _shape: Sequence[int]) -> Iterator[None]:
        """Around a call, and all that is made for it: where several share a device, they wait for each other here.

        Parameters
        ----------
        _shape
            Of the data, as Gadgetron's buffers ``[RO, E1, E2, CHA, N, S, LOC]``.
        """
        yield

    def _seconds_for_maps(self) -> float | None:
        # Without a network the deadline has nothing to give up: no other image needs less.
        deadline = None if self.bundle is None else self.deadline
        return min(filter(None, (deadline, self.map_timeout)), default=None)

    def _late(self, begin: float, spare: float = 0.0) -> bool:
        return self.deadline is not None and time.perf_counter() - begin > self.deadline - spare

    def _cancelled(self) -> bool:
        return self.cancel is not None and self.cancel.is_set()

    def _learned(self, bundle: Bundle, prepared: Prepared, begin: float, spare: float) -> Tensor:
        """The network's image, one element of the batch after the other, so that memory does not grow with slices."""
        images = []
        with torch.no_grad():
            for index in range(prepared.initial.shape[0]):
                part = _element(prepared, index)
                operator: LinearOperator = part.operator().to(self.device)
                if self.deadline is not None or self.cancel is not None:
                    operator = _Watched(operator, lambda: self._check_time(begin, spare))
                adjoint_data = operator.adjoint(part.k_space.data.to(self.device))
                encoding = Encoding(operator, adjoint_data, part.sigma.to(self.device))
                image = bundle.model.refine(encoding, part.initial.to(self.device), memory=self._plan(part))
                images.append(image.cpu())
        image = torch.cat(images)
        if not bool(torch.isfinite(torch.view_as_real(image)).all()):
            raise DataError("the network's image is not finite")
        return image

    def _conventional(self, prepared: Prepared, method: object, *, ready: bool) -> Tensor:
        """Whatever the preparation: a network may want to start from something simpler."""
        if method == "adjoint":
            return prepared.operator().adjoint(prepared.k_space.data)
        if ready:
            return prepared.initial
        settings = Preparation(start_weight=self.weight, start_iterations=self.iterations or _CG_ITERATIONS)
        return start_image(prepared.k_space, prepared.coil_maps, prepared.sigma, settings, prepared.prior)

    def _check_time(self, begin: float, spare: float) -> None:
        if self._cancelled():
            raise DeadlineExceededError("the reconstruction was cancelled")
        if self._late(begin, spare):
            elapsed = time.perf_counter() - begin
            raise DeadlineExceededError(f"the deadline of {self.deadline:g} s could not be met, {elapsed:.1f} s passed")

    def _plan(self, part: Prepared) -> MemoryPlan | None:
        """How the network is executed for one element."""
        if self.memory is None:
            return None
        _, coils, frames, z, y, x = part.k_space.data.shape
        sets, sampled_readout = part.coil_maps.data.shape[1], part.k_space.mask.shape[-1] == 1
        return self.plan((z, y, x), coils, frames=frames, sets=sets, sampled_readout=sampled_readout)

    def plan(
        self, matrix: tuple[int, int, int], coils: int, *, frames: int = 1, sets: int = 1, sampled_readout: bool = True
    ) -> MemoryPlan:
        """How the network is executed for such data within `memory`; found once for each shape.

        Raises
        ------
        ConfigError
            If there is no network, or no limit of memory.
        MemoryBudgetError
            If the data do not fit.
        """
        if self.bundle is None or self.memory is None:
            raise ConfigError("a plan needs a model bundle and a limit of memory.")
        key = (coils, frames, *matrix, sets, int(sampled_readout), self.memory)
        if key not in self._plans:
            self._plans[key] = plan_inference(
                self.bundle.model,
                matrix,
                coils,
                self.memory,
                time=frames,
                sets=sets,
                sampled_readout=sampled_readout,
            )
        return self._plans[key]


def _is_cg_sense(settings: Preparation) -> bool:
    """Whether a start image is the default CG-SENSE."""
    default = Preparation()
    return (settings.start, settings.start_weight, settings.start_iterations) == (
        default.start,
        default.start_weight,
        default.start_iterations,
    )


def data_dimensions(k_space: KSpace) -> str:
    """``2d``, ``3d``, ``2d+t`` or ``3d+t``, from the axes of the data."""
    _, _, frames, z, _, _ = k_space.data.shape
    return ("3d" if z > 1 else "2d") + ("+t" if frames > 1 else "")


def _check_dimensions(bundle: Bundle, k_space: KSpace) -> None:
    found = data_dimensions(k_space)
    # A static network may take the frames of a series one by one; no other combination has a meaning.
    if found not in (bundle.dimensions, f"{bundle.dimensions}+t"):
        raise DataError(
            f"the bundle {bundle.name} is for {bundle.dimensions} data, but these are {found} "
            f"{tuple(k_space.data.shape)}: choose a bundle for {found}, or --model none."
        )


def _element(prepared: Prepared, index: int) -> Prepared:
    """One element of the batch."""
    one = slice(index, index + 1)
    mask = prepared.k_space.mask
    k_space = replace(prepared.k_space, data=prepared.k_space.data[one], mask=mask if mask.shape[0] == 1 else mask[one])
    maps = replace(prepared.coil_maps, data=prepared.coil_maps.data[one])
    return replace(
        prepared,
        k_space=k_space,
        coil_maps=maps,
        initial=prepared.initial[one],
        scale=prepared.scale[one],
        support=prepared.support[one],
        prior=prepared.prior[one],
        sigma=prepared.sigma[one],
    )


def _seconds_of_cg_sense(prepared: Prepared, iterations: int) -> float:
    """How long CG-SENSE will take, from one application of its operator."""
    operator = prepared.operator()
    with torch.no_grad():
        operator.normal(prepared.initial)  # the first time takes longer than any other
        begin = time.perf_counter()
        operator.normal(prepared.initial)
    return 1.2 * iterations * (time.perf_counter() - begin)


def _without_maps(k_space: KSpace, seconds: float, error: Exception) -> Reconstruction:
    """Root of the sum of squares of the zero-filled coil images: all that can be had without coil maps."""
    begin = time.perf_counter()
    image = ifft(k_space.data * k_space.mask).abs().square().sum(1, keepdim=True).sqrt().to(torch.complex64)
    warning = (
        "the coil maps were not ready by the deadline, this is the root of the sum of squares of the zero-filled "
        f"coil images: {' '.join(str(error).split())}"
    )
    rest = time.perf_counter() - begin
    timings = {"prepare": seconds, "reconstruct": rest, "total": seconds + rest}
    return Reconstruction(Image(image, k_space.info), {}, timings, "root-sum-of-squares", warning)


class _Watched(LinearOperator):
    """An operator that may refuse to work; every scheme applies it in each iteration."""

    def __init__(self, operator: LinearOperator, check: Callable[[], None]) -> None:
        super().__init__(operator.domain, operator.codomain)
        self.operator, self.check = operator, check

    def _forward(self, x: Tensor) -> Tensor:
        self.check()
        return self.operator(x)

    def _adjoint(self, y: Tensor) -> Tensor:
        self.check()
        return self.operator.adjoint(y)

    def _normal(self, x: Tensor) -> Tensor:
        self.check()
        return self.operator.normal(x)
