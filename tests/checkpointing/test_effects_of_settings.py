"""Settings that are easily forgotten in an implementation, each by what it does."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.ranks import failure, outcomes, run
from tests.support.streams import FakeStreams
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import CheckpointAddon, ConsolidatedHFAddon
from shardwise.disk.storage import LocalStorage
from shardwise.errors import ExportMismatchError, PeerError


def model(value: float = 1.0) -> nn.Module:
    made = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.fill_(value)
    return made


# --- cpu_offload -----------------------------------------------------------------------------------------------------


class ChangesTheModel(LocalStorage):
    """Changes the model as soon as a file of tensors is written (those of DCP it does not see)."""

    def __init__(self, changed: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._tensors = [*changed.parameters(), *(v for s in optimizer.state.values() for v in s.values())]

    def open(self, path: Path, *, writable: bool) -> int:
        if writable and path.suffix == ".safetensors":
            for tensor in self._tensors:
                tensor.detach().fill_(9)
        return super().open(path, writable=writable)


@pytest.mark.parametrize("form", ["every", "false", "torch_save"])
def test_cpu_offload_writes_what_was_captured(tmp_path: Path, form: str) -> None:
    settings = {"model_save_format": form} if form == "torch_save" else {"save_consolidated": form}
    config = CheckpointingConfig(checkpoint_dir=tmp_path, cpu_offload=True, **settings)  # type: ignore[arg-type]
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), momentum=0.9)
    for parameter in trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    streams = FakeStreams()
    storage = ChangesTheModel(trained, optimizer)
    with Checkpointer(config, storage=storage, device_streams=streams) as checkpointer:
        path = checkpointer.save(step=1, model=trained, optimizer=optimizer)
        assert path is not None
        assert path.is_dir()  # the save is not one in the background
    assert streams.devices == {torch.device("cpu")}  # which is the accelerator here
    other = model(5.0)
    fresh = torch.optim.SGD(other.parameters(), momentum=0.9)
    with config.build() as reader:
        reader.restore(other, fresh)
    assert {float(v) for p in other.parameters() for v in p.detach().flatten()} == {1.0}
    assert {float(v) for s in fresh.state.values() for v in s["momentum_buffer"].flatten()} == {0.0}


# --- consolidation_timeout_minutes -----------------------------------------------------------------------------------


class SlowMerge(LocalStorage):
    """Takes its time for the first file that is merged."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._first = threading.Event()

    def open(self, path: Path, *, writable: bool) -> int:
        if writable and path.parent.name == "consolidated" and not self._first.is_set():
            self._first.set()
            time.sleep(self._seconds)
        return super().open(path, writable=writable)


def merge(root: Path, seconds: float, collective: float, minutes: float) -> None:
    config = CheckpointingConfig(
        checkpoint_dir=root,
        save_consolidated="every",
        single_rank_consolidation=True,
        collective_timeout_seconds=collective,
        consolidation_timeout_minutes=minutes,  # type: ignore[arg-type]
    )
    with Checkpointer(config, storage=SlowMerge(seconds)) as checkpointer:
        checkpointer.save(step=1, model=model())


def test_ranks_wait_longer_for_the_one_that_merges(tmp_path: Path) -> None:
    run(2, merge, tmp_path, 6.0, 4.0, 1.0)
    files = (tmp_path / "epoch_0_step_1" / "model" / "consolidated").glob("*.safetensors")
    assert {float(v) for file in files for t in load_file(file).values() for v in t.flatten()} == {1.0}


def test_ranks_do_not_wait_for_the_one_that_merges_for_ever(tmp_path: Path) -> None:
    waiting = outcomes(2, merge, tmp_path, 20.0, 60.0, 0.05)[1]
    assert isinstance(waiting.error, PeerError)
    assert "merging" in str(waiting.error)


# --- pp_group --------------------------------------------------------------------------------------------------------


class Asks:
    """An addon that needs the ranks of the pipeline."""

    def __init__(self) -> None:
        self.found: list[list[int]] = []

    def pre_save(self, **kwargs: object) -> None:
        self._ask(kwargs)

    def post_save(self, **kwargs: object) -> None:
        self._ask(kwargs)

    def _ask(self, kwargs: dict[str, object]) -> None:
        group = kwargs["pp_group"]
        self.found.append([] if group is None else dist.get_process_group_ranks(group))  # type: ignore[arg-type]


def ask(root: Path) -> list[list[int]]:
    """Two pipelines of two stages: of ranks 0 and 2, and of ranks 1 and 3."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    pipeline, stage = dist.get_rank() % 2, dist.get_rank() // 2
    layers = nn.ModuleDict({str(stage): model()})
    addon = Asks()
    addons: Sequence[CheckpointAddon] = [ConsolidatedHFAddon(), addon]
    config = CheckpointingConfig(checkpoint_dir=root)
    with Checkpointer(config, pp_group=groups[pipeline], addons=addons) as checkpointer:
        checkpointer.save(step=1, model=layers)
    return addon.found


def test_addons_are_given_the_pipeline(tmp_path: Path) -> None:
    assert run(4, ask, tmp_path) == [[[0, 2]] * 2, [[1, 3]] * 2, [[0, 2]] * 2, [[1, 3]] * 2]


# --- model_state_dict_keys -------------------------------------------------------------------------------------------

NAMES = ["0.bias", "0.weight", "1.bias", "1.weight"]


def keep(root: Path, keys: list[list[str]], verify: bool) -> None:
    config = CheckpointingConfig(
        checkpoint_dir=root,
        save_consolidated="every",
        model_state_dict_keys=keys[dist.get_rank()] or None,
        verify_export=verify,
    )
    with config.build() as checkpointer:
        checkpointer.save(step=1, model=model())


def test_an_export_has_the_names_that_the_settings_list(tmp_path: Path) -> None:
    run(2, keep, tmp_path / "whole", [NAMES[:2], NAMES[2:]], True)
    keys = [[], [*NAMES, "2.weight"]]
    error = failure(2, keep, tmp_path / "lacking", keys, True)
    assert isinstance(error, ExportMismatchError)
    assert error.tensor == "2.weight"
    assert "model_state_dict_keys" in str(error)
    run(2, keep, tmp_path / "lacking", keys, False)
