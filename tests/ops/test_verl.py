"""What verl's own checkpoint manager writes on two ranks: converted, and opened by transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from tests.integrations.runs import errors_of, launch
from tests.ops.llamas import llama, opens_as
from tests.ops.verl_runs import WORLD, rank

from shardwise.errors import MisuseError
from shardwise.ops.convert import convert
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("verl") is None, reason="verl is not installed")
@pytest.mark.parametrize("version", [1, 2])
def test_what_verls_checkpoint_manager_wrote(version: int, tmp_path: Path) -> None:
    codes = launch(rank, (tmp_path, version), WORLD, tmp_path)
    assert codes == [0] * WORLD, errors_of(WORLD, tmp_path)
    source = tmp_path / "global_step_3" / "actor"
    trained = llama(6)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.load_state_dict(torch.load(tmp_path / "whole.pt"))
    assert not all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    assert opens_as(convert(source, tmp_path / "hf", "hf").path, trained)
    assert inspect(source).tools[0] == "verl"
    assert not verify(source).damages
    assert convert(source, tmp_path / "dcp", "dcp").tensors == len(trained.state_dict())
    with pytest.raises(MisuseError, match="optim_world_size_2_rank_0.pt") as caught:
        convert(source, tmp_path / "root", "shards")
    assert "--no-optimizer" in str(caught.value)
    assert convert(source, tmp_path / "root", "shards", optimizer=False).path.name == "epoch_0_step_3"
