"""NeMo AutoModel's checkpointer, as its users call it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.peers.peer import CannotError, Peer, Place, Stall, State
from bench.peers.values import empty


class AutoModel(Peer):
    """``nemo_automodel``'s ``Checkpointer`` by its documented methods."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._open: list[Any] = []

    def _checkpointer(self, consolidated: bool | str, *, is_async: bool = False) -> Any:
        from nemo_automodel.components.checkpoint import checkpointing

        root = self.place.base.parent
        config = checkpointing.CheckpointingConfig(
            checkpoint_dir=str(root),
            model_save_format="safetensors",
            save_consolidated=consolidated,
            model_cache_dir=str(root / "cache"),
            model_repo_id=str(self.place.base),
            is_async=is_async,
        )
        made = checkpointing.Checkpointer(config, self.place.rank, 0, 0)
        self._open.append(made)
        return made

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        checkpointer = self._checkpointer("every")

        def save(path: Path) -> Path:
            checkpointer.save_model(model, str(path))
            return path / "model" / "consolidated"

        return save

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        checkpointer = self._checkpointer(False)
        return lambda path: checkpointer.save_model(model, str(path))

    def stall(self, model: nn.Module) -> Stall:
        try:
            checkpointer = self._checkpointer(False, is_async=True)
        except AssertionError as error:
            raise CannotError(f"its staging is for accelerators: {error}") from error

        def begin(path: Path) -> None:
            checkpointer.save_model(model, str(path))
            checkpointer.maybe_wait_for_staging()

        return Stall(begin, checkpointer.async_wait)

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        checkpointer = self._checkpointer(False)
        return lambda path: checkpointer.load_model(model, str(path / "model"))

    def base(self) -> Callable[[Path], nn.Module]:
        checkpointer = self._checkpointer(False)

        def load(path: Path) -> nn.Module:
            model = empty(self.place.config, self.place.mesh)
            model.to_empty(device="cpu")
            checkpointer.load_base_model(model, torch.device("cpu"), str(path.parent), str(path))
            return model

        return load

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        checkpointer = self._checkpointer(False)

        def save(path: Path) -> None:
            checkpointer.save_model(model, str(path))
            checkpointer.save_optimizer(optimizer, model, str(path))

        def load(path: Path) -> None:
            checkpointer.load_model(model, str(path / "model"))
            checkpointer.load_optimizer(optimizer, model, str(path))

        return State(save, load)

    def close(self) -> None:
        while self._open:
            self._open.pop().close()
