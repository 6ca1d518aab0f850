"""The regulariser as a wavefront of planes along the readout: exact, without halo work, in bounded memory.

Each layer keeps the few planes that its neighbours still need. In the backward, the recomputed activations, the
gradients of the inputs and those of the weights advance in one sweep. No tensor of features is ever as large as the
volume; even the image becomes features a chunk at a time.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from melcore.errors import ShapeError
from melcore.memory.protocols import Gradients, LayeredLike, LayerLike
from melcore.memory.streaming.faces import ZERO, continued, fold, gather
from melcore.memory.streaming.kernels import Arrangement, make_kernel
from melcore.memory.streaming.ring import Ring, Whole
from melcore.memory.streaming.schedule import Step, Wavefront, capacity

_leaky_relu = torch.ops.aten.leaky_relu.out
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward.grad_input


def why_not(regulariser: nn.Module) -> str | None:
    """Why a regulariser cannot be streamed, or None if it can."""
    if not isinstance(regulariser, LayeredLike):
        return f"{type(regulariser).__name__} is not made of local layers"
    layers: list[LayerLike] = list(regulariser.layers)  # type: ignore[arg-type]
    if any(layer.kernel[0] > 1 and layer.kernel[1:] != (1, 1, 1) for layer in layers):
        return "a layer convolves space and time at once"
    if layers[-1].slope != 1:
        return "the last layer has an activation"
    if any(layer.slope < 0 for layer in layers):
        return "a negative slope hides the sign of an activation's input"
    if len({str(layer.padding) for layer in layers if layer.halo[3]}) > 1:
        return "layers continue the volume in different ways along the readout"
    return None


class Stream:
    """A wavefront in steps of `chunk` planes."""

    def __init__(self, chunk: int) -> None:
        self.chunk = chunk

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        with torch.no_grad():
            return _Sweep(regulariser, x, self.chunk, backward=False).forward(), ()

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],  # noqa: ARG002
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        with torch.no_grad():
            return _Sweep(regulariser, x, self.chunk, backward=True).vjp(gradient, parameters)


class Keep(Stream):
    """A wavefront whose activations stay in memory from the forward to the backward, so that nothing is recomputed.

    The output of the first layer is never kept: it is the cheapest to compute, and as large as any other.

    Parameters
    ----------
    layers
        How many activations to keep, the last ones first; None is all.
    dtype
        In which precision; None is that of the computation.
    """

    def __init__(self, chunk: int, layers: int | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__(chunk)
        self.layers, self.dtype = layers, dtype

    def _signals(self, regulariser: nn.Module) -> list[int]:
        assert isinstance(regulariser, LayeredLike)
        depth = len(regulariser.layers)
        count = depth if self.layers is None else self.layers
        return list(range(2, depth))[max(0, depth - 2 - count) :]

    def forward(self, regulariser: nn.Module, x: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
        """See `ExecutorLike.forward`."""
        with torch.no_grad():
            sweep = _Sweep(regulariser, x, self.chunk, backward=False)
            sweep.record(self._signals(regulariser), self.dtype)
            return sweep.forward(), list(sweep.recorded.values())

    def vjp(
        self,
        regulariser: nn.Module,
        x: Tensor,
        gradient: Tensor,
        kept: Sequence[Tensor],
        parameters: Sequence[Tensor],
    ) -> Gradients:
        """See `ExecutorLike.vjp`."""
        with torch.no_grad():
            signals = dict(zip(self._signals(regulariser), kept, strict=True))
            return _Sweep(regulariser, x, self.chunk, backward=True, kept=signals).vjp(gradient, parameters)


class _Sweep:
    """One pass over the planes of one image."""

    def __init__(
        self,
        regulariser: nn.Module,
        x: Tensor,
        chunk: int,
        *,
        backward: bool,
        kept: Mapping[int, Tensor] | None = None,
    ) -> None:
        assert isinstance(regulariser, LayeredLike)
        if x.ndim != 6 or not x.is_complex():
            raise ShapeError(
                f"{type(regulariser).__name__} expects a complex image (batch, set, time, z, y, x), "
                f"but got {x.dtype} {tuple(x.shape)}."
            )
        self.regulariser, self.x = regulariser, x
        self.layers: list[LayerLike] = list(regulariser.layers)  # type: ignore[arg-type]
        kind = x.device.type
        autocast = kind != "meta" and torch.is_autocast_enabled(kind)
        self.dtype = torch.get_autocast_dtype(kind) if autocast else x.real.dtype
        batch, _, time, z, y, size = x.shape
        volumetric = any(layer.kernel[1] > 1 for layer in self.layers)
        self.arrangement = Arrangement(batch, time, z, y, volumetric)
        self.kernels = [make_kernel(layer, self.arrangement, self.dtype) for layer in self.layers]
        halos = [layer.halo[3] for layer in self.layers]
        modes = [str(layer.padding) for layer in self.layers if layer.halo[3]]
        self.mode = modes[0] if modes else "zeros"
        kept = kept or {}
        room = capacity(Wavefront(size, halos, chunk, mode=self.mode, backward=backward, kept=kept))
        self.wave = Wavefront(size, halos, chunk, mode=self.mode, backward=backward, kept=kept)
        channels = [layer.weight.shape[1] for layer in self.layers]
        self.recorded: dict[int, Tensor] = {}
        self.signals = [
            Whole(kept[i], self.wave.domains[i], self.wave.pads[i], self.dtype)
            if i in kept
            else self._ring(channels[i], room.signals[i], self.wave.domains[i], self.wave.pads[i], self.mode)
            for i in range(len(halos))
        ]
        self.upstream: list[Ring] = []
        if backward:
            channels = [layer.weight.shape[0] for layer in self.layers]
            self.upstream = [
                self._ring(
                    channels[i], room.gradients[i], self.wave.domains[i + 1], self.wave.gradient_pads[i], "zeros"
                )
                for i in range(len(halos))
            ]

    def _ring(self, channels: int, planes: int, domain: tuple[int, int], pad: int, mode: str) -> Ring:
        shape = self.arrangement.shape(channels, planes)
        return Ring(shape, domain, pad, mode, like=self.x, dtype=self.dtype)

    def record(self, signals: Sequence[int], dtype: torch.dtype | None) -> None:
        """Keep copies of these signals as the sweep passes, with the planes beyond their ends."""
        for index in signals:
            (low, high), pad = self.wave.domains[index], self.wave.pads[index]
            shape = self.arrangement.shape(self.layers[index].weight.shape[1], high - low + 2 * pad)
            batch, channels, *rest = shape
            memory = torch.empty((batch, *rest, channels), dtype=dtype or self.dtype, device=self.x.device)
            self.recorded[index] = memory.movedim(-1, 1)

    def _record(self, index: int, step: Step) -> None:
        if index in self.recorded:
            offset = self.wave.pads[index] - self.wave.domains[index][0]
            target = self.recorded[index].narrow(2, step.start + offset, step.stop - step.start)
            target.copy_(self.signals[index].view(step.start, step.stop))

    def _continue_recorded(self) -> None:
        """Write the planes beyond the ends, which the backward reads as well."""
        for index, memory in self.recorded.items():
            pad, (low, high) = self.wave.pads[index], self.wave.domains[index]
            sources = continued(self.mode if pad else "zeros", high - low, pad, pad)
            for plane in (*range(pad), *range(pad + high - low, high - low + 2 * pad)):
                if sources[plane] == ZERO:
                    memory.select(2, plane).zero_()
                else:
                    memory.select(2, plane).copy_(memory.select(2, sources[plane] + pad))

    def forward(self) -> Tensor:
        """The regulariser's output."""
        result = torch.empty_like(self.x)
        last = len(self.layers) - 1
        with torch.autocast(self.x.device.type, enabled=False):
            for step in self.wave.steps():
                if step.kind == "read":
                    self._read(step, self.x, self.signals[0])
                else:
                    output = self._layer(step)
                    if step.layer == last:
                        here = slice(step.start, step.stop)
                        torch.add(self.x[..., here], self._image(output), out=result[..., here])
                self._drop()
        self._continue_recorded()
        return result

    def vjp(self, gradient: Tensor, parameters: Sequence[Tensor]) -> Gradients:
        """Gradients of the image and of `parameters`."""
        result = gradient.clone()  # the residual connection passes the gradient on as it is
        with torch.autocast(self.x.device.type, enabled=False):
            for step in self.wave.steps():
                if step.kind == "read":
                    self._read(step, self.x, self.signals[0])
                elif step.kind == "layer":
                    self._layer(step)
                elif step.kind == "upstream":
                    self._read(step, gradient, self.upstream[-1])
                elif step.kind == "weights":
                    self._weights(step)
                else:
                    self._gradient(step, result)
                self._drop()
        found = {}
        for layer, kernel in zip(self.layers, self.kernels, strict=True):
            for parameter, value in zip((layer.weight, layer.bias), kernel.gradients(), strict=True):
                found[id(parameter)] = value.to(parameter.dtype)
        return result, [found.get(id(parameter)) for parameter in parameters]

    def _drop(self) -> None:
        for index, ring in enumerate(self.signals):
            ring.drop(self.wave.signal_needed(index))
        for layer, ring in enumerate(self.upstream):
            ring.drop(self.wave.gradient_needed(layer))

    def _read(self, step: Step, image: Tensor, ring: Ring) -> None:
        """Planes of an image, as features; wrapped planes where the sweep begins before 0 or ends behind the last."""
        size = image.shape[-1]
        if step.start >= 0 and step.stop <= size:
            part = image[..., step.start : step.stop]
        else:
            part = gather(image, 5, [index % size for index in range(step.start, step.stop)])
        ring.push(step.stop - step.start).copy_(self.arrangement.planes(self.regulariser.to_features(part)))
        ring.written()

    def _image(self, planes: Tensor) -> Tensor:
        return self.regulariser.from_features(self.arrangement.features(planes).to(self.x.real.dtype).contiguous())

    def _layer(self, step: Step) -> Tensor:
        """Output planes of a layer, activated and kept, unless the layer is the last."""
        halo = self.wave.halos[step.layer]
        planes = self.signals[step.layer].view(step.start - halo, step.stop + halo)
        output = self.kernels[step.layer].forward(planes)
        if step.layer + 1 < len(self.layers):
            ring, slope = self.signals[step.layer + 1], self.layers[step.layer].slope
            target = ring.push(step.stop - step.start)
            if slope == 1:
                target.copy_(output)
            else:
                _leaky_relu(output, slope, out=target)
            self._record(step.layer + 1, step)
            ring.written()
        return output

    def _weights(self, step: Step) -> None:
        halo = self.wave.halos[step.layer]
        planes = self.signals[step.layer].view(step.start - halo, step.stop + halo)
        gradient = self.upstream[step.layer].view(step.start, step.stop)
        self.kernels[step.layer].add_weight_gradient(gradient, planes)

    def _gradient(self, step: Step, result: Tensor) -> None:
        """Gradient of a layer's input; of the image itself, added to `result`, for the first layer."""
        halo, low, high = self.wave.halos[step.layer], *self.wave.domains[step.layer]
        folds = self.mode in ("replicate", "reflect")
        start = step.start - halo if folds and step.start == low else step.start
        stop = step.stop + halo if folds and step.stop == high else step.stop
        planes = self.upstream[step.layer].view(start - halo, stop + halo)
        gradient = self.kernels[step.layer].input_gradient(planes)
        if folds:
            gradient = self._folded(gradient, step, start, stop)
        if step.layer > 0:
            ring, slope = self.upstream[step.layer - 1], self.layers[step.layer - 1].slope
            target = ring.push(step.stop - step.start)
            if slope == 1:
                target.copy_(gradient)
            else:
                activations = self.signals[step.layer].view(step.start, step.stop)
                _leaky_relu_backward(gradient, activations, slope, True, grad_input=target)
            ring.written()
            return
        image, size = self._image(gradient), result.shape[-1]
        fold(result, image, 5, [index % size for index in range(step.start, step.stop)])

    def _folded(self, gradient: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """Add what the planes beyond an end received to the planes that they are copies of."""
        inner = gradient.narrow(2, step.start - start, step.stop - step.start)
        size, halo = self.x.shape[-1], self.wave.halos[step.layer]
        sources = continued(self.mode, size, halo, halo)
        for plane in (*range(start, step.start), *range(step.stop, stop)):
            inner.select(2, sources[plane + halo] - step.start).add_(gradient.select(2, plane - start))
        return inner
