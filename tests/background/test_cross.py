"""Modes, formats, topologies and components: what is restored elsewhere is what was there when `save` was called.

Everything is overwritten as soon as `save` returns, and the background writes only then.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy
import pytest
import torch
import torch.distributed as dist
from tests.background.support import Waits
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardwise import Checkpointer, CheckpointingConfig

MODES: dict[str, dict[str, object]] = {
    "sync": {},
    "async": {"is_async": True},
    "async, staged": {"is_async": True, "wait_for_staging": True},
}
FORMATS: dict[str, dict[str, object]] = {
    "export": {"save_consolidated": "every"},
    "merged": {"save_consolidated": "every", "single_rank_consolidation": True},
    "shards": {"save_consolidated": "false"},
    "torch_save": {"save_consolidated": "false", "model_save_format": "torch_save"},
}
#: How the ranks that save hold the model -> on how many ranks, sharded, it is restored.
TOPOLOGIES = {"one rank": (1, 2), "sharded": (2, 1), "replicated": (2, 1)}
COMPONENTS = ["model", "optimizer", "scheduler", "extra_state", "rng"]
State = dict[str, object]


class Net(nn.Module):
    """Odd sizes, a tied tensor, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 7)
        self.outer = nn.Linear(5, 7)
        self.outer.weight = self.inner.weight
        self.norm = nn.LayerNorm(7)
        self.register_buffer("mean", torch.rand(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.norm(self.inner(x) + self.outer(x))
        return y


class Training:
    """A model with everything around it, after some steps."""

    def __init__(self, seed: int, sharded: bool, steps: int) -> None:
        torch.manual_seed(seed)
        random.seed(seed)
        numpy.random.seed(seed)  # other tests may have left the ranks different ones
        self.model: nn.Module = fully_shard(Net()) if sharded else Net()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 1, 0.5)
        self.extra: dict[str, object] = {"counts": [seed], "table": {"values": torch.full((3,), float(seed))}}
        for _ in range(steps):
            self.model(torch.rand(4, 5)).square().sum().backward()
            self.optimizer.step()
            self.scheduler.step()
            self.optimizer.zero_grad()

    def overwrite(self) -> None:
        """What a loop does next, and worse: no value stays, no list, no generator."""
        with torch.no_grad():
            for tensor in self.model.state_dict().values():
                tensor.fill_(7)
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.fill_(8)
        self.optimizer.param_groups[0]["betas"] = (0.25, 0.75)
        self.scheduler.step()
        self.extra["counts"].append(9)  # type: ignore[attr-defined]
        self.extra["table"]["values"].fill_(9)  # type: ignore[index]
        torch.manual_seed(99)
        random.seed(99)

    def state(self) -> State:
        """Every component's values, the same on any topology. All ranks call."""
        return {
            "model": {name: _whole(tensor) for name, tensor in self.model.state_dict().items()},
            "optimizer": [
                [{key: _whole(value) for key, value in state.items()} for state in self.optimizer.state.values()],
                {key: value for key, value in self.optimizer.param_groups[0].items() if key != "params"},
            ],
            "scheduler": self.scheduler.state_dict(),
            "extra_state": [list(self.extra["counts"]), self.extra["table"]["values"].tolist()],  # type: ignore[call-overload, index]
            "rng": [torch.get_rng_state().tolist(), random.getstate()],
        }

    def restore(self, root: Path) -> None:
        with CheckpointingConfig(checkpoint_dir=root).build(dist.get_rank(), 0, 0) as checkpointer:
            checkpointer.restore(self.model, self.optimizer, self.scheduler, extra_state=self.extra)


def _whole(tensor: torch.Tensor) -> object:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).tolist()


def _save(root: Path, topology: str, settings: dict[str, object]) -> State:
    training, storage = Training(1, topology == "sharded", steps=2), Waits()
    state = training.state()
    config = CheckpointingConfig(checkpoint_dir=root, **settings)  # type: ignore[arg-type]
    with Checkpointer(config, dist.get_rank(), 0, 0, storage=storage) as checkpointer:
        checkpointer.save(
            0, 1, training.model, training.optimizer, training.scheduler, extra_state=dict(training.extra)
        )
        training.overwrite()
        storage.go_on.set()
    return state


def _restore(root: Path, sharded: bool) -> State:
    training = Training(2, sharded, steps=1)
    training.restore(root)
    return training.state()


_FAST = {*(("async", how, "sharded") for how in FORMATS), ("async", "torch_save", "replicated")}
_CASES = [
    pytest.param(*case, marks=() if case in _FAST else pytest.mark.slow, id="-".join(case))
    for case in ((mode, how, topology) for mode in MODES for how in FORMATS for topology in TOPOLOGIES)
]


@pytest.mark.parametrize(("mode", "how", "topology"), _CASES)
def test_what_is_restored_is_what_was_captured(tmp_path: Path, mode: str, how: str, topology: str) -> None:
    writers, readers = TOPOLOGIES[topology]
    saved, *others = run(writers, _save, tmp_path, topology, MODES[mode] | FORMATS[how])
    assert all(other == saved for other in others)
    for restored in run(readers, _restore, tmp_path, readers > 1):
        for component in COMPONENTS:
            assert restored[component] == saved[component], component  # type: ignore[index]
