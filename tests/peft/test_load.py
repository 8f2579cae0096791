"""Before loading, and instead of loading: what a file may mean in this model, and fresh adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from tests.peft.models import causal, logits
from tests.peft.own_models import HIDDEN, OwnConfig, dense, moe
from tests.peft.test_models import EXPERTS, LINEAR, adapted, save

import peft
from shardwise.errors import AdapterError, CheckpointNotFoundError, MisuseError
from shardwise.peft.capture import capture_adapter
from shardwise.peft.check import check_shared_factors, differing_settings
from shardwise.peft.initial_values import initialise_adapters, initialise_magnitudes
from shardwise.peft.tensors import AdapterFile


def only_file(model: nn.Module) -> AdapterFile:
    captured = capture_adapter([model], OwnConfig(), v4_compatible=False, legacy_paramwrapper_layout=False)
    return captured.files[0]


def test_unequal_factors_do_not_fit_a_combined_projection(tmp_path: Path) -> None:
    model = dense(OwnConfig())
    save(model, tmp_path, OwnConfig())
    check_shared_factors(only_file(model), tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    saved = load_file(path)
    name = "base_model.model.model.layers.1.self_attn.v_proj.lora_A.weight"
    saved[name] = saved[name] + 1
    save_file(saved, path)
    with pytest.raises(AdapterError, match="both are one parameter") as caught:
        check_shared_factors(only_file(model), tmp_path)
    assert caught.value.tensor == name
    path.unlink()
    with pytest.raises(CheckpointNotFoundError):
        check_shared_factors(only_file(model), tmp_path)


@pytest.mark.parametrize(
    ("saved", "current", "keys"),
    [
        ({"lora_alpha": 8}, {"lora_alpha": 8, "r": 4}, set()),
        ({"lora_alpha": 8}, {"lora_alpha": 16}, {"lora_alpha"}),
        ({}, {"use_dora": False, "alpha_pattern": None, "peft_type": "LORA"}, set()),
        ({"use_rslora": True}, {"use_dora": True}, {"use_rslora", "use_dora"}),
        ({"alpha_pattern": {"q_proj": 2}}, {}, {"alpha_pattern"}),
        ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": {"embed_tokens": [1, 5]}}, set()),
        ({"trainable_token_indices": [1, 5]}, {"trainable_token_indices": [5, 1]}, {"trainable_token_indices"}),
        ({"layer_replication": [[0, 2]]}, {"layer_replication": [(0, 2)]}, set()),
        ({"layer_replication": [[0, 2]]}, {}, {"layer_replication"}),
        ({"alora_invocation_tokens": [3]}, {"alora_invocation_tokens": [4]}, {"alora_invocation_tokens"}),
        ({"init_lora_weights": "pissa"}, {"init_lora_weights": True}, {"init_lora_weights"}),
        ({"init_lora_weights": "gaussian", "lora_dropout": 0.1}, {"init_lora_weights": True}, set()),
        ({"a_setting_of_tomorrow": 3}, {}, {"a_setting_of_tomorrow"}),
        ({"a_setting_of_tomorrow": None}, {}, set()),
        (
            {"target_parameters": ["down_proj"], "peft_version": "0.18.0"},
            {"target_parameters": ["down_proj"], "peft_version": "0.21.2"},
            {"legacy_paramwrapper_layout"},
        ),
    ],
)
def test_settings_that_change_the_meaning(
    saved: Mapping[str, object], current: Mapping[str, object], keys: set[str]
) -> None:
    assert set(differing_settings(saved, current)) == keys


@pytest.mark.parametrize(
    ("config", "changed"),
    [
        (peft.VeraConfig(r=4), {"projection_prng_key": 7}),
        (peft.RandLoraConfig(r=4), {"projection_prng_key": 7, "randlora_alpha": 3, "sparse": True}),
        (peft.FourierFTConfig(), {"random_loc_seed": 5, "scaling": 2.0}),
        (peft.OFTConfig(oft_block_size=4, r=0), {"coft": True, "eps": 1.0, "block_share": True}),
        (peft.LoHaConfig(), {"alpha": 3}),
        (peft.TrainableTokensConfig(token_indices=[1, 2]), {"token_indices": [2, 1]}),
        (peft.HRAConfig(), {"apply_GS": True, "r": 3}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_settings_of_every_method_are_compared(config: peft.PeftConfig, changed: dict[str, object]) -> None:
    own = config.to_dict()
    unlike = {"peft_version": "0.1", "revision": "x", "inference_mode": True, "base_model_name_or_path": "y"}
    assert differing_settings(own, own | unlike) == {}
    for key, value in changed.items():
        assert differing_settings(own, own | {key: value}) == {key: (own[key], value)}
        assert key in own
        if key not in ("token_indices",):  # which has no default
            older = {k: v for k, v in own.items() if k != key}  # of a release that had no such setting
            assert differing_settings(older, own) == {}


@pytest.mark.parametrize("method", [None, "kaiming", "xavier", "gaussian"])
def test_fresh_adapters_change_nothing_and_are_reproducible(method: str | None) -> None:
    pytest.importorskip("peft")
    settings: dict[str, object] = {"target_modules": [*LINEAR, "embed_tokens"], "target_parameters": EXPERTS}
    models = [adapted("qwen3_moe", settings, seed) for seed in range(2)]
    for model in models:
        assert not torch.equal(logits(model), logits(causal("qwen3_moe")))
        initialise_adapters([model], None, method)
        torch.testing.assert_close(logits(model), logits(causal("qwen3_moe")), rtol=0, atol=1e-6)
    first, second = (dict(model.named_parameters()) for model in models)
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name]), name
        if ".lora_A." in name or "lora_embedding_B" in name:
            assert parameter.std() > 0, name
    before = {name: parameter.clone() for name, parameter in first.items()}
    initialise_adapters([models[0]], None, method, seed=1)
    assert any(not torch.equal(parameter, before[name]) for name, parameter in first.items())


@pytest.mark.parametrize(("method", "spread"), [(None, (1 / 3 / 256) ** 0.5), ("gaussian", 1 / 64)])
def test_the_spread_is_that_of_the_method(method: str | None, spread: float) -> None:
    from tests.peft.own_models import LoRALinear

    model = nn.ModuleDict({"proj": LoRALinear(256, 32, 64, 1.0)})
    initialise_adapters([model], OwnConfig(dim=64), method)
    factor = model["proj"].lora_A.weight
    assert float(factor.std()) == pytest.approx(spread, rel=0.05)


def test_own_factors_and_magnitudes() -> None:
    model = dense(OwnConfig(use_dora=True))
    initialise_adapters([model], OwnConfig(use_dora=True))
    initialise_magnitudes([model])
    module = model.model.layers[0].self_attn.qkv_proj
    assert torch.equal(module.delta(), torch.zeros_like(module.weight))
    assert float(module.lora_A.weight.abs().max()) <= HIDDEN**-0.5
    torch.testing.assert_close(module.lora_magnitude[:, 0], module.weight.norm(dim=1))
    experts = moe(OwnConfig())
    initialise_adapters([experts], OwnConfig())
    factors = experts.model.layers[0].mlp.experts
    assert float(factors.lora_down_A.std()) > 0
    assert not factors.lora_down_B.any()


def test_initialisation_that_cannot_be() -> None:
    model = dense(OwnConfig())
    with pytest.raises(MisuseError, match="'orthogonal' is unknown"):
        initialise_adapters([model], OwnConfig(), "orthogonal")
    with pytest.raises(MisuseError, match="meta device"):
        initialise_adapters([model.to("meta")], OwnConfig())
