"""Lightning with shardwise's checkpoints: killed in a save and resumed, a run goes on as if never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integrations.lightning_runs import Run, result, train
from tests.integrations.runs import die_when_opening, opens_adapter, run_pages_script

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="Lightning is not installed: pip install lightning"
)
#: Fabric's checkpoints have no epoch and step; the saves to a path are counted.
KILLED = {"Trainer": "last.ckpt/.saving-epoch_1_step_13", "Fabric": "last.ckpt/.saving-epoch_0_step_3"}
KINDS = pytest.mark.parametrize("kind", ["Trainer", "Fabric"])


def killed_and_resumed(run: Run, tmp_path: Path) -> None:
    """A run that is killed while it saves step 13 or 12, and resumed, equals one that was never stopped."""
    whole = result(replace(run, directory=tmp_path / "whole"), tmp_path)
    assert train(replace(run, killed_in=KILLED[run.kind]), tmp_path)[0] == -signal.SIGKILL
    resumed = result(run, tmp_path)
    assert resumed.started == 9
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 9}
    assert resumed.weights == whole.weights
    kept = [{path.name for path in each.iterdir()} for each in (run.directory, tmp_path / "whole")]
    # Of step 13 the checkpoint that is not `last` was complete; no callback of the run that went on from 9 knows it.
    assert kept[0] - {"epoch=1-step=13.ckpt"} == kept[1]
    assert len(kept[1]) == (3 if run.kind == "Trainer" else 1)
    opens(run)


def opens(run: Run) -> None:
    """transformers, or peft, opens what was saved last."""
    from transformers import LlamaForCausalLM

    if run.lora:
        opens_adapter(run.directory / "last.ckpt" / "LATEST" / "model")
        return
    directory = run.directory / "last.ckpt" / "LATEST" / "model" / "consolidated"
    _, info = LlamaForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(("world", "fsdp"), [(1, False), (2, False), (2, True)])
def test_killed_in_a_save(world: int, fsdp: bool, kind: str, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", kind, world, fsdp, 4 // world), tmp_path)


@pytest.mark.slow
@KINDS
def test_killed_in_the_background(kind: str, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", kind, is_async=True, masks=True), tmp_path)


@pytest.mark.slow
@KINDS
def test_torchdatas_loader(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("torchdata", reason="torchdata is not installed: pip install torchdata")
    killed_and_resumed(Run(tmp_path / "run", kind, stateful=True), tmp_path)


@pytest.mark.slow
@KINDS
def test_workers_that_mask_at_random(kind: str, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", kind, masks=True, workers=2), tmp_path)


@pytest.mark.slow
@KINDS
@pytest.mark.parametrize(("world", "fsdp"), [(1, False), (2, False), (2, True)])
def test_an_adapter(world: int, fsdp: bool, kind: str, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", kind, world, fsdp, 4 // world, lora=True), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(first: int, then: int, tmp_path: Path) -> None:
    """FSDP2 on two, one process alone: what was trained goes on."""
    started = Run(tmp_path / "run", "Trainer", first, first > 1, 4 // first, steps=9, dropout=0.0)
    result(started, tmp_path)
    after = result(replace(started, steps=20, world=then, fsdp=then > 1, batch=4 // then), tmp_path)
    assert after.started == 9
    assert sorted(after.losses) == list(range(10, 21))
    opens(started)


def say(directory: Path, killed_in: str) -> None:
    os.chdir(directory)
    if killed_in:
        die_when_opening(killed_in)
    ran = runpy.run_path("train.py")
    weights = {name: tensor.tolist() for name, tensor in ran["lit"].model.state_dict().items()}
    print(json.dumps({"losses": dict(ran["lit"].losses), "weights": weights}))


def test_the_pages_script_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    whole, resumed = run_pages_script("lightning.md", say, "last.ckpt/.saving-epoch_1_step_14", tmp_path)
    assert resumed["weights"] == whole["weights"]
    assert resumed["losses"] == {step: loss for step, loss in whole["losses"].items() if int(step) >= 8}
    export = tmp_path / "new" / "my-llama" / "last.ckpt" / "LATEST" / "model" / "consolidated"
    opened = LlamaForCausalLM.from_pretrained(export)
    assert opened.config.hidden_size == 32
