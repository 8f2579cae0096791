"""What a `ShardwiseAccelerator` refuses, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.support import ranks
from torch.utils.data import DataLoader

from shardwise import CheckpointingConfig
from shardwise.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    ConfigError,
    IncompleteCheckpointError,
    MisuseError,
    StorageError,
)

if TYPE_CHECKING:
    from shardwise.integrations.accelerate import ShardwiseAccelerator


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """accelerate keeps what one `Accelerator` has decided for the next one."""
    yield
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)


def accelerator(directory: Path | str, automatic: bool = True, **named: Any) -> ShardwiseAccelerator:
    from accelerate.utils import ProjectConfiguration

    from shardwise.integrations.accelerate import ShardwiseAccelerator

    config = ProjectConfiguration(str(directory), automatic_checkpoint_naming=automatic)
    return ShardwiseAccelerator(cpu=True, project_config=config, **named)


def prepared(directory: Path, automatic: bool = True) -> ShardwiseAccelerator:
    made = accelerator(directory, automatic)
    made.prepare(torch.nn.Linear(2, 2))
    return made


def test_settings_that_the_script_decides(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="checkpointing sets max_recent_checkpoints, which accelerate decides"):
        accelerator(tmp_path, checkpointing=CheckpointingConfig(max_recent_checkpoints=1))


@pytest.mark.parametrize("name", ["save_on_each_node", "FSDP 1"])
def test_what_cannot_be_saved(name: str, tmp_path: Path) -> None:
    from accelerate import Accelerator
    from accelerate.utils import FullyShardedDataParallelPlugin, ProjectConfiguration

    from shardwise.integrations.accelerate import ShardwiseAccelerator

    config = ProjectConfiguration(str(tmp_path), save_on_each_node=name == "save_on_each_node")
    if name == "FSDP 1":
        Accelerator(cpu=True).state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(ConfigError, match=f"ShardwiseAccelerator does not support {name}"):
        ShardwiseAccelerator(cpu=True, project_config=config)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda it, _: it.save_state(safe_serialization=False), "save_state of .* support safe_serialization=False"),
        (lambda it, _: it.load_state(load_kwargs={"weights_only": True}), "load_state of .* support load_kwargs"),
        (lambda it, path: it.save_model(torch.nn.Linear(1, 1), path, max_shard_size="1MB"), "support max_shard_size"),
        (lambda it, _: it.register_save_state_pre_hook(print), "register_save_state_pre_hook is not supported"),
        (lambda it, _: it.register_load_state_pre_hook(print), "register_load_state_pre_hook is not supported"),
        (lambda it, _: it.skip_first_batches(DataLoader([1, 2]), 1), "a DataLoader that was not prepared"),
        (lambda it, _: it.save_state(), "no model was prepared"),
    ],
)
def test_calls(call: Callable[[Any, Path], object], message: str, tmp_path: Path) -> None:
    with pytest.raises(MisuseError, match=message):
        call(accelerator(tmp_path), tmp_path)


def test_paths_that_are_not_said(tmp_path: Path) -> None:
    made = prepared(tmp_path, automatic=False)
    with pytest.raises(MisuseError, match="save_state was not told where to"):
        made.save_state()
    with pytest.raises(MisuseError, match="load_state was not told from where"):
        made.load_state()
    for call in (made.save_state, made.load_state, lambda path: made.save_model(torch.nn.Linear(1, 1), path)):
        with pytest.raises(ConfigError, match="the path is a URL"):
            call("s3://bucket/state")
    with pytest.raises(ConfigError, match="the path is a URL"):
        accelerator("s3://bucket/run")
    made.project_configuration.automatic_checkpoint_naming = True
    made.project_configuration.set_directories(None)
    with pytest.raises(ConfigError, match="automatic_checkpoint_naming is set without a project_dir"):
        made.save_state()


def test_states_that_are_not_there(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint to load"):
        made.load_state()
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint of shardwise at this path"):
        made.load_state(tmp_path)
    (tmp_path / "begun" / ".saving-epoch_0_step_0").mkdir(parents=True)
    with pytest.raises(IncompleteCheckpointError, match="the first save to this path was interrupted"):
        made.load_state(tmp_path / "begun")


def test_an_automatic_name_that_is_taken(tmp_path: Path) -> None:
    made = prepared(tmp_path)
    made.save_state()
    made.project_configuration.iteration = 0
    with pytest.raises(CheckpointExistsError, match="the next automatic name is that of a checkpoint"):
        made.save_state()
    made.load_state()
    assert Path(made.save_state()).name == "checkpoint_1"


def test_more_batches_than_there_are(tmp_path: Path) -> None:
    made = accelerator(tmp_path)
    loader = made.prepare(DataLoader([1, 2, 3], batch_size=1))
    with pytest.raises(MisuseError, match="asked to skip 4 batches of an epoch that has 3"):
        list(made.skip_first_batches(loader, 4))
    assert [int(batch) for batch in made.skip_first_batches(loader, 2)] == [3]


def _saves_where_one_rank_cannot_look(directory: Path) -> None:
    rank = torch.distributed.get_rank()
    made = prepared(directory / str(rank))
    state = directory / str(rank) / "checkpoints" / "checkpoint_0"
    state.parent.mkdir(parents=True)
    if rank == 1:
        state.write_text("a file")
    made.save_state()


def test_a_rank_that_cannot_look_fails_on_all(tmp_path: Path) -> None:
    error = ranks.failure(2, _saves_where_one_rank_cannot_look, tmp_path, seconds=40)
    assert isinstance(error, StorageError)


def test_another_number_of_loaders_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = prepared(tmp_path)
    made.prepare(DataLoader([1, 2]), DataLoader([3, 4]))
    made.save_state()
    again = prepared(tmp_path)
    again.prepare(DataLoader([1, 2]))
    again.load_state()
    assert "the positions of 2 loaders, and 1 are prepared" in caplog.text
