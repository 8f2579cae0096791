"""Lightning's strategies with checkpoints by shardwise, for ``Trainer`` and ``Fabric``.

    from shardwise.integrations.lightning import ShardwiseDDPStrategy

    trainer = L.Trainer(strategy=ShardwiseDDPStrategy())
    trainer.fit(model, ckpt_path="last")

What Lightning decides stays with it: when to save, under which name, which checkpoints are kept. What is written at the
path, and how, is `shardwise.Checkpointer`'s.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from operator import length_hint
from typing import TYPE_CHECKING, NoReturn, cast

import lightning.fabric.strategies as fabric
import lightning.pytorch.strategies as pytorch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig
from shardwise.errors import ConfigError, MisuseError, StateFormatError
from shardwise.format.state_json import encode_state
from shardwise.integrations.hosts import HostPaths, Parts, Pass, first_then
from shardwise.stateful_wrappers.wrapping import is_pretrained, unwrap

if TYPE_CHECKING:
    import os

    from lightning.pytorch import LightningModule, Trainer

__all__ = [
    "ShardwiseDDPStrategy",
    "ShardwiseFabricDDPStrategy",
    "ShardwiseFabricModelParallelStrategy",
    "ShardwiseFabricSingleDeviceStrategy",
    "ShardwiseModelParallelStrategy",
    "ShardwiseSingleDeviceStrategy",
]

_LOG = logging.getLogger(__name__)
_STATE, _DATA = "lightning", "lightning.data"
#: The name of a loader's position in its own `DataOrder`.
_LOADER = "loader"
#: The key by which a position is found among what Lightning saves.
_MARK = "shardwise.position"
_END = object()


class _Shardwise:
    """What strategies of Trainer and Fabric have in common.

    The arguments are those of Lightning's strategy, ``checkpointing``, the settings beside those that Lightning
    decides, and ``tokenizer``, a tokenizer or processor to put beside the weights. By default each checkpoint has a
    Hugging Face export (``LATEST/model/consolidated`` below its path).

    Raises:
        ConfigError: What is asked for cannot be saved; the message names it.
    """

    is_global_zero: bool
    _for_fabric = False

    def __init__(
        self,
        *positional: object,
        checkpointing: CheckpointingConfig | None = None,
        tokenizer: SavesPretrained | None = None,
        **named: object,
    ) -> None:
        for name in ("checkpoint_io", "save_distributed_checkpoint"):
            if named.get(name):
                self._refuse(name)
        super().__init__(*positional, **named)
        self._paths = HostPaths(checkpointing, "Lightning")
        self._tokenizer = tokenizer
        self._resumables: list[Resumable] = []
        self._restored_generators: dict[str, object] | None = None

    @classmethod
    def register_strategies(cls, strategy_registry: object) -> None:
        """Nothing: Lightning's own strategies keep their names."""

    @property
    def checkpoint_io(self) -> object:
        """Lightning's own, which writes nothing."""
        return super().checkpoint_io  # type: ignore[misc]

    @checkpoint_io.setter
    def checkpoint_io(self, io: object) -> None:
        self._refuse(f"the plugin {type(io).__name__}")

    def process_dataloader(self, dataloader: object) -> object:
        """As in Lightning; what it returns knows its position."""
        return resumable(super().process_dataloader(dataloader), self._for_fabric)  # type: ignore[misc]

    def remove_checkpoint(self, filepath: str | os.PathLike[str]) -> None:
        """Remove a path. All ranks call."""
        self._paths.remove(filepath)

    def wait_for_saves(self) -> None:
        """Return when the last checkpoint is complete, in asynchronous mode; raises what failed. All ranks call."""
        self._paths.finish()

    def teardown(self) -> None:
        """As in Lightning, once the last checkpoint is complete."""
        self.wait_for_saves()
        super().teardown()  # type: ignore[misc]

    def _refuse(self, what: str) -> NoReturn:
        raise ConfigError(
            f"{type(self).__name__} does not support {what}",
            hint="Leave it out; what can be set is in the strategy's checkpointing=CheckpointingConfig(...).",
        )


class _TrainerStrategy(_Shardwise):
    """A strategy of ``Trainer``."""

    lightning_module: LightningModule
    optimizers: list[Optimizer]
    lr_scheduler_configs: list[object]

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Model and optimizer are filled where they are, once they are sharded."""
        return True

    @property
    def lightning_restore_optimizer(self) -> bool:
        """`load_checkpoint` does."""
        return False

    def setup(self, trainer: Trainer) -> None:
        """As in Lightning; `ConfigError` where something cannot be saved."""
        module = self.lightning_module
        if not module.strict_loading:
            self._refuse("strict_loading=False")
        for callback in trainer.callbacks if Group.current().world_size > 1 else ():
            kind = type(callback).__name__
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
                self._refuse(f"{kind}(save_on_exception=True) on several ranks, of which one may fail alone")
            if isinstance(callback, OnExceptionCheckpoint):
                self._refuse(f"{kind} on several ranks, of which one may fail alone")
        for owner in (module, trainer.datamodule):
            try:
                encode_state(dict(owner.hparams) if owner is not None else {})
            except StateFormatError as error:
                raise ConfigError(
                    f"a hyper-parameter of {type(owner).__name__} cannot be saved: {error}",
                    hint="Leave it out: self.save_hyperparameters(ignore=[...]).",
                ) from error
        super().setup(trainer)  # type: ignore[misc]

    def lightning_module_state_dict(self) -> dict[str, object]:
        """Empty: nothing is gathered, `save_checkpoint` takes the model as it is sharded."""
        return {}

    def optimizer_state(self, optimizer: object) -> dict[str, object]:
        """Empty, likewise."""
        return {}

    def load_model_state_dict(self, checkpoint: Mapping[str, object], strict: bool = True) -> None:
        """Nothing: `load_checkpoint` has done it. `MisuseError` where ``on_load_checkpoint`` has put something in."""
        self._check_untouched(checkpoint, "on_load_checkpoint")

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, object]) -> None:
        """Nothing: `load_checkpoint` has done it."""

    def save_checkpoint(
        self, checkpoint: dict[str, object], filepath: str | os.PathLike[str], storage_options: object = None
    ) -> None:
        """Write a checkpoint at a path, where an earlier one is replaced once the new one is complete. All ranks call.

        Of what Lightning collects (``checkpoint``), model, optimizers and schedulers are taken from where they are.

        Raises:
            ConfigError: There are storage options.
            MisuseError: A hook has put something into the state of the model.
            ShardwiseError: What failed, on any rank; what was saved before is untouched.
        """
        if storage_options is not None:
            self._refuse("storage_options")
        self._check_untouched(checkpoint, "on_save_checkpoint")
        trainer = self.lightning_module.trainer
        whole = "optimizer_states" in checkpoint
        drawn = ("state_dict", "optimizer_states", "lr_schedulers")
        rest = {name: value for name, value in checkpoint.items() if name not in drawn}
        state, own = without_own(rest, trainer.is_last_batch)
        extra: dict[str, object] = {_STATE: self.broadcast(_on_cpu(state)), _DATA: own}  # type: ignore[attr-defined]
        is_final = not whole or trainer.global_step >= trainer.estimated_stepping_batches
        self._paths.save(
            filepath, self._parts(extra, whole), (trainer.current_epoch, trainer.global_step), bool(is_final)
        )

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike[str], weights_only: bool | None = None
    ) -> dict[str, object]:
        """Restore model, optimizers and schedulers in place, on any number of ranks. All ranks call.

        Returns what Lightning collected, for it to restore. ``weights_only`` is without effect: nothing is unpickled.

        Raises:
            CheckpointNotFoundError: Nothing of shardwise's is there.
            IncompleteCheckpointError: It is an interrupted save.
            MisuseError: Training is to resume from a checkpoint of ``save_weights_only``.
            ShardwiseError: Checkpoint and run do not fit; nothing was restored.
        """
        fits = self.lightning_module.trainer.state.fn == TrainerFn.FITTING
        found = self._paths.find(checkpoint_path)
        with Group.current().together(f"looking into {found}"):
            if fits and not (found / "optim").is_dir():
                raise MisuseError(
                    "the checkpoint was saved with save_weights_only, and has no optimizer to resume with",
                    path=checkpoint_path,
                    hint="Begin a new run from its model, or pass the path to validate, test or predict.",
                )
        before = RandomState().state_dict()
        parts = self._parts({_STATE: None, _DATA: None}, fits)
        self._paths.restore(checkpoint_path, parts)
        generators = RandomState().state_dict()
        if not fits:
            RandomState().load_state_dict(before)
        for loader in self._resumables:
            loader.go_on_with(generators)
        self._restored_generators = generators
        own = cast("list[object]", parts.extra[_DATA] or [])
        state = cast("dict[str, object]", with_own(parts.extra[_STATE], own))
        schedulers = [scheduler.state_dict() for scheduler in parts.schedulers]
        return {**state, "state_dict": {}, "optimizer_states": [], "lr_schedulers": schedulers}

    def process_dataloader(self, dataloader: object) -> object:
        """As in Lightning; what it returns knows its position."""
        made = super().process_dataloader(dataloader)
        if isinstance(made, Resumable):
            self._resumables.append(made)
            if self._restored_generators is not None:
                made.go_on_with(self._restored_generators)
        return made

    def _parts(self, extra: MutableMapping[str, object], whole: bool) -> Parts:
        schedulers = [cast("LRScheduler", each.scheduler) for each in self.lr_scheduler_configs]  # type: ignore[attr-defined]
        model = _inside(self.lightning_module)
        return Parts(model, self.optimizers if whole else [], schedulers if whole else [], extra, self._tokenizer)

    @staticmethod
    def _check_untouched(checkpoint: Mapping[str, object], hook: str) -> None:
        if checkpoint["state_dict"]:
            raise MisuseError(
                f"{hook} has put {', '.join(cast('dict[str, object]', checkpoint['state_dict']))} into the state of "
                "the model, which shardwise takes from the model itself",
                hint="Keep it under another key of the checkpoint, or as a buffer of the module.",
            )


class _FabricStrategy(_Shardwise):
    """A strategy of ``Fabric``."""

    _for_fabric = True

    def save_checkpoint(
        self,
        path: str | os.PathLike[str],
        state: dict[str, object],
        storage_options: object = None,
        filter: Mapping[str, Callable[[str, object], bool]] | None = None,  # noqa: A002 - Lightning's own name
    ) -> None:
        """Write a checkpoint at a path, where an earlier one is replaced once the new one is complete. All ranks call.

        The state has a model, optimizers, schedulers, anything with a state, and plain values, by name.

        Raises:
            MisuseError: There is no model in the state.
            ShardwiseError: What failed, on any rank; what was saved before is untouched.
        """
        for name, given in (("storage_options", storage_options), ("filter", filter)):
            if given:
                self._refuse(name)
        self._paths.save(path, self._parts(state), None, False)

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        state: nn.Module | Optimizer | dict[str, object] | None = None,
        strict: bool = True,
        weights_only: bool | None = None,
    ) -> dict[str, object]:
        """Restore a state in place, on any number of ranks. All ranks call.

        The state has the names that were saved; plain values are replaced in it. What the checkpoint has beside it is
        named in a warning, and the result is empty. ``weights_only`` is without effect: nothing is unpickled.

        Raises:
            CheckpointNotFoundError: Nothing of shardwise's is there.
            MisuseError: There is no model in the state.
            ShardwiseError: Checkpoint and state do not fit; nothing was restored.
        """
        if not strict:
            self._refuse("strict=False")
        if not isinstance(state, dict):
            raise MisuseError(
                f"load was given {'no state' if state is None else f'a {type(state).__name__}'}",
                hint='Pass a dict of what is to be filled, as to save: {"model": model, "optimizer": optimizer, ...}.',
            )
        parts = self._parts(state)
        self._paths.restore(path, parts)
        for name, value in parts.extra.items():
            state[name] = value
            if isinstance(value, Resumable):
                value.go_on_with(RandomState().state_dict())
        return {}

    def _parts(self, state: Mapping[str, object]) -> Parts:
        models = [value for value in state.values() if isinstance(value, nn.Module)]
        if not models:
            raise MisuseError("there is no model in the state", hint='Pass {"model": model, ...}.')
        optimizers = [value for value in state.values() if isinstance(value, Optimizer)]
        schedulers = [value for value in state.values() if isinstance(value, LRScheduler)]
        taken = (nn.Module, Optimizer, LRScheduler)
        extra = {name: value for name, value in state.items() if not isinstance(value, taken)}
        model = _inside(models[0]) if len(models) == 1 else nn.ModuleList([unwrap(each) for each in models])
        return Parts(model, optimizers, schedulers, extra, self._tokenizer)


class ShardwiseSingleDeviceStrategy(_TrainerStrategy, pytorch.SingleDeviceStrategy):  # type: ignore[misc]
    """``Trainer`` on one device."""


class ShardwiseDDPStrategy(_TrainerStrategy, pytorch.DDPStrategy):  # type: ignore[misc]
    """``Trainer`` with DistributedDataParallel."""


class ShardwiseModelParallelStrategy(_TrainerStrategy, pytorch.ModelParallelStrategy):  # type: ignore[misc]
    """``Trainer`` with FSDP2 and tensor parallelism."""


class ShardwiseFabricSingleDeviceStrategy(_FabricStrategy, fabric.SingleDeviceStrategy):  # type: ignore[misc]
    """``Fabric`` on one device."""


class ShardwiseFabricDDPStrategy(_FabricStrategy, fabric.DDPStrategy):  # type: ignore[misc]
    """``Fabric`` with DistributedDataParallel."""


class ShardwiseFabricModelParallelStrategy(_FabricStrategy, fabric.ModelParallelStrategy):  # type: ignore[misc]
    """``Fabric`` with FSDP2 and tensor parallelism."""


def _inside(module: nn.Module) -> nn.Module:
    """The pretrained or adapted model in a module that has no state beside it; else the module itself."""
    found = module = unwrap(module)
    names = list(module.state_dict(keep_vars=True))
    prefix = ""
    while not (is_pretrained(found) or hasattr(found, "peft_config")):
        for name, child in found.named_children() if names else ():
            if all(each.startswith(f"{prefix}{name}.") for each in names):
                prefix, found = f"{prefix}{name}.", child
                break
        else:
            return module
    return found


def _on_cpu(state: object) -> object:
    """Plain containers whose tensors are on the CPU."""
    if isinstance(state, Mapping):
        return {key: _on_cpu(value) for key, value in state.items()}
    if isinstance(state, list | tuple) and type(state) in (list, tuple):
        return type(state)(_on_cpu(each) for each in state)
    return state.detach().cpu() if isinstance(state, torch.Tensor) else state


# --- loaders with their position: epoch, number of batches, and the random numbers of the epoch's start ---------------


class Resumable:
    """A ``DataLoader`` whose state is its position. Mixed into a subclass of the loader's own class; local.

    What the loader itself keeps (torchdata's ``StatefulDataLoader``) is part of the state.
    """

    _order: DataOrder
    _epoch: int
    _sets_epoch: bool
    _saved: Mapping[str, object] | None
    _generators: dict[str, object] | None

    def __iter__(self) -> Iterator[object]:
        # Nothing happens before the first batch: by then Lightning has told the sampler its epoch.
        saved, self._saved = self._saved, None
        generators, self._generators = self._generators, None
        self._epoch += saved is None
        set_epoch = getattr(getattr(self, "sampler", None), "set_epoch", None)
        if self._sets_epoch and set_epoch is not None:
            set_epoch(self._epoch)
        if saved is not None and generators is None:
            generators = RandomState().state_dict()
        if saved is None or generators is None:
            yield from self._order.batches(self._pass(), self._epoch, _LOADER)
        elif self.keeps_position:
            yield from first_then(self._pass(), generators)
        elif saved["own"] is not None:
            self._order.resume(generators, DataOrder.parsed(saved["own"]), ())
            yield from self._order.batches(self._pass(), self._epoch, _LOADER)
        else:
            rest = self._order.batches(self._pass(), self._epoch, _LOADER)
            for _ in range(cast(int, saved["count"])):
                next(rest, _END)
            RandomState().load_state_dict(generators)
            yield from rest

    def _pass(self) -> Pass:
        """One pass over the loader itself."""
        order = {name: getattr(self, name, None) for name in ("generator", "sampler", "batch_sampler")}
        return Pass(self, super().__iter__, **order)  # type: ignore[misc]

    @property
    def keeps_position(self) -> bool:
        """Whether the loader has a position of its own."""
        return hasattr(super(), "state_dict")

    def state_dict(self) -> dict[str, object]:
        """The position."""
        if self._saved:
            return {_MARK: self._saved}
        group = Group.current()
        order = self._order.state(group.rank)
        found = cast("dict[str, dict[str, object]]", order["loaders"])[_LOADER] if order is not None else {}
        count = found.get("count", 0)
        is_over = not count or bool(found.get("is_over")) or count == length_hint(self, -1)
        own = super().state_dict() if self.keeps_position else order  # type: ignore[misc]
        position = {"epoch": self._epoch, "count": count, "is_over": is_over, "world": group.world_size, "own": own}
        return {_MARK: position}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on at a position. What the loader keeps by itself is taken in on the same number of ranks only."""
        saved = dict(cast("Mapping[str, object]", state[_MARK]))
        self._order, self._epoch, self._saved = DataOrder(), cast(int, saved["epoch"]), None
        if saved["is_over"]:
            return
        if saved["world"] != Group.current().world_size:
            saved["own"] = None
            _LOG.warning(
                "the checkpoint was saved on another number of ranks, after %s batches of an epoch: %s",
                saved["count"],
                "this loader begins it again" if self.keeps_position else "so many of each rank are skipped",
            )
        if self.keeps_position:
            if saved["own"] is None:
                return
            super().load_state_dict(saved["own"])  # type: ignore[misc]
        self._saved = saved

    def go_on_with(self, generators: dict[str, object]) -> None:
        """Say what the process's generators are to be when the first batch after a restored position is there."""
        self._generators = generators


def resumable(loader: object, sets_epoch: bool) -> object:
    """The loader with its position; anything but a ``DataLoader`` as it is.

    If it ``sets_epoch``, it tells the sampler its epoch: for a host that counts from 0 in every process.
    """
    if not isinstance(loader, DataLoader) or isinstance(loader, Resumable):
        return loader
    cls = type(loader)
    made = cast("Resumable", object.__new__(type(cls.__name__, (Resumable, cls), {})))
    vars(made).update(vars(loader))
    vars(made).update(_order=DataOrder(), _epoch=-1, _sets_epoch=sets_epoch, _saved=None, _generators=None)
    return made


def without_own(state: object, is_over: bool) -> tuple[object, list[object]]:
    """A state tree whose positions have lost what is each rank's own, and that, in the order of the tree.

    If ``is_over``, all positions count as those of epochs that are over.
    """
    own: list[object] = []

    def strip(position: Mapping[str, object]) -> Mapping[str, object]:
        own.append(position["own"])
        return {**position, "own": None, "is_over": is_over or position["is_over"]}

    return _mapped(state, strip), own


def with_own(state: object, own: list[object]) -> object:
    """What `without_own` has taken apart; positions without an own part where there are none."""
    rest = iter(own)
    return _mapped(state, lambda position: {**position, "own": next(rest, None)})


def _mapped(state: object, change: Callable[[Mapping[str, object]], Mapping[str, object]]) -> object:
    if isinstance(state, Mapping):
        return {key: change(value) if key == _MARK else _mapped(value, change) for key, value in state.items()}
    return [_mapped(each, change) for each in state] if isinstance(state, list) else state
