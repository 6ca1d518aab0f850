"""The reconstruction itself as a stage: sorted k-space in, images with their geometry and their story out."""

import dataclasses
import itertools
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from gadgets.buffer_stage import center_offsets
from gadgets.header import Encoding, Header
from gadgets.image_headers import image_header, image_meta
from gadgets.messages import Array, Image, ImageArray, ImageType, Message, ReconBit, ReconBuffer, ReconData
from gadgets.settings import Bytes
from melcore import layout
from melcore.errors import ConfigError, DataError
from melcore.io.mrd_header import scan_info

if TYPE_CHECKING:
    from melcore.data import KSpace, Noise
    from melcore.reconstruct import Reconstruction, Reconstructor

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ReconstructSettings:
    """How to reconstruct, and what to send.

    Attributes
    ----------
    model
        ``none`` or ``cg-sense``, ``adjoint``, or the path or name of a model bundle; `bundle` is another name for it.
    device
        ``auto``, ``cpu``, ``cuda``, ``cuda:1``.
    memory
        What the reconstruction may use of the device, for example ``12GiB``.
    deadline
        Seconds after which a learned reconstruction is given up.
    map_timeout
        Seconds for the estimation of coil maps, so that a BART that hangs does not keep an exam for ever; a server has
        a limit of its own.
    map_sets, coils
        Sets of coil maps, and virtual coils to compress to at most; by default what the model was trained with.
    weight, iterations
        Of CG-SENSE, also where it is the fallback; by default they follow the noise and the acceleration.
    series
        `image_series_index` of the images.
    output
        Magnitude images (float32), or complex ones.
    send
        Finished images one by one, or complex ImageArrays for the conversion gadgets of a server.
    fallback
        Whether a failed or late learned reconstruction becomes a labelled conventional one.
    partial_fourier
        How conventional methods fill a side of k-space that was not acquired: zero, homodyne or pocs.
    on_doubt
        What to do about a network's image that does not fit the data, or data unlike its training's: record it, warn,
        or give the fallback.
    """

    model: str = "none"
    bundle: str | None = None
    device: str = "auto"
    memory: Bytes | None = None
    deadline: float | None = None
    map_timeout: float = 3600.0
    map_sets: int | None = None
    coils: int | None = None
    weight: float | None = None
    iterations: int | None = None
    series: int = 1
    output: Literal["magnitude", "complex"] = "magnitude"
    send: Literal["images", "array"] = "images"
    fallback: bool = True
    partial_fourier: Literal["zero", "homodyne", "pocs"] = "zero"
    on_doubt: Literal["record", "warn", "fallback"] = "warn"

    def __post_init__(self) -> None:
        if self.bundle is not None and self.model != "none":
            raise ConfigError(f"give a model or a bundle, not both: they are {self.model!r} and {self.bundle!r}.")
        for name in ("map_sets", "coils", "iterations"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name} must be 1 at least, but is {value}.")
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ConfigError(f"weight must be a positive number, but is {self.weight}.")
        if self.deadline is not None and not self.deadline > 0:
            raise ConfigError(f"the deadline must be a positive number of seconds, but is {self.deadline}.")
        if not self.map_timeout > 0:
            raise ConfigError(f"map_timeout must be a positive number of seconds, but is {self.map_timeout}.")
        if not 0 <= self.series < 1 << 16:
            raise ConfigError(f"series must be within 0 and 65535, but is {self.series}.")


def reconstruct(
    messages: Iterator[Message],
    header: Header,
    settings: ReconstructSettings,
    *,
    build: "Callable[..., Reconstructor] | None" = None,
) -> Iterator[Message]:
    """Reconstruct each ReconData; frames and slices without any sample give no image.

    Embedded calibration lines are merged into the data, separate ones go to the estimation of the maps. Everything
    else passes. `build` takes the place of the class `melcore.reconstruct.Reconstructor`: a server has its own.

    Raises
    ------
    ConfigError
        If the settings or the model cannot be used; before the first message is taken.
    DataError
        If the data cannot be reconstructed.
    """
    reconstructor = make_reconstructor(settings, build)
    counter = itertools.count(1)
    for message in messages:
        if not isinstance(message, ReconData):
            yield message
            continue
        for space, bit in enumerate(message.bits):
            if not bit.data.data.size:  # the server pads the list up to the encoding that occurs
                continue
            if space:
                raise DataError(
                    f"data of encoding {space} arrived: only the first encoding of a header can be reconstructed; "
                    "split the measurement."
                )
            yield from _images(bit, header, settings, reconstructor, counter)


def make_reconstructor(
    settings: ReconstructSettings, build: "Callable[..., Reconstructor] | None" = None
) -> "Reconstructor":
    """Load the model that the settings name; `build` as in `reconstruct`."""
    from melcore.preprocess.preparation import Preparation
    from melcore.reconstruct import Reconstructor

    names = ("device", "deadline", "fallback", "partial_fourier", "on_doubt", "weight", "iterations")
    options: dict[str, Any] = {name: getattr(settings, name) for name in names}
    if build is None:
        options["map_timeout"] = settings.map_timeout
    reconstructor = (build or Reconstructor)(settings.bundle or settings.model, memory=settings.memory, **options)
    chosen = {"coils": settings.coils, "map_sets": settings.map_sets}
    changes: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if changes:
        bundle = reconstructor.bundle
        trained = reconstructor.preparation or (bundle.preparation if bundle else Preparation())
        reconstructor.preparation = dataclasses.replace(trained, **changes)
    return reconstructor


def _images(
    bit: ReconBit,
    header: Header,
    settings: ReconstructSettings,
    reconstructor: "Reconstructor",
    counter: Iterator[int],
) -> Iterator[Message]:
    from melcore.preprocess.field_of_view import to_recon_matrix

    with reconstructor.room(bit.data.data.shape):
        k_space, calibration, chosen = to_k_space(bit, header)
        result = reconstructor(k_space, None, calibration)
    for words in filter(None, (result.warning, *result.remarks)):
        _log.warning("%s", words)
    image = to_recon_matrix(result.image)
    field_of_view = [length * 1e3 for length in image.info.geometry[0].field_of_view]
    data = image.data.numpy()
    as_array = settings.send == "array"
    is_complex = as_array or settings.output == "complex"
    if not is_complex:
        # Soft SENSE gives one image for each set of maps: all of them are signal.
        data = np.sqrt(np.square(np.abs(data)).sum(axis=1, keepdims=True)).astype(np.float32)
    image_type = ImageType.COMPLEX if is_complex else ImageType.MAGNITUDE
    meta = image_meta(story(result, reconstructor.name, k_space.info.protocol, k_space.noise))
    sent = []
    for batch, time in np.ndindex(*chosen.shape):
        acquisition: Any = chosen[batch, time]
        pixels = data[batch, :, time]
        head = image_header(
            acquisition, pixels.shape, field_of_view, image_type, index=next(counter), series=settings.series
        )
        sent.append((head, pixels, acquisition["number_of_samples"] > 0))
    if as_array:
        yield _array([head for head, _, _ in sent], data, bit.data.data.shape, meta)
        return
    for head, pixels, sampled in sent:
        if sampled:
            yield Image(head, meta, pixels)


def _array(heads: list[np.void], data: Array, buffer: tuple[int, ...], meta: str) -> ImageArray:
    """All images of a buffer as one array, those without samples as zeros."""
    time, sets, locations = buffer[4:]
    headers = np.array(heads, heads[0].dtype).reshape(locations, sets, time).transpose()
    return ImageArray(layout.image_to_gadgetron(data, sets), headers, (meta,) * len(heads))


def story(result: "Reconstruction", model: str, protocol: str, noise: "Noise") -> dict[str, str]:
    """Meta attributes of an image: what it is, by which path it came, and what was done to its data."""
    path = {"learned": "MEL", "cg-sense": "CG-SENSE", "adjoint": "adjoint"}.get(result.path_taken, result.path_taken)
    story = {
        "GADGETRON_DataRole": "Image",
        "GADGETRON_SeqDescription": f"{protocol}_{path}".lstrip("_"),
        "GADGETRON_ImageComment": f"{path} reconstruction by {model}",
        "MEL_model": model,
        "MEL_path_taken": result.path_taken,
        "MEL_warning": "; ".join(filter(None, (result.warning, *result.remarks))),
        "MEL_doubts": "; ".join(result.doubts),
        "MEL_whitened": _whitening(result, noise),
    }
    figures = {"quality": result.quality, "seconds": result.timings}
    story |= {f"MEL_{kind}_{name}": f"{value:.6g}" for kind, some in figures.items() for name, value in some.items()}
    story |= {f"MEL_provenance_{step}": words for step, words in result.image.info.provenance.items()}
    return {name: value for name, value in story.items() if value}


def _whitening(result: "Reconstruction", noise: "Noise") -> str:
    if "noise" in result.image.info.provenance:  # there was no noise scan
        return "by the noise of the data themselves"
    return "upstream, given a noise scan" if noise.source == "upstream" else f"{noise.whitened}".lower()


def to_k_space(bit: ReconBit, header: Header) -> tuple["KSpace", "KSpace | None", Array]:
    """Sorted k-space in the layout of `melcore`.

    Returns
    -------
    k_space, calibration
        The latter only where it lies on another grid than the data.
    headers
        ``(batch, time)``: for each image the acquisition header of its line nearest to the centre of k-space.
    """
    import torch

    from melcore.data import KSpace, Noise

    encoding = header.encodings[0]
    if not encoding.cartesian:
        raise DataError(
            f"the trajectory is {encoding.trajectory}: pipelines reconstruct Cartesian data only; "
            "reconstruct the file by mel recon, without --pipeline."
        )
    data, lines = bit.data.data, _filled(bit.data)
    calibration = None
    if bit.reference is not None and bit.reference.data.size:
        # Separate lines are of another time or contrast, and never lines of the image.
        apart = encoding.calibration_mode in ("separate", "external")
        if bit.reference.data.shape == data.shape and not apart:
            data, lines = _merged(data, lines, bit.reference)
        else:
            calibration, bit = bit.reference, ReconBit(bit.data)
    chosen = _central_headers(bit, lines)
    whitening = header.provenance.get("whitening", "")
    by_scan = whitening.startswith("by ") or not whitening
    # Without a word from our own stage the server's NoiseAdjustGadget came before us, as in every pipeline of ours. It
    # does not tell whether the exam had a noise scan.
    noise = Noise(whitened=by_scan, source="none" if not by_scan else "scan" if whitening else "upstream")
    filled = [[head for head in one if head["number_of_samples"] > 0] for one in chosen]
    some = next((heads[0] for heads in filled if heads), None)
    if some is None:
        raise DataError("the k-space holds no samples at all: nothing can be reconstructed.")
    infos = [scan_info(header.document, 0, heads[0] if heads else some) for heads in filled]
    geometry = tuple(info.geometry[0] for info in infos)
    info = dataclasses.replace(infos[0], geometry=geometry, provenance=dict(header.provenance))
    size = encoding.encoded_matrix[1:]

    def convert(array: Array, filled: npt.NDArray[np.bool_], first: tuple[int, int]) -> KSpace:
        array, mask = _whole_matrix(array, filled, size, first)
        values = np.ascontiguousarray(layout.k_space_from_gadgetron(array), np.complex64)
        air = None if noise.whitened else header.air.samples
        return KSpace(torch.from_numpy(values), torch.from_numpy(mask), info, noise, air)

    if any(have < wanted for wanted, have in zip(size, data.shape[1:3], strict=True)):
        _log.warning("the buffer %s is smaller than the encoded matrix %s: filled with zeros", data.shape[1:3], size)
    k_space = convert(data, lines, (0, 0))
    if calibration is None:
        return k_space, None, chosen
    lines = _filled(calibration)
    return k_space, convert(calibration.data, lines, _first_lines(calibration, lines, encoding)), chosen


def _filled(buffer: ReconBuffer) -> npt.NDArray[np.bool_]:
    """Which samples were taken, ``[RO or 1, E1, E2, N, S, LOC]``; only `number_of_samples` tells empty headers."""
    heads = buffer.headers
    size = buffer.data.shape[0]
    before, after = heads["discard_pre"].astype(int), heads["discard_post"].astype(int)
    samples = heads["number_of_samples"].astype(int)
    count = samples - before - after
    lines = samples > 0
    if (count[lines] == size).all():
        return lines[None]
    # A part of the readout is missing: where BucketToBuffer put it.
    centered = (samples == size) & (heads["center_sample"] == samples // 2)
    start = np.where(centered, before, int(buffer.sampling["limits"]["center"][0]) - heads["center_sample"].astype(int))
    column = np.arange(size).reshape(-1, *[1] * lines.ndim)
    return lines & (column >= start) & (column < start + count)


def _merged(data: Array, lines: npt.NDArray[np.bool_], reference: ReconBuffer) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Data with the lines that only the calibration has."""
    extra = _filled(reference)
    missing = extra.any(axis=0) & ~lines.any(axis=0)
    if not missing.any():
        return data, lines
    e1, e2, n, s, loc = np.nonzero(missing)
    data = data.copy(order="F")
    data[:, e1, e2, :, n, s, loc] = reference.data[:, e1, e2, :, n, s, loc]
    return data, lines | (extra & missing)


def _whole_matrix(
    data: Array, filled: npt.NDArray[np.bool_], size: tuple[int, int], first: tuple[int, int]
) -> tuple[Array, npt.NDArray[np.bool_]]:
    """Data on the encoded matrix from lines `first` on, and the mask ``(batch, 1, time, z, y, x)``.

    Without `parallelImaging` a server's buffer ends at the last line of the range, while the centre of k-space stays at
    half of the encoded matrix.
    """
    around = [(at, max(0, size[axis] - data.shape[axis + 1] - at)) for axis, at in enumerate(first)]
    if any(map(any, around)):
        widths = [(0, 0), *around]
        data = np.pad(data, widths + [(0, 0)] * 4)
        filled = np.pad(filled, widths + [(0, 0)] * 3)
    mask = layout.k_space_from_gadgetron(filled[:, :, :, None])
    return data, np.ascontiguousarray(mask)


def _first_lines(buffer: ReconBuffer, filled: npt.NDArray[np.bool_], encoding: Encoding) -> tuple[int, int]:
    """Where on the encoded matrix the lines of a separate calibration begin; its buffer holds no more than these.

    Their counters tell. Where they would miss the centre of k-space they count by themselves, around it.
    """
    lines = np.argwhere(filled.any(axis=0))
    if not len(lines):
        raise DataError("the separate calibration holds no samples at all: no coil maps can be estimated from it.")
    counters = buffer.headers[tuple(lines[0])]["idx"]
    first = []
    for axis, offset in enumerate(center_offsets(encoding)):
        have, size = buffer.data.shape[axis + 1], encoding.encoded_matrix[axis + 1]
        start = int(counters[f"kspace_encode_step_{axis + 1}"]) + offset - int(lines[0][axis])
        within = start >= 0 and start + have <= size and start <= size // 2 < start + have
        first.append(start if within else max(0, size // 2 - have // 2))
    return first[0], first[1]


def _central_headers(bit: ReconBit, filled: npt.NDArray[np.bool_]) -> Array:
    lines = filled.any(axis=0)
    heads = bit.data.headers
    if bit.reference is not None and bit.reference.headers.shape == heads.shape:
        heads = np.where(heads["number_of_samples"] > 0, heads, bit.reference.headers)
    first, second = (np.arange(size) - size // 2 for size in lines.shape[:2])
    distance = np.abs(first)[:, None, None, None, None] + np.abs(second)[:, None, None, None]
    nearest = np.where(lines, distance, 1 << 30).reshape(-1, *lines.shape[2:]).argmin(axis=0)
    chosen = np.take_along_axis(heads.reshape(-1, *lines.shape[2:]), nearest[None], axis=0)[0]
    # [N, S, LOC] to (batch, time), LOC slowest, as layout.k_space_from_gadgetron orders the batch.
    return chosen.transpose(2, 1, 0).reshape(-1, lines.shape[2])
