"""Checkpoints of symbolic links (git-annex, hub caches, archives), and copies that have lost theirs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import CheckpointExistsError, IntegrityError
from shardwise.lifecycle import LATEST, LINEAGE_NAME, list_checkpoints, resolve
from shardwise.ops.verify import verify

NAME = "epoch_0_step_3"


def engine(root: Path, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", save_rng=False, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, 0, 0, 0)


def filled(value: float) -> nn.Module:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)
    return model


def restored(root: Path, name: str = LATEST) -> tuple[int | None, float]:
    model = nn.Linear(2, 2)
    record = engine(root).restore(model, restore_from=name, verify="digests")
    assert record is not None
    return record.step, float(model.weight.detach()[0, 0])


def every_file(root: Path) -> None:
    """As a hub cache and git-annex do: content by number, links in the files' places."""
    blobs = root.parent / "blobs"
    blobs.mkdir()
    for number, path in enumerate(sorted(path for path in (root / NAME).rglob("*") if path.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))


def manifest_alone(root: Path) -> None:
    (root.parent / "kept").mkdir()
    (root / NAME / "manifest.json").rename(root.parent / "kept" / "manifest.json")
    (root / NAME / "manifest.json").symlink_to(root.parent / "kept" / "manifest.json")


def large_files(root: Path) -> None:
    """git-annex with ``largefiles``: tensors in its store, text beside them."""
    store = root.parent / ".git" / "annex" / "objects"
    store.mkdir(parents=True)
    for path in (root / NAME).rglob("*.safetensors"):
        path.rename(store / path.name)
        path.symlink_to(store / path.name)


def directory(root: Path) -> None:
    (root.parent / "archive").mkdir()
    (root / NAME).rename(root.parent / "archive" / NAME)
    (root / NAME).symlink_to(root.parent / "archive" / NAME)


KINDS = [every_file, manifest_alone, large_files, directory]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    with engine(tmp_path / "root") as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(0, step, filled(step), metrics={"default": float(step)})
    return tmp_path / "root"


@pytest.mark.parametrize("kind", KINDS)
def test_links_are_as_good_as_files(root: Path, kind: object) -> None:
    kind(root)  # type: ignore[operator]
    infos = {info.name: info for info in list_checkpoints(root)}
    assert infos[NAME].complete
    assert infos[NAME].verifiable
    assert infos[NAME].metrics == {"default": 3.0}
    assert infos[NAME].lineage is not None
    assert restored(root) == (3, 3.0)
    assert restored(root, NAME) == (3, 3.0)
    assert verify(root / NAME).status == "whole"
    with pytest.raises(CheckpointExistsError):
        engine(root).save(0, 3, filled(-1.0))
    assert restored(root, NAME) == (3, 3.0)


@pytest.mark.parametrize("kind", KINDS)
def test_retention_deletes_nothing_through_links(root: Path, kind: object) -> None:
    kind(root)  # type: ignore[operator]
    before = {path for path in root.parent.rglob("*") if path.is_file() and not path.is_relative_to(root)}
    run = engine(root, max_recent_checkpoints=1)
    run.restore(filled(0.0))
    run.save(0, 4, filled(4.0))
    assert {path for path in before if path.is_file()} == before
    left = [info.step for info in list_checkpoints(root)]
    assert left == ([1, 3, 4] if kind is directory else [1, 4])  # 1 is the best


def test_a_file_behind_a_link_that_has_changed_is_damage(root: Path) -> None:
    every_file(root)
    for blob in (root.parent / "blobs").iterdir():
        data = blob.read_bytes()
        if b"F32" in data[:400]:
            blob.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        restored(root)


def test_content_that_is_not_fetched_is_not_an_interrupted_save(root: Path) -> None:
    every_file(root)
    shutil.rmtree(root.parent / "blobs")
    assert [info.step for info in list_checkpoints(root) if info.complete] == [1, 2, 3]
    with pytest.raises(CheckpointExistsError):
        engine(root).save(0, 3, filled(-1.0))
    assert (root / NAME / "manifest.json").is_symlink()


@pytest.mark.parametrize("has_lineage", [True, False])
def test_a_copy_without_links_tells_its_step(root: Path, has_lineage: bool) -> None:
    if not has_lineage:
        for path in root.rglob(LINEAGE_NAME):
            path.unlink()
    copy = root.parent / "copy"
    shutil.copytree(root, copy, symlinks=False)
    found = resolve(copy)
    assert found is not None
    assert (found.name, found.epoch, found.step) == (LATEST, 0, 3)
