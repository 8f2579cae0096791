"""Python's garbage collector rests during a call of the checkpointer or offline work, and afterwards is as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

import pytest
import torch
from tests.ops.damaged import save_dcp
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import CheckpointAddon, SaveHookArgs
from shardwise.engine.collector import without_collector
from shardwise.errors import CheckpointNotFoundError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify


class Looking(CheckpointAddon):
    """Notes whether the collector is on; may fail."""

    def __init__(self, *, fails: bool = False) -> None:
        self.seen: list[bool] = []
        self._fails = fails

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self.seen.append(gc.isenabled())
        if self._fails:
            raise ValueError("not today")

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self.seen.append(gc.isenabled())


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("is_on", [True, False])
def test_it_rests_during_a_save_and_is_as_it_was_before(tmp_path: Path, is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    addon = Looking()
    with Checkpointer(CheckpointingConfig(checkpoint_dir=tmp_path), 0, 0, 0, addons=[addon]) as checkpointer:
        checkpointer.save_model(nn.Linear(2, 2), tmp_path)
    assert addon.seen == [False, False]
    assert gc.isenabled() == is_on


def test_it_is_on_again_after_a_save_that_failed(tmp_path: Path) -> None:
    gc.enable()
    with Checkpointer(
        CheckpointingConfig(checkpoint_dir=tmp_path), 0, 0, 0, addons=[Looking(fails=True)]
    ) as checkpointer:
        with pytest.raises(Exception, match="not today"):
            checkpointer.save_model(nn.Linear(2, 2), tmp_path)
        assert gc.isenabled()


@pytest.mark.parametrize("is_on", [True, False])
def test_it_rests_inside_and_is_as_it_was_before(tmp_path: Path, is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    with without_collector():
        with without_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "absent")
    consolidate(save_dcp({"a": torch.ones(2)}, tmp_path / "dcp"), tmp_path / "export")
    assert gc.isenabled() == is_on
