"""Derivations on models of well-known types, and what a derivation must leave alone."""

from __future__ import annotations

import copy

import pytest
import torch
from tests.convert import compare
from tests.convert.tiny_models import build, quiet

from shardwise.convert.adapter import check_round_trip
from shardwise.convert.derive import derive, identity
from shardwise.convert.rules import HubPart, NativeSpec
from shardwise.errors import ConversionError


def conversion_of(key: str):
    model = build(key)
    state = compare.saved_state(model)
    return model, state, derive(model, compare.specs_of(state))


def test_llama_is_the_same_in_its_files() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=64
    )
    model = LlamaForCausalLM(config)
    state = compare.saved_state(model)
    specs = compare.specs_of(state)
    conversion = derive(model, specs)
    assert not conversion.computed
    assert set(conversion.hub) == set(identity(specs).hub)
    assert set(conversion.names) == set(state)


@pytest.mark.parametrize("key", ["qwen3_moe", "mixtral", "qwen2_moe", "deepseek_v3"])
def test_fused_experts_are_one_by_one_in_the_files(key: str) -> None:
    model, state, conversion = conversion_of(key)
    [fused] = [name for name in state if name.endswith("layers.1.mlp.experts.gate_up_proj")]
    experts = conversion.by_native(fused)
    assert len(experts) == 2 * state[fused].shape[0]
    assert all(len(expert.parts) == 1 and expert.parts[0].view is not None for expert in experts)
    assert {expert.shape for expert in experts} == {(state[fused].shape[1] // 2, state[fused].shape[2])}
    compare.check_whole(conversion, state, compare.reference(model))


@pytest.mark.parametrize(
    ("key", "native", "hub"),
    [
        ("gemma3", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("llava", "model.language_model.norm.weight", "language_model.model.norm.weight"),
        ("Qwen2VLForConditionalGeneration", "model.language_model.norm.weight", "model.norm.weight"),
    ],
)
def test_prefixes_of_models_with_pictures(key: str, native: str, hub: str) -> None:
    model, state, conversion = conversion_of(key)
    assert native in state
    assert [tensor.name for tensor in conversion.by_native(native)] == [hub]
    assert conversion.by_hub(hub).parts == (HubPart(native),)
    compare.check_whole(conversion, state, compare.reference(model))


def test_several_native_tensors_in_one_of_the_files() -> None:
    _, _, conversion = conversion_of("kimi_k25")
    fused = [tensor for tensor in conversion.hub if "wqkv" in tensor.name]
    assert fused
    for tensor in fused:
        assert len({part.native for part in tensor.parts}) == 3
        assert len({part.view.hub_grid for part in tensor.parts if part.view is not None}) == 1


@pytest.mark.parametrize("key", ["qwen3_moe", "kimi_k25", "gemma3", "SegformerModel"])
def test_deriving_changes_nothing(key: str) -> None:
    model = build(key)
    before = compare.reference(model)
    attributes = set(vars(model))
    first = derive(model, compare.specs_of(compare.saved_state(model)))
    assert set(vars(model)) == attributes
    compare.assert_same(compare.reference(model), before)
    assert derive(model, compare.specs_of(compare.saved_state(model))).hub == first.hub


def test_the_rules_of_from_pretrained_are_used_and_left_as_they_are(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    with quiet():
        model = build("qwen3_moe")
        model.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        rules = [(list(r.source_patterns), list(r.target_patterns)) for r in loaded._weight_conversions]
        state = compare.saved_state(loaded)
        conversion = derive(loaded, compare.specs_of(state))
        assert [(list(r.source_patterns), list(r.target_patterns)) for r in loaded._weight_conversions] == rules
        compare.check_whole(conversion, state, compare.reference(loaded))
    compare.assert_same(state, compare.saved_state(model))


def test_a_stage_of_a_pipeline_derives_its_own_tensors_alike() -> None:
    model, state, conversion = conversion_of("kimi_k25")
    stage = [spec for spec in compare.specs_of(state) if ".0." not in spec.name]
    part = derive(model, stage)
    assert {t.name: t for t in part.hub}.items() <= {t.name: t for t in conversion.hub}.items()
    assert {p.native for t in part.hub for p in t.parts} == {spec.name for spec in stage}


def test_wrappers_do_not_change_the_rules() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, state, conversion = conversion_of("gemma3")
    wrapped = copy.deepcopy(model)
    wrapped.model.language_model = checkpoint_wrapper(wrapped.model.language_model)
    assert derive(wrapped, compare.specs_of(state)).hub == conversion.hub
    assert derive(torch.compile(model), compare.specs_of(state)).hub == conversion.hub


@pytest.mark.parametrize("key", ["qwen3_moe", "gemma3", "SegformerForSemanticSegmentation"])
def test_fsdp2_renames_classes_and_changes_no_rule(key: str, one_rank_group: None) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model, state, conversion = conversion_of(key)
    specs = compare.specs_of(state)
    mesh = init_device_mesh("cpu", (1,))
    for module in model.children():
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert type(model).__name__.startswith("FSDP")
    assert derive(model, specs).hub == conversion.hub


@pytest.fixture
def one_rank_group(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_the_model_keeps_out_of_its_files_is_left_out() -> None:
    model = build("qwen3_moe")
    model._keys_to_ignore_on_save = {"model.norm.weight"}
    specs = compare.specs_of(compare.saved_state(model))
    conversion = derive(model, specs)
    assert conversion.ignored == ("model.norm.weight",)
    assert conversion.by_native("model.norm.weight") == ()
    check_round_trip(conversion, specs)


def test_any_module_keeps_its_names() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    specs = compare.specs_of(dict(model.state_dict()))
    assert derive(model, specs) == identity(specs)


def test_an_old_mapping_of_a_custom_model_is_reverted() -> None:
    class Custom(torch.nn.Module):
        _checkpoint_conversion_mapping = {r"^transformer\.": "model.", r"^head\.": "lm_head."}  # noqa: RUF012

    specs = [NativeSpec("model.w", (2,), "F32"), NativeSpec("lm_head.w", (2,), "F32")]
    assert derive(Custom(), specs).names == ("transformer.w", "head.w")


def test_two_tensors_of_one_name_are_an_error() -> None:
    from transformers.core_model_loading import WeightRenaming

    model = build("qwen3_moe")
    model._weight_conversions = [WeightRenaming("old", "one"), WeightRenaming("old", "two")]
    with pytest.raises(ConversionError, match=r"old\.w"):
        derive(model, [NativeSpec(name, (2,), "F32") for name in ("one.w", "two.w")])


def test_a_rule_without_a_reverse_is_an_error() -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class OneWay(ConversionOps):
        def convert(self, input_dict, source_patterns, target_patterns, **_):
            return input_dict

    model = build("qwen3_moe")
    model._weight_conversions = [WeightConverter("a", "b", operations=[OneWay()])]
    with pytest.raises(ConversionError, match="no reverse"):
        derive(model, [])


def test_a_computed_rule_runs_both_ways() -> None:
    from transformers.core_model_loading import ConversionOps, WeightConverter

    class Doubled(ConversionOps):
        def __init__(self, factor: float = 0.5) -> None:
            self.factor = factor

        def convert(self, input_dict, source_patterns, target_patterns, **_):
            [tensors] = input_dict.values()
            tensor = tensors[0] if isinstance(tensors, list) else tensors
            return {target_patterns[0]: tensor * self.factor}

        @property
        def reverse_op(self):
            return Doubled(1 / self.factor)

    model = build("qwen3_moe")
    model._weight_conversions = [WeightConverter(r"norm.scale", "norm.weight", operations=[Doubled()])]
    state = compare.saved_state(model)
    conversion = derive(model, compare.specs_of(state))
    norms = {name for name in state if "norm.weight" in name}
    assert {spec.name for group in conversion.computed for spec in group.natives} == norms
    assert all("mul" in group.reason for group in conversion.computed)
    check_round_trip(conversion, compare.specs_of(state))
    hub = compare.computed(conversion, state)
    assert torch.equal(hub["model.norm.scale"], state["model.norm.weight"] * 2)
    compare.check_whole(conversion, state, compare.reference(model))


def test_tens_of_thousands_of_tensors_are_described_by_few_views() -> None:
    model = build("qwen3_moe")
    specs = [
        NativeSpec(f"model.layers.{layer}.mlp.experts.{name}", shape, "BF16")
        for layer in range(100)
        for name, shape in (("gate_up_proj", (128, 3072, 4096)), ("down_proj", (128, 4096, 1536)))
    ]
    conversion = derive(model, specs)
    assert len(conversion.hub) == 100 * 128 * 3
    assert len({id(part.view) for tensor in conversion.hub for part in tensor.parts}) == 128 * 3
    check_round_trip(conversion, specs)
