"""Writes `deepspeed/` with DeepSpeed 0.19.8 itself: a small GPT-2 after two steps, and the weights that it then had.

Needs ``deepspeed`` and what it imports, apart from the environment of the tests:

    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 tests/interop/make_deepspeed.py 2 tests/interop/deepspeed/zero2
    DS_ACCELERATOR=cpu torchrun --nproc-per-node 2 tests/interop/make_deepspeed.py 3 tests/interop/deepspeed/zero3

``expected.safetensors`` has the master weights by ``safe_get_full_fp32_param``, which asks the running engine and reads
no file; frozen weights, and with ZeRO-2 the 16-bit ones (``half.``), are those of the module. The scripts that
DeepSpeed puts beside are not kept.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file
from tests.interop.test_deepspeed import SIZES
from tests.ops.damaged import gpt2


def main(stage: int, directory: Path) -> None:
    """Train two steps, and save."""
    deepspeed.init_distributed(dist_backend="gloo")
    model = gpt2(5, **SIZES)
    model.transformer.wpe.weight.requires_grad = False
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.ndim == 1], "weight_decay": 0.0},
    ]
    zero: dict[str, object] = {"stage": stage}
    if stage == 3:
        zero |= {"sub_group_size": 300, "stage3_param_persistence_threshold": 20}
    config = {
        "train_batch_size": 2,
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": True},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=torch.optim.AdamW(groups, lr=1e-2), config=config)
    tokens = torch.arange(8).view(1, 8) + int(os.environ["RANK"])
    for _ in range(2):
        engine.backward(engine(tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(directory), tag="global_step2")
    with deepspeed.zero.GatheredParameters(list(model.parameters())) if stage == 3 else _nothing():
        half = {name: value.detach().clone() for name, value in model.named_parameters()}
    expected = {
        name: safe_get_full_fp32_param(value) if value.requires_grad else half[name]
        for name, value in model.named_parameters()
    }
    if stage == 2:
        expected |= {f"half.{name}": value for name, value in half.items()}
    if os.environ["RANK"] == "0":
        save_file({name: value.clone() for name, value in expected.items()}, directory / "expected.safetensors")
        for script in directory.glob("*.py"):
            script.unlink()


def _nothing() -> torch.no_grad:
    return torch.no_grad()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
