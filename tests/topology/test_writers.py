"""Who writes what: one writer for every byte, replicas sharing the work; names that collide are found before that."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from tests.support.ranks import failure, run
from tests.topology.exports import consolidated
from tests.topology.setups import EMBEDDING, LAYERS, Run, Topology, ddp, fsdp, hsdp, local, pp, stage, tp, whole
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import NameCollisionError
from shardwise.plan.schedule import SPLIT_REPLICATED_ABOVE_BYTES

Written = list[tuple[str, int, int]]


class CountingStorage(LocalStorage):
    """A storage that remembers what was written where, after the files' creation."""

    def __init__(self) -> None:
        self.written: Written = []
        self._names: dict[int, str] = {}

    def open(self, path: Path, *, writable: bool) -> int:
        handle = super().open(path, writable=writable)
        self._names[handle] = path.name
        return handle

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        super().write(handle, data, offset)
        self.written.append((self._names[handle], offset, len(data)))


def counted(topology: Topology, root: Path) -> Written:
    training = Run("dense", topology)
    training.fill()
    storage = CountingStorage()
    with training.checkpointer(root, storage, save_consolidated="every") as engine:
        engine.save(0, 7, training.spread.parts)
    return [entry for entry in storage.written if entry[0] == "model.safetensors"]


@pytest.mark.parametrize("topology", [fsdp, hsdp, ddp, tp, pp], ids=lambda topology: topology.__name__)
def test_every_byte_has_one_writer_and_replicas_share(topology: Topology, tmp_path: Path) -> None:
    found = run(4, counted, topology, tmp_path)
    path = consolidated(tmp_path) / "model.safetensors"
    position = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    total = path.stat().st_size - position
    for _, offset, length in sorted(entry for entries in found for entry in entries):  # type: ignore[attr-defined]
        assert offset == position, "a gap, or bytes written twice"
        position += length
    assert position == path.stat().st_size
    if topology in (hsdp, ddp):
        with safe_open(path, framework="np") as file:
            largest = max(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
        shares = [sum(length for _, _, length in entries) for entries in found]  # type: ignore[attr-defined]
        assert max(shares) - min(shares) <= largest
        assert min(shares) > total / 8


class Large(nn.Module):
    """A tensor so large that its replicas cut it among themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1021, SPLIT_REPLICATED_ABOVE_BYTES // 1021 // 4 + 1))


def counted_large(root: Path) -> int:
    storage = CountingStorage()
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    with Checkpointer(config, storage=storage) as engine:
        engine.save(0, 0, Large())
    return sum(length for name, _, length in storage.written if name == "model.safetensors")


def test_a_large_tensor_is_cut_among_its_replicas(tmp_path: Path) -> None:
    rows, columns = 1021, SPLIT_REPLICATED_ABOVE_BYTES // 1021 // 4 + 1
    found = run(4, counted_large, tmp_path)
    assert sum(found) == rows * columns * 4  # type: ignore[arg-type]
    assert max(found) <= -(-rows // 4) * columns * 4  # type: ignore[call-overload]


# --- memory that is not contiguous -----------------------------------------------------------------------------------


class Turned(nn.Module):
    """A plain and a distributed parameter whose memory runs along the columns."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        generator = torch.Generator().manual_seed(seed)
        self.plain = nn.Parameter(torch.randn(7, 5, generator=generator).t())
        self.whole = torch.randn(14, 6, generator=generator)
        piece = self.whole.chunk(dist.get_world_size(), 0)[dist.get_rank()]
        turned = DTensor.from_local(piece.t().contiguous().t(), mesh, [Shard(0)], run_check=False, shape=(14, 6),
                                    stride=(6, 1))  # fmt: skip
        self.spread = nn.Parameter(turned)


def turned_there_and_back(root: Path) -> None:
    before, after = Turned(0), Turned(1)
    assert not local(before.spread).is_contiguous()
    states = []
    for model in (before, after):
        optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
        states.append(optimizer)
    for param in before.parameters():
        param.grad = param.detach().clone()
    states[0].step()
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    with config.build() as engine:
        engine.save(0, 1, before, states[0])
        engine.restore(after, states[1])
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(local(a), local(b))
        assert not local(b).is_contiguous()
        for kind in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(local(states[0].state[a][kind]), local(states[1].state[b][kind]))


def test_memory_that_is_not_contiguous(tmp_path: Path) -> None:
    run(4, turned_there_and_back, tmp_path)
    with safe_open(consolidated(tmp_path) / "model.safetensors", framework="pt") as file:
        assert file.get_slice("plain").get_shape() == [5, 7]
        assert file.get_slice("spread").get_shape() == [14, 6]


# --- collisions ------------------------------------------------------------------------------------------------------


def same_name_on_both_stages(root: Path) -> list[str]:
    """A tied model whose last stage keeps the embedding under its own name."""
    rank = dist.get_rank()
    model = whole("tied", "weight")
    part = stage(model, tuple(range(LAYERS // 2 * rank, LAYERS // 2 * (rank + 1))), True, rank == 1)
    if rank == 1:
        part.lm_head = None
    assert EMBEDDING in dict(part.named_parameters())
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    with config.build(dp_rank=0, tp_rank=0, pp_rank=rank) as engine:
        engine.save(0, 0, part)
    return []


def test_a_name_on_two_stages_is_refused(tmp_path: Path) -> None:
    error = failure(2, same_name_on_both_stages, tmp_path)
    assert isinstance(error, NameCollisionError)
    assert error.tensor == EMBEDDING
    assert "stages 0 and 1" in str(error)
    assert not list(tmp_path.rglob("*.safetensors"))
    assert not list(tmp_path.glob("epoch_*"))


def same_name_on_virtual_stages(root: Path) -> None:
    rank = dist.get_rank()
    parts = [stage(whole("dense", "weight"), (2 * rank + i,), rank + i == 0, rank + i == 2) for i in range(2)]
    layers = parts[1].model.layers
    layers["0"] = layers[str(2 * rank + 1)]  # numbered afresh in each stage
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    with config.build(dp_rank=0, tp_rank=0, pp_rank=rank) as engine:
        engine.save(0, 0, parts)


def test_a_name_on_two_virtual_stages_of_a_rank_is_refused(tmp_path: Path) -> None:
    error = failure(2, same_name_on_virtual_stages, tmp_path)
    assert isinstance(error, NameCollisionError)
    assert error.tensor is not None
    assert error.tensor.startswith("model.layers.0.")
    assert not list(tmp_path.rglob("*.safetensors"))
