"""What `inspect` and `consolidate` tell and write."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.ops.checkpoints import model, saved

from shardwise.errors import CheckpointExistsError, CheckpointNotFoundError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.inspect import inspect


def test_a_checkpoint(tmp_path: Path) -> None:
    saved(tmp_path, (1, 7))
    found = inspect(tmp_path)
    assert (found.epoch, found.step, found.world_size, found.verifiable) == (0, 7, 1, True)
    assert dict(found.metrics) == {"default": pytest.approx(1 / 7)}
    assert found.components == ("model", "optim")
    assert found.dtypes("model") == {"F32": 60_007}
    sizes = {file.path: file.size for file in found.files}
    assert sizes == {path: (found.path / path).stat().st_size for path in sizes}
    big = next(t for t in found.tensors if t.spec.name == "big")
    assert (big.spec.shape, big.files) == ((300, 200), ("model/consolidated/model.safetensors",))


def test_a_part(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    found = inspect(directory / "optim")
    assert found.components == ("optim",)
    assert all(file.path.startswith("optim/") for file in found.files)


def test_anothers_directory(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3, 2, dtype=torch.bfloat16)}, tmp_path / "model.safetensors")
    found = inspect(tmp_path)
    assert not found.verifiable
    assert found.dtypes("model") == {"BF16": 6}


def test_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointNotFoundError):
        inspect(tmp_path)


def test_consolidating_shards_gives_the_bytes_of_a_direct_export(tmp_path: Path) -> None:
    direct = saved(tmp_path / "direct")
    shards = saved(tmp_path / "shards", save_consolidated="false")
    report = consolidate(shards / "model")
    assert report.path == shards / "model" / "consolidated"
    for name in ("model.safetensors", "model.safetensors.index.json"):
        assert (report.path / name).read_bytes() == (direct / "model" / "consolidated" / name).read_bytes()
    with pytest.raises(CheckpointExistsError):
        consolidate(shards)


def test_consolidating_elsewhere(tmp_path: Path) -> None:
    shards = saved(tmp_path / "shards", save_consolidated="false")
    report = consolidate(shards, tmp_path / "export", max_file_bytes=1000)
    assert len(report.files) == 2
    found = {name: t for file in report.files for name, t in load_file(report.path / file).items()}
    for name, tensor in model().named_parameters():
        assert found[name].shape == tensor.shape
