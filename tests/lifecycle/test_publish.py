from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from tests.lifecycle.support import Crash, FaultyStorage, fill_existing, is_whole, made, publish, save

from shardwise.disk.storage import LocalStorage, using
from shardwise.errors import (
    CheckpointExistsError,
    CheckpointNotFoundError,
    IncompleteCheckpointError,
    MisuseError,
    StorageError,
)
from shardwise.lifecycle import (
    LATEST,
    list_checkpoints,
    remove_leftovers,
    reserve,
    resolve,
    set_pointer,
    temporary_name,
)
from shardwise.lifecycle.publish import abandon

NAME = "epoch_0_step_5"


def test_a_save_is_invisible_until_it_is_published(tmp_path: Path) -> None:
    root = tmp_path / "a" / "b"
    temp = reserve(root, NAME)
    assert temp.is_dir()
    assert temp.parent == root
    fill_existing(temp, None, b"x")
    assert list_checkpoints(root) == ()
    assert resolve(root) is None
    publish(temp, root / NAME)
    assert not temp.exists()
    assert is_whole(root / NAME)
    assert [info.name for info in list_checkpoints(root)] == [NAME]


def test_the_rename_comes_after_every_sync_and_before_the_root_is_synced(tmp_path: Path) -> None:
    storage = FaultyStorage()
    with using(storage):
        temp = reserve(tmp_path, NAME)
    fill_existing(temp, None, b"x")
    storage.calls.clear()
    with using(storage):
        publish(temp, tmp_path / NAME)
    at = storage.calls.index(("rename_new", NAME))
    assert ("sync_directory", "model") in storage.calls[:at]
    assert ("sync_directory", temp.name) in storage.calls[:at]
    assert storage.calls[at + 1 :] == [("sync_directory", tmp_path.name)]
    assert [operation for operation, _ in storage.calls].count("rename_new") == 1


def test_a_published_checkpoint_is_never_overwritten(tmp_path: Path) -> None:
    made(tmp_path, 0, 5)
    before = (tmp_path / NAME / "model" / "data.bin").read_bytes()
    with pytest.raises(CheckpointExistsError) as caught:
        reserve(tmp_path, NAME)
    assert isinstance(caught.value, FileExistsError)
    assert caught.value.path == str(tmp_path / NAME)
    assert caught.value.hint
    assert not (tmp_path / temporary_name(NAME)).exists()
    assert (tmp_path / NAME / "model" / "data.bin").read_bytes() == before


def test_publishing_onto_a_name_that_appeared_meanwhile(tmp_path: Path) -> None:
    temp = reserve(tmp_path, NAME)
    fill_existing(temp, None, b"new")
    made(tmp_path, 0, 5)
    with pytest.raises(CheckpointExistsError):
        publish(temp, tmp_path / NAME)
    assert (tmp_path / NAME / "model" / "data.bin").read_bytes() == b"0 5"
    assert (temp / "model" / "data.bin").read_bytes() == b"new"


@pytest.mark.parametrize("content", ["empty directory", "full directory", "file", "link"])
def test_rename_new_replaces_nothing(tmp_path: Path, content: str) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    if content == "file":
        target.write_text("x")
    elif content == "link":
        target.symlink_to("nowhere")
    else:
        target.mkdir()
        if content == "full directory":
            (target / "x").touch()
    with pytest.raises(FileExistsError):
        LocalStorage().rename_new(source, target)
    assert source.is_dir()
    assert os.path.lexists(target)


@pytest.mark.parametrize("where", ["temporary", "published"])
def test_what_an_interrupted_save_left_is_replaced(tmp_path: Path, where: str) -> None:
    old = tmp_path / (temporary_name(NAME) if where == "temporary" else NAME)
    (old / "optim").mkdir(parents=True)
    (old / "optim" / "half").write_bytes(b"x")
    temp = reserve(tmp_path, NAME)
    assert list(temp.iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == [temp.name]


@pytest.mark.parametrize("kind", ["file", "link", "foreign"])
def test_what_is_not_ours_is_not_replaced(tmp_path: Path, kind: str) -> None:
    (tmp_path / "elsewhere").mkdir()
    final = tmp_path / NAME
    if kind == "file":
        final.write_text("mine")
    elif kind == "link":
        final.symlink_to("elsewhere")
    else:
        (final / "model").mkdir(parents=True)
        (final / "model" / "weights").touch()
    with pytest.raises(CheckpointExistsError):
        reserve(tmp_path, NAME)
    assert os.path.lexists(final)


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.write_text("x")
    with pytest.raises(StorageError) as caught:
        reserve(root, NAME)
    assert caught.value.errno == errno.ENOTDIR
    assert "file stands" in str(caught.value)
    assert root.read_text() == "x"


@pytest.mark.parametrize("code", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO])
def test_a_root_that_cannot_be_written(tmp_path: Path, code: int) -> None:
    with pytest.raises(StorageError) as caught, using(FaultyStorage(0, OSError(code, os.strerror(code)))):
        reserve(tmp_path / "new", NAME)
    assert caught.value.errno == code
    assert str(tmp_path) in str(caught.value)
    assert caught.value.hint


def test_a_root_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    root = tmp_path / "root"
    root.symlink_to("disk")
    save(root, 0, 5, LocalStorage())
    resolved = resolve(root)
    assert resolved is not None
    assert resolved.name == NAME


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "x\n", "../epoch_0_step_1"])
def test_names_that_lead_elsewhere(tmp_path: Path, name: str) -> None:
    with pytest.raises(MisuseError):
        reserve(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


def test_publishing_what_was_not_reserved(tmp_path: Path) -> None:
    temp = reserve(tmp_path, NAME)
    with pytest.raises(IncompleteCheckpointError, match=r"manifest\.json"):
        publish(temp, tmp_path / NAME)
    for final in (tmp_path / "epoch_0_step_6", tmp_path / "x" / NAME):
        with pytest.raises(MisuseError):
            publish(temp, final)
    with pytest.raises(MisuseError):
        publish(tmp_path / "plain", tmp_path / "plain")
    abandon(temp)
    with pytest.raises(CheckpointNotFoundError):
        publish(temp, tmp_path / NAME)


def test_abandoning(tmp_path: Path) -> None:
    made(tmp_path, 0, 5)
    temp = reserve(tmp_path, "epoch_0_step_6")
    fill_existing(temp, None, b"x")
    abandon(temp)
    abandon(temp)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    with pytest.raises(MisuseError):
        abandon(tmp_path / NAME)
    assert is_whole(tmp_path / NAME)


def test_a_manifest_that_is_not_a_file_completes_nothing(tmp_path: Path) -> None:
    temp = reserve(tmp_path, NAME)
    os.mkfifo(temp / "manifest.json")
    with pytest.raises(IncompleteCheckpointError):
        publish(temp, tmp_path / NAME)


def test_leftovers_of_other_steps(tmp_path: Path) -> None:
    made(tmp_path, 0, 5)
    for name in (".saving-epoch_0_step_9", ".doomed-epoch_0_step_1", ".saving-epoch_0_step_7", ".cache"):
        (tmp_path / name / "model").mkdir(parents=True)
    gone = remove_leftovers(tmp_path, active=[tmp_path / ".saving-epoch_0_step_7"])
    assert gone == (".doomed-epoch_0_step_1", ".saving-epoch_0_step_9")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache", ".saving-epoch_0_step_7", NAME]
    assert remove_leftovers(tmp_path / "absent") == ()


def operations_of_a_save(root: Path, links: bool) -> int:
    save(root, 0, 1, LocalStorage())
    storage = FaultyStorage(links=links)
    save(root, 0, 2, storage)
    return len(storage.calls)


@pytest.mark.parametrize("links", [True, False])
@pytest.mark.parametrize("kind", ["crash", "refusal"])
def test_every_stop_leaves_the_old_or_the_new_checkpoint(tmp_path: Path, links: bool, kind: str) -> None:
    count = operations_of_a_save(tmp_path / "counted", links)
    assert count > 10
    outcomes = []
    for at in range(count):
        root = tmp_path / f"{kind}-{at}"
        save(root, 0, 1, LocalStorage())
        (root / "epoch_0_step_2" / "optim").mkdir(parents=True)
        error = Crash() if kind == "crash" else OSError(errno.EIO, "Input/output error")
        with pytest.raises(Crash if kind == "crash" else StorageError):
            save(root, 0, 2, FaultyStorage(at, error, links))
        resolved = resolve(root)
        assert resolved is not None
        assert is_whole(resolved.path)
        assert (resolved.path / "model" / "data.bin").read_bytes() == f"0 {resolved.step}".encode()
        outcomes.append(resolved.step)
        # Resuming where the run stopped, the next save has a free name and succeeds.
        following = resolved.step + 1
        save(root, 0, following, LocalStorage())
        after = resolve(root)
        assert after is not None
        assert after.step == following
        remove_leftovers(root)
        assert [path.name for path in root.iterdir() if path.name.startswith((".saving", ".doomed"))] == []
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}


def test_a_pointer_that_was_set_back_is_obeyed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, 0, step, LocalStorage())
    (tmp_path / LATEST).unlink()
    (tmp_path / LATEST).symlink_to("epoch_0_step_1")
    resolved = resolve(tmp_path)
    assert resolved is not None
    assert resolved.step == 1


def test_a_crash_between_publication_and_pointer_resumes_from_the_new(tmp_path: Path) -> None:
    save(tmp_path, 3, 100, LocalStorage())
    temp = reserve(tmp_path, "epoch_1_step_200")
    fill_existing(temp, None, b"x")
    publish(temp, tmp_path / "epoch_1_step_200")
    resolved = resolve(tmp_path)
    assert resolved is not None
    assert resolved.step == 200
    set_pointer(tmp_path, LATEST, "epoch_1_step_200")
    assert sorted(path.name for path in tmp_path.iterdir()) == [LATEST, "epoch_1_step_200", "epoch_3_step_100"]
