"""The unrolled model: iterations in a row, executed as a memory plan says."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
        One for each pass. The same object may stand several times: then its weights are shared. So are those of a
        module that several iterations hold; both stand once in the state dict.
    """

    def __init__(self, iterations: Sequence[Iteration]) -> None:
        super().__init__()
        if not iterations:
            raise ConfigError("an unrolled model needs at least one iteration.")
        # Each distinct iteration is registered once, so that shared weights appear once in the state dict.
        distinct = list(dict.fromkeys(iterations))
        self.distinct = nn.ModuleList(distinct)
        self.order = tuple(distinct.index(iteration) for iteration in iterations)
        self.register_state_dict_post_hook(_drop_duplicates)
        self.register_load_state_dict_pre_hook(_add_duplicates)

    @classmethod
    def repeat(cls, make: Callable[[], Iteration], count: int, *, shared: bool = True) -> "Unrolled":
        """`count` iterations made by `make`: one with shared weights, or as many separate ones."""
        return cls([make()] * count if shared else [make() for _ in range(count)])

    @property
    def iterations(self) -> list[Iteration]:
        """The iterations in the order of execution."""
        return [self.distinct[index] for index in self.order]  # type: ignore[misc]

    def forward(
        self,
        k_space: Tensor,
        operator: LinearOperator,
        *,
        sigma: Tensor,
        initial: Tensor | None = None,
        memory: MemoryPlan | None = None,
    ) -> Tensor:
        """Reconstruct.

        Parameters
        ----------
        k_space
            ``(batch, coil, time, z, y, x)``, scaled so that the image is of order one.
        operator
            The encoding, for example `melcore.physics.Sense`.
        sigma
            Noise level ``(batch,)``; see `melcore.unrolled.Encoding`.
        initial
            Image to begin from, ``(batch, set, time, z, y, x)``; by default the adjoint of the data.
        memory
            How the iterations are executed; None is plain automatic differentiation. Plans change memory and time,
            never results.

        Returns
        -------
        Tensor
            Image ``(batch, set, time, z, y, x)``.
        """
        encoding = Encoding(operator, operator.adjoint(k_space), sigma)
        return self.refine(encoding, encoding.adjoint_data if initial is None else initial, memory=memory)

    def refine(self, encoding: Encoding, initial: Tensor, *, memory: MemoryPlan | None = None) -> Tensor:
        """Reconstruct from an encoding whose adjoint data are known; see `forward`."""
        if initial.shape != encoding.adjoint_data.shape:
            raise ShapeError(
                f"the initial image {tuple(initial.shape)} and the encoding's images "
                f"{tuple(encoding.adjoint_data.shape)} differ in shape."
            )
        iterations = self.iterations
        # No name holds the first state, so that it goes when the first iteration has used it.
        return run(iterations, iterations[0].start(initial, encoding), encoding, memory)[0]


def _duplicates(model: nn.Module) -> Mapping[str, str]:
    """Names under which a parameter stands again, with the name under which it stands first."""
    first: dict[int, str] = {}
    again = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            again[name] = first[id(parameter)]
    return again


def _drop_duplicates(model: nn.Module, state: dict[str, Any], prefix: str, _metadata: object) -> None:
    for name in _duplicates(model):
        state.pop(prefix + name, None)


def _add_duplicates(model: nn.Module, state: dict[str, Any], prefix: str, *_others: object) -> None:
    for name, original in _duplicates(model).items():
        if prefix + original in state:
            state[prefix + name] = state[prefix + original]
