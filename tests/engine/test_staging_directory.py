"""The merging path below ``staging_dir``: a directory of one's own, bytes compared, nothing left."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.ranks import fresh, run
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.processes import private_directory
from shardwise.disk.storage import LocalStorage
from shardwise.errors import IntegrityError, StorageError


class Meets(LocalStorage):
    """Goes on to read a staged file only when the other run is as far."""

    def __init__(self, staging: Path) -> None:
        self._staging = staging

    def open(self, path: Path, *, writable: bool) -> int:
        if self._staging in path.parents and not writable:
            dist.barrier()
        return super().open(path, writable=writable)


def _model(value: float) -> nn.Module:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def _one_of_two_runs(root: Path, single: bool) -> set[float]:
    groups = [dist.new_group([rank]) for rank in range(2)]
    rank = dist.get_rank()
    config = CheckpointingConfig(
        checkpoint_dir=root / str(rank),
        save_consolidated="every",
        staging_dir=str(root / "staging"),
        single_rank_consolidation=single,
        max_file_bytes=400,
    )
    with Checkpointer(config, process_group=groups[rank], storage=Meets(root / "staging")) as checkpointer:
        checkpointer.save(0, 1, _model(float(rank)))
    files = (root / str(rank)).rglob("model-*.safetensors")
    return {v for path in files for tensor in load_file(path).values() for v in tensor.flatten().tolist()}


@pytest.mark.parametrize("single", [True, False])
def test_two_runs_share_it(tmp_path: Path, single: bool) -> None:
    assert run(2, _one_of_two_runs, tmp_path, single) == [{0.0}, {1.0}]
    assert list((tmp_path / "staging").iterdir()) == []


class Damages(LocalStorage):
    """Changes a staged file before it is read again."""

    def __init__(self, staging: Path, how: str) -> None:
        self._staging, self._how = staging, how

    def open(self, path: Path, *, writable: bool) -> int:
        if self._staging in path.parents and not writable:
            if self._how == "cut":
                os.truncate(path, path.stat().st_size - 5)
            else:
                with path.open("r+b") as file:
                    file.seek(-3, os.SEEK_END)
                    file.write(b"\xff")
        return super().open(path, writable=writable)


@pytest.mark.parametrize(
    ("how", "message"),
    [("cut", r"the staged file ends after \d+ of \d+ bytes"), ("flipped", "the staged file has other bytes than")],
)
def test_a_staged_file_that_changed_is_not_published(tmp_path: Path, how: str, message: str) -> None:
    staging = tmp_path / "staging"
    config = CheckpointingConfig(checkpoint_dir=tmp_path / "out", save_consolidated="every", staging_dir=str(staging))
    checkpointer = Checkpointer(config, storage=Damages(staging, how))
    with checkpointer, pytest.raises(IntegrityError, match=message) as caught:
        checkpointer.save(0, 1, _model(1.0))
    assert str(staging) in str(caught.value.path)
    assert list(staging.iterdir()) == []
    assert list((tmp_path / "out").iterdir()) == []


def test_a_place_where_no_directory_can_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = CheckpointingConfig(
        checkpoint_dir=tmp_path / "out", save_consolidated="every", staging_dir=str(tmp_path / "file" / "staging")
    )
    with Checkpointer(config) as checkpointer, pytest.raises(StorageError, match="Not a directory"):
        checkpointer.save(0, 1, _model(1.0))


def _dies(parent: Path) -> None:
    with private_directory(parent) as path:
        (path / "model.safetensors").write_bytes(b"half")
        os._exit(9)


def test_what_a_dead_process_left_is_removed_and_what_a_living_one_uses_is_not(tmp_path: Path) -> None:
    assert fresh(_dies, tmp_path, output=tmp_path / "output", seconds=60) == 9
    [left] = tmp_path.glob(".shardwise-*")
    (tmp_path / ".shardwise-theirs").mkdir()
    with private_directory(tmp_path) as first, private_directory(tmp_path) as second:
        assert first != second
        assert first.is_dir()
        assert second.is_dir()
        assert not left.exists()
    assert [path.name for path in tmp_path.glob(".shardwise-*")] == [".shardwise-theirs"]


def _fails_in(parent: Path) -> None:
    with private_directory(parent) as path:
        (path / "file").write_text("x")
        raise ZeroDivisionError


def test_it_is_removed_when_the_work_in_it_fails(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        _fails_in(tmp_path)
    assert list(tmp_path.iterdir()) == []
