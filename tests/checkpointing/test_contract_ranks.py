"""The contract on several ranks, its memory, and what is refused."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from tests.checkpointing.contract_models import (
    BUILDERS,
    ExtraTensor,
    ExtraValues,
    HalfOnDisk,
    Holder,
    TransposedOnDisk,
    build,
    differing,
    effect,
    equal,
    train_some,
)
from tests.checkpointing.modes import EVERY, MODES, SHARDS
from tests.support.ranks import run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.errors import MisuseError, ModuleStateError
from shardwise.ops.verify import verify

#: Modules that FSDP2 can shard and whose own methods know DTensors.
SHARDED = ["extra_tensor", "extra_values", "half_on_disk", "transposed", "renamed", "cloned", "derived", "versioned"]


def checkpointer(root: Path, mode: dict[str, Any]) -> Checkpointer:
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Checkpointer(CheckpointingConfig(checkpoint_dir=root, **mode), rank, 0, 0)


def sharded(kind: str, seed: int) -> nn.Module:
    return fully_shard(build(kind, seed))


def save_and_restore(root: Path, mode: dict[str, Any], kinds: list[str]) -> list[str]:
    failed: list[str] = []
    for step, kind in enumerate(kinds):
        model = sharded(kind, 0)
        train_some(model)
        with checkpointer(root, mode) as writer:
            writer.save(0, step, model)
        restored, reference = sharded(kind, 1), sharded(kind, 1)
        reference.load_state_dict(model.state_dict())
        with checkpointer(root, mode) as reader:
            reader.restore(restored)
        failed += [f"{kind}: {name}" for name in differing(effect(restored), effect(reference))]
    return failed


@pytest.mark.parametrize("mode", MODES)
def test_under_fsdp2(tmp_path: Path, mode: dict[str, Any]) -> None:
    assert run(2, save_and_restore, tmp_path, mode, SHARDED) == [[], []]
    for path in tmp_path.glob("epoch*"):
        assert verify(path).status == "whole"


def restore_elsewhere(root: Path, kinds: list[str]) -> list[str]:
    failed: list[str] = []
    for step, kind in enumerate(kinds):
        model, restored, reference = build(kind, 0), build(kind, 1), build(kind, 1)
        train_some(model)
        reference.load_state_dict(model.state_dict())
        with checkpointer(root, SHARDS) as reader:
            reader.restore(restored, restore_from=f"epoch_0_step_{step}")
        failed += [f"{kind}: {name}" for name in differing(effect(restored), effect(reference))]
    return failed


@pytest.mark.parametrize("mode", [EVERY, SHARDS], ids=["every", "shards"])
def test_from_two_ranks_to_one(tmp_path: Path, mode: dict[str, Any]) -> None:
    run(2, save_and_restore, tmp_path, mode, SHARDED)
    assert restore_elsewhere(tmp_path, SHARDED) == []


def replicated(root: Path, mode: dict[str, Any]) -> list[str]:
    failed: list[str] = []
    for step, kind in enumerate(BUILDERS):
        model, restored, reference = build(kind, 0), build(kind, 1), build(kind, 1)
        train_some(model)
        reference.load_state_dict(model.state_dict())
        with checkpointer(root, mode) as both:
            both.save(0, step, model)
            both.restore(restored)
        failed += [f"{kind}: {name}" for name in differing(effect(restored), effect(reference))]
    return failed


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_every_module_on_two_ranks(tmp_path: Path, mode: dict[str, Any]) -> None:
    assert run(2, replicated, tmp_path, mode) == [[], []]


class Stage(nn.Module):
    """One of two pipeline stages, each with extra state of its own; the second has modules that the first has not."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.layers = nn.ModuleDict({str(rank): ExtraTensor()})
        if rank == 1:
            self.layers["2"] = TransposedOnDisk()
            self.layers["3"] = ExtraValues()


def stages(root: Path, mode: dict[str, Any]) -> tuple[object, ...]:
    rank = dist.get_rank()
    model, restored = Stage(rank), Stage(rank)
    train_some(model)
    model.layers[str(rank)].amax = rank + 0.5
    with Checkpointer(CheckpointingConfig(checkpoint_dir=root, **mode), 0, 0, rank) as both:
        both.save(0, 0, model)
        both.restore(restored)
    same = rank == 0 or equal(restored.layers["3"].kept, model.layers["3"].kept)
    return restored.layers[str(rank)].amax, same, differing(restored.state_dict(), model.state_dict())


@pytest.mark.parametrize("mode", [EVERY, {**SHARDS, "model_save_format": "torch_save"}], ids=["every", "torch_save"])
def test_stages_have_extra_state_of_their_own(tmp_path: Path, mode: dict[str, Any]) -> None:
    assert run(2, stages, tmp_path, mode) == [(0.5, True, []), (1.5, True, [])]


class Gathers(nn.Linear):
    """Gathers its weight to give it out."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight.full_tensor()  # type: ignore[operator]


def save_gathering(root: Path) -> str:
    model = fully_shard(Holder({"a": Gathers(4, 4, bias=False)}))
    with checkpointer(root, EVERY) as writer:
        try:
            writer.save(0, 0, model)
        except ModuleStateError as error:
            return str(error)
    return ""


def test_a_module_that_gathers_is_refused_by_name(tmp_path: Path) -> None:
    for message in run(2, save_gathering, tmp_path):
        assert "the module 'a' (" in str(message)
        assert "sends messages between ranks to give its state" in str(message)


def fails_on_one(root: Path) -> str:
    class Odd(nn.Linear):
        def set_extra_state(self, state: object) -> None:
            if dist.get_rank() == 1:
                raise RuntimeError("no such scale")

        def get_extra_state(self) -> int:
            return 1

    torch.manual_seed(0)  # the ranks hold the same
    model = nn.ModuleDict({"a": Odd(2, 2), "b": TransposedOnDisk()})
    with checkpointer(root, EVERY) as both:
        both.save(0, 0, model)
        try:
            both.restore(model)
        except ModuleStateError as error:
            return str(error)
    return ""


def test_what_a_module_refuses_on_one_rank_all_learn(tmp_path: Path) -> None:
    for message in run(2, fails_on_one, tmp_path):
        assert "set_extra_state of the module 'a' (Odd) failed: RuntimeError: no such scale" in str(message)
        assert "rank 1" in str(message)


def use_fsdp1(root: Path) -> list[str]:
    wrapped = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
    model = nn.ModuleDict({"head": wrapped})
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    said: list[str] = []
    with checkpointer(root, EVERY) as both:
        for call in (
            lambda: both.save(0, 0, model),
            lambda: both.restore(model),
            lambda: both.save_model(model, root),
            lambda: both.load_model(model, root),
            lambda: both.load_base_model(model, "cpu", None, str(root)),
            lambda: both.save_optimizer(optimizer, model, root),
        ):
            try:
                call()
            except MisuseError as error:
                said.append(str(error))
    return said


def test_fsdp1_is_refused_by_name(tmp_path: Path) -> None:
    for said in run(2, use_fsdp1, tmp_path):
        assert isinstance(said, list)
        assert len(said) == 6
        assert all("the module 'head' is wrapped by FSDP1" in text and "fully_shard" in text for text in said)


# --- memory ---------------------------------------------------------------------------------------------------------


class Watched(TransposedOnDisk):
    """Counts the bytes of what it has made that is still there."""

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        Alive.take(destination[prefix + "weight"])

    def _back(self, state_dict: dict[str, Any], prefix: str, *_: object) -> None:
        Alive.take(state_dict[prefix + "weight"])
        super()._back(state_dict, prefix)


class Alive:
    """Tensors that modules have made or were given, as long as anybody has them."""

    lock = threading.Lock()
    now = 0
    most = 0

    @classmethod
    def take(cls, tensor: torch.Tensor) -> None:
        import weakref

        nbytes = tensor.untyped_storage().nbytes()
        with cls.lock:
            cls.now += nbytes
            cls.most = max(cls.most, cls.now)
        weakref.finalize(tensor.untyped_storage(), cls.drop, nbytes)

    @classmethod
    def drop(cls, nbytes: int) -> None:
        with cls.lock:
            cls.now -= nbytes


MODULES, ROWS, COLUMNS = 24, 128, 1024
ONE = ROWS * COLUMNS * 4


@pytest.mark.parametrize(
    "mode",
    [
        pytest.param({**EVERY, "io_threads": 4}, id="every"),
        pytest.param({**EVERY, "single_rank_consolidation": True}, id="merged"),
        pytest.param({**EVERY, "is_async": True}, id="async"),
        pytest.param(SHARDS, id="shards"),
    ],
)
def test_memory_is_that_of_one_module(tmp_path: Path, mode: dict[str, Any]) -> None:
    Alive.now = Alive.most = 0
    model = nn.ModuleList(Watched(ROWS, COLUMNS) for _ in range(MODULES))
    restored = nn.ModuleList(Watched(ROWS, COLUMNS) for _ in range(MODULES))
    with checkpointer(tmp_path, mode) as both:
        both.save(0, 0, model)
        both.async_wait()
        assert ONE <= Alive.most <= 2 * ONE
        assert Alive.now == 0
        Alive.most = 0
        both.restore(restored)
    assert ONE <= Alive.most <= 2 * ONE
    assert Alive.now == 0
    assert differing(restored.state_dict(), model.state_dict()) == []


def test_an_asynchronous_save_has_the_values_of_its_call(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": TransposedOnDisk(), "b": HalfOnDisk(), "c": ExtraTensor()})
    model["c"].amax = 1.5
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with checkpointer(tmp_path, {**EVERY, "is_async": True}) as both:
        both.save(0, 0, model)
        both.maybe_wait_for_staging()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
        model["c"].amax = 7.0
        time.sleep(0)
        both.async_wait()
        both.restore(model)
    assert differing(model.state_dict(), before) == []
