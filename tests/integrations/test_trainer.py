"""transformers' Trainer with shardwise's checkpoints: killed in a save and resumed, it goes on as if never stopped."""

from __future__ import annotations

import json
import os
import runpy
import signal
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
from tests.integrations.runs import Run, die_when_opening, opens_adapter, result, scripts, train
from tests.support.ranks import fresh

BEST = (("eval_strategy", "steps"), ("eval_steps", 3), ("load_best_model_at_end", True))


def killed_and_resumed(run: Run, tmp_path: Path) -> None:
    """A run that is killed in its second save (steps 3, 6, ...), and resumed, equals one that was never stopped."""
    whole = result(replace(run, directory=tmp_path / "whole"), tmp_path)
    epoch = 6 * run.batch * run.world * run.accumulate // 40
    codes = train(replace(run, killed_in=f"epoch_{epoch}_step_6"), tmp_path)
    assert codes[0] == -signal.SIGKILL
    assert not list(run.directory.glob("epoch_*_step_6"))
    resumed = result(run, tmp_path)
    assert resumed.started == 3
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > 3}
    assert (resumed.weights, resumed.best) == (whole.weights, whole.best)
    opens(run)


def opens(run: Run) -> None:
    """transformers, or peft, opens the output directory."""
    from transformers import LlamaForCausalLM

    if run.lora:
        opens_adapter(run.directory)
        return
    _, info = LlamaForCausalLM.from_pretrained(run.directory, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(("world", "fsdp"), [(1, False), (2, False), (2, True), (1, True)])
def test_killed_in_a_save(world: int, fsdp: bool, lora: bool, is_async: bool, tmp_path: Path) -> None:
    run = Run(tmp_path / "run", world=world, fsdp=fsdp, lora=lora, is_async=is_async, batch=4 // world, options=BEST)
    killed_and_resumed(run, tmp_path)


def run_original_then_changed(directory: Path) -> None:
    """Print what the page's script came to, then be killed in the changed one's second save."""
    _say(directory / "original", "old.py")
    die_when_opening(".saving-epoch_0_step_10/model/")
    _say(directory / "changed", "new.py")


def run_changed(directory: Path) -> None:
    _say(directory / "changed", "new.py")


def said(output: Path) -> dict[str, object]:
    """What `_say` printed, among what the Trainer did."""
    lines = [line for line in output.read_text().splitlines() if line.startswith('{"losses"')]
    return cast("dict[str, object]", json.loads(lines[0]))


def _say(directory: Path, script: str) -> None:
    os.chdir(directory)
    trainer = runpy.run_path(script)["trainer"]
    losses = [(entry["step"], entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    weights = {name: tensor.tolist() for name, tensor in trainer.model.state_dict().items()}
    print(json.dumps({"losses": losses, "weights": weights}), flush=True)


def test_the_pages_script_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    from shardwise.integrations.transformers import get_last_checkpoint

    old, new, lines = scripts("trainer.md")
    assert lines <= 8
    for name, text in (("original/old.py", old), ("changed/new.py", new)):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(text)
    first, second = tmp_path / "first", tmp_path / "second"
    assert fresh(run_original_then_changed, tmp_path, output=first, seconds=200) == -signal.SIGKILL
    assert get_last_checkpoint(tmp_path / "changed" / "my-llama") == str(tmp_path / "changed/my-llama/epoch_0_step_5")
    errors = second.with_name("second.err")
    assert fresh(run_changed, tmp_path, output=second, seconds=200) == 0, errors.read_text()[-3000:]
    original, resumed = said(first), said(second)
    assert resumed == original
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "changed" / "my-llama")
    assert {name: tensor.tolist() for name, tensor in opened.state_dict().items()} == original["weights"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_batches_that_are_augmented_at_random(accumulate: int, tmp_path: Path) -> None:
    batch = 4 // accumulate
    run = Run(tmp_path / "run", steps=9, augment=True, batch=batch, accumulate=accumulate)
    killed_and_resumed(run, tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_batches_are_skipped_by_number_where_that_is_asked_for(tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", world=2, batch=2, replay=False), tmp_path)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(first: int, then: int, lora: bool, tmp_path: Path) -> None:
    """FSDP2 on two, one process alone: the samples of a step are the same, and so are the losses but for rounding."""
    run = Run(tmp_path / "run", world=first, fsdp=first > 1, batch=4 // first, lora=lora, dropout=0.0)
    whole = result(replace(run, directory=tmp_path / "whole"), tmp_path)
    assert train(replace(run, killed_in="epoch_0_step_9"), tmp_path)[0] == -signal.SIGKILL
    resumed = result(replace(run, world=then, fsdp=then > 1, batch=4 // then), tmp_path)
    assert resumed.started == 6
    assert resumed.losses == pytest.approx({step: loss for step, loss in whole.losses.items() if step > 6}, rel=1e-4)
    opens(run)
