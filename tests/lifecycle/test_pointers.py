from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.lifecycle.support import Crash, FaultyStorage, is_whole, made

from shardwise.disk.storage import LocalStorage, using
from shardwise.errors import CheckpointNotFoundError, MisuseError, StorageError
from shardwise.lifecycle import LATEST, pointers, read_pointer, set_pointer


def names(root: Path) -> set[str]:
    return {path.name for path in root.iterdir()}


def test_a_pointer_is_a_relative_link(tmp_path: Path) -> None:
    one, two = made(tmp_path, 0, 1), made(tmp_path, 0, 2)
    assert read_pointer(tmp_path, LATEST) is None
    set_pointer(tmp_path, LATEST, one)
    set_pointer(tmp_path, LATEST, two)
    assert os.readlink(tmp_path / LATEST) == two
    assert read_pointer(tmp_path, LATEST) == two
    moved = tmp_path.with_name("moved")
    tmp_path.rename(moved)
    assert read_pointer(moved, LATEST) == two
    assert names(moved) == {one, two, LATEST}


def test_a_text_file_where_links_are_not_to_be_had(tmp_path: Path) -> None:
    one, two = made(tmp_path, 0, 1), made(tmp_path, 0, 2)
    storage = FaultyStorage(links=False)
    with using(storage):
        set_pointer(tmp_path, LATEST, one)
        set_pointer(tmp_path, LATEST, two)
    assert (tmp_path / "LATEST.txt").read_text().strip() == two
    assert read_pointer(tmp_path, LATEST) == two
    assert pointers(tmp_path) == {LATEST: two}
    assert names(tmp_path) == {one, two, "LATEST.txt"}


@pytest.mark.parametrize("links_then_text", [True, False])
def test_the_stale_one_of_the_other_kind_goes(tmp_path: Path, links_then_text: bool) -> None:
    one, two = made(tmp_path, 0, 1), made(tmp_path, 0, 2)
    with using(FaultyStorage(links=links_then_text)):
        set_pointer(tmp_path, "LOWEST_VAL", one)
    with using(FaultyStorage(links=not links_then_text)):
        set_pointer(tmp_path, "LOWEST_VAL", two)
    assert read_pointer(tmp_path, "LOWEST_VAL") == two
    assert names(tmp_path) == {one, two, "LOWEST_VAL.txt" if links_then_text else "LOWEST_VAL"}


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("after", [True, False])
def test_at_every_moment_it_leads_to_the_old_or_the_new(tmp_path: Path, before: bool, after: bool) -> None:
    at, seen = 0, []
    while True:
        root = tmp_path / str(at)
        one, two = made(root, 0, 1), made(root, 0, 2)
        with using(FaultyStorage(links=before)):
            set_pointer(root, "LOWEST_VAL", one)
        try:
            with using(FaultyStorage(at, Crash(), links=after)):
                set_pointer(root, "LOWEST_VAL", two)
        except Crash:
            seen.append(read_pointer(root, "LOWEST_VAL"))
        else:
            break
        with using(FaultyStorage(links=before)):
            set_pointer(root, "LOWEST_VAL", one)
        assert read_pointer(root, "LOWEST_VAL") == one
        at += 1
    assert set(seen) == {one, two}
    assert seen == sorted(seen)


def test_a_directory_in_the_pointers_place_is_not_deleted(tmp_path: Path) -> None:
    name = made(tmp_path, 0, 1)
    copy = made(tmp_path, 0, 0)
    (tmp_path / copy).rename(tmp_path / LATEST)
    set_pointer(tmp_path, LATEST, name)
    assert is_whole(tmp_path / LATEST)
    assert read_pointer(tmp_path, LATEST) == name


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "LATEST.txt", "epoch_0_step_1"])
def test_names_that_pointers_cannot_have(tmp_path: Path, name: str) -> None:
    made(tmp_path, 0, 1)
    with pytest.raises(MisuseError):
        set_pointer(tmp_path, name, "epoch_0_step_1")
    assert names(tmp_path) == {"epoch_0_step_1"}


def test_targets_that_pointers_cannot_have(tmp_path: Path) -> None:
    for target in ("..", "/", "a/b", ".saving-epoch_0_step_1"):
        with pytest.raises(MisuseError):
            set_pointer(tmp_path, LATEST, target)
    with pytest.raises(CheckpointNotFoundError):
        set_pointer(tmp_path, LATEST, "epoch_0_step_1")
    assert names(tmp_path) == set()


def test_a_refusal_is_typed(tmp_path: Path) -> None:
    name = made(tmp_path, 0, 1)
    with pytest.raises(StorageError) as caught, using(FaultyStorage(0, OSError(errno.ENOSPC, "No space left"))):
        set_pointer(tmp_path, LATEST, name)
    assert caught.value.errno == errno.ENOSPC
    assert read_pointer(tmp_path, LATEST) is None


def test_pointers_that_lead_nowhere_good(tmp_path: Path) -> None:
    root = tmp_path / "root"
    made(root, 0, 1)
    made(tmp_path / "other", 0, 9)
    targets = {"OUT": "../other/epoch_0_step_9", "UP": "..", "SELF": ".", "LOOP": "LOOP", "ABS": "/"}
    for name, target in targets.items():
        (root / name).symlink_to(target)
    (root / "OUT_TEXT.txt").write_text("../other/epoch_0_step_9\n")
    (root / "BINARY.txt").write_bytes(b"\xff\xfe")
    (root / "HUGE.txt").write_text("x" * 100_000)
    os.mkfifo(root / "FIFO.txt")
    for name in (*targets, "OUT_TEXT", "BINARY", "HUGE", "FIFO"):
        with pytest.raises(CheckpointNotFoundError) as caught:
            read_pointer(root, name)
        assert name in str(caught.value)
    assert pointers(root) == {}


def test_pointers_by_other_ways_to_the_same_place(tmp_path: Path) -> None:
    name = made(tmp_path, 0, 1)
    (tmp_path / "ABSOLUTE").symlink_to(tmp_path / name)
    (tmp_path / "CHAIN").symlink_to("ABSOLUTE")
    (tmp_path / "BELOW").symlink_to(f"{name}/model")
    (tmp_path / "DANGLING").symlink_to("epoch_9_step_9")
    found = pointers(tmp_path)
    assert found == {"ABSOLUTE": name, "CHAIN": name, "BELOW": name, "DANGLING": "epoch_9_step_9"}


def test_pointers_of_an_absent_root(tmp_path: Path) -> None:
    assert pointers(tmp_path / "absent") == {}
    assert read_pointer(tmp_path / "absent", LATEST) is None


def test_the_real_file_system_replaces_a_link_in_one_step(tmp_path: Path) -> None:
    one, two = made(tmp_path, 0, 1), made(tmp_path, 0, 2)
    storage = LocalStorage()
    with using(storage):
        set_pointer(tmp_path, LATEST, one)
    recorded = FaultyStorage()
    with using(recorded):
        set_pointer(tmp_path, LATEST, two)
    assert [call for call in recorded.calls if call[1] == LATEST] == [("rename", LATEST)]
