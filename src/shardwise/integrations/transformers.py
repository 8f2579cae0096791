"""transformers' ``Trainer``, and trainers that are made of it (TRL's), with checkpoints by shardwise.

    trainer = ShardwiseTrainer(model=model, args=args, train_dataset=dataset)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(args.output_dir))

    class CheckpointedSFTTrainer(SFTTrainer, ShardwiseTrainer): ...

What the Trainer decides stays with it: when to save, which checkpoint is the best, how many are kept, where the data
goes on. What is written, and how, is `shardwise.Checkpointer`'s: one checkpoint of everything, in ``output_dir``.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, Unpack, cast

from transformers.trainer_callback import ExportableState
from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from shardwise.addons import SaveHookArgs
from shardwise.addons.base import SavesPretrained
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.errors import CheckpointNotFoundError, ConfigError, MisuseError, some
from shardwise.integrations.hosts import Pass, refuse_derived, refuse_ways, write_pretrained
from shardwise.lifecycle import LATEST, checkpoint_name, list_checkpoints, resolve
from shardwise.peft.models import is_peft_adapted
from shardwise.upstream.transformers_trainer import REPLACED, UNUSED, TrainerCheckpoints

if TYPE_CHECKING:
    import os

    import torch
    from transformers import TrainingArguments

    from shardwise.checkpointing import Checkpointer

__all__ = ["ShardwiseTrainer", "get_last_checkpoint"]

_LOG = logging.getLogger(__name__)
#: The metric by which the Trainer's choice of the best checkpoint reaches retention, also among equals.
_NEW_BEST = "new_best_at_step"
#: The Trainer's own record of the run, which its `train` reads out of a checkpoint.
_STATE_NAME = "trainer_state.json"
#: Settings that follow from the Trainer's arguments, and from which.
_DERIVED = {
    "checkpoint_dir": "output_dir",
    "enabled": "save_strategy",
    "max_recent_checkpoints": "save_total_limit",
    "keep_best": "metric_for_best_model and save_total_limit",
    "best_metric_key": "metric_for_best_model",
    "best_metric_mode": "greater_is_better",
}
_SHARDING = "Shard with FSDP2 (fsdp=True), or train with DistributedDataParallel."
_TRAINERS_OWN = re.compile(r"checkpoint-\d+")


class ShardwiseTrainer(TrainerCheckpoints):
    """A ``transformers.Trainer`` that saves and resumes with shardwise. All ranks construct it and call its methods.

    Its arguments are those of ``Trainer``, and `checkpointing`. A trainer that is itself made of ``Trainer`` comes
    first among the bases: ``class CheckpointedSFTTrainer(SFTTrainer, ShardwiseTrainer)``; settings are then a class
    attribute, since such a trainer does not pass on arguments that it does not know.

    A checkpoint is ``output_dir/epoch_E_step_S``: model, optimizer, scheduler, gradient scaler, random number
    generators, the position in the data, the Trainer's and its callbacks' state (``trainer_state.json``), tokenizer or
    processor. It is visible once it is complete, and resumes on any number of ranks.

    Attributes:
        checkpointing: The settings beside those that follow from ``TrainingArguments``. By default each checkpoint has
            a Hugging Face export (``model/consolidated``).
        replay_batches: Whether a run that is resumed in the middle of an epoch makes the batches again that it has had:
            what is drawn while batches are made (masking, augmentation) is then that of the run that was never
            stopped. ``False`` skips them by their number, as the ``Trainer`` itself does: faster, and as exact where
            making a batch draws no random numbers.

    Raises:
        ConfigError: The arguments ask for what cannot be saved, or would be without effect; the message names it.
    """

    checkpointing: CheckpointingConfig = CheckpointingConfig(save_consolidated=SaveConsolidatedMode.EVERY)
    replay_batches: bool = True

    def __init__(
        self,
        model: torch.nn.Module | None = None,
        args: TrainingArguments | None = None,
        *others: object,
        checkpointing: CheckpointingConfig | None = None,
        **named: object,
    ) -> None:
        _check_class(type(self))
        _check_arguments(args)
        super().__init__(model, args, *others, **named)
        if checkpointing is not None:
            self.checkpointing = checkpointing
        self._checkpointer: Checkpointer | None = None
        self.current_epoch = 0
        self._batches: Iterator[object] | None = None
        self.is_replayable = False
        self._resumed = _Position()
        _check_strategy(self)
        _check_settings(self.checkpointing, self)
        self._built(self.checkpointing).close()  # refuses what no checkpointer can be built of

    # --- training ---------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: object = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> object:
        """Train; returns when the last checkpoint is durable, also in asynchronous mode. All ranks call.

        ``resume_from_checkpoint`` is ``True`` for the newest checkpoint in ``output_dir``; a checkpoint's path, or its
        or a pointer's name in ``output_dir``; ``None`` or ``False`` to begin afresh. The rest is as in ``Trainer``, but
        for ``trial``, which is not supported.

        Raises:
            CheckpointNotFoundError: There is nothing to resume from.
            MisuseError: The checkpoint was saved by another trainer; or training is to begin afresh in a directory that
                has checkpoints.
            ShardwiseError: What failed in saving or restoring, on any rank.
        """
        if trial is not None:
            self.hyperparameter_search()
        group = Group.current()
        found = group.broadcast_result(lambda: _find_source(self.args, resume_from_checkpoint), "finding checkpoints")
        self._resumed = _Position()
        try:
            with self._built(self.checkpointing) as self._checkpointer:
                self._checkpointer.addons = [*self._checkpointer.addons, _TrainerState(self)]
                return super().train(resume_from_checkpoint=found, ignore_keys_for_eval=ignore_keys_for_eval)
        finally:
            self._checkpointer = self._batches = None

    def begin_epoch(self, epoch: int, is_begun: bool) -> None:
        """Decide how the epoch's batches are made."""
        resumed = self._resumed
        self.current_epoch, self._batches = epoch, None
        is_known = resumed.is_replayable and resumed.epoch == epoch and resumed.has_batches_of(_Position.of(self))
        self.is_replayable = (
            self.replay_batches
            and self.checkpointing.save_rng
            and not self.args.ignore_data_skip
            and (is_known if is_begun else resumed.epoch != epoch)
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[object], num_batches: int, device: torch.device
    ) -> tuple[list[object], torch.Tensor | int | None]:
        """The batches of one step of the optimizer, as in ``Trainer``."""
        if self._batches is None:
            self._batches = epoch_iterator
            if self.is_replayable and self._checkpointer is not None:
                loader = self.callback_handler.train_dataloader
                # As the Trainer does with the loader that it was to iterate over.
                sampler: object = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
                for each in (loader, sampler):
                    if hasattr(each, "set_epoch"):
                        each.set_epoch(self.current_epoch)
                # Without accelerate's state_dict, which is empty unless torchdata's loader is in it.
                epoch = Pass(loader, loader.__iter__, generator=getattr(loader, "synchronized_generator", None))
                self._batches = self._checkpointer.batches(epoch, self.current_epoch)
        found = super().get_batch_samples(self._batches, num_batches, device)
        return cast("tuple[list[object], torch.Tensor | int | None]", found)

    def write_checkpoint(self) -> None:
        """Save one checkpoint."""
        state = self.state
        checkpointer = self._running("saving a checkpoint")
        if state.best_global_step == state.global_step:
            state.best_model_checkpoint = str(self._root / checkpoint_name(self.current_epoch, state.global_step))
        _record_callbacks(self)
        whole = not self.args.save_only_model
        checkpointer.save(
            epoch=self.current_epoch,
            step=state.global_step,
            model=self.model,
            optimizer=self.optimizer if whole else None,
            scheduler=self.lr_scheduler if whole else None,
            tokenizer=_tokenizer(self),
            metrics=_metrics(self),
            extra_state={"trainer": asdict(_Position.of(self)), **_scaler(self)} if whole else None,
            is_final_checkpoint=state.global_step >= state.max_steps or self.control.should_training_stop,
        )

    def read_checkpoint(self, checkpoint: Path) -> None:
        """Restore model, optimizer, scheduler and scaler, and take in where the run was in its data."""
        extra: dict[str, object] = {"trainer": {}, **_scaler(self)}
        self._running("resuming").restore(
            self.model, self.optimizer, self.lr_scheduler, restore_from=checkpoint, extra_state=extra
        )
        self._resumed = _Position.from_state(cast(Mapping[str, object], extra["trainer"]))
        now = _Position.of(self)
        if self.is_world_process_zero() and not self._resumed.has_batches_of(now):
            _LOG.warning(
                "the checkpoint was saved with %d samples in a step on %d ranks, and the run goes on with %d on %d: "
                "the Trainer finds its place in the data by the number of steps",
                self._resumed.batch_size,
                self._resumed.world_size,
                now.batch_size,
                now.world_size,
            )

    def read_best_model(self, checkpoint: Path) -> None:
        """Load the best checkpoint's model."""
        self._running("loading the best model").load_model(self.model, checkpoint / "model")

    def set_generators(self) -> None:
        """Set the random number generators; nothing where `batches` has done so."""
        self._running("resuming").resume_rng()

    # --- the model alone --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model (or the adapter), its configuration and tokenizer into a directory. All ranks call.

        The directory, ``args.output_dir`` by default, opens with ``from_pretrained``, however the model is sharded.
        Each file takes its place in one step, and an earlier model's files that are not replaced are removed.
        """
        target = Path(output_dir or self.args.output_dir).absolute()
        write_pretrained(self.model, target, self.checkpointing, self._built, _tokenizer(self))

    # --- what is refused --------------------------------------------------------------------------------------------

    def push_to_hub(self, *args: object, **named: object) -> NoReturn:
        """Refuse: the ``Trainer`` would upload every checkpoint in ``output_dir``."""
        raise MisuseError(
            "push_to_hub() of the Trainer uploads output_dir with every checkpoint in it",
            path=self.args.output_dir,
            hint="Call save_model(directory) and upload that directory with huggingface_hub.upload_folder.",
        )

    def hyperparameter_search(self, *args: object, **named: object) -> NoReturn:
        """Refuse: trials of a search are not runs that resume."""
        raise MisuseError(
            "hyperparameter_search() is not supported by ShardwiseTrainer",
            hint="Search with transformers' Trainer, and train with the values that it finds.",
        )

    # --- parts ------------------------------------------------------------------------------------------------------

    @property
    def _root(self) -> Path:
        return Path(self.args.output_dir).absolute()

    def _built(self, settings: CheckpointingConfig) -> Checkpointer:
        """A checkpointer for the model as it is now."""
        limit = self.args.save_total_limit
        limit = limit if limit is not None and limit > 0 else None
        best = limit is not None and self.args.metric_for_best_model is not None
        settings = replace(
            settings,
            checkpoint_dir=self._root,
            is_peft=settings.is_peft or is_peft_adapted([self.model]),
            max_recent_checkpoints=limit,
            keep_best=1 if best else None,
            best_metric_key=_NEW_BEST,
            best_metric_mode="max",
        )
        return settings.build()

    def _running(self, what: str) -> Checkpointer:
        if self._checkpointer is None:
            raise MisuseError(
                f"{what} outside of train()", hint="Call train(), or save_model() for the model as it is now."
            )
        return self._checkpointer


def get_last_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """Find the newest checkpoint in an ``output_dir``, like transformers' function of that name. Any rank calls.

    Returns:
        The checkpoint's path for ``train(resume_from_checkpoint=...)``; ``None`` where there is none, or no directory.

    Raises:
        CheckpointNotFoundError: ``LATEST`` leads nowhere, and there is no other checkpoint.
        StorageError: The directory cannot be read.
    """
    found = resolve(Path(folder).absolute())
    return None if found is None else str(found.path)


# --- what a checkpoint has beside model and optimizer -----------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Position:
    """Where a run was in its data when a checkpoint was saved: epoch -1 where nothing was resumed.

    ``batch_size`` are the samples in one step of the optimizer, of all ranks; with ``is_replayable`` the checkpoint has
    the generators of the epoch's start, and the number of batches.
    """

    epoch: int = -1
    batch_size: int = 0
    world_size: int = 0
    is_replayable: bool = False

    @staticmethod
    def of(trainer: ShardwiseTrainer) -> _Position:
        """The present one."""
        size = int(trainer.get_total_train_batch_size(trainer.args))
        return _Position(trainer.current_epoch, size, int(trainer.args.world_size), trainer.is_replayable)

    @staticmethod
    def from_state(state: Mapping[str, object]) -> _Position:
        """What a checkpoint has, also of another release; what is not said counts as not replayable."""
        known = {field.name for field in fields(_Position)}
        return _Position(**{name: value for name, value in state.items() if name in known})  # type: ignore[arg-type]

    def has_batches_of(self, other: _Position) -> bool:
        """Whether a step has the same samples, on the same ranks."""
        return (self.batch_size, self.world_size) == (other.batch_size, other.world_size)


class _TrainerState:
    """Writes the Trainer's record into the checkpoint, where `Trainer.train` looks for it."""

    def __init__(self, trainer: ShardwiseTrainer) -> None:
        self._trainer = trainer

    def pre_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Write it. All ranks call."""
        group = kwargs["group"]
        if group is None or group.is_main:
            self._trainer.state.save_to_json(str(Path(kwargs["model_path"]).parent / _STATE_NAME))

    def post_save(self, **kwargs: Unpack[SaveHookArgs]) -> None:
        """Nothing."""


def _record_callbacks(trainer: ShardwiseTrainer) -> None:
    """Put the callbacks' states into the Trainer's record; a list where there are several of a class."""
    found: dict[str, list[object]] = {}
    for callback in [*trainer.callback_handler.callbacks, trainer.control]:
        if isinstance(callback, ExportableState):
            found.setdefault(type(callback).__name__, []).append(callback.state())
    trainer.state.stateful_callbacks = {name: each if len(each) > 1 else each[0] for name, each in found.items()}


def _tokenizer(trainer: ShardwiseTrainer) -> SavesPretrained | None:
    """What the Trainer puts beside a model: its own tokenizer or processor, else the collator's."""
    own = trainer.processing_class
    return cast("SavesPretrained | None", getattr(trainer.data_collator, "tokenizer", None) if own is None else own)


def _metrics(trainer: ShardwiseTrainer) -> dict[str, float]:
    """What was logged at this step, and whether the Trainer has found it the best."""
    state = trainer.state
    found: dict[str, float] = {}
    for entry in state.log_history:
        if entry.get("step") == state.global_step:
            found |= {name: float(value) for name, value in entry.items() if isinstance(value, int | float)}
    found = {name: value for name, value in found.items() if name not in ("epoch", "step")}
    if state.best_global_step is not None:
        found[_NEW_BEST] = float(state.global_step if state.best_global_step == state.global_step else 0)
    return found


def _scaler(trainer: ShardwiseTrainer) -> dict[str, object]:
    """The gradient scaler, where there is one."""
    scaler = getattr(trainer.accelerator, "scaler", None)
    return {} if scaler is None else {"scaler": scaler}


# --- what is refused before training: arguments, settings, classes and checkpoints that cannot work -------------------


def _check_class(cls: type[TrainerCheckpoints]) -> None:
    """Raise `ConfigError` where a method of another class would never be called. Local."""
    base = TrainerCheckpoints.__mro__[1]
    ours = next(each for each in cls.__mro__ if TrainerCheckpoints in each.__bases__)
    order = list(cls.__mro__)
    for other in order[: order.index(ours)]:
        for name in UNUSED:
            if name in vars(other):
                raise ConfigError(
                    f"{other.__name__}.{name} would never be called: {ours.__name__} writes the whole checkpoint",
                    hint=f"Remove {name}; what it writes can go along as an addon or a callback's state.",
                )
    for other in order[order.index(ours) + 1 : order.index(base)]:
        for name in (*REPLACED, *UNUSED, "save_model", "train"):
            if other is not TrainerCheckpoints and name in vars(other):
                raise ConfigError(
                    f"{other.__name__}.{name} would never be called, because {ours.__name__} comes before it",
                    hint=f"Change the order of the bases: class {cls.__name__}({other.__name__}, {ours.__name__}).",
                )


def _check_arguments(args: Any) -> None:
    """Raise `ConfigError` for ``TrainingArguments`` that cannot work, before the Trainer acts on them. Local."""
    hints = {
        "push_to_hub": "Leave it out, call save_model(directory), and upload that with huggingface_hub.upload_folder.",
        "enable_jit_checkpoint": "Leave it out, and save by save_steps: it writes into the Trainer's own directories.",
        "save_on_each_node": "Leave it out: all ranks write one checkpoint, in a directory that every node sees.",
        "deepspeed": _SHARDING,
    }
    for name, hint in hints.items():
        if getattr(args, name, None):
            raise ConfigError(f"ShardwiseTrainer does not support {name}", hint=hint)


def _check_strategy(trainer: TrainerCheckpoints) -> None:
    """Raise `ConfigError` where the model is spread in a way that cannot be saved. Local."""
    further = {
        "DeepSpeed": (trainer.is_deepspeed_enabled, _SHARDING),
        "SageMaker's model parallelism": (is_sagemaker_mp_enabled(), _SHARDING),
        "torch_xla": (is_torch_xla_available(), _SHARDING),
    }
    refuse_ways(trainer.accelerator, "ShardwiseTrainer", _SHARDING, further)


def _check_settings(settings: CheckpointingConfig, trainer: TrainerCheckpoints) -> None:
    """Raise `ConfigError` for settings that follow from the Trainer's arguments, or contradict them. Local."""
    refuse_derived(settings, _DERIVED, "ShardwiseTrainer")
    if settings.is_peft and not is_peft_adapted([trainer.model]):
        raise ConfigError(
            f"checkpointing sets is_peft, and the {type(trainer.model).__name__} has no adapter of peft's",
            hint="Leave is_peft out: a PeftModel is recognised.",
        )
    if settings.skip_save_while_busy and trainer.args.metric_for_best_model is not None:
        raise ConfigError(
            "skip_save_while_busy could skip the best checkpoint, which metric_for_best_model asks for",
            hint="Leave skip_save_while_busy or metric_for_best_model out.",
        )


def _find_source(args: Any, given: str | os.PathLike[str] | bool | None) -> str | None:
    """The path of the checkpoint that ``resume_from_checkpoint`` means; ``None`` to begin afresh. One rank calls.

    Raises:
        CheckpointNotFoundError: There is none.
        IncompleteCheckpointError: It is an interrupted save.
        MisuseError: It cannot be resumed from; or training is to begin afresh where checkpoints are.
    """
    root = Path(args.output_dir).absolute()
    _check_root(root, args)
    if given is None or given is False:
        there = [info.name for info in list_checkpoints(root)]
        if there and args.save_strategy != "no":
            raise MisuseError(
                f"a run is to begin afresh in a directory that has checkpoints ({some(there)})",
                path=root,
                hint="Pass resume_from_checkpoint=True to go on from the newest one, or choose another output_dir.",
            )
        return None
    if given is not True and (Path(given) / _STATE_NAME).is_file() and not (Path(given) / "model").is_dir():
        raise MisuseError(
            "the checkpoint was saved by the Trainer itself",
            path=given,
            hint="Finish that run with the Trainer, or begin a new one from its model with from_pretrained.",
        )
    found = resolve(root, LATEST if given is True else given if isinstance(given, str) else Path(given))
    if found is None:
        raise CheckpointNotFoundError(
            "there is no checkpoint to resume from",
            path=root,
            hint="Pass resume_from_checkpoint=get_last_checkpoint(output_dir), which is None where there is none.",
        )
    if not (found.path / _STATE_NAME).is_file():
        raise MisuseError(
            f"the checkpoint has no {_STATE_NAME}: no ShardwiseTrainer has saved it",
            path=found.path,
            hint="Restore it with Checkpointer.restore, in the loop that has saved it.",
        )
    if not (found.path / "optim").is_dir():
        raise MisuseError(
            "the checkpoint was saved with save_only_model, and has no optimizer to resume with",
            path=found.path,
            hint="Begin a new run from its model, with from_pretrained.",
        )
    return str(found.path)


def _check_root(root: Path, args: Any) -> None:
    """The Trainer itself deletes its own checkpoints at the end where ``save_total_limit`` is 1."""
    if args.save_total_limit != 1 or not root.is_dir():
        return
    for path in root.iterdir():
        if _TRAINERS_OWN.fullmatch(path.name):
            raise MisuseError(
                "output_dir has a checkpoint of the Trainer itself, which would delete it at the end of the training",
                path=path,
                hint="Choose another output_dir, or a save_total_limit other than 1.",
            )
