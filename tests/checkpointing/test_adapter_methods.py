"""Methods of peft with state beside their tensors: a resumed run goes on as one that was never interrupted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests.addons.peft_models import causal, randomise
from torch import nn

from shardwise.checkpointing import Checkpointer
from shardwise.config import CheckpointingConfig

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
