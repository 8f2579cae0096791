"""The engine's front: save and restore of whole checkpoints; their components are `ComponentCheckpointer`'s."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, MutableMapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from shardwise._version import __version__
from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.adapters import check_before_training
from shardwise.checkpointing.arguments import (
    check_arguments,
    check_mapping,
    check_same_call,
    whole_number,
)
from shardwise.checkpointing.commits import Publication, RunLine, check_metrics, warn_of_metrics
from shardwise.checkpointing.components import ComponentCheckpointer, Model
from shardwise.checkpointing.hooks import passed_addons
from shardwise.checkpointing.inference import outside_inference_mode
from shardwise.checkpointing.optimizers import Optimizers, OptimizerSave, Schedulers, as_list, open_optimizer, several
from shardwise.checkpointing.records import RestoreRecord
from shardwise.checkpointing.restoring import overwriting, undone_on_failure
from shardwise.checkpointing.wholes import below, capture_extras, find_extras, locate, unrestored
from shardwise.comm import JsonValue
from shardwise.engine.jobs import SaveJob
from shardwise.engine.near_names import listed
from shardwise.engine.verify import VerifyLevel
from shardwise.engine.verify_together import check_checkpoint
from shardwise.errors import StorageError
from shardwise.lifecycle import (
    PreemptionGuard,
    checkpoint_name,
    remove_leftovers,
    reserve,
    temporary_name,
)

_LOG = logging.getLogger(__name__)


class Checkpointer(ComponentCheckpointer):
    """Saves and restores training runs. Build it with `CheckpointingConfig.build`.

    Every method is called by all ranks of the group together, in the same order. A failure on one rank is raised on
    all of them as the same error.

    Args:
        config: Settings.
        dp_rank: Data-parallel rank.
        tp_rank: Tensor-parallel rank.
        pp_rank: Pipeline rank.
        moe_mesh: The mesh of expert parallelism, where there is one. Sharding is read from the tensors themselves, so
            it is only kept.
        process_group: The ranks that save together: all that hold a part of the model. Default: all ranks.
        pp_group: The ranks of this pipeline, kept for addons.
        addons: Hooks around the writing of a model, instead of the default ones (`ConsolidatedHFAddon`, or `PeftAddon`
            with ``is_peft``).
        storage: Where tensor data is written to and read from; the mounted file systems by default.
        file_system: Where names are made and renamed; likewise.
        device_streams: How copies from accelerators are ordered among their other work, in asynchronous mode; torch's
            own streams by default.

    Raises:
        ConfigError: ``checkpoint_dir`` is a URL, and nothing was passed that reaches it; or ``torch_save`` is to write
            an export with every save.
    """

    # Whether what interrupted saves left has been removed.
    _tidied = False

    @cached_property
    def _line(self) -> RunLine:
        return RunLine()

    @outside_inference_mode
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
    ) -> Path | None:
        """Save one whole checkpoint ``epoch_E_step_S``, published atomically at its end. All ranks call.

        Args:
            epoch: Epoch, not negative.
            step: Global step, not negative.
            model: The model, or this rank's pipeline stages.
            optimizer: One, or several.
            scheduler: One, or several.
            tokenizer: A tokenizer or processor to put beside the weights.
            peft_config: The adapter's configuration, for a model with LoRA modules of its own.
            metrics: Numbers to keep; ``config.best_metric_key`` among them decides the best checkpoint.
            extra_state: Name -> a ``Stateful`` object or plain values; see `restore`.
            is_final_checkpoint: Whether this is the run's last save (``save_consolidated="final"`` exports it).

        Returns:
            The checkpoint's directory (in asynchronous mode: where it will be), or ``None`` where checkpointing is
            disabled or the save was skipped by ``skip_save_while_busy``.

        Raises:
            CheckpointExistsError: This checkpoint is already published.
            ShardwiseError: What failed, on any rank; nothing that was published is touched.
        """
        context = self._context
        if not self.config.enabled or self._skip():
            return None
        steers = optimizer is not None or bool(as_list(scheduler))
        numbers: dict[str, float] = {}

        def look() -> str:
            nonlocal numbers, epoch, step
            check_arguments(model, optimizer, scheduler)
            self._looked(model, saves=True)
            check_mapping("metrics", metrics)
            check_mapping("extra_state", extra_state)
            epoch, step = whole_number(epoch), whole_number(step)
            numbers = check_metrics(metrics)
            return checkpoint_name(epoch, step)

        given = {"an optimizer or scheduler": steers, "is_final_checkpoint=True": is_final_checkpoint}
        check_same_call(look, given | passed_addons(self.addons), context.group)
        if context.group.is_main:
            warn_of_metrics(numbers, self.config)
        name = checkpoint_name(epoch, step)
        temp, final = context.root / temporary_name(name), context.root / name
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
            if steers:
                saving = OptimizerSave(context, optimizer or [], model, scheduler, temp / "optim")
                steps += below("optim", saving.steps())
            steps += capture_extras(context, temp, extra_state or {})
        except BaseException:
            publication.abandon(context.group)
            raise
        commit = partial(publication.commit, closing=save.closing)
        self._run(SaveJob(f"saving {final}", tuple(steps), commit, publication.abandon))
        return final

    @outside_inference_mode
    def restore(
        self,
        model: Model,
        optimizer: Optimizers | None = None,
        scheduler: Schedulers | None = None,
        *,
        restore_from: str | Path = "LATEST",
        extra_state: MutableMapping[str, object] | None = None,
        verify: VerifyLevel = "sizes",
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
            restore_from: ``LATEST``, another pointer's name, the name of a checkpoint directory, or a path.
            extra_state: The names that were saved: ``Stateful`` objects take their state in, dicts are refilled, other
                values are replaced in this mapping. Objects take their state in before model and optimizer have
                theirs, since an object may refuse it.
            verify: ``sizes`` compares what is to be read with the manifest, in kind and size; ``digests`` also reads
                every byte of it first, shared between the ranks. A checkpoint without a manifest is restored with a
                warning.

        Returns:
            What was resumed, or ``None`` where there is nothing to resume (``LATEST`` of an empty root).

        Raises:
            CheckpointNotFoundError: What ``restore_from`` names does not exist.
            IncompleteCheckpointError: It is an interrupted save.
            IntegrityError: A file or a tensor differs from what was saved; nothing was restored.
            AdapterError: With ``is_peft``, the model has no adapter, or one that no save could write.
            ShardwiseError: Checkpoint and run do not fit, or the checkpoint is damaged; nothing was restored. If a file
                could not be read although all fitted, the text says that the run's state is now partly overwritten.
        """
        context = self._context
        self.async_wait()
        steers = optimizer is not None or bool(as_list(scheduler))
        given = {"an optimizer or scheduler": steers, "verify='digests'": verify == "digests"}

        def look() -> str:
            check_mapping("extra_state", extra_state)
            return self._looked(model, optimizer, scheduler, "checkpoint")

        check_same_call(look, given, context.group)
        if self.config.enabled:
            context.base_path()  # a base that the saves to come would not find is an error now, not after an hour
            if self.config.is_peft:
                check_before_training(context, model, is_adapted=True)
        record = locate(context, restore_from)
        if record is None:
            self.allocate_staging(model, optimizer)
            return None
        path = record.path
        # As in a save, a rank may have a state that others have not.
        extras = context.group.any(bool(extra_state), "comparing what is to be restored")
        wanted = {"model": True, "optim": steers, "extra": extras, "rng": self.config.save_rng}
        components = [name for name, is_wanted in wanted.items() if is_wanted]
        check_checkpoint(path, verify, context.group, self._storage, components=components, threads=context.threads)
        # Everything that can be refused comes before the first byte that is overwritten.
        opened = self._open_model(model, path / "model")
        steering = open_optimizer(context, optimizer or [], model, scheduler, path / "optim") if steers else None
        found = find_extras(context, path, extra_state if extra_state is not None else {})
        taken = ["optimizer"] * bool(several(optimizer)) + ["scheduler"] * bool(as_list(scheduler))
        taken += [*(extra_state or ()), *found.generators.values]
        partly = [f"optimizer state of {listed(steering.unwanted)}"] if steering and steering.unwanted else []
        left = unrestored(context, path, found, taken, partly)
        with undone_on_failure() as undos, context.group.together("taking in options, schedulers and extra state"):
            if steering is not None:
                steering.take_in(undos)
            found.extra.take_in(undos)
        with overwriting("the run's state"):
            opened.fill()
            if steering is not None:
                steering.fill()
            with context.group.together("setting the random number generators"):
                found.set_generators()
        self.allocate_staging(model, optimizer)
        self._line.origin, self._line.restored = path, True
        return replace(record, unrestored=left)

    # --- preemption -------------------------------------------------------------------------------------------------

    @outside_inference_mode
    def asked_to_stop(self, guard: PreemptionGuard) -> bool:
        """Whether any rank has been asked to leave; call at every step boundary. All ranks call.

        with PreemptionGuard() as guard:
            for step, batch in enumerate(loader):
                train_step(batch)
                if checkpointer.asked_to_stop(guard):
                    checkpointer.save(epoch, step, model, optimizer)
                    checkpointer.finalize()
                    break
        """
        return guard.should_save(lambda asked: self._context.group.any(asked, "asking who is to leave"))

    # --- inside -----------------------------------------------------------------------------------------------------

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
                remove_leftovers(self._context.root, fs=self._fs)
            except StorageError as error:
                # Space that is not freed. Should this save lack it, or want that very name, it says so itself.
                _LOG.warning("what an interrupted save left could not be removed: %s", error)
        reserve(self._context.root, name, self._line.left_from, fs=self._fs)
        self._tidied = True
