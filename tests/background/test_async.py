"""Asynchronous saves: what is written is what was captured, publication waits for nobody, failures reach every rank."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import CheckpointingConfig
from shardwise.checkpointing import Checkpointer
from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import ShardwiseError, StorageError


class SlowStorage(LocalStorage):
    """Takes its time over every write, and can fail."""

    def __init__(self, seconds: float = 0.0, fails_on: int | None = None) -> None:
        self.seconds = seconds
        self.fails_on = fails_on

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        time.sleep(self.seconds)
        if self.fails_on is not None and dist.get_rank() == self.fails_on:
            raise StorageError.from_os(OSError(5, "Input/output error"))
        super().write(handle, data, offset)


def _model(seed: int = 0, width: int = 64) -> nn.Module:
    torch.manual_seed(seed)
    return fully_shard(_plain(width))


def _plain(width: int = 64) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.Linear(width, 7))


def _checkpointer(root: str, storage: LocalStorage | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every", is_async=True, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, dist.get_rank(), 0, 0, storage=storage)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def _room_during_a_save(root: str, name: str, model_name: str) -> list[float]:
    model = _model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(5)
    with _checkpointer(root, SlowStorage(0.2)) as checkpointer:
        checkpointer.save_model(model, root)
        if name == "allocate_staging":
            checkpointer.allocate_staging(model)
        else:
            checkpointer.load_base_model(model, "cpu", None, model_name)
        checkpointer.async_wait()
    return sorted({float(v) for file in Path(root, "model/consolidated").glob("*.safetensors")
                   for tensor in load_file(file).values() for v in tensor.flatten()})  # fmt: skip


@pytest.mark.parametrize("name", ["allocate_staging", "load_base_model"])
def test_memory_that_a_save_still_reads_is_not_made_anew(tmp_path: Path, name: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({n: torch.zeros_like(p) for n, p in _plain().state_dict().items()}, base / "model.safetensors")
    assert run(2, _room_during_a_save, str(tmp_path / "out"), name, str(base)) == [[5.0], [5.0]]


def _same_bytes(root: str) -> list[str]:
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    _step(model, optimizer)
    with _checkpointer(root + "/async") as checkpointer:
        checkpointer.save(0, 1, model, optimizer)
        checkpointer.async_wait()
    config = CheckpointingConfig(checkpoint_dir=root + "/sync", save_consolidated="every")
    with Checkpointer(config, dist.get_rank(), 0, 0) as checkpointer:
        checkpointer.save(0, 1, model, optimizer)
    return []


def test_files_are_those_of_a_synchronous_save(tmp_path: Path) -> None:
    run(2, _same_bytes, str(tmp_path))
    for written in sorted((tmp_path / "sync").rglob("*.safetensors")):
        if "rng" not in written.parts:
            other = tmp_path / "async" / written.relative_to(tmp_path / "sync")
            assert other.read_bytes() == written.read_bytes(), written


def _overwritten(root: str) -> bool:
    model = _model()
    before = [p.to_local().detach().clone() for p in model.parameters()]
    checkpointer = _checkpointer(root, SlowStorage(0.05))
    checkpointer.save(0, 1, model)
    checkpointer.maybe_wait_for_staging()
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(7.0)
    # Training's own collectives go on while the background writes.
    for _ in range(20):
        dist.all_reduce(torch.ones(3))
    deadline = time.monotonic() + 60
    while not os.path.exists(os.path.join(root, "LATEST")) and time.monotonic() < deadline:
        time.sleep(0.02)
    published = os.path.exists(os.path.join(root, "LATEST"))
    fresh = _model(1)
    record = checkpointer.restore(fresh)
    assert record is not None
    assert record.step == 1
    for p, wanted in zip(fresh.parameters(), before, strict=True):
        assert torch.equal(p.to_local(), wanted)
    checkpointer.close()
    return published


def test_training_may_overwrite_memory_and_publication_needs_no_later_call(tmp_path: Path) -> None:
    assert run(2, _overwritten, str(tmp_path)) == [True, True]


def _background_failure(root: str) -> tuple[str, int | None, str | None]:
    model = _model()
    storage = SlowStorage()
    checkpointer = _checkpointer(root, storage)
    checkpointer.save(0, 1, model)
    checkpointer.async_wait()
    storage.fails_on = 1
    checkpointer.save(0, 2, model)
    try:
        checkpointer.save(0, 3, model)
    except ShardwiseError as error:
        storage.fails_on = None
        latest = os.readlink(os.path.join(root, "LATEST"))
        assert latest == "epoch_0_step_1"
        checkpointer.save(0, 4, model)
        checkpointer.close()
        assert os.readlink(os.path.join(root, "LATEST")) == "epoch_0_step_4"
        return type(error).__name__, error.rank, error.path
    return "nothing", None, None


def test_a_background_failure_is_raised_at_the_next_call_on_every_rank(tmp_path: Path) -> None:
    first, second = run(2, _background_failure, str(tmp_path))
    assert first == second
    assert first[0] == "StorageError"
    assert first[1] == 1
    assert first[2] is not None
    assert first[2].endswith(".safetensors")


def _busy(root: str) -> list[str | None]:
    model = _model()
    checkpointer = _checkpointer(root, SlowStorage(0.1), skip_save_while_busy=True)
    first = checkpointer.save(0, 1, model)
    second = checkpointer.save(0, 2, model)
    checkpointer.async_wait()
    third = checkpointer.save(0, 3, model)
    checkpointer.close()
    return [None if path is None else path.name for path in (first, second, third)]


def test_a_save_is_skipped_while_busy_if_asked_to(tmp_path: Path) -> None:
    assert run(2, _busy, str(tmp_path)) == [["epoch_0_step_1", None, "epoch_0_step_3"]] * 2


def _many(root: str, saves: int) -> tuple[float, int, int]:
    """Growth per half of the saves behind the first quarter: the lesser one in MiB (a leak is in both), and in all."""
    model = _model()
    optimizer = torch.optim.AdamW(model.parameters())
    checkpointer = _checkpointer(root, max_recent_checkpoints=2)
    process = psutil.Process()
    marks = []
    for number in range(saves):
        _step(model, optimizer)
        checkpointer.maybe_wait_for_staging()
        checkpointer.save(0, number, model, optimizer, metrics={"default": 1.0})
        if number in (saves // 4, saves * 5 // 8, saves - 1):
            checkpointer.async_wait()
            gc.collect()  # cycles that wait for the collector are no growth; what is still referred to is
            ctypes.CDLL(None).malloc_trim(0)  # nor is free memory that the allocator keeps for threads that ended
            marks.append((process.memory_info().rss, process.num_fds(), threading.active_count()))
    checkpointer.close()
    growth = [(later[0] - earlier[0]) / 2**20 for earlier, later in pairwise(marks)]
    return min(growth), marks[-1][1] - marks[0][1], marks[-1][2] - marks[0][2]


@pytest.mark.parametrize("saves", [pytest.param(40, id="40"), pytest.param(200, id="200", marks=pytest.mark.slow)])
def test_memory_does_not_grow(tmp_path: Path, saves: int) -> None:
    for megabytes, fds, threads in run(2, _many, str(tmp_path), saves, seconds=240):
        assert megabytes < 4
        assert fds <= 0
        assert threads <= 0
