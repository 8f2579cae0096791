"""Replacing a component that stands alone: an interrupted replacement never costs the earlier one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from tests.ops.checkpoints import model

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.disk.storage import LocalStorage
from shardwise.errors import StorageError
from shardwise.lifecycle import doomed_name
from shardwise.ops.verify import verify


class Full(LocalStorage):
    """Takes no file."""

    def create(self, path: Path, size: int, head: bytes | bytearray | memoryview) -> None:
        raise StorageError.from_os(OSError(28, os.strerror(28)), path=path)


def test_a_crash_between_the_renames_is_undone_by_the_next_save(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="every")
    net = model()
    with Checkpointer(config, 0, 0, 0) as engine:
        engine.save_model(net, tmp_path)
    os.rename(tmp_path / "model", tmp_path / doomed_name("model"))
    with Checkpointer(config, 0, 0, 0, storage=Full()) as engine, pytest.raises(StorageError):
        engine.save_model(net, tmp_path)
    assert verify(tmp_path / "model").status == "whole"
    other = model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    with Checkpointer(config, 0, 0, 0) as engine:
        engine.load_model(other, tmp_path / "model")
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))


class Watching(LocalStorage):
    """Notes after every change what a crash at that moment would leave."""

    def __init__(self, component: Path) -> None:
        self._component = component
        self.found: list[str] = []

    def _look(self) -> None:
        self.found.append(verify(self._component).status if self._component.exists() else "absent")

    def rename(self, source: Path, target: Path) -> None:
        super().rename(source, target)
        self._look()

    def exchange(self, one: Path, other: Path) -> bool:
        done = super().exchange(one, other)
        self._look()
        return done

    def remove_tree(self, path: Path) -> None:
        super().remove_tree(path)
        self._look()


def test_at_no_moment_of_a_replacement_is_there_no_component(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="every")
    with Checkpointer(config, 0, 0, 0) as engine:
        engine.save_model(model(), tmp_path)
    watching = Watching(tmp_path / "model")
    if not watching.exchange(tmp_path / "model", tmp_path / "model"):
        pytest.skip("this file system cannot exchange two names")
    with Checkpointer(config, 0, 0, 0, storage=watching) as engine:
        engine.save_model(model(), tmp_path)
    assert len(watching.found) > 3
    assert set(watching.found) == {"whole"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Plain(LocalStorage):
    """Has no exchange."""

    def exchange(self, one: Path, other: Path) -> bool:
        return False


def test_without_exchange_two_renames_replace_it(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=str(tmp_path), save_consolidated="every")
    for _ in range(2):
        with Checkpointer(config, 0, 0, 0, storage=Plain()) as engine:
            engine.save_model(model(), tmp_path)
        assert verify(tmp_path / "model").status == "whole"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]


class Refusing(LocalStorage):
    """Cannot exchange two names if asked so, and refuses an operation on the component from some moment on."""

    def __init__(self, component: Path, exchanges: bool, refused: str) -> None:
        self._component, self._exchanges, self._refused = component, exchanges, refused
        self._is_in_place = False

    def _maybe_refuse(self, what: str) -> None:
        if what == self._refused:
            raise OSError(5, os.strerror(5), str(self._component))

    def exchange(self, one: Path, other: Path) -> bool:
        self._is_in_place = self._exchanges and super().exchange(one, other)
        return self._is_in_place

    def rename(self, source: Path, target: Path) -> None:
        if target == self._component:
            self._maybe_refuse("rename")
        super().rename(source, target)

    def sync_directory(self, path: Path) -> None:
        if path == self._component.parent and self._is_in_place:
            self._maybe_refuse("sync")
        super().sync_directory(path)

    def remove_tree(self, path: Path) -> None:
        if self._is_in_place:
            self._maybe_refuse("remove")
        super().remove_tree(path)


def _saved_with(storage: Refusing, place: Path, value: float) -> None:
    net = model()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(value)
    config = CheckpointingConfig(checkpoint_dir=str(place), save_consolidated="every")
    with Checkpointer(config, 0, 0, 0, storage=storage) as engine:
        engine.save_model(net, place)


def _value(place: Path) -> float:
    net = model()
    with Checkpointer(CheckpointingConfig(checkpoint_dir=str(place)), 0, 0, 0) as engine:
        engine.load_model(net, place / "model")
    return next(net.parameters()).flatten()[0].item()


def test_where_the_second_rename_is_refused_the_earlier_component_is_in_its_place(tmp_path: Path) -> None:
    _saved_with(Refusing(tmp_path / "model", False, ""), tmp_path, 1)
    with pytest.raises(StorageError):
        _saved_with(Refusing(tmp_path / "model", False, "rename"), tmp_path, 2)
    assert _value(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("refused", ["sync", "remove"])
def test_what_is_in_place_is_not_abandoned(tmp_path: Path, refused: str) -> None:
    _saved_with(Refusing(tmp_path / "model", True, ""), tmp_path, 1)
    if not LocalStorage().exchange(tmp_path / "model", tmp_path / "model"):
        pytest.skip("this file system cannot exchange two names")
    storage = Refusing(tmp_path / "model", True, refused)
    if refused == "remove":
        _saved_with(storage, tmp_path, 2)  # only deleting what it replaced failed
    else:
        with pytest.raises(StorageError):
            _saved_with(storage, tmp_path, 2)
    assert _value(tmp_path) == 2
    assert len(list(tmp_path.iterdir())) == 2  # until the new name is durable the replaced one may be all there is
