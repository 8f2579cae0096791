"""Accelerate's ``Accelerator`` with checkpoints by shardwise.

    from shardwise.integrations.accelerate import ShardwiseAccelerator as Accelerator

``save_state``, ``load_state``, ``save_model`` and ``skip_first_batches`` are shardwise's; all else is accelerate's own.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, cast

from accelerate import Accelerator
from torch import nn

from shardwise.comm import Group
from shardwise.config import CheckpointingConfig
from shardwise.errors import CheckpointExistsError, CheckpointNotFoundError, ConfigError, MisuseError
from shardwise.integrations.accelerate_data import Rest, Tracked, tracked
from shardwise.integrations.host_paths import HostPaths, Parts, is_complete, local_path
from shardwise.integrations.host_settings import refuse_ways
from shardwise.stateful_wrappers.wrapping import unwrap
from shardwise.upstream import hugging_face as upstream

if TYPE_CHECKING:
    import os

    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

__all__ = ["ShardwiseAccelerator"]

_LOG = logging.getLogger(__name__)
_STATE, _DATA, _SCALER = "accelerate", "accelerate.data", "accelerate.scaler"
_NAMED = re.compile(r"checkpoint_(\d+)")
_SHARDING = "Shard with FSDP2 (FullyShardedDataParallelPlugin(fsdp_version=2)), or train with DistributedDataParallel."
#: Accelerate's own defaults of ``save_model``.
_MAX_SHARD_SIZE = "10GB"


class ShardwiseAccelerator(Accelerator):  # type: ignore[misc] # accelerate is not followed by mypy
    """An ``accelerate.Accelerator`` whose states are checkpoints of shardwise. All ranks call each method.

    A state is a directory that has one complete checkpoint, and ``LATEST``, a link to it: models, optimizers,
    schedulers, gradient scaler, random number generators, positions in the data, and what was registered. Writing the
    same directory again replaces it at the moment when the new one is complete.

    Args:
        *positional: Those of ``Accelerator``.
        checkpointing: The settings beside those that the script decides. By default each state has a Hugging Face
            export (``LATEST/model/consolidated``).
        **named: Those of ``Accelerator``.

    Raises:
        ConfigError: The arguments ask for what cannot be saved; the message names it.
    """

    def __init__(self, *positional: object, checkpointing: CheckpointingConfig | None = None, **named: object) -> None:
        super().__init__(*positional, **named)
        self._paths = HostPaths(checkpointing, "accelerate")
        self._check()

    # --- states -----------------------------------------------------------------------------------------------------

    def save_state(
        self, output_dir: str | os.PathLike[str] | None = None, safe_serialization: bool = True, **others: object
    ) -> str:
        """Save everything that was prepared and registered. All ranks call.

        Args:
            output_dir: The directory. With ``automatic_checkpoint_naming`` it is
                ``project_dir/checkpoints/checkpoint_N``, whatever is passed, as in accelerate; older ones than
                ``total_limit`` are removed once the new one is complete.
            safe_serialization: Only ``True``.
            **others: None.

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

        Args:
            input_dir: A directory that `save_state` wrote; by default, with ``automatic_checkpoint_naming``, the newest
                one that is complete. The next automatic name is then the one behind it.
            load_kwargs: None.
            **others: None.

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
            path = self._newest()
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
        """Write a model, its configuration and weights, into a directory that ``from_pretrained`` opens.

        Args:
            model: The model, prepared or not.
            save_directory: The directory. An earlier model's files that are not replaced are removed.
            max_shard_size: Only accelerate's default: the setting ``max_file_bytes`` says how large files become.
            safe_serialization: Only ``True``.

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

        Args:
            dataloader: A loader that was prepared.
            num_batches: How many to skip.

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

    def _check(self) -> None:
        hint = "Leave it out: all ranks write one checkpoint, in a directory that every node sees."
        further = {"save_on_each_node": (self.project_configuration.save_on_each_node, hint)}
        refuse_ways(self, "ShardwiseAccelerator", _SHARDING, further)
        if self._is_automatic and self.project_dir is not None:
            local_path(self.project_dir)  # refused now, not at the first save

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

        return [
            Path(path) for path in cast("list[str]", Group.current().broadcast_result(look, f"looking into {root}"))
        ]

    def _newest(self) -> Path:
        numbered = self._numbered()
        if not numbered:
            raise CheckpointNotFoundError(
                "there is no checkpoint to load", path=self._automatic, hint="Begin without load_state()."
            )
        return numbered[-1]

    def _prune(self) -> None:
        """Remove the oldest automatic names above ``total_limit``."""
        limit = self.project_configuration.total_limit
        if not self._is_automatic or limit is None or limit < 1 or self._paths.is_writing:
            return
        for path in self._numbered()[:-limit]:
            self._paths.remove(path)


def _given(directory: str | os.PathLike[str] | None, absent: str) -> Path:
    if directory is None:
        raise MisuseError(absent, hint="Pass a directory, or set automatic_checkpoint_naming.")
    return local_path(directory)
