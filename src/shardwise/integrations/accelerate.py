"""Accelerate's ``Accelerator`` with checkpoints by shardwise.

    from shardwise.integrations.accelerate import ShardwiseAccelerator as Accelerator

``save_state``, ``load_state``, ``save_model`` and ``skip_first_batches`` are shardwise's; all else is accelerate's own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderDispatcher, DataLoaderShard
from accelerate.utils import synchronize_rng_states
from torch import nn
from torch.utils.data import RandomSampler

from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig
from shardwise.errors import CheckpointExistsError, CheckpointNotFoundError, ConfigError, MisuseError
from shardwise.integrations.hosts import HostPaths, Parts, Pass, first_then, is_complete, local_path, refuse_ways
from shardwise.stateful_wrappers.wrapping import unwrap
from shardwise.upstream import hugging_face as upstream

if TYPE_CHECKING:
    import os

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler
    from torchdata.stateful_dataloader import StatefulDataLoader

__all__ = ["ShardwiseAccelerator"]

_LOG = logging.getLogger(__name__)
_STATE, _DATA, _SCALER = "accelerate", "accelerate.data", "accelerate.scaler"
#: The name of a loader's position in its own `DataOrder`.
_LOADER = "loader"
_END = object()
_NAMED = re.compile(r"checkpoint_(\d+)")
_SHARDING = "Shard with FSDP2 (FullyShardedDataParallelPlugin(fsdp_version=2)), or train with DistributedDataParallel."
#: Accelerate's own defaults of ``save_model``.
_MAX_SHARD_SIZE = "10GB"


class ShardwiseAccelerator(Accelerator):  # type: ignore[misc] # accelerate is not followed by mypy
    """An ``accelerate.Accelerator`` whose states are checkpoints of shardwise. All ranks call each method.

    A state is a directory that has one complete checkpoint, and ``LATEST``, a link to it: models, optimizers,
    schedulers, gradient scaler, random number generators, positions in the data, and what was registered. Writing the
    same directory again replaces it at the moment when the new one is complete.

    The arguments are those of ``Accelerator``, and ``checkpointing``: the settings beside those that the script
    decides. By default each state has a Hugging Face export (``LATEST/model/consolidated``).

    Raises:
        ConfigError: The arguments ask for what cannot be saved; the message names it.
    """

    def __init__(self, *positional: object, checkpointing: CheckpointingConfig | None = None, **named: object) -> None:
        super().__init__(*positional, **named)
        self._paths = HostPaths(checkpointing, "accelerate")
        hint = "Leave it out: all ranks write one checkpoint, in a directory that every node sees."
        further = {"save_on_each_node": (self.project_configuration.save_on_each_node, hint)}
        refuse_ways(self, "ShardwiseAccelerator", _SHARDING, further)
        if self._is_automatic and self.project_dir is not None:
            local_path(self.project_dir)  # refused now, not at the first save

    # --- states -----------------------------------------------------------------------------------------------------

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True, **others: object
    ) -> str:
        """Save everything that was prepared and registered. All ranks call.

        With ``automatic_checkpoint_naming`` the directory is ``project_dir/checkpoints/checkpoint_N``, whatever is
        passed, as in accelerate; older ones than ``total_limit`` are removed once the new one is complete.

        Returns:
            The directory, whose checkpoint is complete; in asynchronous mode at the next call of `save_state`,
            `wait_for_saves` or `end_training`.

        Raises:
            CheckpointExistsError: The automatic name has a complete checkpoint.
            MisuseError: An argument that cannot be followed.
            ShardwiseError: What failed, on any rank; what was saved before is untouched.
        """
        if not safe_serialization or others:
            self._refuse_arguments("save_state", ["safe_serialization=False", *others][bool(safe_serialization) :])
        self.wait_for_saves()
        project = self.project_configuration
        if self._is_automatic:
            path = self._automatic / f"checkpoint_{project.iteration}"
            with Group.current().together(f"looking into {path}") as vote:
                vote.flag = is_complete(path)
            if vote.any:
                raise CheckpointExistsError(
                    "the next automatic name is that of a checkpoint",
                    path=path,
                    hint="Resume with load_state(), set ProjectConfiguration(iteration=...) to a number that is free, "
                    "or choose another project_dir.",
                )
        else:
            path = _given(output_dir, "save_state was not told where to")
        self._paths.save(path, self._parts(), (0, project.iteration), False)
        project.iteration += 1
        self._prune()
        return str(path)

    def load_state(
        self,
        input_dir: str | os.PathLike[str] | None = None,
        load_kwargs: Mapping[str, object] | None = None,
        **others: object,
    ) -> None:
        """Restore everything that was prepared and registered, in place, on any number of ranks. All ranks call.

        ``input_dir`` is a directory that `save_state` wrote; by default, with ``automatic_checkpoint_naming``, the
        newest one that is complete. The next automatic name is then the one behind it.

        Raises:
            CheckpointNotFoundError: There is nothing to load.
            IncompleteCheckpointError: The directory has only an interrupted save.
            MisuseError: An argument that cannot be followed.
            ShardwiseError: Checkpoint and run do not fit; nothing was restored.
        """
        if load_kwargs or others:
            self._refuse_arguments("load_state", ["load_kwargs"] * bool(load_kwargs) + list(others))
        self.wait_for_saves()
        if input_dir is None and self._is_automatic:
            numbered = self._numbered()
            if not numbered:
                raise CheckpointNotFoundError(
                    "there is no checkpoint to load", path=self._automatic, hint="Begin without load_state()."
                )
            path = numbered[-1]
        else:
            path = _given(input_dir, "load_state was not told from where")
        parts = self._parts()
        parts.extra[_STATE] = parts.extra[_DATA] = None
        self._paths.restore(path, parts)
        state = cast("Mapping[str, object]", parts.extra[_STATE])
        self.step = state["step"]
        data = cast("Mapping[str, object]", parts.extra[_DATA] or {})
        own = cast("list[object]", data["loaders"]) if data.get("world") == self.num_processes else []
        positions = cast("list[Mapping[str, object]]", state["loaders"])
        loaders = self._loaders()
        if len(loaders) != len(positions):
            _LOG.warning(
                "the state has the positions of %d loaders, and %d are prepared: they are given out in order",
                len(positions),
                len(loaders),
            )
        for number, (loader, position) in enumerate(zip(loaders, positions, strict=False)):
            loader.resume(position, own[number] if own else None)
        if self._is_automatic and (found := _NAMED.fullmatch(path.name)) is not None:
            project = self.project_configuration
            project.iteration = max(project.iteration, int(found[1]) + 1)

    def wait_for_saves(self) -> None:
        """Return when the last state is complete, in asynchronous mode; raises what failed in it. All ranks call."""
        self._paths.finish()
        self._prune()

    def end_training(self) -> None:
        """As in ``Accelerator``, once the last state is complete."""
        self.wait_for_saves()
        super().end_training()

    # --- the model alone --------------------------------------------------------------------------------------------

    def save_model(
        self,
        model: nn.Module,
        save_directory: str | os.PathLike[str],
        max_shard_size: int | str = _MAX_SHARD_SIZE,
        safe_serialization: bool = True,
    ) -> None:
        """Write a model, prepared or not, its configuration and weights, into a directory for ``from_pretrained``.

        An earlier model's files that are not replaced are removed. How large files become the setting
        ``max_file_bytes`` says, and not ``max_shard_size``.

        Raises:
            MisuseError: An argument that cannot be followed.
            ShardwiseError: What failed, on any rank.
        """
        if max_shard_size != _MAX_SHARD_SIZE or not safe_serialization:
            self._refuse_arguments(
                "save_model", ["max_shard_size" if safe_serialization else "safe_serialization=False"]
            )
        self._paths.write_model(model, local_path(save_directory))

    # --- data -------------------------------------------------------------------------------------------------------

    def prepare_data_loader(self, data_loader: object, *positional: object, **named: object) -> object:
        """As in ``Accelerator``; what it returns knows its position."""
        loaders = upstream.prepared_dataloaders(self)
        prepared = super().prepare_data_loader(data_loader, *positional, **named)
        found = tracked(prepared)
        if found is None:
            return prepared
        loaders[:] = [found if each is prepared else each for each in loaders]
        return found

    def skip_first_batches(self, dataloader: object, num_batches: int = 0) -> object:
        """A loader of what is behind the first batches of an epoch.

        After `load_state` it is the epoch that the checkpoint was saved in. With the number of batches that the loop
        had then, on the same number of ranks, these are made again, and the rest is that of the run that was never
        stopped, with all random numbers. Otherwise they are skipped in the order of that epoch.

        Raises:
            MisuseError: The loader was not prepared, or keeps its position by itself.
        """
        if not isinstance(dataloader, Tracked) or dataloader.use_stateful_dataloader:
            kept = isinstance(dataloader, Tracked)
            raise MisuseError(
                f"skip_first_batches was given a {type(dataloader).__name__} "
                f"{'that goes on by itself where it was' if kept else 'that was not prepared'}",
                hint="Iterate over it after load_state." if kept else "Pass what accelerator.prepare has returned.",
            )
        return Rest(dataloader, num_batches)

    # --- what is refused --------------------------------------------------------------------------------------------

    def register_save_state_pre_hook(self, hook: object) -> NoReturn:
        """Refuse: a hook writes files that no manifest knows, and takes out weights that shardwise does not gather."""
        self._refuse_hook("register_save_state_pre_hook")

    def register_load_state_pre_hook(self, hook: object) -> NoReturn:
        """Refuse, like `register_save_state_pre_hook`."""
        self._refuse_hook("register_load_state_pre_hook")

    @staticmethod
    def _refuse_hook(name: str) -> NoReturn:
        raise MisuseError(
            f"{name} is not supported by ShardwiseAccelerator",
            hint="Register an object with register_for_checkpointing; the export has each model's own configuration.",
        )

    @staticmethod
    def _refuse_arguments(method: str, names: list[str]) -> NoReturn:
        raise MisuseError(
            f"{method} of ShardwiseAccelerator does not support {', '.join(names)}",
            hint="Leave it out; what can be set is in ShardwiseAccelerator(checkpointing=CheckpointingConfig(...)).",
        )

    # --- parts ------------------------------------------------------------------------------------------------------

    def _loaders(self) -> list[Tracked]:
        return [loader for loader in upstream.prepared_dataloaders(self) if isinstance(loader, Tracked)]

    def _parts(self) -> Parts:
        models = upstream.prepared_models(self)
        if not models:
            raise MisuseError(
                "no model was prepared", hint="Call accelerator.prepare(model, ...) before save_state or load_state."
            )
        loaders, rank = self._loaders(), Group.current().rank
        extra: dict[str, object] = {
            _STATE: {"step": self.step, "loaders": [loader.position() for loader in loaders]},
            _DATA: {"world": self.num_processes, "loaders": [loader.own_state(rank) for loader in loaders]},
        }
        if self.scaler is not None:
            extra[_SCALER] = self.scaler
        for number, each in enumerate(upstream.registered_objects(self)):
            extra[f"object_{number}"] = each
        together = nn.ModuleList([unwrap(model) for model in models]) if len(models) > 1 else models[0]
        optimizers = [cast("Optimizer", each.optimizer) for each in upstream.prepared_optimizers(self)]  # type: ignore[attr-defined]
        schedulers = [cast("LRScheduler", each.scheduler) for each in upstream.prepared_schedulers(self)]  # type: ignore[attr-defined]
        return Parts(together, optimizers, schedulers, extra)

    @property
    def _is_automatic(self) -> bool:
        return bool(self.project_configuration.automatic_checkpoint_naming)

    @property
    def _automatic(self) -> Path:
        if self.project_dir is None:
            raise ConfigError(
                "automatic_checkpoint_naming is set without a project_dir",
                hint="Set ProjectConfiguration(project_dir=...).",
            )
        return local_path(self.project_dir) / "checkpoints"

    def _numbered(self) -> list[Path]:
        """The automatic names that have a complete checkpoint, in order, as rank 0 sees them. All ranks call."""
        root = self._automatic

        def look() -> list[str]:
            found = [(_NAMED.fullmatch(path.name), path) for path in (root.iterdir() if root.is_dir() else ())]
            complete = sorted((int(name[1]), path) for name, path in found if name is not None and is_complete(path))
            return [str(path) for _, path in complete]

        return [Path(path) for path in Group.current().broadcast_result(look, f"looking into {root}")]

    def _prune(self) -> None:
        """Remove the oldest automatic names above ``total_limit``."""
        limit = self.project_configuration.total_limit
        if not self._is_automatic or limit is None or limit < 1 or self._paths.writing is not None:
            return
        for path in self._numbered()[:-limit]:
            self._paths.remove(path)


def _given(directory: str | os.PathLike[str] | None, absent: str) -> Path:
    if directory is None:
        raise MisuseError(absent, hint="Pass a directory, or set automatic_checkpoint_naming.")
    return local_path(directory)


# --- loaders with their position: epoch, number of batches, and the random numbers of the epoch's start ---------------


@dataclass(frozen=True, slots=True)
class _Resumed:
    """A position that was restored and that the loop has not come to yet."""

    position: Mapping[str, object]  #: What `Tracked.position` gave.
    own: object  #: What `Tracked.own_state` gave; ``None`` on another number of ranks.
    generators: dict[str, object]  #: What the process's generators were set to.
    epoch: int  #: The epoch that was begun last.
    count: int  #: Number of its batches that the loop has had.
    is_over: bool  #: Whether nothing of the epoch is left.


class Tracked:
    """A loader of accelerate's that notes each epoch's start and counts the batches that the loop has had.

    Mixed into a subclass of the loader's own class. Local, but for what accelerate itself synchronizes at the start of
    an epoch. A loader that keeps its own position (``use_stateful_dataloader``) is left to do so.
    """

    # Of accelerate's loader; the dispatching one has no kinds of generators.
    iteration: int
    rng_types: list[str] | None = None
    synchronized_generator: torch.Generator | None = None
    use_stateful_dataloader: bool
    base_dataloader: StatefulDataLoader

    _order: DataOrder
    _begun: dict[str, object] | None
    _start: dict[str, object] | None
    #: Whether the next epoch's iterator is there: accelerate asks torchdata's loader for its state in the beginning,
    #: which makes one, and making one draws a random number.
    _is_made: bool
    _resumed: _Resumed | None

    def __iter__(self) -> Iterator[object]:
        resumed = self._resumed
        if resumed is not None and self.use_stateful_dataloader and not resumed.is_over:
            return self._by_itself() if resumed.own is not None else self.skipping(resumed.count)
        self._resumed = None
        if resumed is not None and not resumed.is_over:
            _LOG.warning(
                "the checkpoint was saved after %d batches of epoch %d, which begins again; "
                "accelerator.skip_first_batches(dataloader, %d) goes on behind them",
                resumed.count,
                resumed.epoch,
                resumed.count,
            )
        return self._from_start(self.iteration)

    def _by_itself(self) -> Iterator[object]:
        """The rest of an epoch, where the loader itself knows the position."""
        resumed, self._resumed = cast(_Resumed, self._resumed), None
        start, count = resumed.position["generator"], resumed.count
        own = cast("Mapping[str, object]", resumed.own)
        self._set_generator(start)
        self.load_state_dict(own["loader"])  # type: ignore[attr-defined]
        if was_made := bool(resumed.position["was_made"]):
            self.base_dataloader.state_dict()  # makes it
        self._start = cast("dict[str, object]", own["start"])
        RandomState().load_state_dict(self._start)  # of which a sampler without a generator draws the order
        self._begun = {"epoch": resumed.epoch, "generator": start, "count": count, "was_made": was_made}
        for number, batch in enumerate(first_then(self._epoch(), resumed.generators), count + 1):
            self._begun["count"] = number
            yield batch

    def _from_start(self, epoch: int) -> Iterator[object]:
        if self.rng_types:
            synchronize_rng_states(self.rng_types, self.synchronized_generator)
        return self._counted(epoch, self._generator_state(), 0)

    def _counted(self, epoch: int, start: object, count: int) -> Iterator[object]:
        self._begun = {"epoch": epoch, "generator": start, "count": count, "was_made": self._is_made}
        self._is_made = False
        self._start = RandomState().state_dict() if self.use_stateful_dataloader else None
        for number, batch in enumerate(self._order.batches(self._epoch(), epoch, _LOADER), count + 1):
            self._begun["count"] = number
            yield batch

    def _epoch(self) -> Pass:
        """One pass over accelerate's own loader."""
        order = {"generator": self.synchronized_generator, "batch_sampler": getattr(self, "batch_sampler", None)}
        return Pass(self, super().__iter__, **order)  # type: ignore[misc]

    def _generator_state(self) -> torch.Tensor | None:
        generator = self.synchronized_generator
        return None if generator is None else generator.get_state()

    def _set_generator(self, state: object) -> None:
        if self.synchronized_generator is not None and isinstance(state, torch.Tensor):
            self.synchronized_generator.set_state(state)

    def position(self) -> dict[str, object]:
        """The position, as far as it is the same on every rank."""
        if self._resumed is not None:
            return dict(self._resumed.position)
        begun = self._begun or {"epoch": self.iteration, "generator": None, "count": 0, "was_made": False}
        seed = getattr(self.get_sampler(), "initial_seed", None)  # type: ignore[attr-defined]
        size = length_hint(self, -1)
        length = size if size >= 0 else None
        now = {"now": self._generator_state(), "iteration": self.iteration, "length": length, "seed": seed}
        return begun | now

    def own_state(self, rank: int) -> object:
        """The rank's part of the position: generators at the epoch's start, or what the loader itself keeps."""
        if self._resumed is not None:
            return self._resumed.own
        if not self.use_stateful_dataloader:
            return self._order.state(rank)
        return {"loader": self.state_dict(), "start": self._start}  # type: ignore[attr-defined]

    def resume(self, position: Mapping[str, object], own: object) -> None:
        """Take in what `position` and `own_state` gave, the latter ``None`` on another number of ranks."""
        self._order, self._begun = DataOrder(), None
        if self._is_made and position["count"]:  # a run that went on would have to make one
            self.load_state_dict({})  # type: ignore[attr-defined]
            self._is_made = False
        epoch, count, iteration = (cast(int, position[name]) for name in ("epoch", "count", "iteration"))
        is_over = count in (0, position["length"]) or iteration != epoch
        self._resumed = _Resumed(position, own, RandomState().state_dict(), epoch, count, is_over)
        # The epoch that a loop begins which begins one: the same one again if it is not over.
        self.iteration = iteration + 1 if count and is_over and iteration == epoch else iteration
        self._set_generator(position["now"])
        if own is None and position["seed"] is None and isinstance(self.get_sampler(), RandomSampler):  # type: ignore[attr-defined]
            _LOG.warning(
                "the number of ranks is not that of the checkpoint: the order of the data may be another one. "
                "DataLoaderConfiguration(use_seedable_sampler=True), from the beginning of a run, keeps it"
            )
        if position["seed"] is not None and hasattr(sampler := self.get_sampler(), "initial_seed"):  # type: ignore[attr-defined]
            sampler.initial_seed = position["seed"]

    def skipping(self, number: int) -> Iterator[object]:
        """What is behind the first batches of the epoch that the restored checkpoint was in, or of a new one."""
        if self._resumed is None or number == 0:
            yield from _behind(number, iter(self))
            return
        resumed, self._resumed = self._resumed, None
        self.iteration = resumed.epoch
        start = resumed.position["generator"]
        if resumed.own is not None and number == resumed.count and not self.use_stateful_dataloader:
            self._order.resume(resumed.generators, DataOrder.parsed(resumed.own), ())
            yield from self._counted(resumed.epoch, start, number)
        else:
            self._set_generator(start)
            rest = _behind(number, self._from_start(resumed.epoch))
            RandomState().load_state_dict(resumed.generators)
            yield from rest
        self.iteration = resumed.epoch + 1


class TrackedShard(Tracked, DataLoaderShard):  # type: ignore[misc] # accelerate is not followed by mypy
    """Batches that each rank makes."""


class TrackedDispatcher(Tracked, DataLoaderDispatcher):  # type: ignore[misc] # accelerate is not followed by mypy
    """Batches that the first rank makes for all."""


class Rest:
    """A loader whose next epoch has the batches behind those that are skipped."""

    def __init__(self, loader: Tracked, number: int) -> None:
        self._loader, self._number = loader, number

    def __iter__(self) -> Iterator[object]:
        return self._loader.skipping(self._number)

    def __len__(self) -> int:
        return max(0, len(cast("DataLoaderShard", self._loader)) - self._number)

    def __getattr__(self, name: str) -> object:
        return getattr(self._loader, name)


def tracked(loader: object) -> Tracked | None:
    """The loader with its position; ``None`` of another kind than accelerate makes."""
    cls = {DataLoaderShard: TrackedShard, DataLoaderDispatcher: TrackedDispatcher}.get(type(loader))
    if cls is None:
        return None
    made = cls.__new__(cls)
    vars(made).update(vars(loader))
    made._order, made._begun, made._start, made._resumed = DataOrder(), None, None, None
    made._is_made = made.use_stateful_dataloader
    return made


def _behind(number: int, batches: Iterator[object]) -> Iterator[object]:
    for had in range(number):
        if next(batches, _END) is _END:
            raise MisuseError(
                f"skip_first_batches was asked to skip {number} batches of an epoch that has {had}",
                hint="Count the batches of the epoch, not those of the run.",
            )
    return batches
