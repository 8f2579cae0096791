"""Leftovers and running saves are told apart by who is alive; a save that is asked for is made."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.disk.storage import Buffer, LocalStorage
from shardwise.errors import CheckpointBusyError, StorageError
from shardwise.lifecycle import LATEST, claim, list_checkpoints, read_pointer, remove_leftovers, reserve


class Gate(LocalStorage):
    """Writes nothing until it is opened, and fails as often as it is told to."""

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun = threading.Event()
        self.failures = 0

    def write(self, handle: int, data: Buffer, offset: int) -> None:
        self.begun.set()
        assert self.opened.wait(60)
        if self.failures:
            self.failures -= 1
            raise StorageError.from_os(OSError(5, "Input/output error"))
        super().write(handle, data, offset)


def engine(root: str | Path, storage: LocalStorage | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", save_rng=False, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, 0, 0, 0, storage=storage)


def steps(root: Path) -> list[int]:
    return [info.step for info in list_checkpoints(root)]


def in_child(body: Callable[[], object]) -> int:
    """Fork a process that does something and is then killed; its number."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        body()
        os.write(writing, b"x")
        signal.pause()
    assert os.read(reading, 1) == b"x"
    os.close(reading)
    os.close(writing)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return child


def test_a_second_checkpointer_leaves_the_firsts_running_save_alone(tmp_path: Path) -> None:
    gate = Gate()
    first, second = engine(tmp_path, gate, is_async=True), engine(tmp_path)
    first.save(0, 10, nn.Linear(2, 2))
    assert gate.begun.wait(60)
    second.save(0, 11, nn.Linear(2, 2))
    gate.opened.set()
    first.finalize()
    second.finalize()
    assert steps(tmp_path) == [10, 11]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_two_that_save_one_step_at_a_time_are_refused_by_name(tmp_path: Path) -> None:
    gate = Gate()
    first, second = engine(tmp_path, gate, is_async=True), engine(tmp_path)
    first.save(0, 10, nn.Linear(2, 2))
    assert gate.begun.wait(60)
    with pytest.raises(CheckpointBusyError) as caught:
        second.save(0, 10, nn.Linear(2, 2))
    assert f"process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
    with pytest.raises(CheckpointBusyError):
        claim(tmp_path, "epoch_0_step_10")
    gate.opened.set()
    first.finalize()
    assert steps(tmp_path) == [10]


def test_a_component_that_is_being_saved_is_not_replaced(tmp_path: Path) -> None:
    gate = Gate()
    first, second = engine(tmp_path, gate, is_async=True), engine(tmp_path)
    first.save_model(nn.Linear(2, 2), tmp_path)
    assert gate.begun.wait(60)
    with pytest.raises(CheckpointBusyError):
        second.save_model(nn.Linear(2, 2), tmp_path)
    second.save(0, 1, nn.Linear(2, 2))
    gate.opened.set()
    first.finalize()
    assert (tmp_path / "model" / "manifest.json").is_file()


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    mine = claim(tmp_path, "epoch_0_step_3")
    reserve(tmp_path, "epoch_0_step_3")

    def die() -> None:
        claim(tmp_path, "epoch_0_step_4")
        reserve(tmp_path, "epoch_0_step_4")

    in_child(die)
    assert remove_leftovers(tmp_path) == (".saving-epoch_0_step_4",)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".owner-epoch_0_step_3", ".saving-epoch_0_step_3"]
    mine.release()
    assert remove_leftovers(tmp_path) == (".saving-epoch_0_step_3",)
    assert list(tmp_path.iterdir()) == []


def test_what_another_machine_may_still_be_writing_stays(tmp_path: Path) -> None:
    """Its lock is not seen here where the file system does not pass locks between machines."""
    owner, temp = tmp_path / ".owner-epoch_0_step_4", tmp_path / ".saving-epoch_0_step_4"
    (temp / "model").mkdir(parents=True)
    (temp / "model" / "shard").write_bytes(b"half")
    owner.write_text("elsewhere 4711 run\n")
    everything = [owner, temp / "model" / "shard", temp / "model", temp]
    assert remove_leftovers(tmp_path) == ()
    long_ago = time.time() - 100_000
    for path in everything[:1] + everything[2:]:
        os.utime(path, (long_ago, long_ago))
    assert remove_leftovers(tmp_path) == ()  # a file is still being written
    assert owner.read_text() == "elsewhere 4711 run\n"
    assert (temp / "model" / "shard").read_bytes() == b"half"
    os.utime(everything[1], (long_ago, long_ago))
    assert remove_leftovers(tmp_path) == (temp.name,)
    assert list(tmp_path.iterdir()) == []


def test_a_claim_that_another_machine_has_taken_is_left_to_it(tmp_path: Path) -> None:
    """It could take it where the file system does not pass locks between machines."""
    gate = Gate()
    checkpointer = engine(tmp_path, gate, is_async=True)
    checkpointer.save(0, 10, nn.Linear(2, 2))
    assert gate.begun.wait(60)
    owner, temp = tmp_path / ".owner-epoch_0_step_10", tmp_path / ".saving-epoch_0_step_10"
    owner.write_text("elsewhere 4711 its-token\n")
    gate.opened.set()
    with pytest.raises(StorageError, match="another run has begun to save epoch_0_step_10 too"):
        checkpointer.finalize()
    assert steps(tmp_path) == []
    assert owner.read_text() == "elsewhere 4711 its-token\n"
    assert temp.is_dir()


def test_a_forked_worker_does_not_keep_a_claim(tmp_path: Path) -> None:
    mine = claim(tmp_path, "epoch_0_step_3")
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:  # lives on when its parent has let go
        os.read(reading, 1)
        os._exit(0)
    mine.release()
    claim(tmp_path, "epoch_0_step_3").release()
    os.write(writing, b"x")
    os.waitpid(child, 0)


@pytest.mark.parametrize("leaves", ["final", "asked to stop", "neither"])
def test_the_last_save_is_never_skipped(tmp_path: Path, leaves: str) -> None:
    class Asked:
        def should_save(self, any_rank: Callable[[bool], bool]) -> bool:
            return any_rank(leaves == "asked to stop")

    gate = Gate()
    checkpointer = engine(tmp_path, gate, is_async=True, skip_save_while_busy=True)
    checkpointer.save(0, 1, nn.Linear(2, 2))
    assert gate.begun.wait(60)
    assert checkpointer.save(0, 2, nn.Linear(2, 2)) is None
    threading.Timer(0.2, gate.opened.set).start()
    if checkpointer.asked_to_stop(Asked()):  # type: ignore[arg-type]
        checkpointer.save(0, 3, nn.Linear(2, 2))
    else:
        checkpointer.save(0, 3, nn.Linear(2, 2), is_final_checkpoint=leaves == "final")
    checkpointer.finalize()
    assert (3 in steps(tmp_path)) == (leaves != "neither")


def test_a_save_that_tells_of_an_earlier_failure_is_made(tmp_path: Path) -> None:
    gate = Gate()
    gate.opened.set()
    gate.failures = 1
    checkpointer = engine(tmp_path, gate, is_async=True)
    checkpointer.save(0, 1, nn.Linear(2, 2))
    with pytest.raises(StorageError, match="an earlier save failed in the background") as caught:
        checkpointer.save(0, 2, nn.Linear(2, 2))
    assert "epoch_0_step_2, was made all the same" in str(caught.value)
    assert caught.value.errno == 5
    assert read_pointer(tmp_path, LATEST) == "epoch_0_step_2"
    checkpointer.save(0, 3, nn.Linear(2, 2))
    checkpointer.finalize()
    assert steps(tmp_path) == [2, 3]


def test_a_relative_directory_is_where_it_was_when_the_checkpointer_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    checkpointer = engine("checkpoints")
    monkeypatch.chdir(tmp_path / "elsewhere")
    checkpointer.save(0, 1, nn.Linear(2, 2))
    monkeypatch.chdir(tmp_path)
    checkpointer.save(0, 2, nn.Linear(2, 2))
    assert steps(tmp_path / "checkpoints") == [1, 2]
    assert not list((tmp_path / "elsewhere").iterdir())
