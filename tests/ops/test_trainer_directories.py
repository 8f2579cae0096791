"""What transformers' own Trainer writes with FSDP on two ranks: converted, and opened by transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.integrations.runs import errors_of, launch, model
from tests.ops.llamas import opens_as
from tests.ops.trainer_runs import WORLD, FsdpRun, rank

from shardwise import CheckpointingConfig
from shardwise.errors import MisuseError
from shardwise.ops.convert import convert
from shardwise.ops.verify import verify

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("form", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_checkpoint_of_the_trainer_becomes_the_model_that_was_trained(
    form: str, version: int, tmp_path: Path
) -> None:
    codes = launch(rank, FsdpRun(tmp_path / "run", form, version), WORLD, tmp_path)
    assert codes == [0] * WORLD, errors_of(WORLD, tmp_path)
    source = tmp_path / "run" / "checkpoint-3"
    trained = model(dropout=0.0).eval()
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    trained.load_state_dict(torch.load(tmp_path / "whole.pt"))
    assert not all(torch.equal(before[name], value) for name, value in trained.state_dict().items())
    trained.config.save_pretrained(tmp_path / "base")
    config = None if (source / "config.json").exists() else tmp_path / "base"
    report = convert(source, tmp_path / "hf", "hf", config=config)
    assert opens_as(report.path, trained)
    assert not verify(source).damages
    if form == "SHARDED_STATE_DICT":
        goes_on(source, tmp_path, trained.state_dict())
    else:
        with pytest.raises(MisuseError, match="optimizer.bin"):
            convert(source, tmp_path / "root", "shards")
        assert not convert(source, tmp_path / "root", "shards", optimizer=False).optimizer


def goes_on(source: Path, tmp_path: Path, trained: dict[str, torch.Tensor]) -> None:
    """The optimizer of ``optimizer_0`` is carried over, by the names of its parameters."""
    assert convert(source, tmp_path / "root", "shards").optimizer
    other = model(dropout=0.0)
    optimizer = torch.optim.AdamW(other.parameters())
    with CheckpointingConfig(checkpoint_dir=tmp_path / "root").build(0, 0, 0) as engine:
        record = engine.restore(other, optimizer)
    assert record is not None
    assert record.step == 3
    assert all(torch.equal(value, trained[name]) for name, value in other.state_dict().items())
    states = [optimizer.state[parameter] for parameter in other.parameters()]
    assert all(state["step"] == 3 for state in states)
    assert all(state["exp_avg_sq"].count_nonzero() for state in states)
