"""Listing a root: states, sizes, metrics and pointers, without torch."""

from __future__ import annotations

import os
import shutil
import socket
import time
from pathlib import Path

import pytest
from tests.ops.checkpoints import saved

from shardwise.errors import CheckpointNotFoundError, ManifestError, MisuseError
from shardwise.format.manifest import Manifest, encode_manifest, read_file_records, read_manifest
from shardwise.lifecycle import claim, set_pointer
from shardwise.ops.listing import ListedCheckpoint, list_checkpoints

EXPORT = "model/consolidated/model.safetensors"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("three")
    saved(root, (1, 2, 3))
    return root


@pytest.fixture
def root(three: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(three, tmp_path / "root", symlinks=True))


def by_step(root: Path) -> dict[int, ListedCheckpoint]:
    return {each.step: each for each in list_checkpoints(root)}


def test_what_is_published(root: Path) -> None:
    found = list_checkpoints(root)
    assert [(each.epoch, each.step, each.state, each.verifiable) for each in found] == [
        (0, step, "published", True) for step in (1, 2, 3)
    ]
    assert found[2].pointers == ("LATEST", "LOWEST_VAL")
    assert found[0].pointers == ()
    assert found[1].metrics == {"default": 0.5}
    files = [file for file in (root / "epoch_0_step_1").rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert found[0].nbytes == sum(file.stat().st_size for file in files)
    assert found[0].saved_at is not None
    assert abs(time.time() - found[0].saved_at) < 3600


def test_damage_that_sizes_show(root: Path) -> None:
    os.truncate(root / "epoch_0_step_1" / EXPORT, 1000)
    (root / "epoch_0_step_2" / "losses.json").unlink()
    manifest = root / "epoch_0_step_3" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-200])
    found = by_step(root)
    assert {each.state for each in found.values()} == {"damaged"}
    assert EXPORT in found[1].problems[0]
    assert "losses.json" in found[2].problems[0]
    assert "manifest" in found[3].problems[0]


def test_what_is_not_published(root: Path) -> None:
    for step in (10, 11, 12, 13):
        (root / f".saving-epoch_0_step_{step}").mkdir()
    (root / ".saving-epoch_0_step_10" / "shard").write_bytes(b"12345")
    (root / ".doomed-epoch_0_step_9").mkdir()
    (root / "epoch_0_step_8" / "optim").mkdir(parents=True)
    (root / ".owner-epoch_0_step_12").write_text("another-machine 17 token\n")
    (root / ".owner-epoch_0_step_13").write_text(f"{socket.gethostname()} {2**22 + 5} token\n")
    mine = claim(root, "epoch_0_step_11")
    try:
        found = by_step(root)
    finally:
        mine.release()
    assert {step: each.state for step, each in found.items() if step > 3} == {
        8: "interrupted",
        9: "being deleted",
        10: "interrupted",
        11: "being written",
        12: "claimed",
        13: "interrupted",
    }
    assert found[10].nbytes == 5
    writer = found[11].writer
    assert writer is not None
    assert (writer.pid, writer.alive) == (os.getpid(), True)


def test_what_has_no_manifest_is_said_to_have_none(root: Path) -> None:
    (root / "epoch_0_step_2" / "manifest.json").unlink()
    found = by_step(root)[2]
    assert (found.state, found.verifiable) == ("published", False)
    assert found.nbytes > 0


def test_a_publication_that_was_cut_off_is_the_latest(root: Path) -> None:
    set_pointer(root, "LATEST", "epoch_0_step_2")
    (root / ".publishing").write_text("epoch_0_step_3\n")
    assert "LATEST" in by_step(root)[3].pointers


def test_places_that_are_no_root(root: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError, match="nothing at this path"):
        list_checkpoints(tmp_path / "nowhere")
    with pytest.raises(MisuseError, match="this is a checkpoint and no directory of checkpoints"):
        list_checkpoints(root / "LATEST")
    (tmp_path / "empty").mkdir()
    assert list_checkpoints(tmp_path / "empty") == ()


def test_the_files_of_a_manifest_are_those_of_the_whole_of_it(root: Path, tmp_path: Path) -> None:
    path = root / "epoch_0_step_1" / "manifest.json"
    assert read_file_records(path) == read_manifest(path).files
    for files in ((), read_manifest(path).files[:1]):
        other = tmp_path / "manifest.json"
        other.write_bytes(encode_manifest(Manifest(files, ())))
        assert read_file_records(other) == files
    path.write_bytes(path.read_bytes().replace(b'"size":', b'"sise":', 1))
    with pytest.raises(ManifestError):
        read_file_records(path)
