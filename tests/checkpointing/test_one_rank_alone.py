"""What one rank alone has, lacks or fails with: all learn of it, and none is left waiting in another collective."""

from __future__ import annotations

from pathlib import Path
from typing import Unpack

import torch
import torch.distributed as dist
from tests.support.ranks import failure
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon, SaveHookArgs
from shardwise.comm import Group
from shardwise.errors import CheckpointNotFoundError, MisuseError, RemoteError
from shardwise.io.sources import open_source


class Stage(nn.Module):
    """One layer of a model of two, under the name that it has in the whole."""

    def __init__(self) -> None:
        super().__init__()
        number = dist.get_rank()
        torch.manual_seed(number)
        self.layers = nn.ModuleDict({str(number): nn.Linear(4, 3)})


def engine(root: Path, addons: list[CheckpointAddon] | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root / "run", collective_timeout_seconds=15, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, 0, 0, dist.get_rank(), addons=addons)


# --- addons ---------------------------------------------------------------------------------------------------------


class Quiet:
    """Does nothing."""

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        pass

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        pass


class Looking(Quiet):
    """Uses the library on one rank, in a group of that rank alone, which puts the rank into what is raised."""

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        if dist.get_rank() == 1:
            open_source("/nowhere", Group(None))


class Unlisted(nn.Linear):
    def modules(self):  # type: ignore[no-untyped-def]
        raise RuntimeError("no list of modules")


def save_with_addon(root: Path, one_more: bool) -> None:
    addons: list[CheckpointAddon] = [ConsolidatedHFAddon()]
    if one_more and dist.get_rank() == 1:
        addons.append(Quiet())
    engine(root, addons if one_more else [*addons, Looking()]).save(0, 1, Stage())


def test_an_addon_that_one_rank_alone_has(tmp_path: Path) -> None:
    error = failure(2, save_with_addon, tmp_path, True)
    assert isinstance(error, MisuseError)
    assert "Quiet as addon 2 was passed on rank 1 and not on rank 0" in str(error)


def test_an_addon_whose_failure_looks_like_that_of_all(tmp_path: Path) -> None:
    error = failure(2, save_with_addon, tmp_path, False)
    assert isinstance(error, CheckpointNotFoundError)
    assert error.path == "/nowhere"


class Parts:
    def __init__(self, part: nn.Module) -> None:
        self.model = [part]


def write_metadata(root: Path) -> None:
    part = (Unlisted if dist.get_rank() == 1 else nn.Linear)(2, 2)
    group = Group.dedicated(None, 15)
    ConsolidatedHFAddon().pre_save(model_state=Parts(part), hf_metadata_dir=str(root), group=group)


def test_a_model_that_cannot_be_looked_at_for_quantization(tmp_path: Path) -> None:
    error = failure(2, write_metadata, tmp_path)
    assert isinstance(error, RemoteError)
    assert (error.rank, error.message) == (1, "RuntimeError: no list of modules")
