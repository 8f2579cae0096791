"""The garbage collector is left as it was."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.ops.damaged import save_dcp

from shardwise.engine.collector import without_collector
from shardwise.errors import CheckpointNotFoundError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify


@pytest.fixture(autouse=True)
def _as_it_was() -> Iterator[None]:
    enabled = gc.isenabled()
    yield
    (gc.enable if enabled else gc.disable)()


@pytest.mark.parametrize("is_on", [True, False])
def test_it_rests_inside_and_is_as_it_was_before(tmp_path: Path, is_on: bool) -> None:
    (gc.enable if is_on else gc.disable)()
    with without_collector():
        with without_collector():
            assert not gc.isenabled()
        assert not gc.isenabled()
    with pytest.raises(CheckpointNotFoundError):
        verify(tmp_path / "absent")
    import torch

    consolidate(save_dcp({"a": torch.ones(2)}, tmp_path / "dcp"), tmp_path / "export")
    assert gc.isenabled() == is_on
