"""Which files of a directory are its model: what transformers takes, or an error that lists what there is."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.base.support import llama, llama_config, on_meta
from tests.support.ranks import failure
from torch import nn
from transformers import LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import AmbiguousFilesError, CheckpointNotFoundError, WeightIndexError


def put(directory: Path, name: str, value: float, tensors: tuple[str, ...] = ("weight", "bias")) -> None:
    shapes = {"weight": (2, 3), "bias": (2,)}
    state = {tensor: torch.full(shapes[tensor], float(value)) for tensor in tensors}
    directory.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        save_file(state, directory / name)
    else:
        torch.save(state, directory / name)


def put_index(directory: Path, name: str, **files: str) -> None:
    (directory / name).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def load(path: Path, how: str) -> tuple[float, float]:
    """The values that a model of sevens has afterwards."""
    model = nn.Linear(3, 2)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 7)
    rank = dist.get_rank() if dist.is_initialized() else 0
    engine = Checkpointer(CheckpointingConfig(checkpoint_dir=path.parent / "run"), rank, 0, 0)
    try:
        if how == "base":
            engine.load_base_model(model, "cpu", None, str(path))
        else:
            engine.load_model(model, path, is_init_step=how == "init")
    except Exception:
        assert {float(value.detach()) for each in model.parameters() for value in each.flatten()} == {7.0}
        raise
    return float(model.weight[0, 0].detach()), float(model.bias[0].detach())


HOWS = ["model", "init", "base"]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(
    "other",
    [
        "ema.safetensors",
        "consolidated.safetensors",
        "adapter_model.safetensors",
        "model.fp16.safetensors",
        "model-00001-of-00001.safetensors",
        "a.safetensors",
        "optimizer.pt",
        "pytorch_model.bin",
    ],
)
def test_the_standard_name_counts(tmp_path: Path, other: str, how: str) -> None:
    put(tmp_path, "model.safetensors", 1)
    put(tmp_path, other, 2)
    assert load(tmp_path, how) == (1, 1)


@pytest.mark.parametrize("how", HOWS)
def test_an_index_counts_before_what_it_does_not_list(tmp_path: Path, how: str) -> None:
    put(tmp_path, "model-00001-of-00002.safetensors", 1, ("weight",))
    put(tmp_path, "model-00002-of-00002.safetensors", 1, ("bias",))
    files = {"weight": "model-00001-of-00002.safetensors", "bias": "model-00002-of-00002.safetensors"}
    put_index(tmp_path, "model.safetensors.index.json", **files)
    for name in ("model-00001-of-00001.safetensors", "consolidated.safetensors", "aa.safetensors"):
        put(tmp_path, name, 2)
    assert load(tmp_path, how) == (1, 1)


def test_beside_an_index_the_standard_file_is_what_transformers_takes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llama(1).save_pretrained(tmp_path / "base", max_shard_size="40KB")
    llama(2).save_pretrained(tmp_path / "single")
    (tmp_path / "single" / "model.safetensors").rename(tmp_path / "base" / "model.safetensors")
    assert (tmp_path / "base" / "model.safetensors.index.json").exists()
    expected = LlamaForCausalLM.from_pretrained(tmp_path / "base").state_dict()
    fresh = on_meta(LlamaForCausalLM, llama_config())
    engine = Checkpointer(CheckpointingConfig(checkpoint_dir=tmp_path))
    with caplog.at_level(logging.WARNING):
        engine.load_base_model(fresh, "cpu", None, str(tmp_path / "base"))
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert "model.safetensors.index.json, which lists other files" in caplog.text


def test_diffusers_takes_its_index_before_its_single_file(tmp_path: Path) -> None:
    put(tmp_path, "diffusion_pytorch_model.safetensors", 2)
    put(tmp_path, "diffusion_pytorch_model.fp16.safetensors", 3)
    put(tmp_path, "diffusion_pytorch_model-00001-of-00001.safetensors", 1)
    files = dict.fromkeys(("weight", "bias"), "diffusion_pytorch_model-00001-of-00001.safetensors")
    put_index(tmp_path, "diffusion_pytorch_model.safetensors.index.json", **files)
    assert load(tmp_path, "model") == (1, 1)


@pytest.mark.parametrize("name", ["ema.safetensors", "consolidated.safetensors", "model.fp16.safetensors"])
def test_the_only_one_counts(tmp_path: Path, name: str) -> None:
    put(tmp_path, name, 1)
    assert load(tmp_path, "model") == (1, 1)


def test_the_only_file_of_torch_counts(tmp_path: Path) -> None:
    put(tmp_path, "weights.pth", 1)
    put(tmp_path, "optimizer.pt", 2)
    (tmp_path / "tokenizer.bin").write_bytes(b"\x07\x01\x02\x03" * 20)
    assert load(tmp_path, "base") == (1, 1)


AMBIGUOUS = {
    "two names": ["ema.safetensors", "raw.safetensors"],
    "two sets": [
        f"model-{n}-of-{t}.safetensors" for n, t in (("00001", "00001"), ("00001", "00002"), ("00002", "00002"))
    ],
    "two shard sets": ["shard-00001-model-00001-of-00001.safetensors", "shard-00001-model-00001-of-00002.safetensors"],
    "two variants": ["model.bf16.safetensors", "model.fp16.safetensors"],
    "two libraries": ["diffusion_pytorch_model.safetensors", "model.safetensors"],
}
AMBIGUOUS_BINS = {
    "two files": ["ema.pt", "raw.bin"],
    "one for each rank": ["consolidated.00.pth", "consolidated.01.pth"],
}


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("kind", AMBIGUOUS)
def test_several_are_refused_and_listed(tmp_path: Path, kind: str, how: str) -> None:
    for value, name in enumerate(AMBIGUOUS[kind]):
        put(tmp_path, name, value)
    with pytest.raises(AmbiguousFilesError) as caught:
        load(tmp_path, how)
    text = str(caught.value)
    assert text.startswith("the directory holds several models' files")
    assert caught.value.path == str(tmp_path)
    if kind not in ("two sets", "two shard sets"):
        assert all(name in text for name in AMBIGUOUS[kind])
        for value, name in enumerate(AMBIGUOUS[kind]):
            assert load(tmp_path / name, how) == (value, value)


@pytest.mark.parametrize("kind", AMBIGUOUS_BINS)
def test_several_files_of_torch_are_refused(tmp_path: Path, kind: str) -> None:
    for name in AMBIGUOUS_BINS[kind]:
        put(tmp_path, name, 1)
    with pytest.raises(AmbiguousFilesError, match=".*".join(AMBIGUOUS_BINS[kind])):
        load(tmp_path, "base")
    assert load(tmp_path / AMBIGUOUS_BINS[kind][0], "base") == (1, 1)


def refused(path: Path) -> None:
    load(path, "model")


def test_every_rank_refuses(tmp_path: Path) -> None:
    for name in AMBIGUOUS["two names"]:
        put(tmp_path, name, 1)
    assert isinstance(failure(2, refused, tmp_path), AmbiguousFilesError)


def test_an_index_can_be_named(tmp_path: Path) -> None:
    for value, stem in enumerate(("ema", "raw")):
        put(tmp_path, f"{stem}-00001-of-00001.safetensors", value)
        put_index(
            tmp_path,
            f"{stem}.safetensors.index.json",
            **dict.fromkeys(("weight", "bias"), f"{stem}-00001-of-00001.safetensors"),
        )
    with pytest.raises(AmbiguousFilesError, match=r"ema\.safetensors\.index\.json.*raw\.safetensors\.index\.json"):
        load(tmp_path, "model")
    for value, stem in enumerate(("ema", "raw")):
        for how in HOWS:
            assert load(tmp_path / f"{stem}.safetensors.index.json", how) == (value, value)


def test_a_set_of_which_files_are_absent_is_refused(tmp_path: Path) -> None:
    put(tmp_path, "model-00001-of-00003.safetensors", 1, ("weight",))
    put(tmp_path, "model-00003-of-00003.safetensors", 1, ("bias",))
    with pytest.raises(CheckpointNotFoundError, match="of the 3 files .* only 2 are there"):
        load(tmp_path, "model")


def test_the_names_of_an_index_are_looked_for(tmp_path: Path) -> None:
    put(tmp_path, "pytorch_model.bin", 2)
    os.rename(tmp_path / "pytorch_model.bin", tmp_path / "a.bin")
    put_index(tmp_path, "pytorch_model.bin.index.json", weight="b.bin", bias="a.bin")
    with pytest.raises(WeightIndexError, match="names b.bin, which is absent"):
        load(tmp_path, "base")


def test_two_formats_in_one_directory_are_refused(tmp_path: Path) -> None:
    dcp.save({"weight": torch.ones(2, 3), "bias": torch.ones(2)}, checkpoint_id=tmp_path)
    assert load(tmp_path, "model") == (1, 1)
    put(tmp_path, "model.safetensors", 2)
    with pytest.raises(AmbiguousFilesError, match=r"a DCP checkpoint \(.metadata\) and a Hugging Face model"):
        load(tmp_path, "model")
    assert load(tmp_path / "model.safetensors", "model") == (2, 2)
