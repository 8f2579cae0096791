"""A small run that saves as others do: by torch.distributed.checkpoint in each of the layouts that torch has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from tests.engine.setups import digest
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

FLAT = StateDictOptions(flatten_optimizer_state_dict=True)
SAVED_AT, STEPS = 3, 2


class Net(nn.Module):
    """Uneven on three ranks; with parameters of one shape that could be mistaken for each other."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.norm = nn.LayerNorm(5)
        self.head = nn.Linear(5, 4, bias=False)
        self.register_buffer("seen", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + x
        return self.head(self.norm(x))


def adamw(net: nn.Module) -> torch.optim.Optimizer:
    decayed = [p for p in net.parameters() if p.ndim > 1]
    rest = [p for p in net.parameters() if p.ndim == 1]
    return torch.optim.AdamW([{"params": rest, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.1}], lr=0.05)


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.05)


class Counters:
    """What torchtitan calls train_state: counters, one of them a tensor."""

    def __init__(self) -> None:
        self.step, self.tokens = 0, 0

    def state_dict(self) -> dict[str, object]:
        return {"step": torch.tensor(self.step, dtype=torch.int32), "tokens": self.tokens}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        self.step, self.tokens = int(cast(torch.Tensor, state_dict["step"])), cast(int, state_dict["tokens"])


class Run:
    """Everything that a run consists of."""

    def __init__(
        self,
        seed: int,
        optimizer: Callable[[nn.Module], torch.optim.Optimizer] = adamw,
        net: Callable[[], nn.Module] = Net,
    ) -> None:
        torch.manual_seed(seed)
        self.net = net()
        if dist.get_world_size() > 1:
            fully_shard(self.net)
        self.optimizer = optimizer(self.net)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1 / (1 + step))
        self.counters = Counters()

    def steps(self, first: int, count: int) -> list[float]:
        losses = []
        for step in range(first, first + count):
            x = torch.randn(6, 5, generator=torch.Generator().manual_seed(step))
            loss = self.net(x).square().mean()
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.scheduler.step()
            self.counters.step += 1
            self.counters.tokens += 6
            losses.append(loss.item())
        return losses

    def everything(self) -> dict[str, object]:
        """Every bit of it on this rank."""
        found = {name: _local(value) for name, value in self.net.state_dict().items()}
        names = {param: name for name, param in self.net.named_parameters()}
        for param, state in self.optimizer.state.items():
            found |= {f"{names[param]}/{key}": _local(value) for key, value in state.items()}
        for number, group in enumerate(self.optimizer.param_groups):
            found[str(number)] = repr({key: value for key, value in group.items() if key != "params"})
        return {**found, "scheduler": repr(self.scheduler.state_dict())}

    # --- as others save -----------------------------------------------------------------------------------------------

    def state(self, layout: str) -> dict[str, object]:
        """The state dict as it is given to DCP."""
        if layout == "plain":
            return {
                "model": self.net.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scheduler": self.scheduler.state_dict(),
                "epoch": 1,
            }
        if layout == "app":
            return {"app": App(self), "train_state": self.counters}
        model, optimizer = get_state_dict(self.net, self.optimizer, options=FLAT)
        if layout == "titan":  # torchtitan's: the model's own names at the top
            return {
                **model,
                "optimizer": optimizer,
                "lr_scheduler": self.scheduler.state_dict(),
                "train_state": self.counters,
                "dataloader": {"dp_rank_0": b"position 7", "world_size": 1},
            }
        assert layout == "automodel"
        return {"optim": optimizer, "sched": self.scheduler.state_dict()}

    def save(self, layout: str, path: Path) -> None:
        if layout != "automodel":
            dcp.save(self.state(layout), checkpoint_id=str(path))
            return
        writer = HuggingFaceStorageWriter(str(path / "model"), save_distributed=True)
        dcp.save(self.net.state_dict(), storage_writer=writer)
        dcp.save(self.state(layout), checkpoint_id=str(path / "optim"))

    def load(self, layout: str, path: Path) -> None:
        """By torch's own means."""
        if layout == "plain":
            self.steps(50, 1)  # an optimizer without state has nothing to load into
        state = self.state(layout)
        if layout == "automodel":
            from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader

            model = self.net.state_dict()
            dcp.load(model, storage_reader=HuggingFaceStorageReader(str(path / "model")))
            dcp.load(state, checkpoint_id=str(path / "optim"))
            self._set(model, state["optim"], state["sched"])
            return
        dcp.load(state, checkpoint_id=str(path))
        if layout == "plain":
            self.net.load_state_dict(cast("dict[str, object]", state["model"]))
            self.optimizer.load_state_dict(cast("dict[str, object]", state["optimizer"]))
            self.scheduler.load_state_dict(cast("dict[str, object]", state["scheduler"]))
        elif layout == "titan":
            model = {name: state[name] for name in self.net.state_dict()}
            self._set(model, state["optimizer"], state["lr_scheduler"])

    def _set(self, model: object, optimizer: object, scheduler: object) -> None:
        set_state_dict(self.net, self.optimizer, model_state_dict=model, optim_state_dict=optimizer, options=FLAT)
        self.scheduler.load_state_dict(cast("dict[str, object]", scheduler))


class App:
    """As in torch's own tutorial: model and optimizer in one object."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def state_dict(self) -> dict[str, object]:
        model, optimizer = get_state_dict(self.run.net, self.run.optimizer)
        return {"model": model, "optim": optimizer, "schedulers": [self.run.scheduler.state_dict()]}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        set_state_dict(
            self.run.net,
            self.run.optimizer,
            model_state_dict=state_dict["model"],
            optim_state_dict=state_dict["optim"],
        )
        self.run.scheduler.load_state_dict(cast("list[dict[str, object]]", state_dict["schedulers"])[0])


def _local(value: object) -> object:
    return digest(value.to_local() if isinstance(value, DTensor) else value) if torch.is_tensor(value) else value
