"""The garbage collector is left as it was."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
from tests.ops.damaged import save_dcp

from shardwise.errors import CheckpointNotFoundError
from shardwise.ops.collector import few_collections
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify


def test_thresholds_are_restored(tmp_path: Path) -> None:
    before = gc.get_threshold()
    with few_collections():
        inside = gc.get_threshold()
        with few_collections():
            assert gc.get_threshold() == inside
        assert gc.get_threshold() == inside
    assert inside[0] > before[0]
    assert gc.get_threshold() == before
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "absent")
    import torch

    consolidate(save_dcp({"a": torch.ones(2)}, tmp_path / "dcp"), tmp_path / "export")
    assert gc.get_threshold() == before


def test_a_collector_that_is_off_stays_off() -> None:
    before = gc.get_threshold()
    try:
        gc.set_threshold(0)
        with few_collections():
            assert gc.get_threshold()[0] == 0
    finally:
        gc.set_threshold(*before)
