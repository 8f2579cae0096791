"""Models that bring an adapter: it is used whatever its class, and what it would lose is an error."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from tests.support.ranks import failure, run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from shardwise import CheckpointingConfig
from shardwise.errors import ConversionError

Tensors = dict[str, torch.Tensor]


class Prefixed:
    """Not derived from anything of shardwise's, as adapters of other frameworks are not."""

    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **_: object
    ) -> list[tuple[str, torch.Tensor]]:
        return [(f"hub.{fqn}", tensor)]

    def to_hf(self, state_dict: Tensors, **_: object) -> Tensors:
        return dict(self.convert_single_tensor_to_hf(name, tensor)[0] for name, tensor in state_dict.items())

    def from_hf(self, state_dict: Tensors, device_mesh: object = None, **_: object) -> Tensors:
        return {name.removeprefix("hub."): tensor for name, tensor in state_dict.items()}


class Halved(Prefixed):
    """Computes what can be undone exactly."""

    which = "weight"

    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **_: object
    ) -> list[tuple[str, torch.Tensor]]:
        return [(f"hub.{fqn}", tensor / 2 if fqn == self.which else tensor)]

    def from_hf(self, state_dict: Tensors, device_mesh: object = None, **_: object) -> Tensors:
        plain = super().from_hf(state_dict)
        return {name: tensor * 2 if name == self.which else tensor for name, tensor in plain.items()}


class Unsigned(Prefixed):
    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **_: object
    ) -> list[tuple[str, torch.Tensor]]:
        return [(f"hub.{fqn}", tensor.abs() if fqn == "weight" else tensor)]


class Forgetful(Prefixed):
    def convert_single_tensor_to_hf(
        self, fqn: str, tensor: torch.Tensor, **_: object
    ) -> list[tuple[str, torch.Tensor]]:
        return [] if fqn == "weight" else [(f"hub.{fqn}", tensor)]


class OneWay(Prefixed):
    def from_hf(self, state_dict: Tensors, device_mesh: object = None, **_: object) -> Tensors:
        return dict(state_dict)


class WrittenThrough(OneWay):
    supports_write_through_checkpoint_load = True


def local(param: torch.Tensor) -> torch.Tensor:
    param = param.detach()
    return param.to_local() if isinstance(param, DTensor) else param


def there_and_back(root: Path, adapter: type[Prefixed]) -> None:
    torch.manual_seed(0)
    model = nn.Linear(6, 7)
    model.state_dict_adapter = adapter()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    before = [local(param).clone() for param in model.parameters()]
    config = CheckpointingConfig(checkpoint_dir=root, save_consolidated="every")
    with config.build(dp_rank=dist.get_rank(), tp_rank=0, pp_rank=0) as engine:
        engine.save(0, 1, model)
        for param in model.parameters():
            local(param).fill_(9)
        engine.restore(model)
    assert all(torch.equal(local(param), value) for param, value in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("adapter", [Prefixed, Halved, WrittenThrough])
def test_an_adapter_of_any_class_names_the_files(adapter: type[Prefixed], tmp_path: Path) -> None:
    run(2, there_and_back, tmp_path, adapter)
    found = load_file(tmp_path / "epoch_0_step_1" / "model" / "consolidated" / "model.safetensors")
    assert found.keys() == {"hub.weight", "hub.bias"}


@pytest.mark.parametrize(
    ("adapter", "message"),
    [
        (Unsigned, "cannot be undone: loading it again would give other values"),
        (Forgetful, "gives 1 of its parameters no name in the files: weight"),
        (OneWay, "from_hf of the model's state_dict_adapter gives back not at all"),
    ],
)
def test_what_would_not_come_back_is_never_published(adapter: type[Prefixed], message: str, tmp_path: Path) -> None:
    error = failure(2, there_and_back, tmp_path, adapter)
    assert isinstance(error, ConversionError)
    assert message in str(error)
    assert not list(tmp_path.glob("epoch_*"))


def test_something_that_is_no_adapter_is_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    model.state_dict_adapter = object()
    config = CheckpointingConfig(checkpoint_dir=tmp_path)
    with caplog.at_level(logging.WARNING), config.build() as engine:
        engine.save_model(model, tmp_path)
    assert "is not used: it has no to_hf and no from_hf" in caplog.text
