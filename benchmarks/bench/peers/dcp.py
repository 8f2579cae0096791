"""torch's own checkpoints, and the two libraries that are made of them: accelerate and torchtitan."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.checkpoint.stateful import Stateful

from bench.peers.peer import Peer, Place, Stall, State
from bench.peers.values import empty


class Torch(Peer):
    """``torch.distributed.checkpoint``: Hugging Face files by its storage writer, the rest in its own format."""

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        # One file for each of about 450 MB, as others write several too; one file for all takes it longer.
        mapping = _file_numbers(model)

        def save(path: Path) -> Path:
            writer = HuggingFaceStorageWriter(
                str(path),
                fqn_to_index_mapping=mapping,
                save_distributed=True,
                enable_consolidation=True,
                thread_count_consolidation=2,
            )
            dcp.save(model.state_dict(), storage_writer=writer)
            return path

        return save

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        return lambda path: dcp.save({"model": model.state_dict()}, checkpoint_id=path)

    def stall(self, model: nn.Module) -> Stall:
        pending: list[Future[Any]] = []
        group = dist.new_group(backend="gloo")

        def begin(path: Path) -> None:
            saving = dcp.async_save({"model": model.state_dict()}, checkpoint_id=path, process_group=group)
            assert isinstance(saving, Future)
            pending.append(saving)

        return Stall(begin, lambda: pending.pop().result())

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        return lambda path: dcp.load({"model": model.state_dict()}, checkpoint_id=path)

    def base(self) -> Callable[[Path], nn.Module]:
        def load(path: Path) -> nn.Module:
            model = empty(self.place.config, self.place.mesh)
            model.to_empty(device="cpu")
            dcp.load(model.state_dict(), storage_reader=HuggingFaceStorageReader(str(path)))
            return model

        return load

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        def save(path: Path) -> None:
            parameters, moments = get_state_dict(model, optimizer)
            dcp.save({"model": parameters, "optimizer": moments}, checkpoint_id=path)

        def load(path: Path) -> None:
            parameters, moments = get_state_dict(model, optimizer)
            dcp.load({"model": parameters, "optimizer": moments}, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=parameters, optim_state_dict=moments)

        return State(save, load)


def _file_numbers(model: nn.Module, largest: int = 450 * 10**6) -> dict[str, int]:
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for name, parameter in model.named_parameters():
        nbytes = parameter.numel() * parameter.element_size()
        if filled and filled + nbytes > largest:
            number, filled = number + 1, 0
        numbers[name] = number
        filled += nbytes
    return numbers


@functools.cache
def _accelerator() -> Any:
    """One for all operations: a second one would turn FSDP2 off again."""
    from accelerate import Accelerator

    made = Accelerator(cpu=True)
    _turn_on(made)
    return made


def _turn_on(accelerator: Any) -> None:
    """Turn FSDP2 on, which accelerate does by itself only where there are accelerators."""
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    accelerator.state.distributed_type = DistributedType.FSDP
    accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=2, state_dict_type="SHARDED_STATE_DICT")


class Accelerate(Peer):
    """accelerate's ``save_state`` with FSDP2 and sharded state dicts, and ``save_model``."""

    reasons = {  # noqa: RUF012 - never changed
        "stall": "`save_state` returns when all is written",
        "base": "no loader of its own: transformers loads, `prepare` shards",
    }

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._accelerator = _accelerator()
        self._plugin = self._accelerator.state.fsdp_plugin

    # `prepare` takes FSDP2's models together with their optimizers only, and `save_state` would save that too: without
    # an optimizer, its part for the model is called by itself.

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        def save(path: Path) -> Path:
            self._accelerator.save_model(model, path)
            return path

        return save

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        from accelerate.utils import save_fsdp_model

        return lambda path: save_fsdp_model(self._plugin, self._accelerator, model, str(path))

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        from accelerate.utils import load_fsdp_model

        def load(path: Path) -> None:
            load_fsdp_model(self._plugin, self._accelerator, model, str(path))

        return load

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        self._accelerator.prepare(model, optimizer)
        _turn_on(self._accelerator)  # which preparing an optimizer undid
        return State(
            lambda path: self._accelerator.save_state(str(path)), lambda path: self._accelerator.load_state(str(path))
        )

    def close(self) -> None:
        self._accelerator.free_memory()


class Torchtitan(Peer):
    """torchtitan's checkpointer, given a transformers model whose names need no conversion."""

    def __init__(self, place: Place) -> None:
        super().__init__(place)
        self._open: list[Any] = []

    def _manager(self, folder: Path, model: nn.Module, optimizers: Stateful | None = None, **settings: object) -> Any:
        from torchtitan.components.checkpointer import CheckpointManager

        config = CheckpointManager.Config(
            enable=True, folder=str(folder), interval=1, keep_latest_k=0, export_dtype="bfloat16", **settings
        )
        made = config.build(
            dataloader=None,
            model_parts=[model],
            optimizers=optimizers or _Nothing(),
            lr_schedulers=_Nothing(),
            states={},
            sd_adapter=_SameNames(model),
        )
        self._open.append(made)
        return made

    def consolidated(self, model: nn.Module) -> Callable[[Path], Path]:
        def save(path: Path) -> Path:
            self._manager(path, model, last_save_in_hf=True, last_save_model_only=True).save(1, last_step=True)
            return path / "step-1"

        return save

    def sharded(self, model: nn.Module) -> Callable[[Path], object]:
        return lambda path: self._manager(path, model).save(1)

    def stall(self, model: nn.Module) -> Stall:
        made: list[Any] = []

        def begin(path: Path) -> None:
            manager = made[0]
            manager.folder = str(path)
            manager.save(1)
            manager.maybe_wait_for_staging()

        made.append(self._manager(self.place.base.parent / "unused", model, async_mode="async"))
        return Stall(begin, made[0].maybe_wait_for_saving)

    def load(self, model: nn.Module) -> Callable[[Path], nn.Module | None]:
        def load(path: Path) -> None:
            if not self._manager(path, model).load(1):
                raise RuntimeError("torchtitan loaded nothing")

        return load

    def base(self) -> Callable[[Path], nn.Module]:
        def load(path: Path) -> nn.Module:
            model = empty(self.place.config, self.place.mesh)
            model.to_empty(device="cpu")
            manager = self._manager(
                path.parent / "nothing-yet", model, initial_load_path=str(path), initial_load_in_hf=True
            )
            if not manager.load():
                raise RuntimeError("torchtitan loaded nothing")
            return model

        return load

    def state(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> State:
        def load(path: Path) -> None:
            if not self._manager(path, model, _Moments(model, optimizer)).load(1):
                raise RuntimeError("torchtitan loaded nothing")

        return State(lambda path: self._manager(path, model, _Moments(model, optimizer)).save(1), load)

    def close(self) -> None:
        while self._open:
            self._open.pop().close()


class _Nothing:
    """A state with nothing in it."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        pass


class _Moments:
    """An optimizer's state under its parameters' names, which is what torchtitan's container of optimizers tells."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._options = StateDictOptions(flatten_optimizer_state_dict=True)

    def state_dict(self) -> dict[str, Any]:
        return get_optimizer_state_dict(self._model, self._optimizer, options=self._options)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        set_optimizer_state_dict(self._model, self._optimizer, state_dict, options=self._options)


class _SameNames:
    """A conversion between torchtitan's names and Hugging Face's where they are the same."""

    def __init__(self, model: nn.Module) -> None:
        self.fqn_to_index_mapping = _file_numbers(model)

    def to_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def from_hf(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        return state_dict

    def get_hf_storage_reader(self, path: str, from_quantized: bool = False) -> HuggingFaceStorageReader:
        return HuggingFaceStorageReader(path)
