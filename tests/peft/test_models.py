"""Adapters made by Hugging Face peft: what is captured equals what peft itself saves."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from tests.peft.models import Parts, causal, logits, randomise, save_captured

from shardwise.addons import PeftAddon, _extract_target_modules, _extract_target_parameters, _get_hf_peft_config
from shardwise.addons.base import SaveHookArgs
from shardwise.errors import AdapterError
from shardwise.peft.capture import capture_adapter
from shardwise.peft.check import check_adapter
from shardwise.peft.config import read_adapter_config

peft = pytest.importorskip("peft")

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

#: Name -> model family, LoraConfig settings.
FEATURES: dict[str, tuple[str, dict[str, object]]] = {
    "plain": ("llama", {"target_modules": LINEAR}),
    "patterns": (
        "llama",
        {
            "target_modules": LINEAR,
            "rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6},
            "alpha_pattern": {"k_proj": 3},
        },
    ),
    "rslora": ("qwen3", {"target_modules": "all-linear", "use_rslora": True}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "regex": ("qwen3", {"target_modules": r".*layers\.1\..*(q|down)_proj"}),
    "modules_to_save": ("llama", {"target_modules": LINEAR, "modules_to_save": ["lm_head", "norm"]}),
    "bias_all": ("qwen2", {"target_modules": LINEAR, "bias": "all"}),
    "bias_lora_only": ("qwen2", {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "lora_bias": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "trainable_tokens": ("llama", {"target_modules": LINEAR, "trainable_token_indices": [1, 5, 9]}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"]}),
    "embedding_dora": ("llama", {"target_modules": ["embed_tokens"], "use_dora": True}),
    "some_layers": ("llama", {"target_modules": LINEAR, "layers_to_transform": [1]}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "experts": ("qwen3_moe", {"target_modules": LINEAR, "target_parameters": EXPERTS}),
    "experts_alone": ("qwen3_moe", {"target_modules": [], "target_parameters": EXPERTS[1:]}),
    "no_task": ("llama", {"target_modules": LINEAR, "task_type": None}),
    "tied": ("llama-tied", {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]}),
    "tied_ensured": (
        "llama-tied",
        {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tied_tokens": ("llama-tied", {"target_modules": LINEAR, "trainable_token_indices": [1, 2]}),
    "layer_replication": ("llama", {"target_modules": LINEAR, "layer_replication": [(0, 2), (1, 2)]}),
    "half": ("llama-bf16", {"target_modules": LINEAR, "modules_to_save": ["lm_head"]}),
}


def adapted(family: str, settings: Mapping[str, object], seed: int = 0) -> nn.Module:
    base = causal(family)
    values = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **settings}
    model = peft.get_peft_model(base, peft.LoraConfig(**values), autocast_adapter_dtype=family != "llama-bf16")
    randomise(model, seed)
    return model


def same_json(ours: Path, theirs: Path) -> None:
    """Lists that peft makes from sets have no order."""

    def sets(value: object) -> object:
        return sorted(value, key=str) if isinstance(value, list) else value

    a, b = json.loads(ours.read_text()), json.loads(theirs.read_text())
    assert {k: sets(v) for k, v in a.items()} == {k: sets(v) for k, v in b.items()}


def same_tensors(ours: Path, theirs: Path) -> None:
    a, b = load_file(ours), load_file(theirs)
    assert set(a) == set(b)
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert a[name].shape == tensor.shape, name
        assert torch.equal(a[name].view(torch.uint8), tensor.view(torch.uint8)), name


def save(model: nn.Module, directory: Path, config: object | None = None, **options: bool) -> None:
    """Write an adapter as the engine does, with the addon's files beside it."""
    args: SaveHookArgs = {"model_state": Parts([model]), "model_path": str(directory), "peft_config": config}
    args["v4_compatible"] = options.get("v4_compatible", False)
    PeftAddon().pre_save(**args)
    save_captured([model], config, directory, **options)
    PeftAddon().post_save(**args)


@pytest.mark.parametrize("feature", FEATURES)
def test_equals_what_peft_saves(feature: str, tmp_path: Path) -> None:
    model = adapted(*FEATURES[feature])
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    same_tensors(tmp_path / "ours/adapter_model.safetensors", tmp_path / "theirs/adapter_model.safetensors")
    same_json(tmp_path / "ours/adapter_config.json", tmp_path / "theirs/adapter_config.json")
    assert json.loads((tmp_path / "ours/automodel_peft_config.json").read_text()) == {}
    captured = capture_adapter([model], None, v4_compatible=False, legacy_paramwrapper_layout=False)
    specs = [entry.spec for entry in captured.files[0].entries]
    check_adapter(specs, read_adapter_config(tmp_path / "ours"), [captured.inventory], layers=2)


#: Other methods whose adapters live in the layers.
METHODS: dict[str, dict[str, object]] = {
    "IA3Config": {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    "LoHaConfig": {"target_modules": LINEAR},
    "OFTConfig": {"target_modules": LINEAR, "oft_block_size": 4},
    "VeraConfig": {"target_modules": ["q_proj", "o_proj"], "r": 4},
    "LNTuningConfig": {"target_modules": ["norm"]},
    "AdaLoraConfig": {"target_modules": LINEAR, "total_step": 10},
    "TrainableTokensConfig": {"token_indices": [1, 2]},
    "FrodConfig": {"target_modules": ["q_proj", "o_proj"]},  # projections that layers share, by kinds of layers
}


@pytest.mark.parametrize("method", METHODS)
def test_other_methods_equal_what_peft_saves(method: str, tmp_path: Path) -> None:
    config = getattr(peft, method)(task_type="CAUSAL_LM", **METHODS[method])
    model = peft.get_peft_model(causal("llama"), config)
    randomise(model, 0)
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    same_tensors(tmp_path / "ours/adapter_model.safetensors", tmp_path / "theirs/adapter_model.safetensors")
    same_json(tmp_path / "ours/adapter_config.json", tmp_path / "theirs/adapter_config.json")


@pytest.mark.parametrize("feature", ["plain", "patterns", "rslora", "dora", "modules_to_save", "embedding", "experts"])
def test_peft_opens_it_with_equal_logits(feature: str, tmp_path: Path) -> None:
    family, settings = FEATURES[feature]
    model = adapted(family, settings)
    save(model, tmp_path)
    opened = peft.PeftModel.from_pretrained(causal(family), tmp_path)
    want = logits(model)
    assert not torch.equal(want, logits(causal(family)))
    assert torch.equal(logits(opened), want)
    assert torch.equal(logits(opened.merge_and_unload()), logits(model.merge_and_unload()))


@pytest.mark.parametrize("task", ["CAUSAL_LM", None])
def test_the_auto_class_finds_the_base_model(task: str | None, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    causal("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=LINEAR, task_type=task))
    randomise(model, 0)
    save(model, tmp_path / "adapter")
    kind = peft.AutoPeftModelForCausalLM if task else peft.AutoPeftModel
    opened = kind.from_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(opened), logits(model.eval()))


def test_the_saved_config_leaves_the_models_alone(tmp_path: Path) -> None:
    model = adapted("llama", {"target_modules": LINEAR, "task_type": None})
    before = model.peft_config["default"].to_dict()
    save(model, tmp_path)
    assert model.peft_config["default"].to_dict() == before
    assert model.peft_config["default"].inference_mode is False


@pytest.mark.parametrize("resize", [False, True])
def test_a_resized_vocabulary_is_saved(resize: bool, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    causal("llama").save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    if resize:
        base.resize_token_embeddings(40)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM"))
    randomise(model, 0)
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    same_tensors(tmp_path / "ours/adapter_model.safetensors", tmp_path / "theirs/adapter_model.safetensors")
    same_json(tmp_path / "ours/adapter_config.json", tmp_path / "theirs/adapter_config.json")
    assert ("base_model.model.lm_head.weight" in load_file(tmp_path / "ours/adapter_model.safetensors")) is resize


def test_a_base_model_on_the_hub_is_not_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def refuse(*args: object, **kwargs: object) -> bool:
        raise AssertionError("the hub was asked")

    model = adapted("llama", {"target_modules": LINEAR})
    model.peft_config["default"].base_model_name_or_path = "someone/some-model"
    monkeypatch.setattr("peft.utils.other.file_exists", refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    save(model, tmp_path / "ours")
    assert json.loads((tmp_path / "ours/adapter_config.json").read_text())["base_model_name_or_path"] == (
        "someone/some-model"
    )


def test_several_adapters(tmp_path: Path) -> None:
    model = adapted("llama", {"target_modules": LINEAR})
    model.add_adapter("second", peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    randomise(model, 1)
    model.save_pretrained(tmp_path / "theirs")
    save(model, tmp_path / "ours")
    for part in ("", "second"):
        ours, theirs = tmp_path / "ours" / part, tmp_path / "theirs" / part
        same_tensors(ours / "adapter_model.safetensors", theirs / "adapter_model.safetensors")
        same_json(ours / "adapter_config.json", theirs / "adapter_config.json")


def test_injected_layers_are_saved_as_if_wrapped(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, target_modules=LINEAR, task_type="CAUSAL_LM")
    base = causal("llama")
    peft.inject_adapter_in_model(config, base)
    randomise(base, 0)
    save(base, tmp_path, config)
    opened = peft.PeftModel.from_pretrained(causal("llama"), tmp_path)
    assert torch.equal(logits(opened), logits(base))


Wrap = Callable[[nn.Module], nn.Module]


def _checkpointed(model: nn.Module) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    layers = model.base_model.model.model.layers
    for index in range(len(layers)):
        layers[index] = checkpoint_wrapper(layers[index])
    return model


@pytest.mark.parametrize("wrap", [torch.compile, _checkpointed], ids=["compile", "activation_checkpoint"])
def test_wrappers_do_not_show(wrap: Wrap, tmp_path: Path) -> None:
    settings: dict[str, object] = {"target_modules": LINEAR, "modules_to_save": ["lm_head"], "use_dora": True}
    model = adapted("llama", settings)
    model.save_pretrained(tmp_path / "theirs")
    save(wrap(model), tmp_path / "ours")
    same_tensors(tmp_path / "ours/adapter_model.safetensors", tmp_path / "theirs/adapter_model.safetensors")
    same_json(tmp_path / "ours/adapter_config.json", tmp_path / "theirs/adapter_config.json")


def legacy_delta(a: torch.Tensor, b: torch.Tensor, experts: int) -> torch.Tensor:
    """The update that peft 0.18 makes from its factors: it reads a parameter as (experts, in, out)."""
    a, b = a.reshape(experts, -1, a.shape[-1]), b.reshape(b.shape[0], -1, experts)
    return torch.einsum("ore,eri->eio", b, a)


def test_the_legacy_layout_means_the_same_update(tmp_path: Path) -> None:
    model = adapted(*FEATURES["experts"])
    save(model, tmp_path, legacy_paramwrapper_layout=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    experts = model.base_model.model.model.layers[0].mlp.experts
    prefix = "base_model.model.model.layers.0.mlp.experts."
    for wrapper, inner in ((experts, ""), (experts.base_layer, "base_layer.")):
        a, b = saved[f"{prefix}{inner}lora_A.weight"], saved[f"{prefix}{inner}lora_B.weight"]
        parameter = wrapper.get_param()
        assert a.shape[1] == parameter.shape[1]
        assert b.shape[0] == parameter.shape[2]
        update = legacy_delta(a, b, parameter.shape[0]) * wrapper.scaling["default"]
        torch.testing.assert_close(update, wrapper.get_delta_weight("default"))


def test_v4_stores_experts_one_by_one(tmp_path: Path) -> None:
    settings = {**FEATURES["experts"][1], "rank_pattern": {"experts.down_proj": 2}}
    model = adapted("qwen3_moe", settings)
    save(model, tmp_path, v4_compatible=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert "model.layers.0.mlp.experts.3.up_proj" in config["target_modules"]
    assert config["rank_pattern"][r"model.layers.0.mlp.experts\.\d+\.down_proj"] == 2
    assert _extract_target_parameters(model, v4_compatible=True) == []
    assert "model.layers.1.mlp.experts.0.gate_proj" in _extract_target_modules(model, v4_compatible=True)
    experts = model.base_model.model.model.layers[1].mlp.experts
    for wrapper, names in ((experts.base_layer, ("gate_proj", "up_proj")), (experts, ("down_proj",))):
        whole = wrapper.get_delta_weight("default") / wrapper.scaling["default"]
        for expert in range(whole.shape[0]):
            pieces = []
            for name in names:
                base = f"base_model.model.model.layers.1.mlp.experts.{expert}.{name}"
                pieces.append(saved[f"{base}.lora_B.weight"] @ saved[f"{base}.lora_A.weight"])
            torch.testing.assert_close(torch.cat(pieces), whole[expert])


def test_peft_opens_single_experts_with_equal_logits(tmp_path: Path) -> None:
    """Current peft fuses the experts again while loading."""
    model = adapted(*FEATURES["experts"])
    save(model, tmp_path, v4_compatible=True)
    opened = peft.PeftModel.from_pretrained(causal("qwen3_moe"), tmp_path)
    assert not torch.equal(logits(model), logits(causal("qwen3_moe")))
    torch.testing.assert_close(logits(opened), logits(model), rtol=1e-5, atol=1e-6)


def test_documented_functions() -> None:
    model = adapted(*FEATURES["experts"])
    config = model.peft_config["default"]
    assert "model.layers.0.self_attn.q_proj" in _extract_target_modules(model)
    assert _extract_target_parameters(model)[:2] == [
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.mlp.experts.gate_up_proj",
    ]
    settings = _get_hf_peft_config(config, Parts([model]))
    assert settings["r"] == 4
    assert settings["inference_mode"] is True
    assert sorted(settings["target_parameters"]) == sorted(EXPERTS)


def test_a_captured_adapter_is_whole_and_a_smaller_one_is_not() -> None:
    model = adapted(*FEATURES["experts"])
    settings = _get_hf_peft_config(None, Parts([model]))
    captured = capture_adapter([model], None, v4_compatible=False, legacy_paramwrapper_layout=False)
    specs = [entry.spec for entry in captured.files[0].entries]
    assert captured.layers == 2
    check_adapter(specs, settings, [captured.inventory], captured.layers)
    lost = next(spec for spec in specs if "lora_B" in spec.name)
    with pytest.raises(AdapterError, match="has no lora_B"):
        check_adapter([spec for spec in specs if spec is not lost], settings, [captured.inventory], layers=2)


def test_prompt_learning_is_refused() -> None:
    config = peft.PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM", encoder_hidden_size=8)
    model = peft.get_peft_model(causal("llama"), config)
    with pytest.raises(AdapterError):
        capture_adapter([model], config, v4_compatible=False, legacy_paramwrapper_layout=False)
