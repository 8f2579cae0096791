"""The usual DCP loop of an FSDP2 training through our storage classes, from some ranks onto others."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.engine.setups import Digests, digest
from tests.support.ranks import run
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardwise import SafetensorsReader, SafetensorsWriter
from shardwise.ops.verify import verify


@dataclass
class Counters:
    """A Stateful object."""

    seen: int = 0
    epochs: list[float] = field(default_factory=list)

    def state_dict(self) -> dict[str, object]:
        return {"seen": self.seen, "nested": {"epochs": self.epochs}}

    def load_state_dict(self, state: dict[str, object]) -> None:
        self.seen = state["seen"]  # type: ignore[assignment]
        self.epochs = state["nested"]["epochs"]  # type: ignore[index]


@dataclass
class Training:
    """A small FSDP2 model and its optimizer with two groups."""

    model: nn.Module
    optimizer: torch.optim.Optimizer

    @staticmethod
    def build(seed: int) -> Training:
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Embedding(53, 24), nn.Linear(24, 13), nn.LayerNorm(13), nn.Linear(13, 2))
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[1], mesh=mesh)
        fully_shard(model, mesh=mesh)
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        return Training(
            model,
            torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=1e-2),
        )

    def step(self) -> None:
        self.model(torch.arange(20).view(2, 10) * 3 % 53).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optim": optimizer, "step": 0, "counters": Counters(), "name": ""}

    def facts(self) -> tuple[Digests, object]:
        """Every tensor, whole, and the groups' options."""
        model, optimizer = get_state_dict(self.model, self.optimizer)
        tensors = {**model, **{f"{n} {k}": t for n, s in optimizer["state"].items() for k, t in s.items()}}  # type: ignore[union-attr]
        options = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        return {name: digest(tensor) for name, tensor in tensors.items()}, options


def save_loop(path: Path, consolidated: bool, background: bool) -> tuple[Digests, object]:
    training = Training.build(seed=0)
    for _ in range(3):
        training.step()
    training.optimizer.param_groups[1]["lr"] = 0.125
    state = training.state() | {"step": 3, "counters": Counters(9, [0.5, 0.25]), "name": "run"}
    writer = SafetensorsWriter(path, consolidated=consolidated)
    if background:
        future = dcp.async_save(state, storage_writer=writer, process_group=dist.new_group(backend="gloo"))
        training_goes_on = Training.build(seed=0)
        training_goes_on.step()
        future.result()  # type: ignore[union-attr]
    else:
        dcp.save(state, storage_writer=writer)
    return training.facts()


def load_loop(path: Path) -> tuple[Digests, object]:
    training = Training.build(seed=1)
    state = training.state()
    counters = state["counters"]
    dcp.load(state, storage_reader=SafetensorsReader(path))
    set_state_dict(
        training.model,
        training.optimizer,
        model_state_dict=state["model"],  # type: ignore[arg-type]
        optim_state_dict=state["optim"],  # type: ignore[arg-type]
    )
    assert (state["step"], state["name"]) == (3, "run")
    assert state["counters"] is counters
    assert counters == Counters(9, [0.5, 0.25])
    return training.facts()


@pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "shards"])
@pytest.mark.parametrize(("writers", "readers"), [(1, (2, 4)), (2, (1, 4)), (4, (1, 2))])
def test_the_usual_loop_goes_round(tmp_path: Path, writers: int, readers: tuple[int, ...], consolidated: bool) -> None:
    saved = run(writers, save_loop, tmp_path, consolidated, False)[0]
    for world in readers:
        assert run(world, load_loop, tmp_path) == [saved] * world
    assert verify(tmp_path).status == "whole"
    assert not [path for path in tmp_path.iterdir() if path.suffix not in (".json", ".safetensors")]


@pytest.mark.parametrize("consolidated", [True, False], ids=["consolidated", "shards"])
def test_the_usual_loop_in_the_background(tmp_path: Path, consolidated: bool) -> None:
    saved = run(2, save_loop, tmp_path, consolidated, True)[0]
    assert run(4, load_loop, tmp_path) == [saved] * 4


@pytest.mark.parametrize("consolidated", [True, False])
def test_only_what_an_earlier_save_left_is_removed(tmp_path: Path, consolidated: bool) -> None:
    left = ["model-00001-of-00002.safetensors", "shard-00009-model-00001-of-00001.safetensors"]
    others = ["model_ema.safetensors", "model.fp16.safetensors", "model-notes.safetensors", "shard-mine.safetensors"]
    for name in [*left, *others]:
        (tmp_path / name).write_bytes(b"\0")
    dcp.save({"w": torch.ones(3)}, storage_writer=SafetensorsWriter(tmp_path, consolidated=consolidated), no_dist=True)
    here = {path.name for path in tmp_path.iterdir()}
    assert here >= set(others)
    assert not here & set(left)
