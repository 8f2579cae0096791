"""An export that is made later is compared with the class that its configuration names, as one made by a save is."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, get_peft_model
from shardwise import CheckpointingConfig
from shardwise.errors import ExportMismatchError
from shardwise.ops.consolidate import consolidate


def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 32}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))


def saved(root: Path, model: nn.Module, **settings: object) -> Path:
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="false", save_rng=False, **settings)  # type: ignore[arg-type]
    with config.build(0, 0, 0) as checkpointer:
        path = checkpointer.save(0, 1, model)
    assert path is not None
    return path / "model"


def test_shards_that_no_class_opens_are_not_exported(tmp_path: Path) -> None:
    adapted = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    model = saved(tmp_path, adapted)
    with pytest.raises(ExportMismatchError, match="LlamaForCausalLM, which is what the export's config"):
        consolidate(model)
    assert not (model / "consolidated").exists()
    command = [sys.executable, "-m", "shardwise", "consolidate", str(model)]
    refused = subprocess.run(command, capture_output=True, text=True)
    assert refused.returncode == 2
    assert "would not load it" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert subprocess.run([*command, "--no-class-check"], capture_output=True).returncode == 0


def test_a_save_that_was_not_to_be_checked_is_not_checked_later(tmp_path: Path) -> None:
    model = llama()
    model.extra = nn.Linear(2, 2)
    assert consolidate(saved(tmp_path, model, verify_export=False)).tensors > 0
