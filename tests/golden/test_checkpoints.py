"""Checkpoints that an earlier release wrote on two ranks: each still restores, opens and verifies as it is."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.golden import runs
from tests.support import ranks

from shardwise.ops.verify import verify

CHECKPOINTS = Path(__file__).parent / "checkpoints"


def restored(root: str, name: str) -> list[str]:
    """Restore a golden checkpoint into an empty run on this many ranks; what differs from what was saved."""
    expected = runs.contents(*runs.made(name, filled=True)[:2])
    model, optimizer, scheduler = runs.made(name, filled=False)
    consumed = runs.Consumed()
    checkpointer = runs.checkpointer(name, Path(root))
    record = checkpointer.restore(model, optimizer, scheduler, extra_state={"consumed": consumed})
    checkpointer.close()
    assert record is not None
    assert record.step == runs.STEP
    assert consumed.samples == 96
    assert scheduler.last_epoch == runs.STEP
    found = runs.contents(model, optimizer)
    saved = {key for key in expected if name != "adapter" or "lora_" in key or key.split(".norm.weight")[1:]}
    assert any(key.endswith(".exp_avg") for key in saved)
    return sorted(key for key in saved if key not in found or not torch.equal(found[key], expected[key]))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("name", list(runs.RUNS))
def test_it_restores(name: str, world: int, tmp_path: Path) -> None:
    shutil.copytree(CHECKPOINTS, tmp_path / "old", symlinks=True)
    assert ranks.run(world, restored, str(tmp_path / "old"), name) == [[]] * world


@pytest.mark.parametrize("name", list(runs.RUNS))
def test_every_byte_is_what_was_saved(name: str) -> None:
    assert verify(CHECKPOINTS / name / "LATEST").status == "whole"


def test_the_export_opens_in_transformers() -> None:
    from transformers import AutoModelForCausalLM

    path = CHECKPOINTS / "export" / "LATEST" / "model" / "consolidated"
    opened = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    expected = runs.made("export", filled=True)[0].state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in opened.state_dict().items())


def test_the_adapter_opens_in_peft() -> None:
    import peft

    base = runs.llama()
    opened = peft.PeftModel.from_pretrained(base, str(CHECKPOINTS / "adapter" / "LATEST" / "model"))
    expected = runs.made("adapter", filled=True)[0].state_dict()
    factors = {key: value for key, value in opened.state_dict().items() if "lora_" in key}
    assert len(factors) == 8
    assert all(torch.equal(value, expected[key]) for key, value in factors.items())
