"""Directories in which accelerate, and with it transformers' Trainer, saved a model by FSDP: to a model's files.

accelerate's own function writes the model; what Trainer puts beside it is written by hand.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.ops.damaged import describe, gpt2, same_logits, save_dcp
from tests.sources.per_rank import save_by_accelerate, trainer_directory
from tests.support.ranks import run

from shardwise.errors import AmbiguousFilesError, MisuseError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify

FORMS = {
    "DCP": ("SHARDED_STATE_DICT", True, 2),
    "each rank's shards": ("SHARDED_STATE_DICT", False, 2),
    "all of it": ("FULL_STATE_DICT", True, 2),
    "DCP, FSDP1": ("SHARDED_STATE_DICT", True, 1),
    "each rank's shards, FSDP1": ("SHARDED_STATE_DICT", False, 1),
}


def saved(root: Path, form: str) -> Path:
    directory = root / "checkpoint-10"
    directory.mkdir()
    run(2, save_by_accelerate, str(directory), 5, *FORMS[form])
    describe(directory)
    return trainer_directory(directory)


@pytest.mark.parametrize("full", [False, True])
def test_its_names_by_hand(full: bool, tmp_path: Path) -> None:
    """What the slow tests show of accelerate's own files, without its import in each process."""
    describe(tmp_path)
    if full:
        torch.save(gpt2(4).state_dict(), tmp_path / "pytorch_model_fsdp.bin")
    else:
        save_dcp({"model": gpt2(4).state_dict()}, tmp_path / "pytorch_model_fsdp_0")
    report = consolidate(trainer_directory(tmp_path), tmp_path / "export")
    assert same_logits(report.path, gpt2(4))
    assert not list(report.path.glob("*.pkl"))
    assert not (report.path / "trainer_state.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
def test_the_model_and_nothing_beside_it(form: str, tmp_path: Path) -> None:
    directory = saved(tmp_path, form)
    report = consolidate(directory, tmp_path / "export")
    assert same_logits(report.path, gpt2(5))
    written = {path.name for path in report.path.iterdir()}
    assert written == {"config.json", "model.safetensors", "model.safetensors.index.json", "manifest.json"}
    assert inspect(directory).tools[0] == "accelerate (FSDP)"
    names = {tensor.spec.name.removeprefix("model.") for tensor in inspect(directory).tensors}
    assert names >= gpt2().state_dict().keys()
    assert verify(directory).status == "unverifiable"


@pytest.mark.slow
def test_without_a_configuration_and_into_the_place_of_an_export(tmp_path: Path) -> None:
    directory = saved(tmp_path, "all of it")
    (directory / "config.json").unlink()
    report = consolidate(directory)
    assert report.path == directory / "consolidated"
    assert any("no config.json" in note for note in report.notes)
    describe(report.path)
    assert same_logits(report.path, gpt2(5))


@pytest.mark.slow
def test_a_rank_that_is_absent(tmp_path: Path) -> None:
    directory = saved(tmp_path, "each rank's shards")
    (directory / "pytorch_model_fsdp_0_rank1.bin").unlink()
    assert [damage.kind for damage in verify(directory).damages] == ["incomplete"]


@pytest.mark.slow
def test_flat_pieces_are_refused_by_name(tmp_path: Path) -> None:
    run(2, save_by_accelerate, str(tmp_path), 5, "LOCAL_STATE_DICT", True, 1)
    with pytest.raises(MisuseError, match="LOCAL_STATE_DICT"):
        consolidate(tmp_path, tmp_path / "export")


@pytest.mark.slow
def test_two_models(tmp_path: Path) -> None:
    directory = saved(tmp_path, "DCP")
    (directory / "pytorch_model_fsdp_0").rename(directory / "pytorch_model_fsdp_1")
    run(2, save_by_accelerate, str(directory), 6, *FORMS["DCP"])
    with pytest.raises(AmbiguousFilesError, match="pytorch_model_fsdp_0, pytorch_model_fsdp_1"):
        consolidate(directory, tmp_path / "export")
    describe(directory / "pytorch_model_fsdp_0")
    assert same_logits(consolidate(directory / "pytorch_model_fsdp_0", tmp_path / "first").path, gpt2(6))
