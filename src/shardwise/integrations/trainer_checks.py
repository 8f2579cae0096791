"""What a `ShardwiseTrainer` refuses, before training: arguments, settings, classes and checkpoints that cannot work."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.utils import is_sagemaker_mp_enabled, is_torch_xla_available

from shardwise.config import CheckpointingConfig
from shardwise.errors import CheckpointNotFoundError, ConfigError, MisuseError, some
from shardwise.integrations.host_settings import refuse_derived, refuse_ways
from shardwise.lifecycle import LATEST, list_checkpoints, resolve
from shardwise.peft.models import is_peft_adapted
from shardwise.upstream.transformers_trainer import REPLACED, UNUSED, TrainerCheckpoints

if TYPE_CHECKING:
    import os

#: The Trainer's own record of the run, which its `train` reads out of a checkpoint.
STATE_NAME = "trainer_state.json"
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


def check_class(cls: type[TrainerCheckpoints]) -> None:
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


def check_arguments(args: Any) -> None:
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


def check_strategy(trainer: TrainerCheckpoints) -> None:
    """Raise `ConfigError` where the model is spread in a way that cannot be saved. Local."""
    further = {
        "DeepSpeed": (trainer.is_deepspeed_enabled, _SHARDING),
        "SageMaker's model parallelism": (is_sagemaker_mp_enabled(), _SHARDING),
        "torch_xla": (is_torch_xla_available(), _SHARDING),
    }
    refuse_ways(trainer.accelerator, "ShardwiseTrainer", _SHARDING, further)


def check_settings(settings: CheckpointingConfig, trainer: TrainerCheckpoints) -> None:
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


def find_source(args: Any, given: str | os.PathLike[str] | bool | None) -> str | None:
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
    if given is not True and (Path(given) / STATE_NAME).is_file() and not (Path(given) / "model").is_dir():
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
    if not (found.path / STATE_NAME).is_file():
        raise MisuseError(
            f"the checkpoint has no {STATE_NAME}: no ShardwiseTrainer has saved it",
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
