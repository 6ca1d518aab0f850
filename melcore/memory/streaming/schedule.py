"""When each plane of each layer is computed: the skewed wavefront, in whole numbers only.

Signal 0 is the input of layer 0, signal ``i`` the output of layer ``i - 1``. A layer that reads ``h`` neighbours can
compute a plane once its input is ``h`` planes further on. The backward of the same sweep follows behind: the gradient
of signal ``i`` can be computed once that of signal ``i + 1`` is ``h`` planes further on. Fronts move at most a chunk at
a time, so that a plane is in memory only while a neighbour still needs it.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Kind = Literal["read", "layer", "upstream", "weights", "gradient"]


@dataclass(frozen=True)
class Step:
    """Compute the planes ``[start, stop)``.

    Kinds: ``read`` signal 0; ``layer`` the output of that layer; ``upstream`` the gradient of the last layer's output;
    ``weights`` the contribution of output planes to the gradient of a layer's weights; ``gradient`` the gradient of
    that layer's input, before the activation that made it.
    """

    kind: Kind
    layer: int
    start: int
    stop: int


class Wavefront:
    """The sweep over `size` planes through layers with the given halos, and what must be kept meanwhile.

    Parameters
    ----------
    halos
        Planes that each layer reads on either side.
    mode
        How the volume continues beyond its two ends: ``zeros``, ``replicate``, ``reflect``, or ``circular``, where the
        sweep begins and ends early and late enough that the wrapped planes are simply there.
    backward
        Whether gradients are computed in the same sweep; the last layer's output is then not computed.
    kept
        Signals that are in memory already as a whole, and need not be computed in the backward.
    """

    def __init__(
        self,
        size: int,
        halos: Sequence[int],
        chunk: int,
        *,
        mode: str = "zeros",
        backward: bool,
        kept: Collection[int] = (),
    ) -> None:
        self.halos, self.chunk, self.mode, self.backward = tuple(halos), chunk, mode, backward
        self.depth = len(halos)
        margin = sum(halos) if mode == "circular" else 0
        self.domains = [(-margin, size + margin)]
        for halo in halos:
            margin -= halo if mode == "circular" else 0
            self.domains.append((-margin, size + margin))
        # Planes beyond the ends that are stored with a signal, and with the gradient of a layer's output.
        self.pads = [0 if mode == "circular" else halo for halo in halos]
        self.gradient_pads = [halo if mode == "zeros" else 2 * halo for halo in halos]
        self._folds = mode in ("replicate", "reflect")
        self._signal = [high if backward and i in kept else low for i, (low, high) in enumerate(self.domains)]
        self._upstream = self.domains[-1][0]
        self._weights = [self.domains[layer + 1][0] for layer in range(self.depth)]
        self._gradient = [self.domains[layer][0] for layer in range(self.depth)]

    def steps(self) -> Iterator[Step]:
        """The steps in order. `signal_needed` and `gradient_needed` tell what later steps still read."""
        last = self.depth - 1
        layers = range(self.depth if not self.backward else last)
        while not self._finished():
            start = self._signal[0]
            stop = min(self.domains[0][1], start + self.chunk)
            if stop > start:
                self._signal[0] = stop
                yield Step("read", 0, start, stop)
            for layer in layers:
                start, end = self._signal[layer + 1], self.domains[layer + 1][1]
                stop = min(self._reach(self._signal[layer], layer, end), start + self.chunk)
                if stop > start:
                    self._signal[layer + 1] = stop
                    yield Step("layer", layer, start, stop)
            if not self.backward:
                continue
            start, end = self._upstream, self.domains[-1][1]
            stop = min(self._reach(self._signal[last], last, end), start + self.chunk)
            if stop > start:
                self._upstream = stop
                yield Step("upstream", last, start, stop)
            for layer in range(last, -1, -1):
                yield from self._backward(layer)

    def _backward(self, layer: int) -> Iterator[Step]:
        known = self._known(layer)
        start, end = self._weights[layer], self.domains[layer + 1][1]
        stop = min(known, self._reach(self._signal[layer], layer, end), start + self.chunk)
        if stop > start:
            self._weights[layer] = stop
            yield Step("weights", layer, start, stop)
        start, end = self._gradient[layer], self.domains[layer][1]
        front = end if known == self.domains[layer + 1][1] else known - self.halos[layer]
        stop = self._advance(start, min(front, self._signal[layer]), layer)
        if stop > start:
            self._gradient[layer] = stop
            yield Step("gradient", layer, start, stop)

    def _advance(self, start: int, front: int, layer: int) -> int:
        """How far a gradient may go: what is folded back from beyond an end must belong to the block at that end."""
        low, high = self.domains[layer]
        if not self._folds:
            return min(front, start + self.chunk)
        edge = self.halos[layer] + 1
        most = max(self.chunk, edge)
        if front == high and high - start <= most + edge:
            return high
        stop = min(front, start + most, high - edge)
        return start if start == low and stop < low + edge else max(stop, start)

    def _reach(self, known: int, layer: int, end: int) -> int:
        """Output planes of a layer that follow from `known` planes of its input."""
        return end if known == self.domains[layer][1] else known - self.halos[layer]

    def _known(self, layer: int) -> int:
        """Planes up to which the gradient of a layer's output is there."""
        return self._upstream if layer == self.depth - 1 else self._gradient[layer + 1]

    def _finished(self) -> bool:
        if not self.backward:
            return self._signal[-1] == self.domains[-1][1]
        weights = all(done == self.domains[layer + 1][1] for layer, done in enumerate(self._weights))
        return weights and self._gradient[0] == self.domains[0][1]

    def signal_needed(self, index: int) -> int:
        """First plane of signal `index` that later steps read."""
        halo = self.halos[index]
        needs = []
        if not self.backward or index < self.depth - 1:
            needs.append(self._signal[index + 1] - halo)
        if self.backward:
            needs.append(self._weights[index] - halo)
            if index > 0:
                needs.append(self._gradient[index])
        return min(needs)

    def gradient_needed(self, layer: int) -> int:
        """First plane of the gradient of a layer's output that later steps read."""
        done, low = self._gradient[layer], self.domains[layer][0]
        reads = self.domains[layer + 1][0] - self.gradient_pads[layer] if done == low else done - self.halos[layer]
        return min(self._weights[layer], reads)


@dataclass(frozen=True)
class Capacity:
    """Planes that each ring must hold: of the signals, and of the gradients of the layers' outputs."""

    signals: tuple[int, ...]
    gradients: tuple[int, ...]


def capacity(wavefront: Wavefront) -> Capacity:
    """Run through the steps of a fresh `wavefront` and note the most planes that any ring holds."""
    depth, backward = wavefront.depth, wavefront.backward
    signals = [_Span(wavefront.domains[i], wavefront.pads[i]) for i in range(depth)]
    gradients = [_Span(wavefront.domains[i + 1], wavefront.gradient_pads[i]) for i in range(depth)]
    for step in wavefront.steps():
        if step.kind == "read":
            signals[0].push(step.stop)
        elif step.kind == "layer" and step.layer + 1 < depth:
            signals[step.layer + 1].push(step.stop)
        elif step.kind == "upstream":
            gradients[-1].push(step.stop)
        elif step.kind == "gradient" and step.layer > 0:
            gradients[step.layer - 1].push(step.stop)
        for index, span in enumerate(signals):
            span.low = max(span.low, wavefront.signal_needed(index))
        if backward:
            for layer, span in enumerate(gradients):
                span.low = max(span.low, wavefront.gradient_needed(layer))
    return Capacity(
        tuple(span.most for span in signals), tuple(span.most for span in gradients) if backward else (0,) * depth
    )


class _Span:
    """The planes that a ring holds at a moment, and the most that it ever held."""

    def __init__(self, domain: tuple[int, int], pad: int) -> None:
        self.low, self.end, self.pad, self.most = domain[0] - pad, domain[1], pad, 0

    def push(self, stop: int) -> None:
        self.most = max(self.most, (stop + self.pad if stop == self.end else stop) - self.low)
