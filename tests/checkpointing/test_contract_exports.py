"""What an export leaves out, a resume has; and base models under the same contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.checkpointing.contract_models import Derived, ExtraTensor, HalfOnDisk, TransposedOnDisk, differing
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from tests.support.ranks import run
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.ops.consolidate import consolidate
from shardwise.ops.verify import verify

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


class WithTower(LlamaForCausalLM):
    """Keeps a layer out of its files that is trained nevertheless."""

    _keys_to_ignore_on_save = ["tower.weight"]  # noqa: RUF012 - transformers' way

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.tower = nn.Linear(4, 4, bias=False)
        self.post_init()


def with_tower(seed: int, **settings: Any) -> WithTower:
    torch.manual_seed(seed)
    return WithTower(LlamaConfig(**SMALL, **settings))


def checkpointer(root: Path, mode: dict[str, Any]) -> Checkpointer:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpointer(CheckpointingConfig(checkpoint_dir=root, **mode), rank, 0, 0)


@pytest.mark.parametrize("mode", MODES)
def test_what_a_class_keeps_out_of_files_is_in_what_resumes(tmp_path: Path, mode: dict[str, Any]) -> None:
    model = with_tower(0)
    with checkpointer(tmp_path, mode) as writer:
        path = writer.save(0, 0, model)
    assert path is not None
    assert verify(path).status == "whole"
    restored = with_tower(1)
    with checkpointer(tmp_path, mode) as reader:
        reader.restore(restored)
    assert differing(restored.state_dict(), model.state_dict()) == []
    if mode.get("save_consolidated") == "every":
        exported = [name for file in (path / "model/consolidated").glob("*.safetensors") for name in load_file(file)]
        assert not [name for name in exported if "tower" in name]
        loaded = LlamaForCausalLM.from_pretrained(path / "model" / "consolidated")
        assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)


def save_on_ranks(root: Path, mode: dict[str, Any]) -> list[str]:
    model, restored = with_tower(0), with_tower(1)
    with checkpointer(root, mode) as both:
        both.save(0, 0, model)
        both.restore(restored)
    return differing(restored.state_dict(), model.state_dict())


@pytest.mark.parametrize("mode", [EVERY, SHARDS], ids=["every", "shards"])
def test_on_two_ranks_too(tmp_path: Path, mode: dict[str, Any]) -> None:
    assert run(2, save_on_ranks, tmp_path, mode) == [[], []]


def test_an_export_made_later_leaves_it_out_as_well(tmp_path: Path) -> None:
    model = with_tower(0)
    with checkpointer(tmp_path, SHARDS) as writer:
        path = writer.save(0, 0, model)
    assert path is not None
    report = consolidate(path)
    names = [name for file in report.path.glob("*.safetensors") for name in load_file(file)]
    assert "lm_head.weight" in names
    assert not [name for name in names if "tower" in name]


def test_files_without_it_leave_it_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = with_tower(0)
    model.save_pretrained(tmp_path)
    restored = with_tower(1)
    tower = restored.tower.weight.detach().clone()
    with checkpointer(tmp_path / "x", EVERY) as reader:
        reader.load_model(restored, tmp_path)
    assert torch.equal(restored.lm_head.weight, model.lm_head.weight)
    assert torch.equal(restored.tower.weight, tower)
    assert "tower.weight, which the model's class keeps out of files" in caplog.text


class Odd(nn.Module):
    """Modules with ways of their own, as a base model has them."""

    def __init__(self) -> None:
        super().__init__()
        self.transposed = TransposedOnDisk()
        self.halved = HalfOnDisk()
        self.derived = Derived()
        self.extra = ExtraTensor()
        self.head = TransposedOnDisk()

    def reset_parameters(self) -> None:
        for parameter in self.parameters(recurse=False):
            parameter.fill_(1)


def base(directory: Path) -> Odd:
    torch.manual_seed(0)
    model = Odd()
    tensors = {n: t for n, t in model.state_dict().items() if "extra_state" not in n and not n.startswith("head")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return model


@pytest.mark.parametrize("is_meta", [False, True], ids=["memory", "meta"])
def test_a_base_model(tmp_path: Path, is_meta: bool) -> None:
    reference = base(tmp_path)
    config = CheckpointingConfig(checkpoint_dir=tmp_path / "x", skip_task_head_prefixes_for_base_model=["head."])
    torch.manual_seed(1)
    if is_meta:
        with torch.device("meta"):
            model = Odd()
        for module in (model.transposed, model.head):
            module.reset_parameters = lambda m=module: m.weight.fill_(5)  # type: ignore[misc, assignment]
    else:
        model = Odd()
        model.head.weight.data.fill_(5)
    with Checkpointer(config) as reader:
        reader.load_base_model(model, "cpu", None, str(tmp_path))
    for name in ("transposed.weight", "halved.bias", "derived.weight", "extra.weight"):
        assert torch.equal(model.get_parameter(name), reference.get_parameter(name)), name
    assert torch.equal(model.halved.weight, reference.halved.weight.half().float())
    assert torch.equal(model.derived.packed, reference.derived.weight.detach().t())
    assert bool((model.head.weight == 5).all())


def test_a_base_in_another_dtype(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": TransposedOnDisk(), "b": nn.Linear(4, 4)}).bfloat16()
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, tmp_path / "model.safetensors")
    restored = nn.ModuleDict({"a": TransposedOnDisk(), "b": nn.Linear(4, 4)})
    with checkpointer(tmp_path / "x", EVERY) as reader:
        reader.load_model(restored, tmp_path, is_init_step=True)
    assert torch.equal(restored["a"].weight, model["a"].weight.float())


def test_an_export_in_the_dtype_of_its_base_resumes_exactly(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": TransposedOnDisk(), "b": nn.Linear(4, 4)})
    (tmp_path / "base").mkdir()
    save_file({n: t.bfloat16() for n, t in model.state_dict().items()}, tmp_path / "base" / "model.safetensors")
    mode = {**EVERY, "model_repo_id": str(tmp_path / "base")}
    restored = nn.ModuleDict({"a": TransposedOnDisk(), "b": nn.Linear(4, 4)})
    with checkpointer(tmp_path / "x", mode) as both:
        path = both.save(0, 0, model)
        both.restore(restored)
    assert path is not None
    exported = load_file(path / "model" / "consolidated" / "model.safetensors")
    assert torch.equal(exported["a.weight"], model["a"].weight.t().bfloat16())
    assert differing(restored.state_dict(), model.state_dict()) == []


def test_a_hook_that_comes_later_is_seen(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))

    def negate(module: nn.Module, state: dict[str, Any], prefix: str, *_: object) -> None:
        state[prefix + "weight"] = -state[prefix + "weight"]

    with checkpointer(tmp_path, EVERY) as both:
        both.save(0, 0, model)
        both.save(0, 1, model)
        before = model[1].weight.detach().clone()
        handle = model[1].register_load_state_dict_pre_hook(negate)
        both.restore(model)
        assert torch.equal(model[1].weight, -before)
        handle.remove()
        both.restore(model)
        assert torch.equal(model[1].weight, before)
