"""What a peer can do: methods that return the operation to be measured, made before the clock starts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import LlamaConfig


class CannotError(Exception):
    """This peer has no such operation; the text says why and goes into the table's cell."""


@dataclass(frozen=True)
class Place:
    """What a peer is given: its rank's mesh, the configuration, and a base model's directory."""

    rank: int
    mesh: DeviceMesh
    config: LlamaConfig
    base: Path


@dataclass(frozen=True)
class Stall:
    """An asynchronous save: ``begin`` returns when training may go on, ``finish`` when all is in the files."""

    begin: Callable[[Path], object]
    finish: Callable[[], object]


@dataclass(frozen=True)
class State:
    """Model and optimizer together; ``load`` returns both if they are new ones."""

    save: Callable[[Path], object]
    load: Callable[[Path], object]


class Peer:
    """A library's operations. All ranks call all methods; each raises `CannotError` unless a peer says otherwise."""

    #: Reasons for what this peer cannot do, by the method's name.
    reasons: dict[str, str] = {}  # noqa: RUF012 - never changed

    def __init__(self, place: Place) -> None:
        self.place = place

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        """Save files that transformers opens; returns the directory that they are in."""
        raise self._cannot("consolidated")

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        """Save what a run resumes from."""
        raise self._cannot("sharded")

    def stall(self, model: nn.Module) -> Stall:
        """Save in the background what `load` reads."""
        raise self._cannot("stall")

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        """Load what `sharded` or `stall` saved into ``model``; returns the model if it is a new one."""
        raise self._cannot("load")

    def base(self) -> Callable[[Path], nn.Module]:
        """Make a sharded model with the values of a Hugging Face directory."""
        raise self._cannot("base")

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        """Save and load model and optimizer together."""
        raise self._cannot("state")

    def sharded_model(self, dim: int) -> nn.Module | None:
        """A filled model that the peer makes itself, or ``None`` where any FSDP2 model will do."""
        return None

    def close(self) -> None:
        """Let go of what the operation made."""

    def _cannot(self, what: str) -> CannotError:
        return CannotError(self.reasons.get(what, "not offered"))
