"""What a path names that is no model, checkpoint or root: said as what it is, and as misuse if it is not damaged."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.ops.checkpoints import saved
from tests.ops.damaged import save_dcp

from shardwise.errors import CheckpointNotFoundError, FormatError, MisuseError, StorageError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.diff import diff
from shardwise.ops.inspect import inspect
from shardwise.ops.listing import list_checkpoints
from shardwise.ops.prune import Retention, prune_checkpoints
from shardwise.ops.push import push
from shardwise.ops.verify import verify


def test_files_that_are_not_compared(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "last.pt")
    for path in (tmp_path, tmp_path / "last.pt"):
        with pytest.raises(MisuseError, match="not compared.*shardwise convert"):
            diff(path, path)
    text = tmp_path / "notes.txt"
    text.write_text("of the run")
    with pytest.raises(MisuseError, match="this is plain text, .* which is not compared"):
        diff(text, text)
    text.with_suffix(".safetensors").write_text("of the run")  # called so: it is damaged
    with pytest.raises(FormatError):
        diff(text.with_suffix(".safetensors"), text)


def test_dcp_without_its_metadata(tmp_path: Path) -> None:
    directory = save_dcp({"w": torch.ones(2)}, tmp_path / "dcp")
    (directory / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"the \.metadata of this DCP directory is absent"):
        diff(directory, directory)
    assert inspect(directory).damaged == ("__0_0.distcp",)


def test_a_pipe_and_a_link_to_nothing(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("absent")
    for look in (inspect, verify, consolidate):
        with pytest.raises(MisuseError, match="this is a named pipe"):
            look(tmp_path / "pipe")
        with pytest.raises(CheckpointNotFoundError, match="the link leads to nothing"):
            look(tmp_path / "link")


def test_a_file_where_a_directory_is_needed(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(MisuseError, match="this is a safetensors file, and no directory .* it is in"):
        consolidate(tmp_path / "model.safetensors", tmp_path / "out")


def test_an_interrupted_save_is_not_shown_as_a_model(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    directory.rename(tmp_path / ".saving-epoch_0_step_1")
    for pointer in ("LATEST", "LOWEST_VAL"):
        (tmp_path / pointer).unlink()
    with pytest.raises(CheckpointNotFoundError, match="those of interrupted saves alone"):
        inspect(tmp_path)


def test_a_checkpoint_is_no_root(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    for delete in (False, True):
        with pytest.raises(MisuseError, match="this is a checkpoint and no directory of checkpoints"):
            prune_checkpoints(directory, Retention(1), delete=delete)
    (tmp_path / "circle").symlink_to("circle")
    with pytest.raises(StorageError, match="links"):
        list_checkpoints(tmp_path / "circle")


def test_files_of_single_ranks_are_not_pushed(tmp_path: Path) -> None:
    for rank in range(2):
        torch.save({"w": torch.ones(2)}, tmp_path / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(MisuseError, match="no model here in the form that others open"):
        push(tmp_path, "org/name", allow_unverified=True)
