"""Ranks that hold different things, as pipeline stages do: what one has and another has not is no reason to wait."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.checkpointing.test_state_dict_adapters import Halved, Prefixed
from tests.support.ranks import run
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig


class Stage(nn.Module):
    """One layer of a model of two, under the name that it has in the whole."""

    def __init__(self, number: int, adapter: type[Prefixed] | None) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.layers = nn.ModuleDict({str(number): nn.Linear(6, 5)})
        if adapter is not None:
            self.state_dict_adapter = adapter()


class HalvedFirst(Halved):
    """Computes the matrix of the first layer."""

    which = "layers.0.weight"


def engine(root: Path, **settings: object) -> Checkpointer:
    settings = {"save_consolidated": "every", "collective_timeout_seconds": 20} | settings
    config = CheckpointingConfig(checkpoint_dir=root / "run", **settings)  # type: ignore[arg-type]
    return config.build(dp_rank=0, tp_rank=0, pp_rank=dist.get_rank())


Stages = tuple[tuple[int, ...], ...]
#: Which layers each of two ranks has.
STAGES: list[Stages] = [((0,), (1,)), ((1,), (0,)), ((0, 1), ()), ((), (0, 1))]


def there_and_back(root: Path, stages: Stages, adapter: type[Prefixed] | None, settings: dict[str, object]) -> None:
    parts: list[nn.Module] = [Stage(number, adapter) for number in stages[dist.get_rank()]]
    params = [param for part in parts for param in part.parameters()]
    optimizer: list[torch.optim.Optimizer] = [torch.optim.SGD(params, momentum=0.5)] if params else []
    for param in params:
        param.grad = torch.ones_like(param)
    for each in optimizer:
        each.step()
    state = [*params, *(value["momentum_buffer"] for each in optimizer for value in each.state.values())]
    before = [tensor.detach().clone() for tensor in state]
    with engine(root, **settings) as checkpointer:
        checkpointer.save(0, 1, parts, optimizer)
        for tensor in state:
            tensor.detach().fill_(9)
        checkpointer.restore(parts, optimizer)
    state = [*params, *(value["momentum_buffer"] for each in optimizer for value in each.state.values())]
    assert all(torch.equal(now.detach(), value) for now, value in zip(state, before, strict=True))


def base(root: Path, narrow: int, prefix: str = "") -> dict[str, object]:
    """A base model, one layer of which is in a narrower dtype than the run's."""
    tensors = {
        f"{prefix}layers.{number}.{leaf}": torch.zeros(shape, dtype=torch.bfloat16 if number == narrow else None)
        for number in (0, 1)
        for leaf, shape in (("weight", (5, 6)), ("bias", (5,)))
    }
    (root / "base").mkdir()
    save_file(tensors, root / "base" / "model.safetensors")
    return {"model_repo_id": str(root / "base")}


def dtypes(root: Path) -> dict[str, torch.dtype]:
    found = load_file(root / "run" / "epoch_0_step_1" / "model" / "consolidated" / "model.safetensors")
    return {name: tensor.dtype for name, tensor in found.items() if name.endswith("weight")}


@pytest.mark.parametrize("stages", STAGES)
def test_only_one_stage_rounds(tmp_path: Path, stages: Stages) -> None:
    run(2, there_and_back, tmp_path, stages, None, base(tmp_path, 0))
    assert dtypes(tmp_path) == {"layers.0.weight": torch.bfloat16, "layers.1.weight": torch.float32}


@pytest.mark.parametrize("settings", [{}, {"random_writes": False}, {"save_consolidated": "false"}], ids=str)
@pytest.mark.parametrize("stages", STAGES)
def test_only_one_stage_computes(tmp_path: Path, stages: Stages, settings: dict[str, object]) -> None:
    run(2, there_and_back, tmp_path, stages, HalvedFirst, settings)


@pytest.mark.parametrize("settings", [{}, {"random_writes": False}, {"is_async": True}], ids=str)
@pytest.mark.parametrize("stages", STAGES)
def test_what_is_computed_is_rounded(tmp_path: Path, stages: Stages, settings: dict[str, object]) -> None:
    run(2, there_and_back, tmp_path, stages, HalvedFirst, settings | base(tmp_path, 0, "hub."))
    assert dtypes(tmp_path) == {"hub.layers.0.weight": torch.bfloat16, "hub.layers.1.weight": torch.float32}
