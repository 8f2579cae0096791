"""Ranks that do not see the same directory, that never come, or that ask for something else."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from tests.support.ranks import failure, outcomes, run
from torch import nn
from torch.distributed.fsdp import fully_shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import LocalStorage
from shardwise.errors import ConfigError, MisuseError, PeerError, StorageError
from shardwise.lifecycle import list_checkpoints


def engine(
    root: Path, storage: LocalStorage | None = None, absent_seconds: float = 30.0, **settings: object
) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", **settings)  # type: ignore[arg-type]
    return Checkpointer(config, dist.get_rank(), 0, 0, storage=storage, absent_seconds=absent_seconds)


def model() -> nn.Module:
    return fully_shard(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)))


def in_own_directories(root: Path, relative: bool) -> None:
    own = root / f"run_{dist.get_rank()}"
    own.mkdir()
    before = os.getcwd()
    if relative:
        os.chdir(own)
    try:
        engine(Path("checkpoints") if relative else own).save(0, 1, model())
    finally:
        os.chdir(before)


@pytest.mark.parametrize("relative", [False, True])
def test_directories_that_differ_are_named(tmp_path: Path, relative: bool) -> None:
    error = failure(2, in_own_directories, tmp_path, relative)
    assert isinstance(error, ConfigError)
    assert "run_0" in str(error)
    assert "run_1" in str(error)


class NodeLocal(LocalStorage):
    """A disk of rank 1's own under the same path: what it writes is seen by nobody else."""

    def __init__(self, root: Path) -> None:
        self.root, self.own = root, root.with_name("own")

    def _moved(self, path: Path) -> Path:
        return self.own / path.relative_to(self.root) if path.is_relative_to(self.root) else path

    def make_directory(self, path: Path, *, new: bool = False) -> None:
        super().make_directory(self._moved(path), new=new)

    def create(self, path: Path, size: int, head: bytes) -> None:  # type: ignore[override]
        self.make_directory(path.parent)
        super().create(self._moved(path), size, head)

    def open(self, path: Path, *, writable: bool) -> int:
        return super().open(self._moved(path), writable=writable)

    def sync_directory(self, path: Path) -> None:
        super().sync_directory(self._moved(path))


def on_a_disk_of_its_own(root: Path, is_async: bool) -> None:
    with engine(root, max_recent_checkpoints=1, is_async=is_async) as shared:
        shared.save(0, 1, model())
    checkpointer = engine(root, NodeLocal(root) if dist.get_rank() == 1 else None, max_recent_checkpoints=1)
    checkpointer.save(0, 2, model())


@pytest.mark.parametrize("is_async", [False, True])
def test_what_rank_0_does_not_see_is_not_published(tmp_path: Path, is_async: bool) -> None:
    root = tmp_path / "root"
    error = failure(2, on_a_disk_of_its_own, root, is_async)
    assert isinstance(error, StorageError)
    assert f"rank 1 wrote below {root}" in str(error)
    assert "does not see it" in str(error)
    assert [info.step for info in list_checkpoints(root)] == [1]
    assert os.readlink(root / "LATEST") == "epoch_0_step_1"


def under_two_names(root: Path) -> int | None:
    checkpointer = engine(root if dist.get_rank() == 0 else root.with_name("alias"))
    checkpointer.save(0, 5, model())
    record = checkpointer.restore(model())
    assert record is not None
    return record.step


def test_one_directory_may_have_two_names(tmp_path: Path) -> None:
    (tmp_path / "root").mkdir()
    (tmp_path / "alias").symlink_to("root")
    assert run(2, under_two_names, tmp_path / "root") == [5, 5]


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


def alone(root: Path, first: bool) -> list[str]:
    """Rank 1 never makes the call, at the first one or at a later one."""
    heard = Heard()
    logging.getLogger("shardwise").addHandler(heard)
    checkpointer = engine(root, absent_seconds=1.0, collective_timeout_seconds=5)
    if not first:
        checkpointer.save(0, 1, model())
    if dist.get_rank() != 1:
        with pytest.raises(PeerError):
            checkpointer.save(0, 2, nn.Linear(2, 2))
    else:
        time.sleep(4)
    logging.getLogger("shardwise").removeHandler(heard)
    return [text for text in heard.texts if "not come" in text]


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_does_not_come_is_named(tmp_path: Path, first: bool) -> None:
    texts, nothing, others = run(3, alone, tmp_path, first)
    assert nothing == []
    assert len(texts) + len(others) == 1  # type: ignore[arg-type]
    (text,) = [*texts, *others]  # type: ignore[misc]
    assert text.startswith("rank 1 has not come for 1 s. Waiting: ranks 0, 2 in save(epoch 0, step 2)")


def at_odds(root: Path) -> None:
    checkpointer = engine(root, collective_timeout_seconds=30)
    checkpointer.save(0, 1, model())
    if dist.get_rank() == 0:
        checkpointer.save(0, 2, model())
    else:
        checkpointer.restore(model())


def test_a_restore_that_meets_a_save_says_so_at_once(tmp_path: Path) -> None:
    found = outcomes(2, at_odds, tmp_path)
    for outcome in found:
        assert isinstance(outcome.error, MisuseError)
        assert "rank 0 calls save(epoch 0, step 2) and rank 1 calls restore(LATEST)" in str(outcome.error)
