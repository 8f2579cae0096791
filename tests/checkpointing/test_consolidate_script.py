"""The script beside shards makes the export that the save did not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from shardwise import CheckpointingConfig


def test_the_script_makes_the_export(tmp_path: Path) -> None:
    model = nn.Linear(5, 3)
    checkpointer = CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=False).build(0, 0, 0)
    checkpointer.save(0, 1, model)
    script = tmp_path / "epoch_0_step_1" / "model" / "consolidate.sh"
    readable = (script.parent / "shard-00001-model-00001-of-00001.safetensors").stat().st_mode & 0o444
    assert script.stat().st_mode & 0o111 == readable >> 2, "whoever may read it may run it"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    subprocess.run([str(script)], check=True, env=os.environ | {"PATH": path}, timeout=120)
    found = load_file(script.parent / "consolidated" / "model.safetensors")
    assert torch.equal(found["weight"], model.weight)


def test_an_export_needs_no_script(tmp_path: Path) -> None:
    checkpointer = CheckpointingConfig(checkpoint_dir=tmp_path, save_consolidated=True).build(0, 0, 0)
    checkpointer.save(0, 1, nn.Linear(5, 3))
    assert not (tmp_path / "epoch_0_step_1" / "model" / "consolidate.sh").exists()
