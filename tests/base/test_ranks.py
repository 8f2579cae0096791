"""Two ranks: shards straight from the meta device, the same values as on one, and nothing read twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.base.support import (
    CountingStorage,
    checkpointer,
    llama,
    llama_config,
    on_meta,
    whole_tensor,
)
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from transformers import BertConfig, BertModel, LlamaForCausalLM, LlamaForSequenceClassification

from shardwise.checkpointing import Checkpointer
from shardwise.errors import CheckpointNotFoundError, MissingTensorError


def _sharded(config: Any, how: str, cls: Any = LlamaForCausalLM) -> Any:
    model = on_meta(cls, config)
    if how == "tp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
        for layer in model.model.layers:
            styles = {f"self_attn.{n}_proj": ColwiseParallel() for n in "qkv"} | {"self_attn.o_proj": RowwiseParallel()}
            styles |= {f"mlp.{n}_proj": ColwiseParallel() for n in ("gate", "up")} | {
                "mlp.down_proj": RowwiseParallel()
            }
            parallelize_module(layer, mesh, styles)
        return model
    if how == "none":
        return model
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard")) if how == "hsdp" else None
    if how == "replicas":
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    dim = 1 if how == "columns" else 0
    extra: dict[str, Any] = {"mesh": mesh} if mesh is not None else {}
    extra["shard_placement_fn"] = lambda p: Shard(dim if p.dim() > dim else 0)
    for layer in model.model.layers:
        fully_shard(layer, **extra)
    return fully_shard(model, **extra)


def _load(base: str, directory: str, how: str, tied: bool) -> tuple[int, int, int]:
    config = llama_config(tie_word_embeddings=tied)
    model = _sharded(config, how)
    storage = CountingStorage()
    checkpointer(Path(directory), storage).load_base_model(model, "cpu", None, base)
    expected = llama(3, tie_word_embeddings=tied)
    for name, value in expected.state_dict().items():
        own = model.state_dict()[name]
        assert own.device.type == "cpu"
        assert torch.equal(whole_tensor(own), value), name
    assert torch.equal(dict(model.named_buffers())["model.rotary_emb.inv_freq"], expected.model.rotary_emb.inv_freq)
    if tied:
        assert model.lm_head.weight is model.model.embed_tokens.weight
    held = {id(p): p for p in model.parameters()}.values()
    local = sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in held)
    ids = torch.arange(6).reshape(1, 6)
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)
    return storage.nbytes, local, len(storage.overlaps())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("how", ["rows", "columns", "hsdp", "replicas", "tp"])
def test_meta_models_get_their_shards(tmp_path: Path, how: str, tied: bool) -> None:
    llama(3, tie_word_embeddings=tied).save_pretrained(tmp_path / "base")
    for nbytes, local, overlaps in run(2, _load, str(tmp_path / "base"), str(tmp_path), how, tied):  # type: ignore[misc]
        assert overlaps == 0
        # Rows of column shards are read with the gaps between them, at most as much again.
        assert nbytes == local if how in ("rows", "hsdp", "replicas") else local <= nbytes <= 2 * local


def _initial(how: str, seed: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed + dist.get_rank() if dist.is_initialized() else seed)
    model = _sharded(llama_config(pad_token_id=3), how)
    Checkpointer.initialize_model_weights(model, "cpu")
    return {name: whole_tensor(value).clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("how", ["rows", "columns", "replicas", "hsdp", "tp"])
def test_fresh_values_are_those_of_one_process(how: str) -> None:
    torch.manual_seed(11)
    expected = _initial("none", 11)
    assert torch.equal(expected["model.embed_tokens.weight"][3], torch.zeros(32))
    for rank, found in enumerate(run(2, _initial, how, 11)):
        assert isinstance(found, dict)
        for name, value in expected.items():
            if how == "tp" and rank == 1 and "_proj" not in name:
                continue  # plain parameters of a rank that was seeded otherwise
            assert torch.equal(found[name], value), name


def _classifier(base: str, directory: str) -> list[torch.Tensor]:
    torch.manual_seed(dist.get_rank())
    model = _sharded(llama_config(num_labels=2), "rows", LlamaForSequenceClassification)
    saver = checkpointer(Path(directory), skip_task_head_prefixes_for_base_model=["score."])
    saver.load_base_model(model, "cpu", None, base)
    assert torch.equal(whole_tensor(model.model.embed_tokens.weight), llama(3).model.embed_tokens.weight)
    return [whole_tensor(model.score.weight).detach()]


def test_task_heads_keep_fresh_values_that_ranks_agree_on(tmp_path: Path) -> None:
    llama(3).save_pretrained(tmp_path / "base")
    first, second = run(2, _classifier, str(tmp_path / "base"), str(tmp_path))
    assert torch.equal(first[0], second[0])  # type: ignore[index]
    assert 0.005 < first[0].std() < 0.05  # type: ignore[index]


def _lacking(base: str, directory: str) -> None:
    model = _sharded(llama_config(num_hidden_layers=3), "rows")
    checkpointer(Path(directory)).load_base_model(model, "cpu", None, base)


def test_every_rank_raises_the_same_error(tmp_path: Path) -> None:
    llama(3).save_pretrained(tmp_path / "base")
    error = failure(2, _lacking, str(tmp_path / "base"), str(tmp_path))
    assert isinstance(error, MissingTensorError)
    assert "lacks 9 of the model's tensors: model.layers.2" in str(error)


def _shard_lost(directory: str) -> None:
    model = llama(3)
    fully_shard(model)
    saver = checkpointer(Path(directory), save_consolidated="false")
    saver.save(0, 1, model)
    place = Path(directory) / "checkpoints" / "epoch_0_step_1" / "model"
    if dist.get_rank() == 0:
        sorted(place.glob("*.safetensors"))[-1].unlink()
    dist.barrier()
    saver.load_base_model(_sharded(llama_config(), "rows"), "cpu", None, str(place))


def test_a_base_of_which_a_shard_is_lost_names_the_file(tmp_path: Path) -> None:
    error = failure(2, _shard_lost, str(tmp_path))
    assert isinstance(error, CheckpointNotFoundError)
    assert "this file of the checkpoint, which its manifest lists, is absent" in str(error)
    assert error.path is not None
    assert error.path.endswith(".safetensors")


def _stage(base: str, directory: str) -> None:
    """Pipeline stages: the embedding on one rank, the head on the other; the base ties them."""
    config = llama_config()
    model = on_meta(LlamaForCausalLM, config)
    first = dist.get_rank() == 0
    layers = model.model.layers
    if first:
        model.model.layers = nn.ModuleDict({"0": layers[0]})
        model.model.norm = model.lm_head = None
    else:
        model.model.layers = nn.ModuleDict({"1": layers[1]})
        model.model.embed_tokens = None
    checkpointer(Path(directory)).load_base_model([model], "cpu", None, base)
    expected = llama(3, tie_word_embeddings=True).state_dict()
    own = model.state_dict()
    assert any(name.startswith("model.layers.0") for name in own) == first
    assert all(torch.equal(value, expected[name]) for name, value in own.items())


def test_stages_of_a_tied_base(tmp_path: Path) -> None:
    llama(3, tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    run(2, _stage, str(tmp_path / "base"), str(tmp_path))


def _adapted(base: str, directory: str) -> None:
    from peft import LoraConfig, get_peft_model

    model = on_meta(BertModel, BertConfig.from_pretrained(base))
    config = LoraConfig(r=4, target_modules=["query", "value"], modules_to_save=["pooler"])
    adapted = get_peft_model(model, config)
    for layer in model.encoder.layer:
        fully_shard(layer)
    fully_shard(adapted)
    checkpointer(Path(directory)).load_base_model(adapted, "cpu", None, base)
    expected = BertModel.from_pretrained(base).state_dict()
    state = model.state_dict()
    for name, value in state.items():
        plain = name.replace(".base_layer", "").replace(".original_module", "").replace(".modules_to_save.default", "")
        if "lora_" not in name:
            assert torch.equal(whole_tensor(value), expected[plain]), name
        elif "lora_B" in name:
            assert whole_tensor(value).count_nonzero() == 0
        else:
            assert 0 < whole_tensor(value).abs().max() < 1


def test_models_with_adapters(tmp_path: Path) -> None:
    config = BertConfig(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
    BertModel(config).save_pretrained(tmp_path / "base")
    run(2, _adapted, str(tmp_path / "base"), str(tmp_path))
