"""Adapters whole: saved after an evaluation, with all that trains, under whatever names; or refused early."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tests.clients.adapters_whole import (
    KINDS,
    adapted,
    checkpointer,
    save_evaluated,
    save_gathered,
    save_more,
    save_stages,
    staged,
    two_alone,
)
from tests.clients.lora import step, values
from tests.peft.models import SIZES, causal, logits, randomise
from tests.peft.own_models import OwnConfig, dense
from tests.peft.test_models import same_json
from tests.support.ranks import failure, fresh, run
from torch import nn

import peft
from shardwise import CheckpointingConfig
from shardwise.errors import (
    AdapterError,
    MissingTensorError,
    MisuseError,
    ModuleStateError,
    ShardwiseError,
    UnexpectedTensorError,
)

WEIGHTS, EXTRA = "adapter_model.safetensors", "adapter_extra.safetensors"


def same_as_pefts(ours: Path, model: nn.Module, reference: Path, name: str = "default") -> None:
    """The files are those that peft writes, byte for byte."""
    model.save_pretrained(reference, selected_adapters=[name])
    below = "" if name == "default" else name
    assert (ours / below / WEIGHTS).read_bytes() == (reference / below / WEIGHTS).read_bytes()
    same_json(ours / below / "adapter_config.json", reference / below / "adapter_config.json")


def gathered(kind: str, path: Path) -> nn.Module:
    """The trained model in one process."""
    model = adapted(kind, 0)
    trained = {name: tensors[0] for name, tensors in torch.load(path).items()}
    assert set(trained) == {name for name, p in model.named_parameters() if p.requires_grad}
    model.load_state_dict(trained, strict=False)
    return model.eval()


@pytest.mark.parametrize(("kind", "reshard"), [("head", True), ("embeddings", True), ("own", True), ("tokens", False)])
def test_an_evaluation_comes_before_a_save_and_a_restore(kind: str, reshard: bool, tmp_path: Path) -> None:
    run(2, save_evaluated, kind, str(tmp_path), False, reshard)
    if kind in KINDS:
        same_as_pefts(tmp_path / "LATEST/model", gathered(kind, tmp_path / "values.pt"), tmp_path / "reference")


@pytest.mark.parametrize(("kind", "reshard"), [("head", True), ("embeddings", False)])
def test_a_save_in_the_background_holds_nothing_that_fsdp_frees(kind: str, reshard: bool, tmp_path: Path) -> None:
    output, store = tmp_path / "output", str(tmp_path / "store")
    code = fresh(two_alone, store, save_evaluated, kind, str(tmp_path), True, reshard, output=output, seconds=200)
    assert code == 0, output.with_name("output.err").read_text()
    same_as_pefts(tmp_path / "LATEST/model", gathered(kind, tmp_path / "values.pt"), tmp_path / "reference")


def test_an_optimizer_of_gathered_parameters_is_told_what_to_do(tmp_path: Path) -> None:
    error = failure(2, save_gathered, str(tmp_path))
    assert isinstance(error, MisuseError)
    assert "change nothing that the model keeps" in str(error)
    assert "model.reshard()" in str(error)


def trained(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1.0)


def test_what_is_unfrozen_beside_the_adapter_is_restored(tmp_path: Path) -> None:
    run(2, save_more, str(tmp_path))
    saved = torch.load(tmp_path / "values.pt")
    model = adapted("more", 9)
    optimizer = trained(model)
    with checkpointer(tmp_path) as loader:
        loader.restore(model, optimizer)
    restored = values(model, optimizer)
    assert saved.keys() == restored.keys()
    for name, tensors in saved.items():
        assert all(torch.equal(a, b) for a, b in zip(restored[name], tensors, strict=True)), name
    same_as_pefts(tmp_path / "LATEST/model", gathered("more", tmp_path / "values.pt"), tmp_path / "reference")

    frozen = adapted("plain", 9)  # its norms are not trained, and are those of the checkpoint all the same
    with checkpointer(tmp_path) as loader:
        loader.load_model(frozen, tmp_path / "LATEST/model")
    assert torch.equal(logits(frozen), logits(model))

    smaller = peft.get_peft_model(causal("llama"), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    del smaller.base_model.model.model.norm
    with checkpointer(tmp_path) as loader, pytest.raises(UnexpectedTensorError, match="norm"):
        loader.load_model(smaller, tmp_path / "LATEST/model")


def test_what_the_checkpoint_lacks_is_said(tmp_path: Path) -> None:
    plain, more = adapted("plain", 1), adapted("more", 9)
    plain.save_pretrained(tmp_path / "theirs")
    before = more.base_model.model.model.norm.weight.detach().clone()
    with checkpointer(tmp_path) as loader:
        with pytest.raises(MissingTensorError, match=r"beside its adapter .*embed_tokens"):
            loader.load_model(more, tmp_path / "theirs")
        loader.load_model(more, tmp_path / "theirs", allow_checkpoint_key_subset=True)
    assert torch.equal(more.base_model.model.model.norm.weight, before)
    ours, theirs = (dict(m.named_parameters()) for m in (more, plain))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora_" in name)


def test_what_was_trained_and_is_frozen_by_now_is_saved(tmp_path: Path) -> None:
    model = adapted("more", 1)
    optimizer = step(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    with checkpointer(tmp_path) as saver:
        saver.save(0, 1, model, optimizer)
    other = adapted("plain", 9)
    with checkpointer(tmp_path) as loader:
        loader.restore(other)
    assert torch.equal(logits(other), logits(model))


def test_a_base_that_nobody_has_frozen_is_saved_where_it_was_trained(tmp_path: Path) -> None:
    model, other = dense(OwnConfig()), adapted("own", 9)
    step(model.requires_grad_(True))  # without its optimizer, nothing says that the base was trained
    with checkpointer(tmp_path) as saver:
        saver.save(0, 1, model, peft_config=OwnConfig())
        assert not (tmp_path / "LATEST/model" / EXTRA).exists()
        saver.save(0, 2, model, step(model), peft_config=OwnConfig())
        saver.restore(other)
    ours, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm, self.depthwise = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, groups=4)
        self.register_buffer("packed", torch.ones(4, 4, dtype=torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.depthwise(self.norm(self.stem(x)))


def test_running_statistics_are_restored(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return peft.get_peft_model(Convolutions(), peft.LoraConfig(r=4, target_modules=["stem"]))

    model, other = build(), build()
    batch = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    model.train()(batch)
    model.eval()  # statistics have moved, whichever mode the model is in when it is saved
    with checkpointer(tmp_path) as saver:
        saver.save(0, 1, model)
        saver.restore(other)
    assert torch.equal(model(batch), other.eval()(batch))
    names = set(load_file(tmp_path / "LATEST/model" / EXTRA))
    assert names == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


class Named(nn.Module):
    """Modules whose names have numbers in them that count no layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        proj = nn.Module()
        proj.proj = nn.Linear(8, 8)
        self.ff = nn.Module()
        self.ff.net = nn.ModuleList([proj, nn.Dropout(), nn.Linear(8, 8)])
        self.heads = nn.ModuleDict({"3": nn.Sequential(nn.Linear(8, 3)), "7": nn.Sequential(nn.Linear(8, 7))})
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)


def llama(**changes: object) -> nn.Module:
    import transformers as tf

    torch.manual_seed(7)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**{**SIZES, **changes})).eval()


def pruned() -> nn.Module:
    model = llama(num_hidden_layers=4)
    model.model.layers = nn.ModuleList([model.model.layers[n] for n in (0, 1, 3)])
    return model


def _blocks() -> dict[str, object]:
    from peft.tuners.lora.config import BdLoraConfig

    return {"use_bdlora": BdLoraConfig(target_modules_bd_a=["o_proj"], target_modules_bd_b=["q_proj"], nblocks=2)}


Q = "self_attn.q_proj"
WHOLE: dict[str, tuple[Callable[[], nn.Module], dict[str, object]]] = {
    "a path that ends like a layer's": (Named, {"target_modules": ["ff.net.0.proj", "net.2"]}),
    "heads by number": (Named, {"target_modules": ["proj"]}),
    "attention as one module": (Named, {"target_modules": ["attn"], "rank_pattern": {"attn": 2}}),
    "groups": (Convolutions, {"target_modules": ["stem", "depthwise"]}),
    "a layer by number": (llama, {"target_modules": [f"layers.1.{Q}", "v_proj"]}),
    "an exception": (
        llama,
        {"target_modules": [f"model.layers.{n}.{Q}" for n in (0, 1)], "exclude_modules": [f"layers.0.{Q}"]},
    ),
    "a target that nothing matches": (llama, {"target_modules": ["q_proj", "layers.5.mlp.up_proj"]}),
    "ties": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "pruned": (pruned, {"target_modules": ["q_proj"]}),
    "blocks": (llama, {"target_modules": ["q_proj", "o_proj"], **_blocks()}),
}


@pytest.mark.parametrize("case", WHOLE)
def test_whole_adapters_are_not_refused(case: str, tmp_path: Path) -> None:
    make, settings = WHOLE[case]
    models = [peft.get_peft_model(make(), peft.LoraConfig(r=4, **settings)) for _ in range(2)]
    for seed, model in enumerate(models):
        randomise(model, seed)
    with checkpointer(tmp_path) as saver:
        saver.restore(models[0])
        saver.save(0, 1, models[0])
        saver.restore(models[1])
    same_as_pefts(tmp_path / "LATEST/model", models[0], tmp_path / "reference")
    ours, theirs = (m.state_dict() for m in models)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours if "lora_" in name)


def test_adapters_called_by_numbers(tmp_path: Path) -> None:
    def build(seed: int) -> nn.Module:
        config = peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"])
        model = peft.get_peft_model(llama(), config, adapter_name="2024")
        for name in ("0", "1"):
            model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name or "modules_to_save" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
        return model

    model, other = build(0), build(1)
    with checkpointer(tmp_path) as saver:
        saver.save(0, 1, model)
        saver.restore(other)
    kept = [name for name, _ in model.named_parameters() if "lora_" in name or "modules_to_save" in name]
    ours, theirs = model.state_dict(), other.state_dict()
    assert len(kept) == 4 + 5 + 8 + 8  # modules_to_save matches every norm
    assert all(torch.equal(ours[name], theirs[name]) for name in kept)
    names = {}
    for adapter in ("2024", "0", "1"):
        with safe_open(tmp_path / "LATEST/model" / adapter / WEIGHTS, "pt") as reader:
            names[adapter] = sorted(reader.keys())
    # peft itself drops the tensors of layer 1 from every adapter beside one called "1".
    prefix = "base_model.model.model.layers"
    assert names["0"] == names["1"]
    assert names["1"] == sorted(
        f"{prefix}.{n}.self_attn.{p}.lora_{s}.weight" for n in (0, 1) for p in ("q_proj", "v_proj") for s in "AB"
    )


def test_stages_that_were_adapted_one_by_one(tmp_path: Path) -> None:
    run(2, save_stages, str(tmp_path), [4, 4])
    config = peft.LoraConfig(r=4, target_modules="all-linear", exclude_modules=["lm_head"], task_type="CAUSAL_LM")
    whole = peft.get_peft_model(causal("llama"), config)
    for rank in range(2):
        parts = {n: p for n, p in staged(rank).named_parameters() if "lora_" in n}
        assert not whole.load_state_dict(parts, strict=False).unexpected_keys
    whole.save_pretrained(tmp_path / "reference")
    saved = tmp_path / "LATEST/model"
    assert set(load_file(saved / EXTRA)) == {"model.norm.weight"}
    assert (saved / WEIGHTS).read_bytes() == (tmp_path / "reference" / WEIGHTS).read_bytes()
    # The last stage has no embeddings, and peft does not know the head for one there; it is in exclude_modules.
    targets = set(peft.LoraConfig.from_pretrained(saved).target_modules)
    assert targets == {*config.target_modules, "lm_head"}
    opened = peft.PeftModel.from_pretrained(causal("llama"), saved).eval()
    assert torch.equal(logits(opened), logits(whole.eval()))


def test_stages_that_contradict_each_other(tmp_path: Path) -> None:
    error = failure(2, save_stages, str(tmp_path), [4, 2])
    assert isinstance(error, AdapterError)
    assert "has r 4 on rank 0 and 2 on rank 1" in str(error)


def test_a_stage_by_itself_is_no_adapter(tmp_path: Path) -> None:
    config = CheckpointingConfig(checkpoint_dir=tmp_path, is_peft=True)
    with config.build(0, 0, 1) as saver, pytest.raises(AdapterError, match=r"pipeline stages \[1\], and not 0"):
        saver.save(0, 1, staged(1))
    with config.build() as saver, pytest.raises(AdapterError, match="the ranks have 1 of 2 layers"):
        saver.restore(staged(0))


def hooked() -> nn.Module:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["norm"]))
    norm = model.base_model.model.model.norm.modules_to_save["default"]
    norm.register_state_dict_post_hook(lambda *state: None)
    return model


def hooked_around() -> nn.Module:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    model.base_model.model.model.layers[0].register_state_dict_post_hook(lambda *state: None)
    return model


def half() -> nn.Module:
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules=["q_proj"]))
    del model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"]
    return model


UNSAVABLE: dict[str, tuple[Callable[[], nn.Module], type[ShardwiseError], str]] = {
    "a hook": (hooked, ModuleStateError, "by its own methods or hooks"),
    "a hook around it": (hooked_around, ModuleStateError, r"layers.0.* by its own methods or hooks"),
    "half a pair": (half, AdapterError, "has no lora_B"),
    "no adapter": (llama, AdapterError, "the model has no adapter, and is_peft is true"),
}


@pytest.mark.parametrize("case", UNSAVABLE)
def test_what_cannot_be_saved_is_said_before_training(case: str, tmp_path: Path) -> None:
    make, kind, message = UNSAVABLE[case]
    with checkpointer(tmp_path / "run") as saver:
        with pytest.raises(kind, match=message):
            saver.restore(make())
        if case != "no adapter":
            llama().save_pretrained(tmp_path / "base")
            with pytest.raises(kind, match=message):
                saver.load_base_model(make(), "cpu", None, str(tmp_path / "base"))
    assert not list(tmp_path.rglob(WEIGHTS))
