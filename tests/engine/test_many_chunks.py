"""Shards of very many tensors and ranks: the manifest then tells files and no chunks, and is checked all the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.comm import Group
from shardwise.disk.storage import LocalStorage
from shardwise.engine.agreement import Agreement
from shardwise.engine.records import ComponentRecord, merged
from shardwise.engine.shards import ShardPlan, write_shards
from shardwise.format.manifest import MANIFEST_NAME, Manifest, encode_manifest, read_manifest
from shardwise.ops.verify import verify
from shardwise.plan.schedule import plan_shards
from shardwise.stateful_wrappers import ModelState


def build(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Embedding(3, 4), nn.Linear(4, 1, bias=False))
    model.register_buffer("none", torch.zeros(0, 3))
    return fully_shard(model)


def save(directory: Path, most_chunks: int) -> int:
    """Returns how many files and tensors the ranks have recorded together."""
    group, model = Group(dist.group.WORLD), build(0)
    held = ModelState(model).held()
    roster = Agreement(group).roster(lambda: held, "describing")
    plan = ShardPlan(directory, "model", roster, plan_shards(held, roster, group.rank))
    own = write_shards(plan, group, LocalStorage(), most_chunks=most_chunks)
    record = merged(map(ComponentRecord.decoded, group.gather(own.encoded, "gathering records")))
    if group.is_main:
        manifest = encode_manifest(Manifest(record.files, record.tensors, {}))
        (directory / MANIFEST_NAME).write_bytes(manifest)
    return len(record.files) * 100 + len(record.tensors)


def load(directory: Path) -> bool:
    model, expected = build(1), build(0)
    with Checkpointer(CheckpointingConfig(checkpoint_dir=str(directory)), dist.get_rank(), 0, 0) as engine:
        engine.load_model(model, directory)
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    return all(torch.equal(a.to_local(), b.to_local()) for a, b in pairs)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("most_chunks", "recorded"), [(100, 305), (3, 300)])
def test_either_way_every_byte_is_checked(tmp_path: Path, most_chunks: int, recorded: int) -> None:
    assert run(3, save, tmp_path, most_chunks) == [recorded] * 3
    assert run(2, load, tmp_path) == [True, True]
    report = verify(tmp_path)
    assert (report.status, report.undigested) == ("whole", ())
    files = read_manifest(tmp_path).files
    assert report.bytes_read == sum(file.size for file in files)
    for file in files:
        for offset in (3, file.size // 2, file.size - 1):
            path = tmp_path / file.path
            content = bytearray(path.read_bytes())
            content[offset] ^= 4
            path.write_bytes(content)
            assert {damage.file for damage in verify(tmp_path).damages} == {file.path}
            content[offset] ^= 4
            path.write_bytes(content)
    assert verify(tmp_path).status == "whole"
