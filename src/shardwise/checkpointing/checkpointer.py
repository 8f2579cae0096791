"""`Checkpointer`: the methods that a training program calls; the other modules do the work."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, overload

import torch
from torch import nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from shardwise.addons import CheckpointAddon
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.arguments import check_building
from shardwise.checkpointing.lifetime import Lifetime, check_same_call, public_call, undisturbed
from shardwise.checkpointing.loading import base_model
from shardwise.checkpointing.loading import whole as loading
from shardwise.checkpointing.loading.foreign_optimizers import Changes
from shardwise.checkpointing.loading.restoring import Stateful
from shardwise.checkpointing.optimizers import Optimizers, Schedulers
from shardwise.checkpointing.parallel_ranks import ParallelRanks
from shardwise.checkpointing.reports import Reports, RestoreRecord
from shardwise.checkpointing.run_state.extras import load_rank_state, save_rank_state
from shardwise.checkpointing.saving import whole as saving
from shardwise.checkpointing.saving.models import default_addons
from shardwise.comm import ABSENT_SECONDS
from shardwise.disk.storage import LocalStorage, Storage
from shardwise.engine.staging import DeviceStreams
from shardwise.engine.verify import VerifyLevel
from shardwise.lifecycle import CheckpointInfo, PreemptionGuard, list_checkpoints, resolve
from shardwise.settings import Settings
from shardwise.stateful_wrappers.model import Model
from shardwise.timing import Callback, CallRecord

_LOG = logging.getLogger(__name__)
_Batch = TypeVar("_Batch")


class Checkpointer:
    """Saves and restores training runs. Build it with `CheckpointingConfig.build`.

    Every method is called by all ranks of the group together, in the same order. A failure on one rank is raised on
    all of them as the same error. As a context manager it finishes at the end what is still being written.

    Args:
        config: Settings.
        dp_rank: Data-parallel rank; derived where it is not given, as `CheckpointingConfig.build` says.
        tp_rank: Tensor-parallel rank; derived like ``dp_rank``.
        pp_rank: Pipeline rank; derived like ``dp_rank``.
        moe_mesh: Accepted for compatibility and kept as an attribute; it has no effect, since the sharding of experts
            is read from their tensors.
        process_group: The ranks that save together: all that hold a part of the model. Default: all ranks.
        pp_group: The ranks of this pipeline, in the order of the stages; addons are given it.
        addons: Hooks around the writing of a model, instead of the default ones (`ConsolidatedHFAddon`, or `PeftAddon`
            with ``is_peft``).
        storage: Where data is written and read, and names are made and renamed; the mounted file systems by default.
        device_streams: How asynchronous copies from accelerators are ordered; among torch's own streams by default.
        absent_seconds: After how long a wait for ranks to make the same call one warning names those that have not.
        callbacks: Called on every rank with the `CallRecord` of each save and load that is over, in asynchronous mode
            by the thread that saves. An error in one is logged and changes nothing.

    Raises:
        ConfigError: ``checkpoint_dir`` is a URL, and nothing was passed that reaches it; or ``torch_save`` is to write
            an export with every save.
        StorageError: This process may not write to ``checkpoint_dir``, or not to the directory of the traces.
    """

    def __init__(
        self,
        config: Settings,
        dp_rank: int | None = None,
        tp_rank: int | None = None,
        pp_rank: int | None = None,
        moe_mesh: DeviceMesh | None = None,
        process_group: ProcessGroup | None = None,
        pp_group: ProcessGroup | None = None,
        *,
        addons: Sequence[CheckpointAddon] | None = None,
        storage: Storage | None = None,
        device_streams: DeviceStreams | None = None,
        absent_seconds: float = ABSENT_SECONDS,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self.config = config
        self.dp_rank, self.tp_rank, self.pp_rank = dp_rank, tp_rank, pp_rank
        self.moe_mesh, self.pp_group = moe_mesh, pp_group
        trace_dir = check_building(config, storage)
        self._life = Lifetime(
            config,
            ParallelRanks(dp_rank, tp_rank, pp_rank, pp_group),
            process_group,
            pp_group,
            list(addons) if addons is not None else default_addons(config.is_peft),
            storage or LocalStorage(),
            device_streams,
            absent_seconds,
            Reports(config.log_summary, callbacks, trace_dir, shows_progress=not config.is_async),
        )

    @property
    def last_save(self) -> CallRecord | None:
        """Times and bytes of the last save that is over, of a checkpoint or a component, as this rank saw it."""
        return self._life.reports.last_save

    @property
    def last_restore(self) -> CallRecord | None:
        """Times and bytes of the last load that is over: `restore`, `load_model` and the others."""
        return self._life.reports.last_restore

    @property
    def storage(self) -> Storage:
        """Where data is written to and read from, and names are made, looked at and renamed."""
        return self._life.storage

    @property
    def addons(self) -> list[CheckpointAddon]:
        """The hooks that write metadata around the weights, in this order; a new list applies from the next save on."""
        return self._life.addons

    @addons.setter
    def addons(self, addons: Sequence[CheckpointAddon]) -> None:
        self._life.addons = list(addons)

    # --- whole checkpoints ------------------------------------------------------------------------------------------

    @overload
    def save(
        self,
        epoch: int,
        step: int,
        model: Model,
        optimizer: Optimizers | None = None,
        scheduler: Schedulers | None = None,
        *,
        tokenizer: SavesPretrained | None = None,
        peft_config: object | None = None,
        metrics: Mapping[str, float] | None = None,
        extra_state: Mapping[str, object] | None = None,
        is_final_checkpoint: bool = False,
        ema: Model | None = None,
        dataloader: object | None = None,
    ) -> Path | None: ...

    @overload
    def save(
        self,
        *,
        step: int,
        model: Model,
        epoch: int | None = None,
        optimizer: Optimizers | None = None,
        scheduler: Schedulers | None = None,
        tokenizer: SavesPretrained | None = None,
        peft_config: object | None = None,
        metrics: Mapping[str, float] | None = None,
        extra_state: Mapping[str, object] | None = None,
        is_final_checkpoint: bool = False,
        ema: Model | None = None,
        dataloader: object | None = None,
    ) -> Path | None: ...

    @public_call
    def save(
        self,
        *positional: object,
        tokenizer: SavesPretrained | None = None,
        peft_config: object | None = None,
        metrics: Mapping[str, float] | None = None,
        extra_state: Mapping[str, object] | None = None,
        is_final_checkpoint: bool = False,
        ema: Model | None = None,
        dataloader: object | None = None,
        **named: object,
    ) -> Path | None:
        """Save one whole checkpoint ``epoch_E_step_S``, published atomically at its end. All ranks call.

        Args:
            epoch: Epoch, not negative. By default the one of the last `batches`, save or restore; 0 before any.
            step: Global step, not negative.
            model: The model, or this rank's pipeline stages.
            optimizer: One, or several.
            scheduler: One, or several.
            *positional: Those above, in this order.
            **named: Those above, by name.
            tokenizer: A tokenizer or processor to put beside the weights.
            peft_config: The adapter's configuration, for a model with LoRA modules of its own.
            metrics: Numbers to keep; ``config.best_metric_key`` among them decides the best checkpoint.
            extra_state: Name -> a ``Stateful`` object, a module, a random generator or plain values; see `restore`.
                DTensors in it, and modules, are saved as they are sharded.
            is_final_checkpoint: Whether this is the run's last save (``save_consolidated="final"`` exports it).
            ema: The moving average of the model: a module (torch's ``AveragedModel`` is looked into), or the averages
                of this rank's stages. It is saved in ``model_ema`` as the model is in ``model``: the same names, files,
                configuration and tokenizer, and an export where the model has one.
            dataloader: The loader whose position is saved: torchdata's ``StatefulDataLoader``, or any in `batches`.

        Returns:
            The checkpoint's directory (in asynchronous mode: where it will be), or ``None`` where checkpointing is
            disabled or the save was skipped by ``skip_save_while_busy``.

        Raises:
            CheckpointBusyError: Another checkpointer is saving this very checkpoint; the message names its process.
            CheckpointExistsError: This checkpoint is already published.
            MisuseError: An argument is missing, given twice, or not what it should be.
            ShardwiseError: What failed, on any rank; nothing that was published is touched. Also what failed in an
                earlier asynchronous save: this one is made all the same before that is raised, as the text says.

        Examples:
            >>> checkpointer.save(step=10, model=model, optimizer=optimizer).name
            'epoch_0_step_10'
            >>> checkpointer.save(1, 20, model, optimizer, metrics={"loss": 2.5}).name
            'epoch_1_step_20'
        """
        what, mistake = saving.WhatToSave.of(positional, named, self._life.order.epoch)
        rest = replace(
            what,
            tokenizer=tokenizer,
            peft_config=peft_config,
            metrics=metrics,
            extra_state=extra_state,
            is_final_checkpoint=is_final_checkpoint,
            ema=ema,
            dataloader=dataloader,
        )
        with self._life.reports.call("save") as told:
            return saving.save_checkpoint(self._life, rest, mistake, told)

    @public_call
    def restore(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        scheduler: Schedulers | None = None,
        *,
        restore_from: str | Path | int = "LATEST",
        extra_state: MutableMapping[str, object] | None = None,
        verify: VerifyLevel = "sizes",
        key_mapping: Mapping[str, str] | None = None,
        ema: Model | None = None,
        allow_new_parameters: bool = False,
        dataloader: object | None = None,
    ) -> RestoreRecord | None:
        """Resume from a checkpoint, in place. All ranks call.

        Everything is opened, matched and compared on all ranks before anything is overwritten: what does not fit, or is
        asked for and absent, is an error that leaves the run as it was. What the checkpoint has and was not asked for
        is named in a warning and in `RestoreRecord.unrestored`. Another kind of optimizer than the saved one is an
        error; to go on with another, restore without an optimizer and scheduler, and let them start afresh.

        Args:
            model: The model, or this rank's pipeline stages; its topology may differ from the one that saved.
            optimizer: The optimizer or optimizers, fresh or used.
            scheduler: The scheduler or schedulers.
            restore_from: ``LATEST``, another pointer's name, the name of a checkpoint directory, a path, or the number
                of a step.
            extra_state: The names that were saved: ``Stateful`` objects load their state, dicts are refilled, other
                values are replaced in this mapping. Objects load their state before model and optimizer do, since an
                object may refuse it.
            verify: ``sizes`` compares what is to be read with the manifest, in kind and size; ``digests`` also reads
                every byte of it first, shared between the ranks. A checkpoint without a manifest is restored with a
                warning.
            key_mapping: Regular expression -> replacement, applied to the checkpoint's names of the model's and the
                average's tensors and of the optimizer's parameters, in a DCP directory too; first match.
            ema: The average that `save` was given, to be filled in place; its topology may differ as well.
            allow_new_parameters: Parameters that the saved optimizer did not update, as of a layer unfrozen since, are
                no error: they start without optimizer state and are named in `RestoreRecord.fresh`.
            dataloader: The loader that `save` was given. Its position is restored exactly, or it is an error: where it
                was not saved, or was saved on another number of ranks. Iterate over `batches` afterwards.

        Returns:
            A record of the checkpoint, or ``None`` where there is nothing to resume (``LATEST`` of an empty root).

        Raises:
            CheckpointNotFoundError: What ``restore_from`` names does not exist; the message lists what does.
            MisuseError: Several checkpoints are of the step that ``restore_from`` is; the message lists them.
            IncompleteCheckpointError: It is an interrupted save.
            IntegrityError: A file or a tensor differs from what was saved; nothing was restored.
            AdapterError: With ``is_peft``, the model has no adapter, or one that no save could write.
            ShardwiseError: Checkpoint and run do not fit, or the checkpoint is damaged; nothing was restored. If a file
                could not be read although all fitted, the text says that the run's state is now partly overwritten.

        Examples:
            >>> checkpointer.restore(model, optimizer) is None  # nothing there yet
            True
            >>> path = checkpointer.save(step=10, model=model, optimizer=optimizer, metrics={"loss": 2.5})
            >>> resumed = checkpointer.restore(model, optimizer)
            >>> resumed.step, resumed.metrics
            (10, {'loss': 2.5})
        """
        changes = Changes(key_mapping, allow_new_parameters)
        extra_state = {} if extra_state is None else extra_state
        what = loading.WhatToRestore(
            model, optimizer, scheduler, restore_from, extra_state, verify, changes, ema, dataloader
        )
        with self._life.reports.call("restore") as told:
            return loading.restore_checkpoint(self._life, what, told)

    @public_call
    def checkpoints(self) -> tuple[CheckpointInfo, ...]:
        """The checkpoints in ``checkpoint_dir``, by epoch and step.

        A directory with a checkpoint's name that cannot be resumed from, as another tool leaves it when it is
        interrupted, is among them as not complete. What an interrupted save of this library left has another name.

        Any rank may call, alone or together with others, and sees what is on its file system at that moment; names and
        small files are read, and no tensors. An asynchronous save is among them once it is published (`async_wait`).

        Returns:
            For each its ``name``, ``epoch``, ``step``, ``complete`` (it may be resumed from), ``metrics`` and ``path``.

        Raises:
            StorageError: The directory cannot be read.

        Examples:
            >>> path = checkpointer.save(step=10, model=model)
            >>> [(info.step, info.complete) for info in checkpointer.checkpoints()]
            [(10, True)]
        """
        return list_checkpoints(self._life.root)

    @public_call
    def latest_step(self) -> int | None:
        """The step that `restore` would resume from. Any rank may call, as with `checkpoints`.

        Returns:
            ``None`` where there is nothing to resume from, or another tool's checkpoint does not record its step.

        Raises:
            CheckpointNotFoundError: ``LATEST`` leads nowhere, and there is no other checkpoint.
            StorageError: The directory cannot be read.
        """
        found = resolve(self._life.root)
        return None if found is None else found.step

    # --- components -------------------------------------------------------------------------------------------------

    @public_call
    def save_model(
        self,
        model: Model,
        weights_path: str | Path,
        peft_config: object | None = None,
        tokenizer: SavesPretrained | None = None,
        is_final_checkpoint: bool = False,
    ) -> None:
        """Write ``weights_path/model``; an earlier one is replaced as a whole. All ranks call."""
        saving.save_model(self._life, model, weights_path, peft_config, tokenizer, is_final_checkpoint)

    @public_call
    def load_model(
        self,
        model: Model,
        model_path: str | Path,
        is_init_step: bool = False,
        use_checkpoint_id: bool = True,
        key_mapping: Mapping[str, str] | None = None,
        allow_checkpoint_key_subset: bool = False,
    ) -> None:
        """Fill ``model`` in place. All ranks call.

        Args:
            model: The model, or this rank's pipeline stages, with memory (not on the meta device).
            model_path: A checkpoint's ``model`` directory, ``model/consolidated``, a DCP directory, any Hugging Face
                model directory, or a single safetensors file.
            is_init_step: Initialise from a base model: values are cast to the model's dtypes, quantized ones are
                dequantized (``dequantize_base_checkpoint``), tensors that the model lacks are left alone, adapters
                are too, and ``skip_task_head_prefixes_for_base_model`` applies. ``.bin`` files are read as well.
            use_checkpoint_id: Accepted for compatibility; the path is always opened by this library's own reader.
            key_mapping: Regular expression -> replacement, applied to the checkpoint's names; first match.
            allow_checkpoint_key_subset: Tensors that the checkpoint lacks keep their values.

        Examples:
            >>> checkpointer.save_model(model, "weights")
            >>> checkpointer.load_model(model, "weights/model")
        """
        loading.load_model(self._life, model, model_path, is_init_step, key_mapping, allow_checkpoint_key_subset)

    @public_call
    def save_optimizer(
        self, optimizer: Optimizers, model: Model, weights_path: str | Path, scheduler: Schedulers | None = None
    ) -> None:
        """Write ``weights_path/optim``; an earlier one is replaced as a whole. All ranks call."""
        saving.save_optimizer(self._life, optimizer, model, weights_path, scheduler)

    @public_call
    def load_optimizer(
        self,
        optimizer: Optimizers,
        model: Model,
        weights_path: str | Path,
        scheduler: Schedulers | None = None,
        *,
        key_mapping: Mapping[str, str] | None = None,
        allow_new_parameters: bool = False,
    ) -> None:
        """Restore what `save_optimizer` wrote, in place; the optimizer may be fresh. All ranks call.

        Args:
            optimizer: The optimizer or optimizers: torch's, and containers and wrappers of such.
            model: The model, or this rank's pipeline stages.
            weights_path: The directory around ``optim``, ours or DCP's, or a DCP directory, in any of torch's layouts.
            scheduler: The scheduler or schedulers.
            key_mapping: Regular expression -> replacement, applied to the saved names of parameters; first match.
            allow_new_parameters: Parameters that the saved optimizer did not update start without state; else an error.

        Examples:
            >>> checkpointer.save_optimizer(optimizer, model, "weights")
            >>> checkpointer.load_optimizer(optimizer, model, "weights")
        """
        changes = Changes(key_mapping, allow_new_parameters)
        loading.load_optimizer(self._life, optimizer, model, weights_path, scheduler, changes)

    @public_call
    def save_on_dp_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Write one file for each data-parallel rank, ``path/state_name/``, by its TP 0, PP 0 peer. All ranks call.

        Raises:
            MisuseError: Which data-parallel rank this is was neither given nor can be derived.
        """
        save_rank_state(self._life, state, state_name, path, by_dp=True)

    @public_call
    def load_on_dp_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Read what `save_on_dp_ranks` wrote for this data-parallel rank. All ranks call.

        Raises:
            MisuseError: As in `save_on_dp_ranks`.
            CheckpointNotFoundError: Nothing was saved for it.
        """
        load_rank_state(self._life, state, state_name, path, by_dp=True)

    @public_call
    def save_on_global_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Write one file for each process, ``path/state_name/``. All ranks call."""
        save_rank_state(self._life, state, state_name, path, by_dp=False)

    @public_call
    def load_on_global_ranks(self, state: Stateful, state_name: str, path: str | Path) -> None:
        """Read what `save_on_global_ranks` wrote for this process. All ranks call."""
        load_rank_state(self._life, state, state_name, path, by_dp=False)

    # --- base models ------------------------------------------------------------------------------------------------

    @staticmethod
    def initialize_model_weights(
        model: nn.Module, device: torch.device | str, peft_init_method: str | None = None
    ) -> None:
        """Give a meta-device model memory on ``device`` and fresh weights by its own code. All ranks call."""
        with undisturbed():
            base_model.initialize_model_weights(model, torch.device(device), peft_init_method)

    @public_call
    def load_base_model(
        self,
        model: Model,
        device: torch.device | str,
        root_dir: str | Path | None,
        model_name: str | None,
        load_base_model: bool = True,
    ) -> None:
        """Materialise ``model`` on ``device`` and load a base model into it, each rank its own slices. All ranks call.

        The model keeps its dtypes; `shardwise.base_dtype` gives the base's.

        Args:
            model: The model, or this rank's pipeline stages, usually on the meta device and already sharded.
            device: Where its memory is made.
            root_dir: The hub cache, or a directory that base models lie in; ``None`` for the hub's own cache.
            model_name: A hub id (``org/name`` or ``org/name@revision``), a directory, or a file.
            load_base_model: Whether to load; otherwise the model is only initialised.

        Raises:
            CheckpointNotFoundError: The base is not there.
            TensorError: Model and base do not fit.
            QuantizationError: The base is quantized in a way that cannot be undone.
            AdapterError: With ``is_peft``, the model has an adapter that no save could write.
        """
        loading.load_base_model(self._life, model, torch.device(device), root_dir, model_name, load_base_model)

    # --- random numbers and data ------------------------------------------------------------------------------------

    def batches(self, loader: Iterable[_Batch], epoch: int, *, name: str = "train") -> Iterator[_Batch]:
        """The batches of an epoch that the loop has not had yet. Each rank calls for itself.

        Of an epoch that was begun before the checkpoint was saved, in the run that `restore` has restored, the iterator
        is made with the random numbers of that epoch's start, the batches that the loop has had are skipped, and the
        generators are then set to what they were when the checkpoint was saved: order, workers' seeds and dropout are
        those of a run that was never stopped. Of any other epoch it is ``iter(loader)``. A loop that has taken a batch
        has had it: save after the step, not before.

        Skipping reads what it skips. A loader with ``state_dict`` (torchdata's ``StatefulDataLoader``) keeps its own
        position and skips nothing; pass it to `save` and `restore` as ``dataloader``. Positions are restored on the
        same number of ranks only; on another, `restore` names ``batches`` among what it left.

        Args:
            loader: A ``DataLoader``, or anything that can be iterated over anew in each epoch.
            epoch: Number of the epoch.
            name: Distinguishes the loaders where there are several.

        Returns:
            An iterator over what is left.

        Raises:
            MisuseError: The loader has fewer batches than the loop has had, or a position of its own that was not
                restored.

        Examples:
            >>> loader = torch.utils.data.DataLoader(range(4))
            >>> for step, batch in enumerate(checkpointer.batches(loader, epoch=0), start=1):
            ...     if step == 3:
            ...         path = checkpointer.save(step=step, model=model)
            ...         break
            >>> resumed = checkpointer.restore(model)
            >>> [batch.item() for batch in checkpointer.batches(loader, resumed.epoch)]
            [3]
        """
        return self._life.order.batches(loader, epoch, name)

    def resume_rng(self) -> None:
        """Set the random number generators once more to what `restore` has set them to. Each rank calls for itself.

        For loops without `batches`: call it in the middle of an epoch, when the iterator is there and the batches that
        the loop has had are skipped, right before the first step; random numbers drawn until then do not count.
        Only the first call after a `restore` does anything, so that it may stand in front of every step. Where the
        checkpoint was saved between two epochs leave it out: the run that goes on draws for its iterator as well.
        """
        self._life.order.set_generators()

    # --- preemption and background ----------------------------------------------------------------------------------

    @public_call
    def asked_to_stop(self, guard: PreemptionGuard) -> bool:
        """Whether any rank has been asked to leave, for every step boundary; see `PreemptionGuard`. All ranks call."""
        session = self._life.begin(call := "asked_to_stop()")

        def ask(asked: bool) -> bool:
            return any(check_same_call(call, lambda: "who is to leave", {}, session.group, asked))

        # From then on no save is skipped for one that is being written: the next one is the last.
        self._life.leaves = guard.should_save(ask) or self._life.leaves
        return self._life.leaves

    @public_call
    def allocate_staging(self, model: Model, optimizer: Optimizers | None = None) -> None:
        """Make the staging memory of asynchronous saves ahead of the first one. All ranks call.

        `restore` and `load_base_model` call it. An optimizer that has not taken a step has no state to
        make room for yet: call this after the first step to keep the first save as short as the later ones.
        """
        self._life.wait()  # a save that still writes reads that very memory
        session = self._life.begin(call := "allocate_staging()")
        check_same_call(call, lambda: self._life.looked(model, optimizer), {}, session.group)
        self._life.allocate_staging(model, optimizer)

    def maybe_wait_for_staging(self) -> None:
        """Return when the model's and the optimizer's memory may be overwritten by anybody, on any stream.

        A loop does not need to call it. On the CPU the state is copied before a save returns. On an accelerator, what
        this thread queues on a device's current stream after a save runs behind the copies, and so does any optimizer's
        ``step()`` on any stream. Call it before the state is changed in another way: by kernels or a captured graph on
        a stream that was not the current one, by another process that shares the memory, or by freeing memory that
        torch does not manage.
        """
        if self._life.background is not None:
            self._life.background.stager.wait()

    @public_call
    def async_wait(self) -> None:
        """Return when the last asynchronous save is durable and published; raises what failed in it. All ranks call."""
        self._life.wait()

    @public_call
    def finalize(self) -> None:
        """Wait for what is pending and release groups, threads and buffers. All ranks call; safe to call twice."""
        self._life.close()

    close = finalize

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish what is pending and release everything, also after an error.

        A save in the background needs no other rank's training loop, so that it is finished even where this rank alone
        has failed. Should it fail, that is raised, or after an error logged and noted with it.
        """
        try:
            self.finalize()
        except Exception as lost:
            if error is None or isinstance(error, SystemExit):
                raise
            _LOG.error("a save that was pending when %s was raised has failed: %s", type(error).__name__, lost)
            error.add_note(f"A save that was still being written has failed too: {lost}")
