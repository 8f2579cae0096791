"""shardwise, by the calls of its documentation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.peers.peer import Peer, Place, Stall, State
from shardwise import Checkpointer, CheckpointingConfig


class Shardwise(Peer):
    """shardwise with its defaults, digests included."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._open: list[Checkpointer] = []

    def _checkpointer(self, mode: str, *, is_async: bool = False) -> Checkpointer:
        config = CheckpointingConfig(checkpoint_dir=self.place.base.parent, save_consolidated=mode, is_async=is_async)
        made = Checkpointer(config, self.place.rank, 0, 0)
        self._open.append(made)
        return made

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        checkpointer = self._checkpointer("every")

        def save(path: Path) -> Path:
            checkpointer.save_model(model, path)
            return path / "model" / "consolidated"

        return save

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        checkpointer = self._checkpointer("false")
        return lambda path: checkpointer.save_model(model, path)

    def stall(self, model: nn.Module) -> Stall:
        checkpointer = self._checkpointer("false", is_async=True)

        def begin(path: Path) -> None:
            checkpointer.save_model(model, path)
            checkpointer.maybe_wait_for_staging()

        return Stall(begin, checkpointer.async_wait)

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        checkpointer = self._checkpointer("false")
        return lambda path: checkpointer.load_model(model, path / "model")

    def base(self) -> Callable[[Path], nn.Module]:
        from bench.peers.values import empty

        checkpointer = self._checkpointer("false")

        def load(path: Path) -> nn.Module:
            model = empty(self.place.config, self.place.mesh)
            checkpointer.load_base_model(model, "cpu", None, str(path))
            return model

        return load

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        checkpointer = self._checkpointer("false")

        def save(path: Path) -> None:
            checkpointer.save_model(model, path)
            checkpointer.save_optimizer(optimizer, model, path)

        def load(path: Path) -> None:
            checkpointer.load_model(model, path / "model")
            checkpointer.load_optimizer(optimizer, model, path)

        return State(save, load)

    def close(self) -> None:
        while self._open:
            self._open.pop().close()
