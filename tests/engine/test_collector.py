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


@pytest.mark.parametrize("settings", [{}, {"is_async": True}, {"is_peft": False, "save_consolidated": "false"}])
def test_nothing_is_left_for_it(tmp_path: Path, settings: dict[str, object]) -> None:
    """Loops that collect by themselves, and seldom, would else keep models and process groups for so long."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    model(torch.ones(3, 2)).sum().backward()
    optimizer.step()

    def train(root: Path) -> None:
        config = CheckpointingConfig(checkpoint_dir=root, **{"save_consolidated": "every", **settings})  # type: ignore[arg-type]
        with config.build() as checkpointer:
            for step in (1, 2):
                checkpointer.save(step=step, model=model, optimizer=optimizer, extra_state={"seen": (step, {1.5})})
            checkpointer.restore(model, optimizer, extra_state={"seen": ()})

    train(tmp_path / "first")  # what is made once for each process
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        train(tmp_path / "second")
        gc.collect()
        left = {type(each).__qualname__ for each in gc.garbage if type(each).__module__.startswith("shardwise")}
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert left == set()
