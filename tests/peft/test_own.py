"""A model's own LoRA modules, written as an adapter that peft opens on the Hugging Face model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file
from tests.peft.models import Parts, causal, logits
from tests.peft.own_models import (
    EXPERTS,
    GROUPS,
    HEADS,
    HIDDEN,
    INNER,
    WIDTH,
    GroupedLoRA,
    LoRALinear,
    OwnConfig,
    OwnForCausalLM,
    TransposedLoRALinear,
    dense,
    moe,
)
from tests.peft.test_models import legacy_delta, save

from shardwise.addons import (
    _extract_target_modules,
    _extract_target_parameters,
    _get_automodel_peft_metadata,
    _get_hf_peft_config,
    _is_qwen3_moe,
)
from shardwise.errors import AdapterError
from shardwise.peft.capture import capture_adapter
from shardwise.peft.config import read_adapter_config
from shardwise.peft.tensors import AdapterTensors

peft = pytest.importorskip("peft")


def capture(model: nn.Module, config: object, **options: bool) -> AdapterTensors:
    v4 = options.get("v4_compatible", False)
    return capture_adapter([model], config, v4_compatible=v4, legacy_paramwrapper_layout=False)


def opened(directory: Path, family: str = "llama") -> nn.Module:
    model: nn.Module = peft.PeftModel.from_pretrained(causal(family), directory)
    inner: nn.Module = model.base_model.model.model
    return inner


@pytest.mark.parametrize("dora", [False, True])
def test_combined_projections_are_split(dora: bool, tmp_path: Path) -> None:
    config = OwnConfig(use_dora=dora)
    model = dense(config)
    save(model, tmp_path, config)
    layers = opened(tmp_path).layers
    for layer, own in zip(layers, model.model.layers, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        for target, modules in (
            (own.self_attn.qkv_proj, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (own.mlp.gate_up_proj, (mlp.gate_proj, mlp.up_proj)),
            (own.mlp.down_proj, (mlp.down_proj,)),
        ):
            factors = [m.lora_B["default"].weight @ m.lora_A["default"].weight * m.scaling["default"] for m in modules]
            torch.testing.assert_close(torch.cat(factors), target.delta())
            if dora:
                magnitudes = [m.lora_magnitude_vector["default"].weight for m in modules]
                assert torch.equal(torch.cat(magnitudes), target.lora_magnitude[:, 0])
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["use_dora"] is dora
    assert settings["target_modules"] == _extract_target_modules(model)
    assert "model.layers.0.self_attn.k_proj" in settings["target_modules"]
    assert not any("qkv_proj" in name or "gate_up_proj" in name for name in settings["target_modules"])


def test_a_shared_factor_is_the_same_memory_under_each_name() -> None:
    model = dense(OwnConfig())
    entries = {e.spec.name: e for e in capture(model, OwnConfig()).files[0].entries}
    prefix = "base_model.model.model.layers.0.self_attn."
    q, k = entries[f"{prefix}q_proj.lora_A.weight"], entries[f"{prefix}k_proj.lora_A.weight"]
    assert q.tensor is k.tensor is model.model.layers[0].self_attn.qkv_proj.lora_A.weight
    assert (q.alias_of, k.alias_of) == (None, q.spec.name)
    assert q.fqn == "model.layers.0.self_attn.qkv_proj.lora_A.weight"


def test_logits_of_a_llama_with_own_lora(tmp_path: Path) -> None:
    config = OwnConfig()

    class Own(LoRALinear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + self.lora_B(self.lora_A(x)) * self.scale

    model = causal("llama").requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            new = Own(old.in_features, old.out_features, config.dim, config.alpha / config.dim)
            new.weight.data.copy_(old.weight)
            setattr(layer.self_attn, name, new)
    save(model, tmp_path, config)
    loaded = peft.PeftModel.from_pretrained(causal("llama"), tmp_path)
    assert not torch.equal(logits(model), logits(causal("llama")))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-6, atol=1e-6)
    merged = logits(loaded.merge_and_unload())
    torch.testing.assert_close(merged, logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dim", [4, 16])
def test_transposed_factors(dim: int, tmp_path: Path) -> None:
    """At rank 16 the A factor is square, and only the B factor tells how both lie."""
    config = OwnConfig(dim=dim)
    model = dense(config, combined=False, kind=TransposedLoRALinear)
    if dim == HIDDEN:
        del model.model.layers[0].self_attn.q_proj, model.model.layers[1].self_attn.q_proj
    save(model, tmp_path, config)
    names = [(e.spec, e.view) for e in capture(model, config).files[0].entries]
    assert names == [(e.spec, e.view) for e in capture(model, read_adapter_config(tmp_path)).files[0].entries]
    own = model.model.layers[1].self_attn.k_proj
    theirs = opened(tmp_path).layers[1].self_attn.k_proj
    torch.testing.assert_close(theirs.get_delta_weight("default"), own.delta())


def expert_delta(saved: dict[str, torch.Tensor], layer: int, expert: int, *names: str) -> torch.Tensor:
    base = f"base_model.model.model.layers.{layer}.mlp.experts.{expert}."
    return torch.cat([saved[f"{base}{n}.lora_B.weight"] @ saved[f"{base}{n}.lora_A.weight"] for n in names])


@pytest.mark.parametrize(("qwen", "v4"), [(True, True), (False, False), (False, True)])
@pytest.mark.parametrize("swapped", [False, True])
def test_experts_one_by_one(qwen: bool, v4: bool, swapped: bool, tmp_path: Path) -> None:
    config = OwnConfig()
    model = moe(config, qwen, swapped=swapped)
    save(model, tmp_path, config, v4_compatible=v4)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert "target_parameters" not in settings
    assert {n.removeprefix("base_model.model.").rpartition(".lora_")[0] for n in saved} == set(
        settings["target_modules"]
    )
    for index, layer in enumerate(model.model.layers):
        experts: GroupedLoRA = layer.mlp.experts
        for expert in range(EXPERTS):
            pair = expert_delta(saved, index, expert, "gate_proj", "up_proj") * experts.scale
            torch.testing.assert_close(pair, experts.delta("gate_and_up")[expert])
            single = expert_delta(saved, index, expert, "down_proj") * experts.scale
            torch.testing.assert_close(single, experts.delta("down")[expert])


@pytest.mark.parametrize("rank", [4, 2])
@pytest.mark.parametrize("swapped", [False, True])
def test_qwen3_moe_is_opened_by_peft(rank: int, swapped: bool, tmp_path: Path) -> None:
    config = OwnConfig()
    model = moe(config, rank=rank, swapped=swapped)
    # The tiny Hugging Face model has the same sizes but for the experts' inner one.
    from tests.peft.models import SIZES
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {**SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes))
    save(model, tmp_path, config)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["target_parameters"] == _extract_target_parameters(model)
    assert settings["target_parameters"][0] == "model.layers.0.mlp.experts.down_proj"
    theirs = peft.PeftModel.from_pretrained(base, tmp_path).base_model.model.model
    for layer, own in zip(theirs.layers, model.model.layers, strict=True):
        outer = layer.mlp.experts
        assert outer.parameter_name == "down_proj"
        torch.testing.assert_close(outer.get_delta_weight("default"), own.mlp.experts.delta("down"))
        inner = outer.base_layer
        torch.testing.assert_close(inner.get_delta_weight("default"), own.mlp.experts.delta("gate_and_up"))
        torch.testing.assert_close(layer.self_attn.q_proj.get_delta_weight("default"), own.self_attn.q_proj.delta())


def test_the_legacy_layout_of_own_experts(tmp_path: Path) -> None:
    config = OwnConfig()
    model = moe(config)
    save(model, tmp_path, config, legacy_paramwrapper_layout=True)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    experts: GroupedLoRA = model.model.layers[1].mlp.experts
    prefix = "base_model.model.model.layers.1.mlp.experts."
    for inner, name in (("base_layer.", "gate_and_up"), ("", "down")):
        a, b = saved[f"{prefix}{inner}lora_A.weight"], saved[f"{prefix}{inner}lora_B.weight"]
        torch.testing.assert_close(legacy_delta(a, b, EXPERTS) * experts.scale, experts.delta(name))


def test_a_separate_gate_and_up_are_stored_one_by_one() -> None:
    """The fused parameter has one A factor: two cannot be a view of it."""
    model = moe(OwnConfig())
    for layer in model.model.layers:
        experts = layer.mlp.experts
        a, b = experts.lora_gate_and_up_A, experts.lora_gate_and_up_B
        del experts.lora_gate_and_up_A, experts.lora_gate_and_up_B
        for at, name in enumerate(("gate", "up")):
            experts.register_parameter(f"lora_{name}_A", nn.Parameter(a.detach().clone()))
            columns = b.detach()[:, :, at * INNER : (at + 1) * INNER].contiguous()
            experts.register_parameter(f"lora_{name}_B", nn.Parameter(columns))
    assert _extract_target_parameters(model) == []
    names = {e.spec.name for e in capture(model, OwnConfig()).files[0].entries}
    assert "base_model.model.model.layers.1.mlp.experts.3.up_proj.lora_B.weight" in names


def test_mixtral_names() -> None:
    model = moe(OwnConfig(), qwen=False)
    model.config.model_type = "mixtral"
    names = _extract_target_modules(model)
    assert {f"model.layers.0.mlp.experts.0.w{i}" for i in (1, 2, 3)} <= set(names)
    assert not any("gate_proj" in name for name in names)


def test_wrappers_are_stripped() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = dense(OwnConfig())
    plain = _extract_target_modules(model)
    captured = [(e.spec, e.fqn) for e in capture(model, OwnConfig()).files[0].entries]
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    model.model.layers[1].self_attn = torch.compile(model.model.layers[1].self_attn)
    model.model.layers[1].mlp.down_proj = torch.compile(model.model.layers[1].mlp.down_proj)
    wrapped = torch.compile(model)
    assert _extract_target_modules(wrapped) == plain
    again = [(e.spec, e.fqn) for e in capture(wrapped, OwnConfig()).files[0].entries]
    assert sorted(again, key=str) == sorted(captured, key=str)


def test_transformers_own_combined_names_stay() -> None:
    """Phi-3's qkv_proj is the hub's name too: peft finds no q_proj in it."""
    from transformers import Phi3Config, Phi3ForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    model = Phi3ForCausalLM(Phi3Config(**sizes, num_attention_heads=4, pad_token_id=0)).requires_grad_(False)
    model.model.layers[0].self_attn.qkv_proj = LoRALinear(16, 48, 4, 2.0)
    assert _extract_target_modules(model) == ["model.layers.0.self_attn.qkv_proj"]


def test_a_trained_head_is_a_module_to_save(tmp_path: Path) -> None:
    config = OwnConfig()
    model = dense(config)
    model.lm_head.requires_grad_(True)
    save(model, tmp_path, config)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["lm_head"]
    loaded = peft.PeftModel.from_pretrained(causal("llama"), tmp_path)
    head = loaded.base_model.model.lm_head.modules_to_save["default"]
    assert torch.equal(head.weight, model.lm_head.weight)


def test_a_trained_base_weight_is_refused() -> None:
    model = dense(OwnConfig())
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(True)
    with pytest.raises(AdapterError, match="trained beside LoRA"):
        capture(model, OwnConfig())


def test_a_model_that_is_not_frozen_keeps_its_base_weights_out(caplog: pytest.LogCaptureFixture) -> None:
    model = dense(OwnConfig())
    names = {e.spec.name for e in capture(model, OwnConfig()).files[0].entries}
    model.requires_grad_(True)
    with caplog.at_level(logging.WARNING):
        assert {e.spec.name for e in capture(model, OwnConfig()).files[0].entries} == names
    assert "not frozen" in caplog.text


def test_settings_are_minimal_and_filtered() -> None:
    config = OwnConfig(lora_dtype=torch.bfloat16)
    model = dense(config)
    assert _get_hf_peft_config(config, Parts([model])) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "use_dora": False,
        "target_modules": _extract_target_modules(model),
        "bias": "none",
        "base_model_name_or_path": "base/model",
        "inference_mode": True,
    }
    assert _get_automodel_peft_metadata(config) == {
        "target_modules": ["*_proj"],
        "match_all_linear": False,
        "dropout": 0.0,
        "lora_dtype": "torch.bfloat16",
    }


@pytest.mark.parametrize(
    ("class_name", "encoder_decoder", "task"),
    [
        ("LlamaForCausalLM", False, "CAUSAL_LM"),
        ("GPT2LMHeadModel", False, "CAUSAL_LM"),
        ("BertForSequenceClassification", False, "SEQ_CLS"),
        ("BertForTokenClassification", False, "TOKEN_CLS"),
        ("BertForQuestionAnswering", False, "QUESTION_ANS"),
        ("BertForMaskedLM", False, None),
        ("T5ForConditionalGeneration", True, "SEQ_2_SEQ_LM"),
        ("Gemma3ForConditionalGeneration", False, "CAUSAL_LM"),
        ("BertModel", False, "FEATURE_EXTRACTION"),
        ("SomethingElse", False, "CAUSAL_LM"),
    ],
)
def test_task_types(class_name: str, encoder_decoder: bool, task: str | None) -> None:
    module = "transformers.models.some" if class_name == "BertModel" else "mine"
    model = type(class_name, (nn.Module,), {"__module__": module})()
    model.config = SimpleNamespace(is_encoder_decoder=encoder_decoder, architectures=None)
    settings = _get_hf_peft_config(OwnConfig(), Parts([model]))
    assert settings["task_type"] == task
    mapping = {"base_model_class": class_name, "parent_library": module}
    assert settings.get("auto_mapping") == (mapping if task is None else None)


def test_ranks_and_scales_of_their_own() -> None:
    config = OwnConfig()
    model = moe(config, rank=2)
    model.model.layers[0].self_attn.q_proj.scale = 5.0
    settings = _get_hf_peft_config(config, Parts([model]))
    assert settings["rank_pattern"] == {
        f"model.layers.{i}.mlp.experts.{p}_proj": 2 for i in range(2) for p in ("gate_up", "down")
    }
    assert settings["alpha_pattern"] == {
        "model.layers.0.self_attn.q_proj": 20,
        **{f"model.layers.{i}.mlp.experts.{p}_proj": 4 for i in range(2) for p in ("gate_up", "down")},
    }


def test_qwen3_moe_is_told_by_its_state_dict_adapter() -> None:
    assert _is_qwen3_moe(moe(OwnConfig()))
    assert not _is_qwen3_moe(moe(OwnConfig(), qwen=False))
    assert _is_qwen3_moe(causal("qwen3_moe"))
    other = causal("qwen3_moe")
    other.state_dict_adapter = object()
    assert not _is_qwen3_moe(other)


def test_rows_that_do_not_split_are_an_error() -> None:
    model = dense(OwnConfig())
    model.config.num_key_value_heads = 1
    with pytest.raises(AdapterError, match="do not split into q_proj, k_proj, v_proj"):
        capture(model, OwnConfig())
    assert (HEADS + 2 * GROUPS) * WIDTH == 32


def test_half_a_pair_is_an_error() -> None:
    model = dense(OwnConfig())
    del model.model.layers[0].mlp.down_proj.lora_B
    with pytest.raises(AdapterError, match="has no lora_B"):
        capture(model, OwnConfig())


def test_factors_that_do_not_fit_are_an_error() -> None:
    model = dense(OwnConfig())
    model.model.layers[0].mlp.down_proj.lora_B = nn.Linear(5, HIDDEN, bias=False)
    with pytest.raises(AdapterError, match="do not fit together"):
        capture(model, OwnConfig())


def test_pipeline_stages_in_one_process() -> None:
    whole = dense(OwnConfig())
    names = {e.spec.name for e in capture(whole, OwnConfig()).files[0].entries}
    stages: list[OwnForCausalLM] = []
    for index in range(2):
        stage = dense(OwnConfig())
        stage.model.layers = nn.ModuleDict({str(index): stage.model.layers[index]})
        stages.append(stage)
    captured = capture_adapter(stages, OwnConfig(), v4_compatible=False, legacy_paramwrapper_layout=False)
    assert {e.spec.name for e in captured.files[0].entries} == names
    assert captured.inventory == {"model.layers": (0, 1)}


class AppliedLoRA(LoRALinear):
    """With the forward pass that its factors mean."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora_B(self.lora_A(x)) * self.scale


def _applied(family: str, config: OwnConfig) -> nn.Module:
    model = causal(family).requires_grad_(False)
    torch.manual_seed(1)
    for layer in model.model.layers:
        old = layer.self_attn.q_proj
        new = AppliedLoRA(old.in_features, old.out_features, config.dim, config.alpha / config.dim)
        new.weight.data.copy_(old.weight)
        layer.self_attn.q_proj = new.to(old.weight.dtype)
    return model


@pytest.mark.parametrize("family", ["llama", "llama-tied"])
def test_a_trained_embedding_brings_the_head_that_is_tied_to_it(family: str, tmp_path: Path) -> None:
    model = _applied(family, OwnConfig())
    embedding = model.model.embed_tokens.weight.requires_grad_(True)
    embedding.data.add_(torch.ones_like(embedding) * 0.1)
    save(model, tmp_path, OwnConfig())
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    tied = ["lm_head"] if family == "llama-tied" else []
    assert settings["modules_to_save"] == [*tied, "model.embed_tokens"]
    loaded = peft.PeftModel.from_pretrained(causal(family), tmp_path)
    assert torch.equal(logits(loaded), logits(model))


def test_factors_of_half_precision_are_computed_as_trained(tmp_path: Path) -> None:
    """peft casts such factors to float32 unless told otherwise, and only that changes a bit of the result."""
    model = _applied("llama-bf16", OwnConfig())
    save(model, tmp_path, OwnConfig())
    loaded = peft.PeftModel.from_pretrained(causal("llama-bf16"), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(loaded), logits(model))


class Settings(SimpleNamespace):
    def to_dict(self) -> dict[str, object]:
        return dict(vars(self))


@pytest.mark.parametrize("kind", [dict, Settings])
@pytest.mark.parametrize("setting", ["use_dora", "use_rslora"])
def test_settings_in_a_dictionary_are_those_of_the_object(setting: str, kind: type, tmp_path: Path) -> None:
    from shardwise import CheckpointingConfig

    settings = kind(**{"dim": 4, "alpha": 8, setting: True, "target_modules": ["*_proj"]})
    model = dense(OwnConfig(use_dora=setting == "use_dora"))
    for module in model.modules():
        if isinstance(module, LoRALinear) and setting == "use_rslora":
            module.scale = 8 / 4**0.5
    with torch.no_grad():
        before = {n: p.clone() for n, p in model.named_parameters()}
    with CheckpointingConfig(checkpoint_dir=str(tmp_path), is_peft=True).build() as saver:
        saver.save(0, 1, model, peft_config=settings)
        saved = read_adapter_config(tmp_path / "LATEST/model")
        assert saved[setting] is True
        assert "alpha_pattern" not in saved
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.zero_()
        saver.restore(model)  # which is given no peft_config
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
