"""The engine's front: save and restore of whole checkpoints; their components are `ComponentCheckpointer`'s."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar, overload

from shardwise._version import __version__
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.arguments import (
    check_arguments,
    check_mapping,
)
from shardwise.checkpointing.averages import MODEL_EMA, Average, FoundAveraging
from shardwise.checkpointing.calls import check_same_call
from shardwise.checkpointing.components import ComponentCheckpointer, Model
from shardwise.checkpointing.inference import outside_inference_mode
from shardwise.checkpointing.loading.foreign_optimizers import Changes
from shardwise.checkpointing.loading.models import OpenedModel
from shardwise.checkpointing.loading.restoring import overwriting, undone_on_failure
from shardwise.checkpointing.optimizers import (
    OpenedOptimizer,
    Optimizers,
    OptimizerSave,
    Schedulers,
    as_list,
    open_optimizer,
    several,
)
from shardwise.checkpointing.records import RestoreRecord
from shardwise.checkpointing.run_state.data_order import DataOrder
from shardwise.checkpointing.run_state.wholes import (
    FoundExtras,
    below,
    capture_extras,
    find_extras,
    locate,
    model_place,
    unrestored,
)
from shardwise.checkpointing.saving.adapters import OpenedAdapter, check_before_training
from shardwise.checkpointing.saving.commits import Publication, RunLine, check_metrics, warn_of_metrics
from shardwise.checkpointing.saving.hooks import passed_addons
from shardwise.checkpointing.saving.request import WhatToSave
from shardwise.comm import Group, JsonValue
from shardwise.engine.jobs import SaveJob, Step
from shardwise.engine.near_names import listed
from shardwise.engine.verify import VerifyLevel
from shardwise.engine.verify_together import check_checkpoint
from shardwise.errors import StorageError
from shardwise.lifecycle import (
    CheckpointInfo,
    PreemptionGuard,
    Start,
    checkpoint_name,
    latest_step,
    list_checkpoints,
    remove_leftovers,
    reserve,
    temporary_name,
)

_LOG = logging.getLogger(__name__)
_Batch = TypeVar("_Batch")


@dataclass(frozen=True, slots=True)
class _Opened:
    """Everything of a run that fits a checkpoint, on every rank; nothing of it has been changed.

    Attributes:
        model: The model, or its adapters.
        averaged: The average, with what it has beside tensors.
        steering: Optimizers and schedulers.
        extras: Extra state and generators.
    """

    model: OpenedModel | OpenedAdapter
    averaged: tuple[OpenedModel | OpenedAdapter, FoundAveraging] | None
    steering: OpenedOptimizer | None
    extras: FoundExtras

    def restore(self, group: Group, order: DataOrder) -> None:
        """Put everything back. All ranks call.

        What has code of its own comes first, since it may refuse: then every rank puts back what it had. From then on
        only reading can fail, and the error says what it leaves.
        """
        if self.steering is not None:
            self.steering.read_aside()
        with undone_on_failure() as undos, group.together("taking in options, schedulers and extra state"):
            if self.steering is not None:
                self.steering.take_in(undos)
            self.extras.extra.take_in(undos)
            if self.averaged is not None:
                self.averaged[1].take_in(undos)
        with overwriting("the run's state"):
            self.model.fill()
            if self.averaged is not None:
                self.averaged[0].fill()
            if self.steering is not None:
                self.steering.fill()
            self.extras.spread.fill(group)
            with group.together("setting the random number generators"):
                self.extras.set_generators(order)


class Checkpointer(ComponentCheckpointer):
    """Saves and restores training runs. Build it with `CheckpointingConfig.build`.

    Every method is called by all ranks of the group together, in the same order. A failure on one rank is raised on
    all of them as the same error.

    Args:
        config: Settings.
        dp_rank: Data-parallel rank; derived where it is not given, as `CheckpointingConfig.build` says.
        tp_rank: Tensor-parallel rank; likewise.
        pp_rank: Pipeline rank; likewise.
        moe_mesh: The mesh of expert parallelism, where there is one. Sharding is read from the tensors themselves, so
            it is only kept.
        process_group: The ranks that save together: all that hold a part of the model. Default: all ranks.
        pp_group: The ranks of this pipeline, in the order of the stages; addons are given it.
        addons: Hooks around the writing of a model, instead of the default ones (`ConsolidatedHFAddon`, or `PeftAddon`
            with ``is_peft``).
        storage: Where tensor data is written to and read from; the mounted file systems by default.
        file_system: Where names are made and renamed; likewise.
        device_streams: How copies from accelerators are ordered among their other work, in asynchronous mode; torch's
            own streams by default.
        absent_seconds: When some ranks have waited so long for others to make the same call, one warning names those
            that have not come.

    Raises:
        ConfigError: ``checkpoint_dir`` is a URL, and nothing was passed that reaches it; or ``torch_save`` is to write
            an export with every save.
    """

    # Whether what interrupted saves left has been removed.
    _tidied = False

    @cached_property
    def _order(self) -> DataOrder:
        return DataOrder()

    @cached_property
    def _line(self) -> RunLine:
        return RunLine()

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
    ) -> Path | None: ...

    @outside_inference_mode
    def save(
        self,
        *positional: object,
        tokenizer: SavesPretrained | None = None,
        peft_config: object | None = None,
        metrics: Mapping[str, float] | None = None,
        extra_state: Mapping[str, object] | None = None,
        is_final_checkpoint: bool = False,
        ema: Model | None = None,
        **named: object,
    ) -> Path | None:
        """Save one whole checkpoint ``epoch_E_step_S``, published atomically at its end. All ranks call.

        checkpointer.save(step=step, model=model, optimizer=optimizer)
        checkpointer.save(epoch, step, model, optimizer)

        Args:
            epoch: Epoch, not negative. Left out, it is the one that `batches` was called with last, or that the last
                save or restore was of, whichever came later; 0 where there was none.
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

        Returns:
            The checkpoint's directory (in asynchronous mode: where it will be), or ``None`` where checkpointing is
            disabled or the save was skipped by ``skip_save_while_busy``.

        Raises:
            CheckpointBusyError: Another checkpointer is saving this very checkpoint; the message names its process.
            CheckpointExistsError: This checkpoint is already published.
            MisuseError: An argument is missing, given twice, or not what it should be.
            ShardwiseError: What failed, on any rank; nothing that was published is touched. Also what failed in an
                earlier asynchronous save: this one is made all the same before that is raised, as the text says.
        """
        what, mistake = WhatToSave.of(positional, named, self._order.epoch)
        model, optimizer, scheduler = what.model, what.optimizer, what.scheduler
        context = self._begin(call := f"save(epoch {what.epoch}, step {what.step})")
        if not self.config.enabled:
            return None
        self._ends = self._ends or is_final_checkpoint
        steers = optimizer is not None or bool(as_list(scheduler))
        numbers: dict[str, float] = {}

        def look() -> str:
            nonlocal numbers
            if mistake is not None:
                raise mistake
            check_arguments(model, optimizer, scheduler)
            self._looked(model, saves=True)
            check_mapping("metrics", metrics)
            check_mapping("extra_state", extra_state)
            if ema is not None:
                self._looked(ema, saves=True, is_run=False)
            numbers = check_metrics(metrics)
            return checkpoint_name(what.epoch, what.step)

        given = {"an optimizer or scheduler": steers, "is_final_checkpoint=True": is_final_checkpoint}
        given["an ema"] = ema is not None
        turn = self._turn(call, look, given | passed_addons(self.addons))
        epoch, step = self._order.epoch, _ = what.epoch, what.step
        if turn.skipped:
            return None
        if context.group.is_main:
            warn_of_metrics(numbers, self.config)
        name = checkpoint_name(epoch, step)
        temp, final = context.root / temporary_name(name), context.root / name
        with turn.telling(name, self.async_wait):
            publication = self._publication(temp, final, epoch, step, numbers)
            make_room = partial(self._reserve, name)
            try:
                save = self._model_save(
                    model,
                    temp / "model",
                    tokenizer,
                    peft_config,
                    is_final_checkpoint,
                    publication.reserved(make_room),
                    optimizer,
                )
                steps = below("model", save.steps())
                closing = [*save.closing]
                if ema is not None:
                    own, theirs = self._ema_steps(ema, temp / MODEL_EMA, tokenizer, peft_config, is_final_checkpoint)
                    steps, closing = steps + own, closing + theirs
                if steers:
                    chosen = [] if optimizer is None else optimizer
                    steps += below("optim", OptimizerSave(context, chosen, model, scheduler, temp / "optim").steps())
                steps += capture_extras(context, temp, extra_state or {}, self._order)
            except BaseException:
                publication.abandon(context.group)
                raise
            commit = partial(publication.commit, closing=closing)
            self._run(SaveJob(f"saving {final}", tuple(steps), commit, publication.abandon))
        return final

    @outside_inference_mode
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
            extra_state: The names that were saved: ``Stateful`` objects take their state in, dicts are refilled, other
                values are replaced in this mapping. Objects take their state in before model and optimizer have
                theirs, since an object may refuse it.
            verify: ``sizes`` compares what is to be read with the manifest, in kind and size; ``digests`` also reads
                every byte of it first, shared between the ranks. A checkpoint without a manifest is restored with a
                warning.
            key_mapping: Regular expression -> replacement, applied to the checkpoint's names of the model's tensors and
                of the optimizer's parameters, in a DCP directory too; first match.
            ema: The average that `save` was given, to be filled in place; its topology may differ as well.
            allow_new_parameters: Parameters that the saved optimizer did not update, as of a layer that was unfrozen
                since, start without optimizer state and are named in `RestoreRecord.fresh`; otherwise they are an
                error.

        Returns:
            What was resumed, or ``None`` where there is nothing to resume (``LATEST`` of an empty root).

        Raises:
            CheckpointNotFoundError: What ``restore_from`` names does not exist; the message lists what does.
            MisuseError: Several checkpoints are of the step that ``restore_from`` is; the message lists them.
            IncompleteCheckpointError: It is an interrupted save.
            IntegrityError: A file or a tensor differs from what was saved; nothing was restored.
            AdapterError: With ``is_peft``, the model has no adapter, or one that no save could write.
            ShardwiseError: Checkpoint and run do not fit, or the checkpoint is damaged; nothing was restored. If a file
                could not be read although all fitted, the text says that the run's state is now partly overwritten.
        """
        context = self._begin(call := f"restore({restore_from})")
        self.async_wait()
        steers = optimizer is not None or bool(as_list(scheduler))
        given = {
            "an optimizer or scheduler": steers,
            "verify='digests'": verify == "digests",
            f"key_mapping={key_mapping}": bool(key_mapping),
            "an ema": ema is not None,
            "allow_new_parameters=True": allow_new_parameters,
        }

        def look() -> str:
            check_mapping("extra_state", extra_state)
            check_mapping("key_mapping", key_mapping)
            if ema is not None:
                self._looked(ema, is_run=False)
            return self._looked(model, optimizer, scheduler, "checkpoint")

        check_same_call(call, look, given, context.group)
        if self.config.enabled:
            context.base_path()  # a base that the saves to come would not find is an error now, not after an hour
            if self.config.is_peft:
                check_before_training(context, model, is_adapted=True)
        starts: list[Start] = []
        record = locate(context, restore_from, starts.append)
        if record is None:
            self._allocate_staging(model, optimizer)
            return None
        path = record.path
        # As in a save, a rank may have a state that others have not.
        extras = context.group.any(bool(extra_state), "comparing what is to be restored")
        wanted = {"model": True, "optim": steers, "extra": extras, "rng": self.config.save_rng}
        wanted[MODEL_EMA] = ema is not None
        components = [name for name, is_wanted in wanted.items() if is_wanted]
        check_checkpoint(path, verify, context.group, self._storage, components=components, threads=context.threads)
        # Everything that can be refused comes before the first byte that is overwritten.
        opened = self._open_model(model, model_place(path, context.group), key_mapping)
        averaged = self._open_ema(ema, path / MODEL_EMA) if ema is not None else None
        steering: OpenedOptimizer | None = None
        if steers:
            changes = Changes(key_mapping, allow_new_parameters)
            chosen = [] if optimizer is None else optimizer
            steering = open_optimizer(context, chosen, model, scheduler, path / "optim", changes)
        found = find_extras(context, path, extra_state if extra_state is not None else {})
        taken = ["optimizer"] * bool(several(optimizer)) + ["scheduler"] * bool(as_list(scheduler))
        taken += ["ema"] * (ema is not None)
        taken += [*(extra_state or ()), *found.generators.values]
        partly = [f"optimizer state of {listed(steering.unwanted)}"] if steering and steering.unwanted else []
        below_name = opened.direct.source.below if isinstance(opened, OpenedModel) else None
        left = unrestored(context, path, found, taken, partly, below_name)
        _Opened(opened, averaged, steering, found).restore(context.group, self._order)
        self._allocate_staging(model, optimizer)
        self._line.start, self._line.restored = next(iter(starts), None), True
        if record.epoch is not None:
            self._order.epoch = record.epoch
        return replace(record, unrestored=left, fresh=tuple(steering.plan.fresh) if steering is not None else ())

    # --- what there is ----------------------------------------------------------------------------------------------

    def checkpoints(self) -> tuple[CheckpointInfo, ...]:
        """The checkpoints in ``checkpoint_dir``, by epoch and step, interrupted ones included.

        Any rank may call, alone or together with others, and sees what is on its file system at that moment; names and
        small files are read, and no tensors. An asynchronous save is among them once it is published (`async_wait`).

        Returns:
            For each its ``name``, ``epoch``, ``step``, ``complete`` (it may be resumed from), ``metrics`` and ``path``.

        Raises:
            StorageError: The directory cannot be read.
        """
        return list_checkpoints(self._root)

    def latest_step(self) -> int | None:
        """The step that `restore` would resume from. Any rank may call, as with `checkpoints`.

        Returns:
            ``None`` where there is nothing to resume from, or another tool's checkpoint does not tell its step.

        Raises:
            CheckpointNotFoundError: ``LATEST`` leads nowhere, and there is no other checkpoint.
            StorageError: The directory cannot be read.
        """
        return latest_step(self._root)

    # --- random numbers and data ------------------------------------------------------------------------------------

    def batches(self, loader: Iterable[_Batch], epoch: int, *, name: str = "train") -> Iterator[_Batch]:
        """The batches of an epoch that the loop has not had yet. Each rank calls for itself.

        for epoch in range(resumed.epoch if resumed else 0, epochs):
            for batch in checkpointer.batches(loader, epoch):
                train_step(batch)
                checkpointer.save(step=step, model=model, optimizer=optimizer)

        Of an epoch that was begun before the checkpoint was saved, in the run that `restore` has restored, the iterator
        is made with the random numbers of that epoch's start, the batches that the loop has had are skipped, and the
        generators are then set to what they were when the checkpoint was saved: order, workers' seeds and dropout are
        those of a run that was never stopped. Of any other epoch it is ``iter(loader)``. A loop that has taken a batch
        has had it: save after the step, not before.

        Skipping reads what it skips. A loader with ``state_dict`` (torchdata's ``StatefulDataLoader``) keeps its own
        position and skips nothing; pass it in ``extra_state`` as well. Positions are restored on the same number of
        ranks only; on another, `restore` names ``batches`` among what it left.

        Args:
            loader: A ``DataLoader``, or anything that can be iterated over anew in each epoch.
            epoch: Number of the epoch.
            name: Tells the loaders apart where there are several.

        Returns:
            An iterator over what is left.

        Raises:
            MisuseError: The loader has fewer batches than the loop has had, or a position of its own that was not
                restored.
        """
        return self._order.batches(loader, epoch, name)

    def resume_rng(self) -> None:
        """Set the random number generators once more to what `restore` has set them to. Each rank calls for itself.

        For loops without `batches`: call it in the middle of an epoch, when the iterator is there and the batches that
        the loop has had are skipped, right before the first step. What making the iterator has drawn is then forgotten.
        Only the first call after a `restore` does anything, so that it may stand in front of every step. Where the
        checkpoint was saved between two epochs leave it out: the run that goes on draws for its iterator as well.
        """
        self._order.set_generators()

    # --- preemption -------------------------------------------------------------------------------------------------

    @outside_inference_mode
    def asked_to_stop(self, guard: PreemptionGuard) -> bool:
        """Whether any rank has been asked to leave; call at every step boundary. All ranks call.

        with PreemptionGuard() as guard:
            for step, batch in enumerate(loader):
                train_step(batch)
                if checkpointer.asked_to_stop(guard):
                    checkpointer.save(step=step, model=model, optimizer=optimizer)
                    checkpointer.finalize()
                    break
        """
        context = self._begin(call := "asked_to_stop()")

        def ask(asked: bool) -> bool:
            return any(check_same_call(call, lambda: "who is to leave", {}, context.group, asked))

        # From then on no save is skipped for one that is being written: the next one is the last.
        self._leaves = guard.should_save(ask) or self._leaves
        return self._leaves

    # --- inside -----------------------------------------------------------------------------------------------------

    def _ema_steps(
        self, ema: Model, directory: Path, tokenizer: SavesPretrained | None, peft_config: object | None, is_final: bool
    ) -> tuple[list[Step], list[Callable[[Group], None]]]:
        """Capture the average; what is left to do, and with what it ends. All ranks call."""
        context = self._context
        average: Average | None = None
        beside: list[Step] = []
        with context.group.together("looking at the averaged model"):
            average = Average.of(ema)
            beside = average.capture(directory, context.storage)
        assert average is not None
        further = context.further(MODEL_EMA)
        saving = self._model_save(
            average.model, directory, tokenizer, peft_config, is_final, lambda: None, context=further
        )
        return below(MODEL_EMA, [*saving.steps(), *beside], MODEL_EMA), list(saving.closing)

    def _open_ema(self, ema: Model, directory: Path) -> tuple[OpenedModel | OpenedAdapter, FoundAveraging]:
        """Compare an average with a checkpoint's. All ranks call; nothing is changed."""
        context = self._context
        average: Average | None = None
        found: FoundAveraging | None = None
        with context.group.together("looking at the averaged model"):
            average = Average.of(ema)
            found = average.find(directory)
        assert average is not None
        assert found is not None
        return self._open_model(average.model, directory, context=context.further(MODEL_EMA)), found

    def _publication(self, temp: Path, final: Path, epoch: int, step: int, metrics: Mapping[str, float]) -> Publication:
        context = self._context
        info: dict[str, JsonValue] = {
            "shardwise": __version__,
            "epoch": epoch,
            "step": step,
            "world_size": context.group.world_size,
            "metrics": {key: value if math.isfinite(value) else None for key, value in metrics.items()},
        }
        return Publication(context, temp, final, info, metrics, self._line)

    def _reserve(self, name: str) -> None:
        """Make the directory of a checkpoint to be; once also remove what interrupted saves left. Rank 0 calls."""
        if not self._tidied:
            try:
                active = [self._context.root / temporary_name(name)]  # whose claim is this very save's
                remove_leftovers(self._context.root, active=active, fs=self._fs)
            except StorageError as error:
                # Space that is not freed. Should this save lack it, or want that very name, it says so itself.
                _LOG.warning("what an interrupted save left could not be removed: %s", error)
        reserve(self._context.root, name, self._line.left_from, fs=self._fs)
        self._tidied = True
