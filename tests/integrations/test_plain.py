"""The plain loop of docs/howto/fsdp2.md: killed in a save and resumed, it goes on as if never stopped."""

from __future__ import annotations

import shutil
import signal
from pathlib import Path

import pytest
from tests.integrations.scripts import run_script, write_scripts


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_pages_script_resumes_as_if_never_stopped(world: int, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    assert write_scripts("fsdp2.md", tmp_path) <= 11
    codes, whole, errors = run_script(tmp_path / "old.py", tmp_path / "old", world)
    assert codes == [0] * world, errors
    codes, _, _ = run_script(tmp_path / "new.py", tmp_path / "new", world, killed_in=".saving-epoch_0_step_10/model/")
    assert codes[0] == -signal.SIGKILL
    shutil.copytree(tmp_path / "new", tmp_path / "other", symlinks=True)
    codes, resumed, errors = run_script(tmp_path / "new.py", tmp_path / "new", world)
    assert codes == [0] * world, errors
    assert resumed == {step: loss for step, loss in whole.items() if step > 5}
    assert len(resumed) == 15
    LlamaForCausalLM.from_pretrained(tmp_path / "new" / "my-llama" / "LATEST" / "model" / "consolidated")
    if world == 2:  # on one: the epoch begins anew, at step 6
        codes, other, errors = run_script(tmp_path / "new.py", tmp_path / "other", 1)
        assert codes == [0], errors
        assert list(other) == list(range(6, 26))
        assert "batches" in errors
