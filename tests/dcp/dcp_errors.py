"""Errors of ours out of what DCP wraps them in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import SavePlanner

from shardwise import SafetensorsReader, SafetensorsWriter
from shardwise.errors import ShardwiseError


def told(error: CheckpointException) -> ShardwiseError:
    """The error of ours that DCP wrapped."""
    causes = [cause for cause, _ in error.failures.values()]
    assert isinstance(causes[0], ShardwiseError), str(error)
    assert len({str(cause) for cause in causes}) == 1
    return causes[0]


def refused(state: dict[str, object], path: Path, planner: SavePlanner | None = None) -> ShardwiseError:
    with pytest.raises(CheckpointException) as caught:
        dcp.save(state, storage_writer=SafetensorsWriter(path), planner=planner)
    return told(caught.value)


def unreadable(path: Path, state: dict[str, object] | None = None) -> ShardwiseError:
    with pytest.raises(CheckpointException) as caught:
        dcp.load({"w": torch.zeros(3), "step": 0} if state is None else state, storage_reader=SafetensorsReader(path))
    return told(caught.value)
