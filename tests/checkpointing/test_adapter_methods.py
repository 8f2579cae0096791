"""Methods of peft with more than factors, and what peft and vLLM would make of the saved files."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests.peft.models import causal, randomise
from torch import nn

import peft
from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig
from shardwise.errors import AdapterError

_ALL: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]}
_STEPS = 10


def _saver(path: Path, **settings: Any) -> Checkpointer:
    return CheckpointingConfig(checkpoint_dir=str(path), is_peft=True, **settings).build(0, 0, 0)


def _allocating(seed: int) -> tuple[Any, torch.optim.Optimizer]:
    """An AdaLoRA model whose ranks are allocated from step 2 to step 7, and masked from there on."""
    config = peft.AdaLoraConfig(init_r=4, target_r=2, tinit=1, tfinal=3, deltaT=1, total_step=_STEPS, **_ALL)
    model = peft.get_peft_model(causal("llama"), config)
    randomise(model, seed)
    return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)


def _train(model: Any, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        ids = torch.tensor([[1, 2 + step, 3, 5 + step]])
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


@pytest.mark.parametrize("stop", [1, 5, 8])
@pytest.mark.parametrize("is_async", [False, True])
def test_adalora_goes_on_allocating_as_if_it_had_never_stopped(stop: int, is_async: bool, tmp_path: Path) -> None:
    model, optimizer = _allocating(1)
    _train(model, optimizer, range(stop))
    with _saver(tmp_path, is_async=is_async) as saver:
        saver.save(0, stop, model, optimizer)
        _train(model, optimizer, range(stop, _STEPS))
    again, other = _allocating(2)
    _train(again, other, range(4))  # what it has allocated by itself gives way
    with _saver(tmp_path) as saver:
        saver.restore(again, other)
    _train(again, other, range(stop, _STEPS))
    ours, theirs = _trained(again), _trained(model)
    assert {name for name in theirs if not torch.equal(ours[name], theirs[name])} == set()
    assert again.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern
    assert any(False in kept for kept in model.peft_config["default"].rank_pattern.values())


def _lora(**settings: Any) -> Any:
    return peft.get_peft_model(causal("llama"), peft.LoraConfig(**{"r": 4, **_ALL, **settings}))


def _renamed(model: Any) -> None:
    model.peft_config["default"].target_modules = {"v_proj"}


def _bared(model: Any) -> None:
    attention = model.base_model.model.model.layers[1].self_attn
    attention.q_proj = attention.q_proj.get_base_layer()


def _contradicting(model: Any) -> None:
    model.peft_config["default"].layers_pattern = "layers"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_renamed, r"as another one: 'model.layers.0.self_attn.q_proj' has tensors"),
        (_bared, r"as another one: 'model.layers.1.self_attn.q_proj' has no tensors"),
        (_contradicting, r"peft does not take the settings of the adapter 'default': ValueError: .*layers_to"),
    ],
    ids=["renamed", "bared", "contradicting"],
)
def test_what_peft_would_open_as_another_adapter_is_refused(
    change: Callable[[Any], None], message: str, tmp_path: Path
) -> None:
    model = _lora()
    change(model)
    with _saver(tmp_path) as saver:
        for call in (lambda: saver.restore(model), lambda: saver.save(0, 1, model)):
            with pytest.raises(AdapterError, match=message):
                call()
    assert not list(tmp_path.rglob("adapter_model.safetensors"))


_VLLM: dict[str, tuple[dict[str, Any], str]] = {
    "plain": ({}, ""),
    "rslora": ({"use_rslora": True, "r": 16}, ""),
    "embeddings": ({"target_modules": ["embed_tokens", "q_proj"]}, ""),
    "dora": ({"use_dora": True}, "use_dora: it does not apply magnitudes"),
    "head": ({"modules_to_save": ["lm_head"]}, "modules_to_save (['lm_head']): it loads no whole modules"),
    "bias": ({"bias": "lora_only"}, "bias is 'lora_only'"),
    "factor bias": ({"lora_bias": True}, "4 tensors are no factors"),
    "tokens": ({"trainable_token_indices": [1]}, "1 tensors are no factors"),
    "ranks": ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: it scales every module by the one r"),
    "rank": ({"r": 32}, "r is 32: set max_lora_rank, 16 by default"),
    "high": ({"r": 600}, "r is 600: over 512"),
}


@pytest.mark.parametrize("case", _VLLM)
def test_what_vllm_does_not_serve_is_said_once(case: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings, expected = _VLLM[case]
    model = _lora(**settings)
    with _saver(tmp_path) as saver, caplog.at_level(logging.INFO, logger="shardwise"):
        saver.save(0, 1, model)
        saver.save(0, 2, model)
    told = [record.getMessage() for record in caplog.records if "vLLM" in record.getMessage()]
    assert len(told) == bool(expected)
    assert all("does not serve the adapter 'default'" in line and expected in line for line in told)


def test_vllm_serves_lora_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, _ = _allocating(1)
    with _saver(tmp_path) as saver, caplog.at_level(logging.INFO, logger="shardwise"):
        saver.save(0, 1, model)
    assert "peft_type is ADALORA, and it serves LORA alone" in caplog.text


def test_multitask_prompts_are_saved_as_peft_does_and_resumed(tmp_path: Path) -> None:
    def built(seed: int) -> Any:
        config = peft.MultitaskPromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, num_tasks=2)
        model = peft.get_peft_model(causal("llama"), config)
        randomise(model, seed)
        return model

    model, again = built(1), built(2)
    with _saver(tmp_path) as saver:
        saver.save(0, 1, model)
        saver.restore(again)
    model.save_pretrained(tmp_path / "theirs")
    ours = load_file(tmp_path / "LATEST/model/adapter_model.safetensors")
    theirs = load_file(tmp_path / "theirs/adapter_model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_module_in_extra_state_beside_a_merged_export(tmp_path: Path) -> None:
    config = CheckpointingConfig(
        checkpoint_dir=str(tmp_path), is_peft=True, export_merged=True, save_consolidated="every", log_summary=False
    )
    head, again = nn.Linear(2, 2), nn.Linear(2, 2)
    with config.build() as engine:
        model = _lora()
        path = engine.save(step=1, model=model, extra_state={"head": head})
        engine.restore(model, extra_state={"head": again})
    assert path is not None
    assert (path / "model/consolidated/model.safetensors").is_file()
    assert torch.equal(head.weight, again.weight)
