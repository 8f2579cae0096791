"""Loads in which each rank reads the headers of just what it holds, and what all of them have to look at."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from tests.support.ranks import failure, run
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import MissingTensorError, TensorError


class Holding(nn.Module):
    """A module with one parameter, of which ranks may have different ones, as pipeline stages have."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(4)))


def load(directory: Path, models: list[list[str]], tie: bool) -> dict[str, list[float]]:
    model = Holding(*models[dist.get_rank()])
    if tie and dist.get_rank() == 0:
        model.register_parameter("head", model.get_parameter("embed"))
    config = CheckpointingConfig(checkpoint_dir=directory / "run")
    with Checkpointer(config, 0, 0, dist.get_rank()) as checkpointer:
        checkpointer.load_model(model, directory)
    return {name: value.tolist() for name, value in model.named_parameters()}


def write(directory: Path, files: list[dict[str, float]]) -> None:
    for number, values in enumerate(files, start=1):
        tensors = {name: torch.full((4,), value) for name, value in values.items()}
        save_file(tensors, directory / f"shard-{number:05d}.safetensors")


def test_stages_that_have_each_read_their_own_file(tmp_path: Path) -> None:
    write(tmp_path, [{"a": 1.0}, {"b": 2.0}])
    assert run(2, load, tmp_path, [["a"], ["b"]], False) == [{"a": [1.0] * 4}, {"b": [2.0] * 4}]


def test_what_the_notes_say_counts_whichever_rank_has_read_it(tmp_path: Path) -> None:
    write(tmp_path, [{"a": 1.0}, {"b": 2.0}])
    (tmp_path / ".hf_metadata").mkdir()
    (tmp_path / ".hf_metadata" / "passed_through.json").write_text(json.dumps(["b"]))
    for models in ([["a"], ["b"]], [["b"], ["a"]]):
        assert isinstance(failure(2, load, tmp_path, models, False), MissingTensorError)


def test_other_values_for_a_tied_tensor_are_refused(tmp_path: Path) -> None:
    write(tmp_path, [{"embed": 1.0}, {"embed": 1.0, "head": 2.0}])
    assert isinstance(failure(2, load, tmp_path, [["embed"], ["embed", "head"]], True), TensorError)
