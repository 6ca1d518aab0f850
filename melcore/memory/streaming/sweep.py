"""One pass of the wavefront over the planes of an image: the steps of the schedule, carried out."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from melcore.errors import ShapeError
from melcore.memory.noise import noise_of
from melcore.memory.plan import Axis, Way
from melcore.memory.protocols import Gradients, LayeredLike, LayerLike
from melcore.memory.streaming.arrangement import Arrangement
from melcore.memory.streaming.faces import ZERO, continued, fold, gather
from melcore.memory.streaming.kernels import make_kernel
from melcore.memory.streaming.ring import Ring, Whole
from melcore.memory.streaming.schedule import Step, Wavefront, capacity

#: Where a layer's halo (time, z, y, x) holds the axes that a wavefront can run along.
AXES: Mapping[Axis, int] = {"readout": 3, "time": 0}

_leaky_relu = torch.ops.aten.leaky_relu.out
_leaky_relu_backward = torch.ops.aten.leaky_relu_backward.grad_input


class Sweep:
    """One pass over the planes of one image."""

    def __init__(
        self,
        regulariser: nn.Module,
        x: Tensor,
        chunk: int,
        axis: Axis = "readout",
        way: Way = "channels_last",
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
        batch, _, time, z, y, readout = x.shape
        volumetric = any(layer.kernel[1] > 1 for layer in self.layers)
        self.arrangement = Arrangement(batch, time, z, y, readout, volumetric, axis)
        self.kernels = [make_kernel(layer, self.arrangement, self.dtype, way) for layer in self.layers]
        halos = [layer.halo[AXES[axis]] for layer in self.layers]
        modes = [str(layer.padding) for layer in self.layers if layer.halo[AXES[axis]]]
        self.mode = modes[0] if modes else "zeros"
        self.size = self.arrangement.size
        noise = noise_of(regulariser, x)
        self.noise = [noise.layer(number) for number in range(len(halos) - 1)] if noise is not None else None
        kept = kept or {}
        room = capacity(Wavefront(self.size, halos, chunk, mode=self.mode, backward=backward, kept=kept))
        self.wave = Wavefront(self.size, halos, chunk, mode=self.mode, backward=backward, kept=kept)
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
        return Ring(self._memory(channels, planes, self.dtype), domain, pad, mode)

    def _memory(self, channels: int, planes: int, dtype: torch.dtype) -> Tensor:
        return self.arrangement.allocate(channels, planes, like=self.x, dtype=dtype)

    def record(self, signals: Sequence[int], dtype: torch.dtype | None) -> None:
        """Keep copies of these signals as the sweep passes, with the planes beyond their ends."""
        for index in signals:
            (low, high), pad = self.wave.domains[index], self.wave.pads[index]
            channels = self.layers[index].weight.shape[1]
            self.recorded[index] = self._memory(channels, high - low + 2 * pad, dtype or self.dtype)

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
                        torch.add(self._at(self.x, step), self._image(output), out=self._at(result, step))
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

    def _drop_out(self, planes: Tensor, step: Step, layer: int) -> None:
        """Apply a layer's noise to the planes of a step; it is its own adjoint."""
        if self.noise is not None:
            noise = self.noise[layer].part(self.arrangement.streamed, self._wrapped(step))
            noise.drop_(planes, self.arrangement.layout)

    def _drop(self) -> None:
        for index, ring in enumerate(self.signals):
            ring.drop(self.wave.signal_needed(index))
        for layer, ring in enumerate(self.upstream):
            ring.drop(self.wave.gradient_needed(layer))

    def _at(self, image: Tensor, step: Step) -> Tensor:
        return image.narrow(self.arrangement.dim, step.start, step.stop - step.start)

    def _wrapped(self, step: Step) -> list[int]:
        """The planes of a step as positions in the image; the wavefront of a circle passes some of them twice."""
        return [index % self.size for index in range(step.start, step.stop)]

    def _read(self, step: Step, image: Tensor, ring: Ring) -> None:
        """Planes of an image, as features; wrapped planes where the sweep begins before 0 or ends behind the last."""
        if step.start >= 0 and step.stop <= self.size:
            part = self._at(image, step)
        else:
            part = gather(image, self.arrangement.dim, self._wrapped(step))
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
            self._drop_out(output, step, step.layer)
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
            self._drop_out(target, step, step.layer - 1)
            ring.written()
            return
        fold(result, self._image(gradient), self.arrangement.dim, self._wrapped(step))

    def _folded(self, gradient: Tensor, step: Step, start: int, stop: int) -> Tensor:
        """Add what the planes beyond an end received to the planes that they are copies of."""
        inner = gradient.narrow(2, step.start - start, step.stop - step.start)
        halo = self.wave.halos[step.layer]
        sources = continued(self.mode, self.size, halo, halo)
        for plane in (*range(start, step.start), *range(step.stop, stop)):
            inner.select(2, sources[plane + halo] - step.start).add_(gradient.select(2, plane - start))
        return inner
