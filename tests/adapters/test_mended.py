"""What the matrix of peft's methods has found, each by itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.clients.adapters_whole import checkpointer
from tests.peft.models import causal, logits, randomise
from torch import nn

import peft
from shardwise.errors import AdapterError

LINEAR = ["q_proj", "v_proj"]


def test_base_weights_that_an_adapter_began_by_changing_at_random_are_restored(tmp_path: Path) -> None:
    def begun(seed: int) -> nn.Module:
        base = causal("llama")
        torch.manual_seed(seed)
        settings = {"r": 4, "target_modules": LINEAR, "init_lora_weights": "pissa_niter_1"}
        return peft.get_peft_model(base, peft.LoraConfig(**settings)).eval()

    model, other = begun(1), begun(2)
    randomise(model, 0)
    with checkpointer(tmp_path) as saver:
        saver.save(0, 1, model)
        assert not torch.equal(logits(other), logits(model))
        saver.restore(other)
    assert torch.equal(logits(other), logits(model))


def test_subspaces_that_are_allocated_while_training_are_refused_before_it(tmp_path: Path) -> None:
    config = peft.AdamssConfig(target_modules=LINEAR, r=8, num_subspaces=2, subspace_rank=1, use_asa=True)
    with checkpointer(tmp_path) as saver, pytest.raises(AdapterError, match="which subspaces it trains"):
        saver.restore(peft.get_peft_model(causal("llama"), config))
