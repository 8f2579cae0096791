from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
from tests.lifecycle.support import made, save

from shardwise.disk.storage import LocalStorage
from shardwise.errors import CheckpointNotFoundError, IncompleteCheckpointError, MisuseError, StorageError
from shardwise.lifecycle import BEST, LATEST, list_checkpoints, resolve, set_pointer


def step_of(root: Path, restore_from: str | Path = LATEST) -> int | None:
    resolved = resolve(root, restore_from)
    assert resolved is not None
    return resolved.step


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three checkpoints; LATEST leads to the second, the best is the first."""
    directory = tmp_path / "root"
    for step in (8, 9, 10):
        made(directory, 0, step, {"default": step / 4, "flag": True, "note": "x", "bad": float("nan")})  # type: ignore[dict-item]
    set_pointer(directory, LATEST, "epoch_0_step_9")
    set_pointer(directory, BEST, "epoch_0_step_8")
    return directory


@pytest.mark.parametrize("wrong", [None, 3.0, ["LATEST"], True])
def test_what_is_neither_text_nor_a_path(root: Path, wrong: object) -> None:
    with pytest.raises(MisuseError, match="restore_from is .*LATEST"):
        resolve(root, wrong)  # type: ignore[arg-type]


def test_nothing_to_resume_from(tmp_path: Path) -> None:
    assert resolve(tmp_path / "absent") is None
    assert resolve(tmp_path) is None
    (tmp_path / "notes.txt").write_text("hello there")
    (tmp_path / ".saving-epoch_0_step_1" / "model").mkdir(parents=True)
    (tmp_path / "epoch_0_step_2" / "optim").mkdir(parents=True)
    assert resolve(tmp_path) is None
    assert list_checkpoints(tmp_path / "absent") == ()


def test_every_way_to_name_a_checkpoint(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert step_of(root) == 9
    assert step_of(root, BEST) == 8
    assert step_of(root, "epoch_0_step_10") == 10
    assert step_of(root, "epoch_0_step_10/") == 10
    assert step_of(root, str(root / "epoch_0_step_10")) == 10
    assert step_of(root, root / LATEST) == 9
    assert step_of(root / "elsewhere", root / "epoch_0_step_8") == 8
    monkeypatch.chdir(root.parent)
    assert step_of(root, "root/epoch_0_step_8") == 8
    resolved = resolve(root, BEST)
    assert resolved is not None
    assert (resolved.path, resolved.name, resolved.epoch) == (root / "epoch_0_step_8", "epoch_0_step_8", 0)
    assert resolved.verifiable
    assert resolved.metrics == {"default": 2.0}


def test_a_path_to_a_text_pointer(root: Path) -> None:
    (root / LATEST).unlink()
    (root / "LATEST.txt").write_text("epoch_0_step_8\n")
    assert step_of(root) == 8
    assert step_of(root, root / LATEST) == 8


def test_a_checkpoint_under_any_name_by_path(root: Path) -> None:
    kept = root.parent / ".kept"
    shutil.copytree(root / "epoch_0_step_8", kept)
    resolved = resolve(root, kept)
    assert resolved is not None
    assert (resolved.path, resolved.epoch, resolved.step) == (kept, None, None)


@pytest.mark.parametrize("name", ["epoch_0_step_11", "BEST", "", " ", "..", ".", "/", "a\0b", "x" * 5000, "~/no/such"])
def test_what_is_not_there_is_listed(root: Path, name: str) -> None:
    with pytest.raises((CheckpointNotFoundError, IncompleteCheckpointError)) as caught:
        resolve(root, name)
    assert isinstance(caught.value, FileNotFoundError)
    assert "newest first: epoch_0_step_10, epoch_0_step_9, epoch_0_step_8" in str(caught.value)


def test_a_file_is_not_a_checkpoint(root: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="not a directory"):
        resolve(root, root / "epoch_0_step_8" / "manifest.json")


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize("name", ["epoch_0_step_11", ".saving-epoch_0_step_12", ".doomed-epoch_0_step_1"])
def test_an_interrupted_save_by_name_is_an_error(root: Path, name: str, as_path: bool) -> None:
    shutil.copytree(root / "epoch_0_step_8", root / name)
    if not name.startswith("."):
        shutil.rmtree(root / name / "model")
        (root / name / "manifest.json").unlink()
    with pytest.raises(IncompleteCheckpointError, match="newest first: epoch_0_step_10"):
        resolve(root, root / name if as_path else name)
    assert step_of(root) == 9


def test_a_pointer_to_an_interrupted_save(root: Path) -> None:
    (root / "epoch_0_step_8" / "manifest.json").unlink()
    shutil.rmtree(root / "epoch_0_step_8" / "model")
    with pytest.raises(IncompleteCheckpointError, match=r"LOWEST_VAL leads to epoch_0_step_8.*interrupted"):
        resolve(root, BEST)


@pytest.mark.parametrize(
    "target", ["epoch_0_step_77", "../outside", "/", LATEST, "..", ".saving-epoch_0_step_11", "epoch_0_step_11"]
)
def test_latest_falls_back_to_the_newest_complete(root: Path, target: str, caplog: pytest.LogCaptureFixture) -> None:
    made(root.parent, 0, 99)
    (root.parent / "epoch_0_step_99").rename(root.parent / "outside")
    (root / "epoch_0_step_11" / "optim").mkdir(parents=True)
    (root / LATEST).unlink()
    (root / LATEST).symlink_to(target)
    assert step_of(root) == 10
    assert "Falling back to epoch_0_step_10" in caplog.text


def test_latest_without_a_pointer(root: Path) -> None:
    (root / LATEST).unlink()
    assert step_of(root) == 10


def test_a_lost_checkpoint_is_not_a_fresh_start(root: Path) -> None:
    for step in (8, 9, 10):
        shutil.rmtree(root / f"epoch_0_step_{step}")
    with pytest.raises(CheckpointNotFoundError, match="LATEST leads to epoch_0_step_9"):
        resolve(root)


def test_a_pointer_that_leads_out_is_an_error_when_named(root: Path) -> None:
    made(root.parent, 0, 99)
    (root / "OUT").symlink_to("../epoch_0_step_99")
    with pytest.raises(CheckpointNotFoundError, match="not in its root"):
        resolve(root, "OUT")
    (root / "epoch_0_step_98").symlink_to("../epoch_0_step_99")
    with pytest.raises(CheckpointNotFoundError, match="not in its root"):
        resolve(root, "epoch_0_step_98")
    assert [info.step for info in list_checkpoints(root)] == [8, 9, 10]
    assert step_of(root, root / "epoch_0_step_98") == 99


def test_a_copy_in_the_place_of_latest(root: Path) -> None:
    (root / LATEST).unlink()
    shutil.copytree(root / "epoch_0_step_8", root / LATEST)
    resolved = resolve(root)
    assert resolved is not None
    assert resolved.path == root / LATEST


def test_another_tools_checkpoint_is_complete_but_unverifiable(tmp_path: Path) -> None:
    (tmp_path / "epoch_0_step_1" / "model").mkdir(parents=True)
    assert resolve(tmp_path) is None
    (tmp_path / "epoch_0_step_1" / "model" / "shard.safetensors").touch()
    resolved = resolve(tmp_path)
    assert resolved is not None
    assert not resolved.verifiable
    assert [(info.complete, info.verifiable) for info in list_checkpoints(tmp_path)] == [(True, False)]


def test_order_is_by_number_and_never_by_time(tmp_path: Path) -> None:
    for index, (epoch, step) in enumerate([(2, 30), (0, 9), (1, 5), (0, 100), (0, 10), (2, 4)]):
        name = made(tmp_path, epoch, step)
        # The clock stood still, ran back, and jumped into the next century.
        stamp = (0, 10**9, 4 * 10**9)[index % 3]
        os.utime(tmp_path / name, (stamp, stamp))
    listed = [(info.epoch, info.step) for info in list_checkpoints(tmp_path)]
    assert listed == [(0, 9), (0, 10), (0, 100), (1, 5), (2, 4), (2, 30)]
    assert step_of(tmp_path) == 30


@pytest.mark.parametrize(
    "content", ["[1]", "{", "null", "[" * 100_000, '{"default": "low", "huge": 1' + "0" * 400 + "}", "\ufffe"]
)
def test_damaged_metrics_do_not_stand_in_the_way(tmp_path: Path, content: str) -> None:
    name = made(tmp_path, 0, 1)
    (tmp_path / name / "losses.json").write_text(content)
    resolved = resolve(tmp_path)
    assert resolved is not None
    assert resolved.metrics == {}


def test_metrics_are_read_from_an_ordinary_file_only(tmp_path: Path) -> None:
    name = made(tmp_path, 0, 1)
    os.mkfifo(tmp_path / name / "losses.json")
    assert list_checkpoints(tmp_path)[0].metrics == {}
    pipe = os.open(tmp_path / name / "losses.json", os.O_RDWR)
    try:
        os.write(pipe, b'{"default": 1.0}')
        assert list_checkpoints(tmp_path)[0].metrics == {}
    finally:
        os.close(pipe)
    (tmp_path / name / "losses.json").unlink()
    outside = tmp_path / "outside.json"
    outside.write_text(json.dumps({"default": 1.0}))
    (tmp_path / name / "losses.json").symlink_to(outside)
    assert list_checkpoints(tmp_path)[0].metrics == {}


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    path = tmp_path / "root"
    path.write_text("x")
    for call in (resolve, list_checkpoints):
        with pytest.raises(StorageError) as caught:
            call(path)
        assert caught.value.errno == errno.ENOTDIR


def test_what_a_save_publishes_is_what_resolves(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, 0, step, LocalStorage(), {"default": float(step)})
        resolved = resolve(tmp_path)
        assert resolved is not None
        assert (resolved.step, resolved.metrics) == (step, {"default": float(step)})
