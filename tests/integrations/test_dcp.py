"""The loop of docs/howto/dcp.md, with torch's own calls: killed in a save, resumed on another number of processes."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
import torch
from tests.integrations.runs import model
from tests.integrations.scripts import run_script, write_scripts
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver

from shardwise import SafetensorsReader, SafetensorsWriter


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_pages_script_resumes_as_if_never_stopped(world: int, tmp_path: Path) -> None:
    assert write_scripts("dcp.md", tmp_path) <= 8
    codes, whole, errors = run_script(tmp_path / "old.py", tmp_path / "old", world)
    assert codes == [0] * world, errors
    codes, _, _ = run_script(tmp_path / "new.py", tmp_path / "new", world, killed_in="step-08/")
    assert codes[0] == -signal.SIGKILL
    shutil.copytree(tmp_path / "new", tmp_path / "other")
    codes, resumed, errors = run_script(tmp_path / "new.py", tmp_path / "new", world)
    assert codes == [0] * world, errors
    rest = {step: loss for step, loss in whole.items() if step > 4}
    assert resumed == rest
    if world == 2:  # each process has the same samples, so that the losses are the same but for rounding
        codes, other, errors = run_script(tmp_path / "new.py", tmp_path / "other", 1)
        assert codes == [0], errors
        assert other == pytest.approx(rest, rel=1e-3)


def test_transformers_opens_what_torch_saves_through_the_writer(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    saved = model()
    state_dict_saver.save(saved.state_dict(), storage_writer=SafetensorsWriter(tmp_path))
    saved.config.save_pretrained(tmp_path)  # type: ignore[union-attr,operator]
    opened, info = LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    again = {name: torch.zeros_like(tensor) for name, tensor in opened.state_dict().items()}
    state_dict_loader.load(again, storage_reader=SafetensorsReader(tmp_path))
    assert all(torch.equal(tensor, again[name]) for name, tensor in saved.state_dict().items())
