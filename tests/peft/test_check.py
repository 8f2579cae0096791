"""Which adapters are whole: a pure check of names, shapes and layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.peft.models import causal

from shardwise.errors import AdapterError
from shardwise.geometry import TensorSpec
from shardwise.peft.check import check_adapter, check_opens

Specs = dict[str, TensorSpec]
PREFIX = "base_model.model."


def pair(module: str, rank: int = 4, n_in: int = 16, n_out: int = 8, dora: bool = False) -> Specs:
    specs = [
        TensorSpec(f"{PREFIX}{module}.lora_A.weight", (rank, n_in), "F32"),
        TensorSpec(f"{PREFIX}{module}.lora_B.weight", (n_out, rank), "F32"),
    ]
    if dora:
        specs.append(TensorSpec(f"{PREFIX}{module}.lora_magnitude_vector", (n_out,), "F32"))
    return {spec.name: spec for spec in specs}


def adapter(layers: int = 3, dora: bool = False) -> tuple[Specs, dict[str, object]]:
    modules = [f"model.layers.{i}.self_attn.{p}" for i in range(layers) for p in ("q_proj", "v_proj")]
    specs: Specs = {}
    for module in modules:
        specs |= pair(module, dora=dora)
    return specs, {"peft_type": "LORA", "r": 4, "use_dora": dora, "target_modules": modules}


@given(st.integers(1, 5), st.booleans())
def test_a_whole_adapter_passes(layers: int, dora: bool) -> None:
    specs, config = adapter(layers, dora)
    halves = [{"model.layers": [i for i in range(layers) if i % 2 == rank]} for rank in range(2)]
    check_adapter(specs.values(), config, [h for h in halves if h["model.layers"]], layers)
    check_adapter(specs.values(), {**config, "target_modules": ["q_proj", "v_proj"]})
    check_adapter(specs.values(), {**config, "target_modules": r".*_proj"})


@given(st.data(), st.booleans())
def test_no_tensor_can_be_lost(data: st.DataObject, dora: bool) -> None:
    specs, config = adapter(3, dora)
    lost = data.draw(st.sampled_from(sorted(specs)))
    with pytest.raises(AdapterError, match="not complete"):
        check_adapter([s for n, s in specs.items() if n != lost], config)


@pytest.mark.parametrize("module", [f"model.layers.{i}.self_attn.{p}" for i in range(2) for p in ("q_proj", "v_proj")])
def test_no_target_can_be_lost(module: str) -> None:
    peft = pytest.importorskip("peft")
    specs, config = adapter(2)
    model = peft.get_peft_model(causal("llama"), peft.LoraConfig(r=4, target_modules=config["target_modules"]))
    check_opens([model], "default", specs, config)
    rest = [name for name in specs if not name.startswith(f"{PREFIX}{module}.")]
    with pytest.raises(AdapterError, match=f"'{module}' has no tensors, and by the settings peft would adapt it"):
        check_opens([model], "default", rest, config)


def test_no_module_that_is_no_target_has_tensors() -> None:
    pytest.importorskip("peft")
    specs, config = adapter()
    check_opens([], "default", specs, config)
    specs |= pair("model.layers.0.mlp.down_proj")
    with pytest.raises(AdapterError, match="has tensors, and the settings give peft no adapter for it"):
        check_opens([], "default", specs, config)


Change = Callable[[Specs, dict[str, object]], object]

FAULTS: dict[str, tuple[Change, str]] = {
    "rank of one": (
        lambda s, c: s.update(pair("model.layers.0.self_attn.q_proj", rank=2)),
        "has rank 2, configured is 4",
    ),
    "factors": (
        lambda s, c: s.update({f"{PREFIX}x.lora_A.weight": TensorSpec(f"{PREFIX}x.lora_A.weight", (3, 2), "F32")}),
        "x has no lora_B",
    ),
    "empty": (lambda s, c: s.update(pair("model.layers.0.self_attn.q_proj", n_in=0)), "lora_A.weight is empty"),
    "no magnitude": (lambda s, c: c.update(use_dora=True), "has no lora_magnitude_vector"),
    "stray magnitude": (lambda s, c: s.update(pair("model.layers.0.self_attn.q_proj", dora=True)), "use_dora is off"),
    "nothing": (lambda s, c: s.clear(), "no tensors"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault: str) -> None:
    specs, config = adapter()
    change, message = FAULTS[fault]
    change(specs, config)
    with pytest.raises(AdapterError, match=message):
        check_adapter(specs.values(), config)


def test_rank_patterns_count() -> None:
    specs, config = adapter()
    specs |= pair("model.layers.0.self_attn.q_proj", rank=2)
    check_adapter(specs.values(), {**config, "rank_pattern": {r"layers\.0\..*q_proj": 2}})


def test_experts_side_by_side_have_a_multiple_of_the_rank() -> None:
    specs = pair("model.layers.0.mlp.experts", rank=16) | pair("model.layers.0.mlp.experts.base_layer", rank=16)
    config: dict[str, object] = {"r": 4, "target_modules": [], "target_parameters": ["experts.gate_up_proj"]}
    check_adapter(specs.values(), config)
    with pytest.raises(AdapterError, match="has rank 16, configured is 5"):
        check_adapter(specs.values(), {**config, "r": 5})


def test_other_methods_are_not_judged_by_the_rules_of_lora() -> None:
    spec = TensorSpec(f"{PREFIX}model.layers.0.mlp.down_proj.ia3_l", (1, 16), "F32")
    check_adapter([spec], {"peft_type": "IA3", "target_modules": ["down_proj"]})


def test_missing_layers_are_named() -> None:
    specs, config = adapter()
    with pytest.raises(AdapterError, match="no rank has model.layers.1"):
        check_adapter(specs.values(), config, [{"model.layers": [0]}, {"model.layers": [2]}], 3)
    with pytest.raises(AdapterError, match="the ranks have 3 of 4 layers"):
        check_adapter(specs.values(), config, [{"model.layers": [0, 1, 2]}], 4)
    # A vision tower may have fewer layers than the language model, and a draft head may add one.
    check_adapter(specs.values(), config, [{"vision.layers": [0], "model.layers": [0, 1, 2, 3]}], 3)
