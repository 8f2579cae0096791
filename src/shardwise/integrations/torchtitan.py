"""torchtitan's checkpointer component, with checkpoints by shardwise.

    Trainer.Config(..., checkpoint=ShardwiseCheckpointManager.Config(enable=True, interval=500))

It stands where torchtitan's ``CheckpointManager`` does and takes the same settings. What is written, and how, is
`shardwise.Checkpointer`'s: one checkpoint of everything, in ``dump_folder/folder``.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import tyro
from torchdata.stateful_dataloader import StatefulDataLoader
from torchtitan.components import checkpointer as titan
from torchtitan.components.checkpointer import DATALOADER, LR_SCHEDULER, OPTIMIZER
from torchtitan.components.dataloader import ParallelAwareDataloader

from shardwise.comm import Group, JsonValue
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.errors import ConfigError, MisuseError
from shardwise.integrations.hosts import refuse_derived
from shardwise.integrations.torchtitan_export import attach_export, divide, hub_adapter, take_over
from shardwise.lifecycle import LATEST, resolve
from shardwise.sources.state_files import pack_state, unpack_state

if TYPE_CHECKING:
    from torch import nn

    from shardwise.checkpointing import Checkpointer
    from shardwise.checkpointing.loading.restoring import Stateful

__all__ = ["ShardwiseCheckpointManager"]

_State = dict[str, object]
#: Settings that follow from torchtitan's, and from which.
_DERIVED = {
    "checkpoint_dir": "dump_folder and checkpoint.folder",
    "enabled": "checkpoint.enable",
    "is_async": "checkpoint.async_mode",
    "max_recent_checkpoints": "checkpoint.keep_latest_k",
}
_TITANS_OWN = re.compile(r"step-\d+")


class ShardwiseCheckpointManager(titan.BaseCheckpointManager):  # type: ignore[misc] # torchtitan is not followed by mypy
    """A checkpointer of torchtitan's that saves and restores with shardwise. All ranks make the same calls.

    torchtitan builds it from its `Config`, with what its own is built with, and calls ``load``, ``save``,
    ``maybe_wait_for_staging``, ``maybe_wait_for_saving`` and ``close``. A checkpoint is ``epoch_0_step_S``, visible
    once it is complete: model, optimizers, schedulers, torchtitan's own state (``train_state``), the loader's position,
    random number generators. It resumes on other meshes; the position in the data needs as many data-parallel ranks.

    Raises:
        ConfigError: The settings ask for what cannot be done; the message names it.
        ExportMismatchError: With ``last_save_in_hf`` or exports with every save, ``config.json`` in
            ``hf_assets_path`` describes another model than is trained.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(titan.CheckpointManager.Config):  # type: ignore[misc]
        """Settings: those of torchtitan's ``CheckpointManager``, and shardwise's.

        Attributes:
            checkpointing: The settings beside those that follow from torchtitan's. By default the model is exported
                with the last checkpoint where ``last_save_in_hf`` says so, and never otherwise.
        """

        checkpointing: Annotated[CheckpointingConfig | None, tyro.conf.Suppress] = None

    def __init__(
        self,
        config: Config,
        *,
        dataloader: Stateful | None,
        model_parts: Sequence[nn.Module],
        optimizers: Sequence[object],
        lr_schedulers: Sequence[object],
        states: dict[str, Stateful],
        sd_adapter: object | None,
        base_folder: str = "",
    ) -> None:
        self.enable = config.enable
        self.save_future: Future[None] | None = None
        if not self.enable:
            return
        self._config = config
        self._parts = list(model_parts)
        fused = take_over(self._parts)
        self._optimizers = list(optimizers)
        self._schedulers = list(lr_schedulers)
        self._states = _by_data_rank(dataloader, states)
        settings = _settings(config, Path(base_folder) / config.folder)
        known = [OPTIMIZER, LR_SCHEDULER, *self._states]
        for name in config.exclude_from_loading:
            if name not in known:
                raise ConfigError(
                    f"exclude_from_loading has {name!r}, and the run has {', '.join(known)}",
                    hint="Correct the name, or leave it out.",
                )
        if settings.consolidated_mode is not SaveConsolidatedMode.FALSE:
            dtype = config.export_dtype if config.last_save_model_only else None
            attach_export(self._parts, sd_adapter, fused, dtype)
        elif config.initial_load_in_hf:
            hub_adapter(self._parts, sd_adapter, fused)
        elif fused.known:
            divide(self._parts, fused)
        self._assets = getattr(sd_adapter, "hf_assets_path", None)
        self._checkpointer: Checkpointer = settings.build()
        self._root = Path(settings.checkpoint_dir).absolute()

    # --- what torchtitan's base class calls ---------------------------------------------------------------------------

    def _save(self, curr_step: int, last_step: bool = False) -> bool:
        config = self._config
        is_due = curr_step % config.interval == 0 or (curr_step == 1 and config.enable_first_step_checkpoint)
        if config.load_only or not (last_step or is_due):
            return False
        whole = not (last_step and config.last_save_model_only)
        group = Group.current()
        extra = {name: each.gathered(name, group) for name, each in self._states.items()} if whole else None
        saved = self._checkpointer.save(
            epoch=0,
            step=curr_step,
            model=self._parts,
            optimizer=self._optimizers if whole else None,  # type: ignore[arg-type]
            scheduler=self._schedulers if whole else None,  # type: ignore[arg-type]
            extra_state=extra,
            is_final_checkpoint=last_step,
        )
        if self._checkpointer.config.is_async:
            self.save_future = Future()
        return saved is not None

    def _load(self, step: int = -1) -> bool:
        config = self._config
        found = Group.current().broadcast_result(lambda: _find(self._root, step), "finding checkpoints")
        if found is not None:
            path, resumed_step = cast("tuple[str, int | None]", found)
            self._restore(Path(path), model_only=resumed_step == 0)
            return True
        if config.initial_load_path is None and not config.initial_load_in_hf:
            return False
        source = config.initial_load_path or self._assets
        if source is None:
            raise ConfigError(
                "initial_load_in_hf is set, and there is neither initial_load_path nor hf_assets_path",
                hint="Set one of them to the directory of the Hugging Face model.",
            )
        self._restore(Path(source), model_only=config.initial_load_model_only)
        return True

    def _maybe_wait_for_staging(self) -> None:
        self._checkpointer.maybe_wait_for_staging()

    def _wait_for_saving(self) -> None:
        self.save_future = None
        self._checkpointer.async_wait()

    def _close(self) -> None:
        self._checkpointer.close()

    # --- parts --------------------------------------------------------------------------------------------------------

    def _restore(self, path: Path, model_only: bool) -> None:
        if model_only:
            inside = path / "model"
            self._checkpointer.load_model(self._parts, inside if inside.is_dir() else path, is_init_step=True)
            return
        left = self._config.exclude_from_loading
        self._checkpointer.restore(
            self._parts,
            None if OPTIMIZER in left else self._optimizers,  # type: ignore[arg-type]
            None if LR_SCHEDULER in left else self._schedulers,  # type: ignore[arg-type]
            restore_from=path,
            extra_state={name: each for name, each in self._states.items() if name not in left},
        )


def _settings(config: ShardwiseCheckpointManager.Config, folder: Path) -> CheckpointingConfig:
    """The checkpointer's settings; `ConfigError` where they contradict torchtitan's, or are not supported."""
    given = config.checkpointing or CheckpointingConfig(save_consolidated=SaveConsolidatedMode.FALSE)
    refuse_derived(given, _DERIVED, "ShardwiseCheckpointManager")
    if config.initial_load_in_hf_quantized:
        raise ConfigError(
            "ShardwiseCheckpointManager does not support initial_load_in_hf_quantized",
            hint="Dequantize the model with transformers first, and load what it saves.",
        )
    mode = given.consolidated_mode
    if config.last_save_in_hf and mode is SaveConsolidatedMode.FALSE:
        mode = SaveConsolidatedMode.FINAL
    return replace(
        given,
        checkpoint_dir=folder,
        is_async=config.async_mode != "disabled",
        max_recent_checkpoints=config.keep_latest_k or None,
        save_consolidated=mode,
    )


def _find(root: Path, step: int) -> JsonValue:
    """The checkpoint to resume from, and its step; ``None`` where there is none. One rank calls.

    None of this step is a `CheckpointNotFoundError`, a directory with torchtitan's own a `MisuseError`.
    """
    theirs = sorted(path.name for path in root.iterdir() if _TITANS_OWN.fullmatch(path.name)) if root.is_dir() else []
    if theirs:
        raise MisuseError(
            f"the directory has checkpoints that torchtitan's own CheckpointManager has saved ({theirs[0]}, ...)",
            path=root,
            hint="Choose another checkpoint.folder, and take the model over with checkpoint.initial_load_path.",
        )
    found = resolve(root, LATEST if step == -1 else step)
    return None if found is None else [str(found.path), found.step]


# --- states of the data-parallel ranks --------------------------------------------------------------------------------


class _ByDataRank:
    """A state that each data-parallel rank has one of; in a checkpoint it is that of all of them.

    Ranks that share their data (tensor, pipeline and context parallelism) have the same state, so that a checkpoint
    resumes on any mesh with as many data-parallel ranks. One that ``is_bound`` means nothing on another number of them;
    of others the first rank's is taken then.
    """

    def __init__(self, target: Stateful, rank: int, size: int, is_bound: bool) -> None:
        self._target, self._rank, self._size, self._is_bound = target, rank, size, is_bound

    def gathered(self, name: str, group: Group) -> _State:
        """The states of all data-parallel ranks, the same on every rank. All ranks call."""

        def own() -> JsonValue:
            packed = pack_state(self._own())
            return [self._rank, {suffix: base64.b64encode(content).decode() for suffix, content in packed.items()}]

        rows = cast("list[tuple[int, dict[str, str]]]", group.gather(own, f"gathering {name}"))
        states = {str(rank): {s: base64.b64decode(text) for s, text in packed.items()} for rank, packed in rows[::-1]}
        return {"size": self._size, "states": {rank: unpack_state(packed) for rank, packed in sorted(states.items())}}

    def state_dict(self) -> _State:
        """This rank's state, as a part of `gathered`."""
        return {"size": self._size, "states": {str(self._rank): self._own()}}

    def load_state_dict(self, state_dict: _State) -> None:
        """Take this rank's state out of all; `MisuseError` for torchtitan's own, or another number of ranks."""
        states, size = state_dict.get("states"), state_dict.get("size")
        if not isinstance(states, Mapping):
            raise MisuseError(
                f"the state of the {type(self._target).__name__} was saved by torchtitan itself",
                hint="Name it in checkpoint.exclude_from_loading: it then starts afresh.",
            )
        if size != self._size and self._is_bound:
            raise MisuseError(
                f"the position in the data is that of {size} data-parallel ranks, and the run has {self._size}",
                hint="Resume on as many, or begin the data afresh: set checkpoint.exclude_from_loading to "
                f"['{DATALOADER}'].",
            )
        state = cast(_State, states[str(self._rank if size == self._size else 0)])
        if isinstance(self._target, ParallelAwareDataloader):
            StatefulDataLoader.load_state_dict(self._target, state)
        else:
            self._target.load_state_dict(state)

    def _own(self) -> _State:
        if isinstance(self._target, ParallelAwareDataloader):  # its own method pickles this, and unpickles it
            return cast(_State, StatefulDataLoader.state_dict(self._target))
        return self._target.state_dict()


def _by_data_rank(dataloader: Stateful | None, states: Mapping[str, Stateful]) -> dict[str, _ByDataRank]:
    """The loader and the run's further states, by name."""
    group = Group.current()
    rank = getattr(dataloader, "dp_rank", group.rank)
    size = getattr(dataloader, "dp_world_size", group.world_size)
    found = {name: _ByDataRank(state, rank, size, is_bound=False) for name, state in states.items()}
    if dataloader is not None:
        found[DATALOADER] = _ByDataRank(dataloader, rank, size, is_bound=True)
    return found
