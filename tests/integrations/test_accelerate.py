"""Accelerate with shardwise's states: killed in a save and resumed, a run goes on as if never stopped."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import signal
from dataclasses import replace
from pathlib import Path

import pytest
from tests.integrations.accelerate_runs import Result, Run, result, train
from tests.integrations.runs import die_when_opening, opens_adapter, run_pages_script

stateful = pytest.param(
    "stateful",
    marks=pytest.mark.skipif(
        importlib.util.find_spec("torchdata") is None, reason="torchdata is not installed: pip install torchdata"
    ),
)


def killed_and_resumed(run: Run, tmp_path: Path, number: int = 3) -> Result:
    """A run that is killed in its save of this number (3 is that of step 12), and resumed, equals one never stopped."""
    whole = result(replace(run, directory=tmp_path / "whole"), tmp_path)
    name = f"{'state' if run.named else f'checkpoint_{number}'}/.saving-epoch_0_step_{number}"
    assert train(replace(run, killed_in=name), tmp_path)[0] == -signal.SIGKILL
    resumed = result(run, tmp_path)
    assert resumed.started == number * run.save_every
    assert resumed.losses == {step: loss for step, loss in whole.losses.items() if step > resumed.started}
    assert resumed.weights == whole.weights
    left = sorted(path.name for path in (run.directory / ("state" if run.named else "checkpoints")).iterdir())
    last = run.steps // run.save_every - 1
    assert (
        left[0] == "LATEST" and len(left) == 2 if run.named else left == [f"checkpoint_{n}" for n in (last - 1, last)]
    )
    opens(run)
    return whole


def opens(run: Run) -> None:
    """transformers, or peft, opens what `save_model` wrote."""
    from transformers import LlamaForCausalLM

    for number in range(run.models):
        if run.lora:
            opens_adapter(run.directory / f"final-{number}")
            continue
        _, info = LlamaForCausalLM.from_pretrained(run.directory / f"final-{number}", output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]


@pytest.mark.slow
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize(("world", "fsdp"), [(1, False), (2, False), (2, True), (1, True)])
def test_killed_in_a_save(world: int, fsdp: bool, is_async: bool, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", world, fsdp, batch=4 // world, is_async=is_async), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["seedable", stateful, "dispatch"])
@pytest.mark.parametrize("world", [1, 2])
def test_ways_of_making_batches(world: int, data: str, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", world, batch=4 // world, data=data), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])
def test_one_directory_again_and_again(world: int, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", world, batch=4 // world, named=True), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fsdp"), [(1, False), (2, False)])
def test_several_models(world: int, fsdp: bool, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", world, fsdp, batch=4 // world, models=2), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 2)])
def test_another_number_of_ranks(first: int, then: int, tmp_path: Path) -> None:
    """FSDP2 on two, one process alone, in the middle of an epoch: the same samples in each step, rounded otherwise."""
    started = Run(tmp_path / "run", first, first > 1, 4 // first, steps=6, data="seedable", dropout=0.0)
    before = result(started, tmp_path)
    after = result(replace(started, steps=18, world=then, fsdp=then > 1, batch=4 // then), tmp_path)
    whole = result(replace(started, steps=18, directory=tmp_path / "whole"), tmp_path)
    assert after.started == 6
    assert before.samples | after.samples == whole.samples
    assert before.losses | after.losses == pytest.approx(whole.losses, rel=1e-2)
    opens(started)


@pytest.mark.slow
@pytest.mark.parametrize("data", ["plain", stateful])
def test_saved_at_the_end_of_an_epoch(data: str, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", data=data, save_every=5), tmp_path, 2)


@pytest.mark.slow
def test_workers_that_mask_at_random(tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", workers=2), tmp_path)


@pytest.mark.slow
def test_gradient_scaler(tmp_path: Path) -> None:
    whole = killed_and_resumed(Run(tmp_path / "run", scaler=True), tmp_path)
    assert whole.weights[-1] == "16.0"  # twice as much after each 7 of 18 steps


@pytest.mark.slow
@pytest.mark.parametrize(("world", "fsdp"), [(1, False), (2, False), (2, True)])
def test_an_adapter(world: int, fsdp: bool, tmp_path: Path) -> None:
    killed_and_resumed(Run(tmp_path / "run", world, fsdp, batch=4 // world, lora=True), tmp_path)


def say(directory: Path, killed_in: str) -> None:
    os.chdir(directory)
    if killed_in:
        die_when_opening(killed_in)
    ran = runpy.run_path("train.py")
    weights = {name: tensor.tolist() for name, tensor in ran["model"].state_dict().items()}
    print(json.dumps({"losses": ran["progress"].losses, "weights": weights}))


def test_the_pages_script_resumes_as_if_never_stopped(tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM

    whole, resumed = run_pages_script("accelerate.md", say, "checkpoint_3/.saving", tmp_path)
    assert json.dumps(resumed) == json.dumps(whole)
    opened = LlamaForCausalLM.from_pretrained(tmp_path / "new" / "my-llama" / "final")
    assert {name: tensor.tolist() for name, tensor in opened.state_dict().items()} == whole["weights"]
