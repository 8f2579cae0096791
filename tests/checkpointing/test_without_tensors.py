"""A model, a pipeline stage and an optimizer that have no tensor at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from tests.engine.setups import checkpointer
from tests.support.ranks import failure, run
from torch import nn

from shardwise import CheckpointingConfig
from shardwise.errors import MissingTensorError
from shardwise.ops.consolidate import consolidate
from shardwise.ops.inspect import inspect
from shardwise.ops.verify import verify


class Double(nn.Module):
    """Neither parameters nor buffers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


def save_nothing(root: Path, settings: dict[str, object]) -> None:
    with checkpointer(root, **settings) as engine:
        engine.save(0, 1, Double(), extra_state={"seen": {"batches": 3}})
        engine.save_model(Double(), root / "alone")


def load_nothing(root: Path, settings: dict[str, object]) -> object:
    seen: dict[str, object] = {}
    with checkpointer(root, **settings) as engine:
        record = engine.restore(Double(), extra_state={"seen": seen}, verify="digests")
        engine.load_model(Double(), root / "alone" / "model")
    assert record is not None
    return record.step, seen


def load_something(root: Path, settings: dict[str, object]) -> None:
    with checkpointer(root, **settings) as engine:
        engine.restore(nn.Linear(2, 3))


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("settings", MODES)
def test_a_model_without_tensors_comes_back(tmp_path: Path, world: int, settings: dict[str, object]) -> None:
    run(world, save_nothing, tmp_path, settings)
    assert run(3 - world, load_nothing, tmp_path, settings) == [(1, {"batches": 3})] * (3 - world)
    for place in (tmp_path, tmp_path / "alone"):
        report = verify(place)
        assert (report.status, report.tensors) == ("whole", 0)
        description = inspect(place)
        assert description.verifiable
        assert description.tensors == ()
        assert description.files


@pytest.mark.parametrize("settings", [EVERY, SHARDS])
def test_one_that_has_tensors_is_told_what_it_lacks(tmp_path: Path, settings: dict[str, object]) -> None:
    run(2, save_nothing, tmp_path, settings)
    error = failure(2, load_something, tmp_path, settings)
    assert isinstance(error, MissingTensorError)
    assert error.tensor == "weight"


def test_others_read_the_export(tmp_path: Path) -> None:
    run(2, save_nothing, tmp_path, EVERY)
    export = tmp_path / "epoch_0_step_1" / "model" / "consolidated"
    assert load_file(export / "model.safetensors") == {}
    engine = CheckpointingConfig(checkpoint_dir=tmp_path).build()
    engine.load_base_model(Double(), "cpu", None, str(export))
    engine.load_model(Double(), export / "model.safetensors")


def test_shards_are_consolidated(tmp_path: Path) -> None:
    run(2, save_nothing, tmp_path, SHARDS)
    report = consolidate(tmp_path)
    assert (report.files, report.tensors) == (("model.safetensors",), 0)
    CheckpointingConfig(checkpoint_dir=tmp_path).build().load_model(Double(), report.path)


@pytest.mark.parametrize("settings", [EVERY, SHARDS])
def test_a_base_without_tensors_has_no_split_to_follow(tmp_path: Path, settings: dict[str, object]) -> None:
    (tmp_path / "base").mkdir()
    save_file({}, tmp_path / "base" / "model.safetensors")
    config = CheckpointingConfig(  # type: ignore[arg-type]
        checkpoint_dir=tmp_path / "run", original_model_root_dir=str(tmp_path / "base"), **settings
    )
    engine, other = config.build(), nn.Linear(2, 3)
    for step, model in enumerate([Double(), nn.Linear(2, 3)]):
        engine.save(0, step, model)
    assert engine.restore(other) is not None
    assert torch.equal(other.weight, model.weight)


# --- one stage without tensors --------------------------------------------------------------------------------------


def stages(root: Path, settings: dict[str, object]) -> None:
    rank = dist.get_rank()

    def stage(value: float) -> tuple[nn.Module, list[torch.optim.Optimizer]]:
        if rank != 0:
            return Double(), []
        model = nn.Sequential(nn.Linear(4, 4))
        made = torch.optim.AdamW(model.parameters())
        for parameter in model.parameters():
            nn.init.constant_(parameter, value)
            parameter.grad = torch.full_like(parameter, value)
        made.step()
        return model, [made]

    config = CheckpointingConfig(checkpoint_dir=root, **settings)  # type: ignore[arg-type]
    with config.build(dp_rank=0, tp_rank=0, pp_rank=rank) as engine:
        model, optimizers = stage(3.0)
        engine.save(0, 1, model, optimizers)
        other, others = stage(5.0)
        engine.restore(other, others, verify="digests")
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    for own, saved in zip(others, optimizers, strict=True):
        for mine, theirs in zip(own.state.values(), saved.state.values(), strict=True):
            assert all(torch.equal(mine[key], theirs[key]) for key in ("step", "exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("settings", MODES)
def test_a_stage_without_tensors(tmp_path: Path, settings: dict[str, object]) -> None:
    run(2, stages, tmp_path, settings)
