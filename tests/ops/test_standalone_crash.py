"""Replacing a component that stands alone: an interrupted replacement never costs the earlier one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.ops.checkpoints import model

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.errors import StorageError
from shardwise.io.storage import LocalStorage
from shardwise.lifecycle import doomed_name
from shardwise.ops.verify import verify


class Full(LocalStorage):
    """Takes no file."""

    def create(self, path: Path, size: int, head: bytes | bytearray | memoryview) -> None:
        raise StorageError.from_os(OSError(28, os.strerror(28)), path=path)


def test_a_crash_between_the_renames_is_undone_by_the_next_save(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="every")
    net = model()
    with Checkpointer(config, 0, 0, 0) as engine:
        engine.save_model(net, tmp_path)
    os.rename(tmp_path / "model", tmp_path / doomed_name("model"))
    with Checkpointer(config, 0, 0, 0, storage=Full()) as engine, pytest.raises(StorageError):
        engine.save_model(net, tmp_path)
    assert verify(tmp_path / "model").status == "whole"
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with Checkpointer(config, 0, 0, 0) as engine:
        engine.load_model(other, tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
