"""The unrolled model: iterations in a row, with a memory plan around them."""

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from melcore.errors import ConfigError, ShapeError
from melcore.memory import MemoryPlan, run
from melcore.physics import LinearOperator
from melcore.unrolled.iteration import Encoding, Iteration


class Unrolled(nn.Module):
    """Iterations in a row, from undersampled k-space to an image.

    Parameters
    ----------
    iterations
        One for each pass. The same object may stand several times: then its weights are shared.
    memory
        How the iterations are executed in training; None is plain automatic differentiation. It may be replaced at any
        time: plans change memory and time, never results.
    """

    def __init__(self, iterations: Sequence[Iteration], *, memory: MemoryPlan | None = None) -> None:
        super().__init__()
        if not iterations:
            raise ConfigError("an unrolled model needs at least one iteration.")
        # Each distinct iteration is registered once, so that shared weights appear once in the state dict.
        distinct = list(dict.fromkeys(iterations))
        self.distinct = nn.ModuleList(distinct)
        self.order = tuple(distinct.index(iteration) for iteration in iterations)
        self.memory = memory

    @classmethod
    def repeat(cls, make: Callable[[], Iteration], count: int, *, shared: bool = True) -> "Unrolled":
        """`count` iterations made by `make`: one with shared weights, or as many separate ones."""
        return cls([make()] * count if shared else [make() for _ in range(count)])

    @property
    def iterations(self) -> list[Iteration]:
        """The iterations in the order of execution."""
        return [self.distinct[index] for index in self.order]  # type: ignore[misc]

    def forward(self, k_space: Tensor, operator: LinearOperator, *, initial: Tensor | None = None) -> Tensor:
        """Reconstruct.

        Parameters
        ----------
        k_space
            ``(batch, coil, time, z, y, x)``, scaled so that the image is of order one.
        operator
            The encoding, for example `melcore.physics.Sense`.
        initial
            Image to begin from, ``(batch, set, time, z, y, x)``; by default the adjoint of the data.

        Returns
        -------
        Tensor
            Image ``(batch, set, time, z, y, x)``.
        """
        encoding = Encoding(operator, operator.adjoint(k_space))
        return self.refine(encoding, encoding.adjoint_data if initial is None else initial)

    def refine(self, encoding: Encoding, initial: Tensor) -> Tensor:
        """Reconstruct from an encoding whose adjoint data are known; see `forward`."""
        if initial.shape != encoding.adjoint_data.shape:
            raise ShapeError(
                f"the initial image {tuple(initial.shape)} and the encoding's images "
                f"{tuple(encoding.adjoint_data.shape)} differ in shape."
            )
        iterations = self.iterations
        state = iterations[0].start(initial)
        return run(iterations, state, encoding, self.memory)[0]
