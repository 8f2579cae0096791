"""Modules that share a parameter when they are saved and have one each when they are loaded, and the other way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from tests.engine.setups import checkpointer
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import CheckpointingConfig
from shardwise.errors import MissingTensorError, TensorError
from shardwise.format.manifest import AliasRecord, encode_manifest, read_manifest
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify
from shardwise.stateful_wrappers import ModelState, OptimizerState


class Pair(nn.Module):
    """Two layers that may be one, and a third of their own."""

    def __init__(self, shared: bool) -> None:
        super().__init__()
        self.a, self.own, self.b = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)
        if shared:
            self.b.weight = self.a.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(torch.relu(self.own(torch.relu(self.a(x)))))


def build(shared: bool, seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model: nn.Module = Pair(shared)
    if dist.get_world_size() > 1:
        model = fully_shard(model)
    return model, torch.optim.AdamW(model.parameters(), lr=0.1)


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    model(torch.linspace(-1, 1, 24).view(4, 6)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    found = ModelState(model).state_dict() | OptimizerState(optimizer, model).state_dict()
    return {n: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for n, t in found.items()}


def save(root: Path, shared: bool, settings: dict[str, object]) -> dict[str, torch.Tensor]:
    model, optimizer = build(shared, 0)
    step(model, optimizer)
    with checkpointer(root, **settings) as engine:
        engine.save(0, 1, model, optimizer)
        engine.save_model(model, root / "alone")
        engine.save_optimizer(optimizer, model, root / "alone")
    return whole(model, optimizer)


def load(root: Path, shared: bool, settings: dict[str, object], alone: bool = False) -> dict[str, torch.Tensor]:
    model, optimizer = build(shared, 1)
    with checkpointer(root, **settings) as engine:
        if alone:
            engine.load_model(model, root / "alone" / "model")
            engine.load_optimizer(optimizer, model, root / "alone")
        else:
            engine.restore(model, optimizer, verify="digests")
    found = whole(model, optimizer)
    step(model, optimizer)
    return found


def expected(saved: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same under the further name too."""
    further = {n.replace("a.weight", "b.weight"): t for n, t in saved.items() if "a.weight" in n}
    return {**saved, **further}


def same(found: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> bool:
    return found.keys() == want.keys() and all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("worlds", [(1, 2), (2, 1), (2, 2)])
@pytest.mark.parametrize("settings", MODES)
def test_each_gets_the_shared_values(tmp_path: Path, settings: dict[str, object], worlds: tuple[int, int]) -> None:
    saving, loading = worlds
    want = expected(run(saving, save, tmp_path, True, settings)[0])  # type: ignore[arg-type]
    assert "state.b.weight.exp_avg_sq" in want
    for alone in (False, True):
        assert all(same(found, want) for found in run(loading, load, tmp_path, False, settings, alone))  # type: ignore[arg-type]
    assert verify(tmp_path).status == "whole"
    assert read_manifest(tmp_path / "epoch_0_step_1").aliases == (AliasRecord("model", "b.weight", "a.weight"),)


def test_what_shares_again_needs_no_further_names(tmp_path: Path) -> None:
    saved = run(2, save, tmp_path, True, EVERY)
    assert all(map(same, run(2, load, tmp_path, True, EVERY), saved))  # type: ignore[arg-type]


def test_a_checkpoint_of_before_lacks_the_tensor(tmp_path: Path) -> None:
    run(2, save, tmp_path, True, EVERY)
    manifest = tmp_path / "epoch_0_step_1" / "manifest.json"
    manifest.write_bytes(encode_manifest(replace(read_manifest(manifest), aliases=())))
    error = failure(2, load, tmp_path, False, EVERY)
    assert isinstance(error, MissingTensorError)
    assert error.tensor == "b.weight"
    assert run(2, load, tmp_path, True, EVERY)


def test_unshared_values_that_differ_are_not_shared(tmp_path: Path) -> None:
    run(2, save, tmp_path, False, EVERY)
    assert read_manifest(tmp_path / "epoch_0_step_1").aliases == ()
    error = failure(2, load, tmp_path, True, EVERY)
    assert isinstance(error, TensorError)
    assert error.tensor == "b.weight"
    assert "'a.weight'" in str(error)


def test_the_export_made_later_tells_too(tmp_path: Path) -> None:
    run(2, save, tmp_path, True, SHARDS)
    export = consolidate(tmp_path).path
    for model in (Pair(False), Pair(True)):
        CheckpointingConfig(checkpoint_dir=tmp_path).build().load_model(model, export)
        assert torch.equal(model.a.weight, model.b.weight)
        assert torch.equal(model.a.weight, load_file(export / "model.safetensors")["a.weight"])


def test_names_are_mapped_like_those_of_files(tmp_path: Path) -> None:
    run(1, save, tmp_path, True, EVERY)
    model = nn.ModuleDict({"net": Pair(False)})
    engine = CheckpointingConfig(checkpoint_dir=tmp_path).build()
    engine.load_model(model, tmp_path / "epoch_0_step_1" / "model", key_mapping={r"^": "net."})
    assert torch.equal(model["net"].b.weight, model["net"].a.weight)


def test_a_share_that_came_later_is_told(tmp_path: Path) -> None:
    model, other = Pair(False), Pair(False)
    with torch.no_grad():
        model.b.weight.copy_(model.a.weight)
    with CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=True).build() as engine:
        engine.save(0, 1, model)
        model.b.weight = model.a.weight
        engine.save(0, 2, model)
        model.own.weight = model.a.weight
        engine.save(0, 3, model)
        engine.restore(other)
    kept = {alias.name: alias.kept for alias in read_manifest(tmp_path / "epoch_0_step_3").aliases}
    assert kept == {"b.weight": "a.weight", "own.weight": "a.weight"}
    assert torch.equal(other.own.weight, model.a.weight)


def test_exact_values_beside_a_rounded_export(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    state = {name: tensor.to(torch.bfloat16) for name, tensor in Pair(False).state_dict().items()}
    save_file(state, base / "model.safetensors")
    model, other = Pair(True), Pair(False)
    config = CheckpointingConfig(
        checkpoint_dir=tmp_path / "run", save_consolidated=True, original_model_root_dir=str(base)
    )
    with config.build() as engine:
        engine.save(0, 1, model)
        engine.restore(other)
    assert torch.equal(other.b.weight, model.a.weight)


# --- pipeline stages ------------------------------------------------------------------------------------------------


def stages(root: Path, settings: dict[str, object]) -> None:
    rank = dist.get_rank()

    def stage(shared: bool) -> nn.Module:
        return nn.ModuleDict({f"stage{rank}": Pair(shared and rank == 1)})

    torch.manual_seed(rank)
    model, other = stage(True), stage(False)
    config = CheckpointingConfig(checkpoint_dir=root, **settings)  # type: ignore[arg-type]
    with config.build(dp_rank=0, tp_rank=0, pp_rank=rank) as engine:
        engine.save(0, 1, model)
        engine.restore(other)
    want, found = model.state_dict(), other.state_dict()
    assert all(torch.equal(found[name], want[name]) for name in want)


@pytest.mark.parametrize("settings", MODES)
def test_another_stage_shares(tmp_path: Path, settings: dict[str, object]) -> None:
    run(2, stages, tmp_path, settings)
    aliases = read_manifest(tmp_path / "epoch_0_step_1").aliases
    assert aliases == (AliasRecord("model", "stage1.b.weight", "stage1.a.weight"),)


def test_parts_of_one_rank_share(tmp_path: Path) -> None:
    def parts(shared: bool) -> list[nn.Module]:
        first, last = nn.ModuleDict({"a": nn.Linear(3, 3)}), nn.ModuleDict({"b": nn.Linear(3, 3)})
        if shared:
            last["b"].weight = first["a"].weight
        return [first, last]

    model, other = parts(True), parts(False)
    with CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=True).build() as engine:
        engine.save(0, 1, model)
        engine.restore(other)
    assert torch.equal(other[1]["b"].weight, model[0]["a"].weight)  # type: ignore[index]


# --- transformers ---------------------------------------------------------------------------------------------------


def llama(shared: bool, **settings: object) -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **settings))  # type: ignore[arg-type]
    if shared:
        model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    return model


@pytest.mark.parametrize("settings", [EVERY, SHARDS])
@pytest.mark.parametrize("tied", [False, True])
def test_transformers_finds_every_weight_of_an_undeclared_share(
    tmp_path: Path, settings: dict[str, object], tied: bool
) -> None:
    model = llama(True, tie_word_embeddings=tied)
    with CheckpointingConfig(checkpoint_dir=tmp_path, **settings).build() as engine:  # type: ignore[arg-type]
        path = engine.save(0, 1, model)
    assert path is not None
    if settings is SHARDS:
        consolidate(tmp_path)
    export = path / "model" / "consolidated"
    assert ("lm_head.weight" in load_file(export / "model.safetensors")) is not tied
    opened, told = LlamaForCausalLM.from_pretrained(export, output_loading_info=True)
    assert not any(told.values())
    assert all(torch.equal(opened.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    for other in (llama(False, tie_word_embeddings=tied), llama(True, tie_word_embeddings=tied)):
        engine.load_model(other, path / "model")
        assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
        base = llama(True, tie_word_embeddings=tied)
        engine.load_base_model(base, "cpu", None, str(export))
        assert torch.equal(base.model.layers[1].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


@pytest.mark.parametrize("settings", MODES)
def test_a_declared_tie_is_not_undone(tmp_path: Path, settings: dict[str, object]) -> None:
    model, other = llama(False, tie_word_embeddings=True), llama(False, tie_word_embeddings=False)
    with CheckpointingConfig(checkpoint_dir=tmp_path, **settings).build() as engine:  # type: ignore[arg-type]
        engine.save(0, 1, model)
        with pytest.raises(MissingTensorError, match=r"lm_head\.weight"):
            engine.restore(other)
    assert read_manifest(tmp_path / "epoch_0_step_1").aliases == ()


def test_a_head_that_is_shared_against_the_configuration_is_written(tmp_path: Path) -> None:
    model = llama(False, tie_word_embeddings=False)
    model.lm_head.weight = model.model.embed_tokens.weight
    with CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=True).build() as engine:
        path = engine.save(0, 1, model)
    assert path is not None
    opened, told = LlamaForCausalLM.from_pretrained(path / "model" / "consolidated", output_loading_info=True)
    assert not any(told.values())
    assert torch.equal(opened.lm_head.weight, model.model.embed_tokens.weight)
