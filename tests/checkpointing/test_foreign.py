"""Directories whose files have names of another time or another tool, opened by `load_model` and `restore`."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from tests.base.support import checkpointer, whole_tensor
from tests.convert.tiny_models import build
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoConfig, BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel

from shardwise.checkpointing.loading.foreign_optimizers import foreign_schedules
from shardwise.errors import MissingTensorError, MisuseError, ShardwiseError, StateFormatError, UnexpectedTensorError

Tensors = dict[str, torch.Tensor]


def bert() -> BertForMaskedLM:
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    return BertForMaskedLM(BertConfig(**sizes, intermediate_size=48, max_position_embeddings=16))


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=16))


def llava() -> Any:
    return build("llava")


def qwen() -> Any:
    return build("qwen3_moe")


def old_bert(saved: Tensors, model: nn.Module) -> Tensors:
    """The endings of the first checkpoints, a buffer that was kept then, and the tied decoder beside the embedding."""
    out = {}
    for name, tensor in saved.items():
        if "LayerNorm" in name:
            name = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
        out[name] = tensor
    out["bert.embeddings.position_ids"] = torch.arange(16).unsqueeze(0)
    out["cls.predictions.decoder.weight"] = out["bert.embeddings.word_embeddings.weight"].clone()
    return out


def old_gpt2(saved: Tensors, model: nn.Module) -> Tensors:
    """As on the hub: no prefix, the causal mask of each layer; here also the head beside the embedding."""
    out = {name.removeprefix("transformer."): tensor for name, tensor in saved.items()}
    out |= {f"h.{n}.attn.bias": torch.ones(1, 1, 16, 16).tril() for n in range(2)}
    return out | {"lm_head.weight": out["wte.weight"].clone()}


def head_alone(saved: Tensors, model: nn.Module) -> Tensors:
    """The embedding under the head's name only."""
    out = old_gpt2(saved, model)
    return {name: tensor for name, tensor in out.items() if name != "wte.weight"}


def authors_llava(saved: Tensors, model: nn.Module) -> Tensors:
    return {name.replace("vision_tower.", "vision_tower.vision_model."): tensor for name, tensor in saved.items()}


def fused_without_prefix(saved: Tensors, model: nn.Module) -> Tensors:
    """Experts as the model has them, and everything without the base model's prefix."""
    return {name.removeprefix("model."): tensor.clone() for name, tensor in model.state_dict().items()}


def rename_directory(directory: Path, change: Callable[[Tensors, nn.Module], Tensors], model: nn.Module) -> None:
    saved = load_file(directory / "model.safetensors")
    changed = change(saved, model)
    assert set(changed) != set(saved)
    save_file(changed, directory / "model.safetensors", metadata={"format": "pt"})


def fresh(make: Callable[[], Any], spread: bool) -> Any:
    torch.manual_seed(99)
    model = make()
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.fill_(0.5)
    if not spread:
        return model
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            for layer in module:
                fully_shard(layer)
    return fully_shard(model)


def same(model: nn.Module, expected: nn.Module) -> None:
    state = {name: whole_tensor(tensor) for name, tensor in model.state_dict().items()}
    want = expected.state_dict()
    assert state.keys() == want.keys()
    assert [name for name in want if not torch.equal(state[name], want[name])] == []


def load(make: Callable[[], Any], directory: str, expected: str, spread: bool) -> None:
    model = fresh(make, spread)
    checkpointer(Path(directory).parent).load_model(model, directory)
    same(model, type(make()).from_pretrained(expected))


@pytest.mark.parametrize(
    ("make", "change"),
    [
        (bert, old_bert),
        (gpt2, old_gpt2),
        (gpt2, head_alone),
        (llava, authors_llava),
        (qwen, fused_without_prefix),
    ],
)
def test_other_names_of_the_same_model(
    make: Callable[[], Any], change: Callable[[Tensors, nn.Module], Tensors], tmp_path: Path
) -> None:
    torch.manual_seed(3)
    model = make()
    model.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    rename_directory(tmp_path / "old", change, model)
    assert AutoConfig.from_pretrained(tmp_path / "old").model_type == model.config.model_type
    for world, spread in ((1, False), (2, True)):
        run(world, load, make, str(tmp_path / "old"), str(tmp_path / "new"), spread)


def stage(directory: str, expected: str) -> None:
    """The embedding on one rank, its tied head on the other, which the files do not have."""
    model: Any = fresh(gpt2, False)
    layers, inner = model.transformer.h, model.transformer
    if dist.get_rank() == 0:
        inner.h = nn.ModuleDict({"0": layers[0]})
        inner.ln_f = model.lm_head = None
    else:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        inner.h = nn.ModuleDict({"1": layers[1]})
        inner.wte = inner.wpe = None
    checkpointer(Path(directory).parent).load_model([model], directory)
    want = GPT2LMHeadModel.from_pretrained(expected).state_dict()
    state = model.state_dict()
    assert [name for name, tensor in state.items() if not torch.equal(tensor, want[name])] == []
    assert ("lm_head.weight" in state) == (dist.get_rank() == 1)


def without_head(saved: Tensors, model: nn.Module) -> Tensors:
    return {name: tensor for name, tensor in old_gpt2(saved, model).items() if name != "lm_head.weight"}


def test_a_stage_takes_its_tied_head_from_the_embedding(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = gpt2()
    model.save_pretrained(tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    rename_directory(tmp_path / "old", without_head, model)
    run(2, stage, str(tmp_path / "old"), str(tmp_path / "new"))


def restore(root: str, expected: str) -> None:
    model = fresh(bert, True)
    with checkpointer(Path(root)) as engine:
        record = engine.restore(model, restore_from=str(Path(root) / "checkpoints" / "epoch_0_step_3"))
    assert record is not None
    assert record.step == 3
    same(model, BertForMaskedLM.from_pretrained(expected))


def test_restore_opens_them_too(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = bert()
    model.save_pretrained(tmp_path / "new")
    place = tmp_path / "checkpoints" / "epoch_0_step_3" / "model"
    shutil.copytree(tmp_path / "new", place)
    rename_directory(place, old_bert, model)
    run(2, restore, str(tmp_path), str(tmp_path / "new"))


def _without(name: str, saved: Tensors, model: nn.Module) -> Tensors:
    out = old_bert(saved, model)
    out[name.replace("dense", "densely")] = out.pop(name)
    return out


def test_what_is_missing_is_named_with_the_nearest(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = bert()
    model.save_pretrained(tmp_path / "old")
    name = "bert.encoder.layer.1.output.dense.weight"
    rename_directory(tmp_path / "old", lambda saved, m: _without(name, saved, m), model)
    error = failure(2, load, bert, str(tmp_path / "old"), str(tmp_path / "old"), True)
    assert isinstance(error, MissingTensorError)
    assert error.tensor == name
    assert name.replace("dense", "densely") in str(error)


def test_what_no_model_wants_is_named(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = gpt2()
    model.save_pretrained(tmp_path / "old")
    rename_directory(tmp_path / "old", lambda s, m: old_gpt2(s, m) | {"h.0.attn.scale": torch.ones(1)}, model)
    error = failure(2, load, gpt2, str(tmp_path / "old"), str(tmp_path / "old"), True)
    assert isinstance(error, UnexpectedTensorError)
    assert error.tensor == "h.0.attn.scale"


def test_tied_tensors_that_differ_are_an_error_under_any_name(tmp_path: Path) -> None:
    from shardwise.errors import TensorError

    torch.manual_seed(3)
    model = gpt2()
    model.save_pretrained(tmp_path / "old")
    rename_directory(tmp_path / "old", lambda s, m: old_gpt2(s, m) | {"lm_head.weight": torch.ones(60, 32)}, model)
    error = failure(2, load, gpt2, str(tmp_path / "old"), str(tmp_path / "old"), True)
    assert type(error) is TensorError
    assert error.tensor == "lm_head.weight"


@pytest.mark.parametrize(("saved", "error"), [("text", StateFormatError), ({"T_max": 4}, MisuseError)])
def test_a_scheduler_that_does_not_fit_can_be_left_out_without_the_optimizer(
    tmp_path: Path, saved: object, error: type[ShardwiseError]
) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.raises(error) as raised:
        foreign_schedules([scheduler], {"scheduler": saved}, False, tmp_path)
    assert str(raised.value.hint).endswith("Or restore without it, and it starts afresh.")


@pytest.mark.parametrize("lists", [1, 2])
def test_schedulers_are_told_apart_by_their_order_in_one_list_alone(tmp_path: Path, lists: int) -> None:
    """Which of two lists comes first is not known."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedulers = [torch.optim.lr_scheduler.StepLR(optimizer, size) for size in (1, 7)]
    states = [scheduler.state_dict() for scheduler in schedulers]
    saved = (
        {"schedulers": states}
        if lists == 1
        else {"warm": {"schedulers": states[:1]}, "cool": {"schedulers": states[1:]}}
    )
    dcp.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), **saved}, checkpoint_id=tmp_path / "dcp"
    )
    engine = checkpointer(tmp_path / "run")
    if lists == 2:
        with pytest.raises(MisuseError, match="which is which is not known"):
            engine.restore(model, optimizer, schedulers, restore_from=tmp_path / "dcp")
        return
    for scheduler in schedulers:
        scheduler.step_size = 3
    engine.restore(model, optimizer, schedulers, restore_from=tmp_path / "dcp")
    assert [scheduler.step_size for scheduler in schedulers] == [1, 7]
