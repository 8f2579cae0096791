"""Conversions that have to be computed, written by merging: the same bytes as by writing once."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.engine.setups import checkpointer
from tests.support.faults import FaultyStorage
from tests.support.ranks import failure, run
from tests.support.simulate import raw
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.convert.adapter import StateDictAdapter
from shardwise.disk.storage import LocalStorage
from shardwise.errors import ConversionError, StorageError


class Negated(StateDictAdapter):
    """Files hold the negative of every matrix, cut in two by columns; vectors are only renamed."""

    broken = False

    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **options: object
    ) -> list[tuple[str, torch.Tensor]]:
        if tensor.dim() != 2:
            return [(f"hub.{fqn}", tensor)]
        if self.broken and tensor.device.type != "meta":
            return [(f"hub.{fqn}.left", -tensor)]
        half = tensor.shape[1] // 2
        return [(f"hub.{fqn}.left", -tensor[:, :half]), (f"hub.{fqn}.right", -tensor[:, half:])]

    def to_hf(self, state_dict: Mapping[str, torch.Tensor], **options: object) -> dict[str, torch.Tensor]:
        return dict(pair for name, t in state_dict.items() for pair in self.convert_single_tensor_to_hf(name, t))

    def from_hf(
        self, state_dict: Mapping[str, torch.Tensor], device_mesh: object = None, **options: object
    ) -> dict[str, torch.Tensor]:
        left = next(name for name in state_dict if name.endswith(".left"))
        fqn = left.removeprefix("hub.").removesuffix(".left")
        return {fqn: -torch.cat([state_dict[left], state_dict[f"hub.{fqn}.right"]], 1)}


class Net(nn.Module):
    def __init__(self, seed: int, first: int = 0, last: int = 5) -> None:
        super().__init__()
        torch.manual_seed(seed)
        layers = [nn.Linear(8 + n, 6 + 2 * n, dtype=torch.bfloat16 if n == 2 else None) for n in range(5)]
        self.layers = nn.ModuleDict({str(n): layers[n] for n in range(first, last)})
        self.norm = nn.LayerNorm(7) if last == 5 else None
        self.state_dict_adapter = Negated()


def spread(net: Net, how: str) -> nn.Module:
    if how == "fsdp" and dist.get_world_size() > 1:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("dp",))
        for layer in net.layers.values():
            fully_shard(layer, mesh=mesh)
        return fully_shard(net, mesh=mesh)
    return net


MODES: dict[str, dict[str, object]] = {
    "once": {},
    "merged": {"random_writes": False},
    "single": {"single_rank_consolidation": True, "max_file_bytes": 600},
    "split": {"max_file_bytes": 600},
    "background": {"random_writes": False, "is_async": True},
    "background, once": {"is_async": True},
    "background, shards": {"is_async": True, "save_consolidated": "false"},
}


class Appending(LocalStorage):
    """A file system on which files are written from front to back, behind what they were created with."""

    def __init__(self) -> None:
        self._ends: dict[int, int] = {}

    def write(self, handle: int, data: bytes | bytearray | memoryview, offset: int) -> None:
        assert offset == self._ends.get(handle, offset), "a random write"
        self._ends[handle] = offset + len(data)
        super().write(handle, data, offset)

    def close(self, handle: int) -> None:
        self._ends.pop(handle, None)
        super().close(handle)


def save(root: Path, how: str) -> None:
    world = dist.get_world_size()
    if how == "stages" and world > 1:
        model: nn.Module = Net(0, 0, 2) if dist.get_rank() == 0 else Net(0, 2, 5)
    else:
        model = spread(Net(0), how)
    for name, settings in MODES.items():
        where = root / f"{how}-{world}-{name}"
        extra = {"staging_dir": str(root / "staging")} if name == "single" else {}
        chosen = {"save_consolidated": "every"} | settings | extra
        config = CheckpointingConfig(checkpoint_dir=where, **chosen)  # type: ignore[arg-type]
        rank = dist.get_rank()
        stage = rank if how == "stages" else 0
        storage = Appending() if name in ("merged", "single") else None
        with Checkpointer(config, rank, 0, stage, storage=storage) as engine:
            engine.save(0, 0, model)


def hashes(root: Path) -> dict[str, str]:
    directory = root / "epoch_0_step_0" / "model" / "consolidated"
    assert directory.is_dir()
    assert not list(root.rglob(".merging"))
    assert not list(root.rglob("computed-*"))
    files = [p for p in directory.iterdir() if p.suffix in (".safetensors", ".json")]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def restore(root: Path) -> bool:
    model, expected = Net(1), Net(0)
    with checkpointer(root) as engine:
        engine.restore(model, verify="digests")
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


@pytest.mark.parametrize(("how", "world"), [("plain", 1), ("plain", 2), ("fsdp", 2), ("fsdp", 3), ("stages", 2)])
def test_the_same_bytes_however_written(how: str, world: int, tmp_path: Path) -> None:
    run(world, save, tmp_path, how)
    found = {name: hashes(tmp_path / f"{how}-{world}-{name}") for name in MODES if "shards" not in name}
    assert found["merged"] == found["once"]
    assert found["background"] == found["background, once"] == found["once"]
    assert found["single"] == found["split"]
    assert len(found["split"]) > 3
    whole = load_file(tmp_path / f"{how}-{world}-merged/epoch_0_step_0/model/consolidated/model.safetensors")
    assert len(whole) == 5 * 3 + 2
    for number, layer in Net(0).layers.items():
        left, right = (whole[f"hub.layers.{number}.weight.{side}"] for side in ("left", "right"))
        assert raw(torch.cat([left, right], 1)) == raw(-layer.weight.detach())  # type: ignore[operator]
    for name in ("single", "background, shards"):
        assert run(world, restore, tmp_path / f"{how}-{world}-{name}") == [True] * world


def fail(root: Path, how: str, rank: int) -> None:
    storage = FaultyStorage("write", rank, errno.ENOSPC) if how == "disk" else None
    net = Net(0)
    net.state_dict_adapter.broken = how == "rule"
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every", random_writes=False)
    with Checkpointer(config, dist.get_rank(), 0, 0, storage=storage) as engine:
        engine.save(0, 0, spread(net, "fsdp"))


@pytest.mark.parametrize("rank", [0, 1])
def test_failures_reach_every_rank(tmp_path: Path, rank: int) -> None:
    error = failure(2, fail, tmp_path, "disk", rank)
    assert isinstance(error, StorageError)
    assert error.rank == rank
    assert not list(tmp_path.glob("epoch*"))


def test_a_rule_that_does_not_give_what_it_announced(tmp_path: Path) -> None:
    error = failure(2, fail, tmp_path, "rule", 0)
    assert isinstance(error, ConversionError)
    assert error.tensor is not None
    assert error.tensor.startswith("hub.layers.")
