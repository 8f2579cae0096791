"""Everything is captured by value: what changes once `save` has returned is not in the checkpoint."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Unpack

import pytest
import torch
from safetensors.torch import load_file
from tests.background.support import Waits
from torch import nn

from shardwise import Checkpointer, CheckpointingConfig
from shardwise.addons import ConsolidatedHFAddon, SaveHookArgs
from shardwise.convert.adapter import StateDictAdapter
from shardwise.errors import MisuseError

FORMATS: dict[str, dict[str, object]] = {
    "export": {"save_consolidated": "every"},
    "merged": {"save_consolidated": "every", "random_writes": False},
    "shards": {"save_consolidated": "false"},
    "torch_save": {"save_consolidated": "false", "model_save_format": "torch_save"},
}
by_format = pytest.mark.parametrize("name", FORMATS)


def _engine(root: Path, storage: Waits | None = None, **settings: object) -> Checkpointer:
    config = CheckpointingConfig(checkpoint_dir=root, is_async=storage is not None, **settings)  # type: ignore[arg-type]
    return Checkpointer(config, 0, 0, 0, storage=storage)


class Tied(nn.Module):
    """Two names of one tensor, a buffer, and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.second = nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.register_buffer("mean", torch.ones(5))
        self.scale = nn.Parameter(torch.tensor(2.0))


class Steps:
    """A scheduler whose state the loop goes on using: the list and the tensor themselves are in it."""

    def __init__(self) -> None:
        self.history = [1, 2]
        self.factor = torch.ones(3)
        self.nested = {"seen": {"batches": [3]}}

    def state_dict(self) -> dict[str, object]:
        return {"history": self.history, "factor": self.factor, "nested": self.nested}

    def load_state_dict(self, state_dict: Mapping[str, object]) -> None:
        vars(self).update(state_dict)

    def go_on(self) -> None:
        self.history.append(9)
        self.factor.fill_(9)
        self.nested["seen"]["batches"].append(9)


@by_format
def test_model_optimizer_scheduler_and_extra_state(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model = Tied()
    rate = torch.tensor(0.5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.5, 0.9))
    sum(p.sum() for p in model.parameters()).backward()  # type: ignore[union-attr]
    optimizer.step()
    scheduler, extra = Steps(), Steps()
    values = {"own": extra, "list": [1, [2]], "tensor": torch.ones(2), "dict": {"a": torch.zeros(2)}}
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    states = {n: {k: v.clone() for k, v in optimizer.state[p].items()} for n, p in model.named_parameters()}
    metrics = {"default": 1.0}
    storage = Waits()
    with _engine(tmp_path, storage, **FORMATS[name]) as checkpointer:
        checkpointer.save(0, 1, model, optimizer, scheduler, extra_state=values, metrics=metrics)
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.fill_(7)
            for state in optimizer.state.values():
                for value in state.values():
                    value.fill_(8)
        rate.fill_(0.25)
        optimizer.param_groups[0].update(weight_decay=0.75, betas=(0.1, 0.2))
        scheduler.go_on()
        extra.go_on()
        values["list"].append(9)  # type: ignore[attr-defined]
        values["list"][1].append(9)  # type: ignore[index]
        values["tensor"].fill_(9)  # type: ignore[attr-defined]
        values["dict"]["a"].fill_(9)  # type: ignore[index]
        metrics["default"] = 9.0
        torch.manual_seed(1234)
        storage.go_on.set()
    other = Tied()
    again = torch.optim.AdamW(other.parameters(), lr=torch.tensor(1.0))
    schedule, found = Steps(), {"own": Steps(), "list": None, "tensor": None, "dict": {}}
    with _engine(tmp_path) as checkpointer:
        record = checkpointer.restore(other, again, schedule, extra_state=found)
    assert record is not None
    assert record.metrics == {"default": 1.0}
    for n, tensor in other.state_dict().items():
        assert torch.equal(tensor, before[n]), n
    for n, parameter in other.named_parameters():
        for key, value in again.state[parameter].items():
            assert torch.equal(value, states[n][key]), (n, key)
    group = again.param_groups[0]
    assert (group["lr"].item(), tuple(group["betas"]), group["weight_decay"]) == (0.5, (0.5, 0.9), 0.01)
    for own in (schedule, found["own"]):
        assert isinstance(own, Steps)
        assert (own.history, own.factor.tolist(), own.nested) == ([1, 2], [1.0] * 3, {"seen": {"batches": [3]}})
    assert found["list"] == [1, [2]]
    assert found["tensor"].tolist() == [1.0, 1.0]  # type: ignore[attr-defined]
    assert found["dict"]["a"].tolist() == [0.0, 0.0]  # type: ignore[index]
    assert torch.initial_seed() != 1234


class Negated(StateDictAdapter):
    """A conversion that has to be computed from the values."""

    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **_: object
    ) -> list[tuple[str, torch.Tensor]]:
        return [(f"hub.{fqn}", -tensor)]

    def to_hf(self, state_dict: Mapping[str, torch.Tensor], **_: object) -> dict[str, torch.Tensor]:
        return {f"hub.{name}": -tensor for name, tensor in state_dict.items()}

    def from_hf(
        self, state_dict: Mapping[str, torch.Tensor], device_mesh: object = None, **_: object
    ) -> dict[str, torch.Tensor]:
        return {name.removeprefix("hub."): -tensor for name, tensor in state_dict.items()}


@pytest.mark.parametrize("name", ["export", "merged", "shards"])
def test_what_computed_tensors_are_computed_from(tmp_path: Path, name: str) -> None:
    model = nn.Linear(3, 2)
    model.state_dict_adapter = Negated()  # type: ignore[assignment]
    before = {n: t.detach().clone() for n, t in model.state_dict().items()}
    storage = Waits()
    with _engine(tmp_path, storage, **FORMATS[name]) as checkpointer:
        checkpointer.save(0, 1, model)
        for tensor in model.state_dict().values():
            tensor.fill_(7)
        storage.go_on.set()
    other = nn.Linear(3, 2)
    other.state_dict_adapter = Negated()  # type: ignore[assignment]
    with _engine(tmp_path) as checkpointer:
        checkpointer.restore(other)
    assert all(torch.equal(t, before[n]) for n, t in other.state_dict().items())


def test_adapters(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    def built(seed: int) -> nn.Module:
        torch.manual_seed(seed)
        found: nn.Module = get_peft_model(
            nn.Sequential(nn.Linear(6, 6)), LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
        )
        return found

    model = built(0)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    storage = Waits()
    with _engine(tmp_path, storage, is_peft=True) as checkpointer:
        checkpointer.save(0, 1, model)
        for name, parameter in model.named_parameters():
            if name in before:
                parameter.data.fill_(7)
        storage.go_on.set()
    other = built(1)
    with _engine(tmp_path, is_peft=True) as checkpointer:
        checkpointer.restore(other)
    found = dict(other.named_parameters())
    assert before
    assert all(torch.equal(found[name], value) for name, value in before.items())


class Reads:
    """An addon whose hook reads the model where it must not."""

    def __init__(self) -> None:
        self.parts: list[int] = []

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        kwargs["model_state"].state_dict()  # type: ignore[attr-defined]

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        self.parts.append(len(kwargs["model_state"].model))
        kwargs["model_state"].state_dict()  # type: ignore[attr-defined]


@pytest.mark.parametrize("is_peft", [False, True])
def test_a_hook_in_the_background_that_reads_the_model_is_refused(tmp_path: Path, is_peft: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model: nn.Module = nn.Sequential(nn.Linear(6, 6))
    if is_peft:
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["0"]))  # type: ignore[arg-type]
    addon = Reads()
    for is_async in (False, True):
        config = CheckpointingConfig(checkpoint_dir=tmp_path, is_async=is_async, is_peft=is_peft)
        checkpointer = Checkpointer(config, 0, 0, 0, addons=[ConsolidatedHFAddon(), addon])
        checkpointer.save(0, int(is_async), model)
        if is_async:
            with pytest.raises(MisuseError, match="post_save of an asynchronous save reads the model"):
                checkpointer.async_wait()
        checkpointer.finalize()
    assert addon.parts == [1, 1]
    assert not (tmp_path / "epoch_0_step_1").exists()


def test_saves_one_after_the_other_do_not_share_memory_that_is_still_read(tmp_path: Path) -> None:
    """The memory is one and the same: the second save waits for the first, also where nobody waits for either."""
    model = nn.Linear(3, 2)
    storage = Waits()
    checkpointer = _engine(tmp_path, storage, save_consolidated="every")
    with checkpointer:
        for step in (1, 2, 3):
            model.weight.data.fill_(step)
            threading.Timer(0.05, storage.go_on.set).start()
            checkpointer.save(0, step, model)
    for step in (1, 2, 3):
        path = tmp_path / f"epoch_0_step_{step}" / "model" / "consolidated" / "model.safetensors"
        assert set(load_file(path)["weight"].flatten().tolist()) == {float(step)}
