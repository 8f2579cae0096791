"""Pipeline stages whose tensors the base model has in other dtypes than memory does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.support.ranks import run
from torch import nn

from shardwise import CheckpointingConfig
from shardwise.ops.verify import verify

#: Dtypes in memory and in the base, of the first stage's weight and of the second's.
CASES = [
    pytest.param((torch.float32, torch.bfloat16), (torch.float32, torch.float32), id="the first rounds"),
    pytest.param((torch.float32, torch.float32), (torch.float32, torch.bfloat16), id="the second rounds"),
    pytest.param((torch.float32, torch.bfloat16), (torch.float32, torch.bfloat16), id="both round"),
    pytest.param((torch.bfloat16, torch.float32), (torch.bfloat16, torch.float32), id="both widen"),
    pytest.param((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32), id="one each"),
]
Pair = tuple[torch.dtype, torch.dtype]


def stage(dtype: torch.dtype, value: float) -> nn.Module:
    model = nn.Module()
    model.register_parameter("ab"[dist.get_rank()], nn.Parameter(torch.full((3, 5), value, dtype=dtype)))
    return model


def save_and_restore(
    root: Path, base: Path, dtypes: tuple[torch.dtype, torch.dtype], settings: dict[str, object]
) -> None:
    rank = dist.get_rank()
    config = CheckpointingConfig(
        checkpoint_dir=root,
        save_consolidated="every",
        original_model_root_dir=str(base),
        **settings,  # type: ignore[arg-type]
    )
    with config.build(dp_rank=0, tp_rank=0, pp_rank=rank) as engine:
        for step in (1, 2):
            model, other = stage(dtypes[rank], 1.01 * step), stage(dtypes[rank], 7.0)
            engine.save(0, step, model)
            assert engine.restore(other, verify="digests") is not None
            assert all(map(torch.equal, model.parameters(), other.parameters()))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize(("first", "second"), CASES)
def test_each_stage_comes_back_as_it_was(tmp_path: Path, first: Pair, second: Pair, is_async: bool) -> None:
    base = tmp_path / "base"
    base.mkdir()
    save_file({"a": torch.zeros(3, 5, dtype=first[1]), "b": torch.zeros(3, 5, dtype=second[1])}, base / "m.safetensors")
    run(2, save_and_restore, tmp_path / "run", base, (first[0], second[0]), {"is_async": is_async})
    exported = load_file(tmp_path / "run" / "epoch_0_step_2" / "model" / "consolidated" / "m.safetensors")
    assert {name: tensor.dtype for name, tensor in exported.items()} == {"a": first[1], "b": second[1]}
    assert verify(tmp_path / "run").status == "whole"
