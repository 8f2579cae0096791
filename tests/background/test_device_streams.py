"""A loop that knows nothing of staging, on an accelerator that is not there: what it saves is one step's state.

The accelerator executes what it was given as late as it may, and other work before copies wherever order allows that.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from tests.support.streams import FakeStreams
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig

FORMATS: dict[str, dict[str, object]] = {
    "export": {"save_consolidated": "every"},
    "shards": {"save_consolidated": "false"},
    "torch_save": {"save_consolidated": "false", "model_save_format": "torch_save"},
}


class Counter(torch.optim.Optimizer):
    """Sets parameters and its state to the number of the step, by kernels on the current stream."""

    def __init__(self, model: nn.Module, streams: FakeStreams) -> None:
        super().__init__(model.parameters(), {"lr": 0.0})
        self._streams = streams
        for parameter in model.parameters():
            self.state[parameter]["average"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            for tensor in (parameter.data, self.state[parameter]["average"]):
                self._streams.launch(partial(tensor.add_, 1))


def _training(streams: FakeStreams) -> tuple[nn.Module, Counter]:
    model = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model, Counter(model, streams)


def _published(root: Path, step: int) -> set[float]:
    """Every value that a checkpoint has, of model and optimizer."""
    model, optimizer = _training(FakeStreams())
    with CheckpointingConfig(checkpoint_dir=root).build(0, 0, 0) as checkpointer:
        checkpointer.restore(model, optimizer, restore_from=f"epoch_0_step_{step}")
    states = [optimizer.state[p]["average"] for p in model.parameters()]
    return {float(value) for tensor in [*model.parameters(), *states] for value in tensor.detach().flatten()}


def _saves(root: Path, streams: FakeStreams, settings: dict[str, object]) -> Iterator[int]:
    """A training loop that saves after every step and goes on at once; gives the number of each step saved."""
    model, optimizer = _training(streams)
    config = CheckpointingConfig(checkpoint_dir=root, is_async=True, **settings)  # type: ignore[arg-type]
    with Checkpointer(config, 0, 0, 0, device_streams=streams) as checkpointer:
        optimizer.step()
        for step in (1, 2):
            streams.open.clear()
            checkpointer.save(0, step, model, optimizer)
            optimizer.step()
            streams.open.set()
            checkpointer.async_wait()
            yield step


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_saved_is_the_state_of_the_step(tmp_path: Path, name: str) -> None:
    for step in _saves(tmp_path, FakeStreams(), FORMATS[name]):
        assert _published(tmp_path, step) == {float(step)}


def test_without_the_order_it_is_that_of_a_later_step(tmp_path: Path) -> None:
    """The fake accelerator can show what the test above is to exclude."""
    for step in _saves(tmp_path, FakeStreams(holds_back=False), FORMATS["export"]):
        assert _published(tmp_path, step) != {float(step)}


def test_waiting_for_staging_is_what_the_setting_says(tmp_path: Path) -> None:
    """With it, a save returns when every copy was made, so that no order is needed."""
    streams = FakeStreams(holds_back=False)
    model, optimizer = _training(streams)
    config = CheckpointingConfig(checkpoint_dir=tmp_path, is_async=True, wait_for_staging=True)
    with Checkpointer(config, 0, 0, 0, device_streams=streams) as checkpointer:
        optimizer.step()
        checkpointer.save(0, 1, model, optimizer)
        optimizer.step()
        checkpointer.async_wait()
    assert _published(tmp_path, 1) == {1.0}


@pytest.mark.parametrize("call", ["save", "parts"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_synchronous_save_reads_what_the_current_stream_was_given(tmp_path: Path, name: str, call: str) -> None:
    """The threads that write queue their copies elsewhere, so that what was queued before has to be done."""
    streams = FakeStreams()
    model, optimizer = _training(streams)
    config = CheckpointingConfig(checkpoint_dir=tmp_path, **FORMATS[name])  # type: ignore[arg-type]
    with Checkpointer(config, 0, 0, 0, device_streams=streams) as checkpointer:
        with streams.using("training"):
            optimizer.step()
            if call == "save":
                checkpointer.save(0, 1, model, optimizer)
            else:
                checkpointer.save_model(model, tmp_path / "parts")
                optimizer.step()
                checkpointer.save_optimizer(optimizer, model, tmp_path / "parts")
        other, fresh = _training(FakeStreams())
        for state in fresh.state.values():
            state["average"].fill_(9)
        if call == "save":
            checkpointer.restore(other, fresh)
        else:
            checkpointer.load_model(other, tmp_path / "parts" / "model")
            checkpointer.load_optimizer(fresh, other, tmp_path / "parts")
    assert {float(v) for p in other.parameters() for v in p.detach().flatten()} == {1.0}
    assert {float(v) for s in fresh.state.values() for v in s["average"].flatten()} == {1.0 if call == "save" else 2.0}


def test_what_was_queued_before_a_load_does_not_come_after_it(tmp_path: Path) -> None:
    streams = FakeStreams()
    model, optimizer = _training(streams)
    with Checkpointer(CheckpointingConfig(checkpoint_dir=tmp_path), 0, 0, 0, device_streams=streams) as checkpointer:
        checkpointer.save(0, 1, model, optimizer)
        with streams.using("training"):
            optimizer.step()
            checkpointer.restore(model, optimizer)
            streams.finish()
    assert {float(v) for p in model.parameters() for v in p.detach().flatten()} == {0.0}
