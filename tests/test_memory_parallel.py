"""The engine under DistributedDataParallel and FSDP2: two real processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from memory_cases import NETWORKS, distance, encoding, model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from melcore.memory import MemoryPlan
from melcore.physics import Sense
from melcore.unrolled import Encoding, Unrolled, build

NETWORK = NETWORKS[0]


class Loss(nn.Module):
    """A model and its loss on one element of a batch of two."""

    def __init__(self, made: Unrolled, executor: Any) -> None:
        super().__init__()
        self.made, self.plan = made, MemoryPlan.uniform(executor, 3)

    def forward(self, index: int) -> torch.Tensor:
        problem = encoding(NETWORK.matrix, batch=2)
        operator = problem.operator
        assert isinstance(operator, Sense)
        mask = operator.mask[index : index + 1]
        part = Sense(
            torch.ones(1, 1, 1, *([1] * 4), dtype=torch.complex128).expand(1, 1, 2, 1, *NETWORK.matrix[1:]), mask
        )
        data = problem.adjoint_data[index : index + 1]
        problem = Encoding(part, data, problem.sigma[index : index + 1])
        return self.made.refine(problem, data, memory=self.plan).abs().square().sum()


def make(scheme: str) -> Unrolled:
    if scheme == "modl":
        return model(NETWORK.make, count=3)
    torch.manual_seed(5)
    network = {"name": "shrinkage", "dimensions": 2, "filters": 4, "maps": 2, "channels": 4}
    return build({"scheme": scheme, "iterations": 3, "regulariser": network}).double()


def _process(rank: int, folder: str, executor: Any, kind: str, scheme: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        made = make(scheme)
        calls: dict[str, int] = {}
        if kind == "ddp":
            for name, parameter in _learned(made):
                parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name: calls.__setitem__(name, calls.get(name, 0) + 1)
                )
            wrapped: nn.Module = DistributedDataParallel(Loss(made, executor))
        else:
            from torch.distributed.fsdp import fully_shard

            wrapped = Loss(made, executor)
            # FSDP2 refuses scalar parameters; the few there are stay whole, and their gradients are each process's own.
            fully_shard(wrapped, ignored_params={p for p in made.parameters() if p.ndim == 0})
        for _ in range(2):
            wrapped.zero_grad()
            wrapped(rank).backward()
        found = {}
        for name, parameter in _learned(made):
            grad = parameter.grad
            assert grad is not None
            found[name] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        if rank == 0:
            torch.save({"gradients": found, "calls": calls}, f"{folder}/result.pt")
    finally:
        dist.destroy_process_group()


def _learned(made: Unrolled) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in made.named_parameters() if parameter.requires_grad]


@pytest.mark.parametrize(
    ("kind", "executor", "scheme"),
    [
        ("ddp", "store", "modl"),
        ("ddp", "checkpoint", "modl"),
        ("fsdp", "store", "modl"),
        ("ddp", "store", "primal_dual"),
        ("ddp", "plain", "primal_dual"),
    ],
)
def test_two_processes_have_the_gradients_of_one(tmp_path: Path, kind: str, executor: Any, scheme: str) -> None:
    torch.multiprocessing.spawn(_process, (str(tmp_path), executor, kind, scheme), nprocs=2)
    result = torch.load(tmp_path / "result.pt")
    made = make(scheme)
    loss = Loss(made, "plain")
    ((loss(0) + loss(1)) / 2).backward()
    expected = {name: p.grad for name, p in _learned(made) if kind == "ddp" or p.ndim > 0}
    result["gradients"] = {name: value for name, value in result["gradients"].items() if name in expected}
    assert distance(result["gradients"], expected) < 1e-12  # type: ignore[arg-type]
    if kind == "ddp":
        assert result["calls"] == dict.fromkeys(expected, 2)
