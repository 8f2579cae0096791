"""torchtitan's Trainer with shardwise's checkpoints: killed in a save and resumed, it goes on as if never stopped.

What runs on the CPU, as `tests.integrations.titan` says: one process, tensor parallelism, FSDP2.
No environment of this repository has torchtitan: these tests are skipped there.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tests.integrations.scripts import write_scripts
from tests.integrations.titan import Run, make_assets, train

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("torchtitan") is None, reason="torchtitan is not installed: pip install torchtitan"
    ),
]
SECOND = "epoch_0_step_4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_assets(tmp_path / "assets")
    assert write_scripts("torchtitan.md", tmp_path) <= 8
    return tmp_path


def opens_with_equal_logits(folder: Path, checkpoints: str = "checkpoint") -> None:
    """transformers computes what torchtitan's model did at the end of the run on one process."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "outputs" / checkpoints / "epoch_0_step_6/model/consolidated")
    theirs = torch.load(folder / "logits.pt")
    with torch.no_grad():
        ours = model(torch.arange(32).reshape(1, 32)).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_pages_script_resumes_as_if_never_stopped(folder: Path) -> None:
    plain = (("last_save_in_hf", False), ("folder", "theirs"))
    codes, whole, errors = train(Run(folder, "old.py", settings=plain))
    assert codes == [0], errors
    codes, _, _ = train(Run(folder, killed_in=SECOND))
    assert codes == [-signal.SIGKILL]
    codes, resumed, errors = train(Run(folder))
    assert codes == [0], errors
    assert resumed == {step: loss for step, loss in whole.items() if step > 2}
    assert len(resumed) == 4
    assert sorted(path.name for path in (folder / "outputs/checkpoint").glob("epoch_*")) == [SECOND, "epoch_0_step_6"]
    opens_with_equal_logits(folder)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
def test_another_mesh(fused: bool, folder: Path) -> None:
    """From one process onto two that are tensor-parallel: the data go on, and the losses are equal but for rounding."""
    codes, whole, errors = train(Run(folder, fused=fused, settings=(("folder", "whole"),)))
    assert codes == [0], errors
    codes, _, _ = train(Run(folder, fused=fused, settings=(("async_mode", "async"),), killed_in=SECOND))
    assert codes == [-signal.SIGKILL]
    codes, resumed, errors = train(Run(folder, fused=fused, world=2, tp=2))
    assert codes == [0, 0], errors
    assert resumed == pytest.approx({step: loss for step, loss in whole.items() if step > 2}, rel=1e-3)
    opens_with_equal_logits(folder)


def test_fused_projections_are_restored_on_each_mesh(folder: Path) -> None:
    """Without an export, two ranks go on to the last bit after a kill, and one process from theirs but for rounding."""
    plain = (("last_save_in_hf", False), ("last_save_model_only", False))
    two = Run(folder, world=2, tp=2, settings=plain)
    codes, whole, errors = train(replace(two, settings=(*plain, ("folder", "whole"))))
    assert codes == [0, 0], errors
    codes, _, _ = train(replace(two, killed_in=SECOND))
    assert codes[0] == -signal.SIGKILL
    shutil.copytree(folder / "outputs/checkpoint", folder / "outputs/other", symlinks=True)
    codes, resumed, errors = train(two)
    assert codes == [0, 0], errors
    rest = {step: loss for step, loss in whole.items() if step > 2}
    assert resumed == rest
    codes, resumed, errors = train(Run(folder, settings=(*plain, ("folder", "other"))))
    assert codes == [0], errors
    assert resumed == pytest.approx(rest, rel=1e-3)
    names = set()
    for file in (folder / "outputs/other/epoch_0_step_6/model").rglob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            names |= set(opened.keys())
    assert {f"layers.0.attention.qkv_linear.{name}.weight" for name in ("wq", "wk", "wv")} < names
    assert not any("wqkv" in name for name in names)


def test_fsdp2(folder: Path) -> None:
    """Two ranks go on to the last bit. On one the model goes on, and the data begin anew where that is asked for."""
    two = Run(folder, world=2)
    codes, whole, errors = train(replace(two, settings=(("folder", "whole"),)))
    assert codes == [0, 0], errors
    codes, _, _ = train(replace(two, killed_in=SECOND))
    assert codes[0] == -signal.SIGKILL
    shutil.copytree(folder / "outputs/checkpoint", folder / "outputs/other", symlinks=True)
    codes, resumed, errors = train(two)
    assert codes == [0, 0], errors
    assert resumed == {step: loss for step, loss in whole.items() if step > 2}
    other = Run(folder, settings=(("folder", "other"),))
    assert "the position in the data is that of 2 data-parallel ranks" in refused(other)
    codes, resumed, errors = train(replace(other, settings=(*other.settings, ("exclude_from_loading", ["dataloader"]))))
    assert codes == [0], errors
    assert list(resumed) == [3, 4, 5, 6]
    opens_with_equal_logits(folder, "other")


def refused(run: Run) -> str:
    codes, losses, errors = train(run)
    assert codes == [1] * run.world, errors
    assert not losses
    return errors


def test_what_is_refused_before_the_first_step(folder: Path) -> None:
    assert "exclude_from_loading has 'data'" in refused(Run(folder, settings=(("exclude_from_loading", ["data"]),)))
    assert "export_dtype is bfloat16" in refused(Run(folder, settings=(("export_dtype", "bfloat16"),)))
    config = folder / "assets" / "config.json"
    good = config.read_text()
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    config.write_text(json.dumps(json.loads(good) | heads))
    assert "num_attention_heads is 8 in config.json and 16 in torchtitan" in refused(Run(folder))
    config.write_text(json.dumps(json.loads(good) | {"hidden_size": 128}))
    assert "would not load it" in refused(Run(folder))
    config.unlink()
    assert "hf_assets_path has no config.json" in refused(Run(folder))
    (folder / "outputs/theirs/step-2").mkdir(parents=True)
    theirs = (("folder", "theirs"), ("last_save_in_hf", False))
    assert "torchtitan's own CheckpointManager has saved" in refused(Run(folder, settings=theirs))
