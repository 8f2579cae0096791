"""What integrations share: settings that hosts decide, checkpoints at their paths, a model's own files, loaders.

Where a host chooses the path, it is a directory in which one complete checkpoint is. A host that writes the same path
again replaces what is there. The new checkpoint is published beside the old one, which is removed after that: at no
moment is there none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch.nn import ModuleList

from shardwise.addons.base import SavesPretrained
from shardwise.checkpointing.run_state.generators import RandomState
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.disk.storage import LOCAL, storage_errors
from shardwise.errors import CheckpointNotFoundError, ConfigError, IncompleteCheckpointError
from shardwise.lifecycle import MANIFEST_NAME, checkpoint_name, list_checkpoints, resolve
from shardwise.peft.models import is_peft_adapted

if TYPE_CHECKING:
    import os

    from torch import nn
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    from shardwise.checkpointing import Checkpointer
    from shardwise.checkpointing.reports import RestoreRecord

#: Settings that the host's paths and its own retention decide.
_DERIVED = (
    "is_peft",
    "checkpoint_dir",
    "enabled",
    "max_recent_checkpoints",
    "keep_best",
    "best_metric_key",
    "best_metric_mode",
    "skip_save_while_busy",
)
#: Below the directory: where a model is written before its files are put in place.
_SCRATCH = ".saving-model"
#: What is beside a model in a component's directory.
_NOT_MODELS = (MANIFEST_NAME, "consolidate.sh")
#: Files of an earlier model that would be opened instead of, or together with, those of a new one.
_WEIGHTS = re.compile(r"(?:model|adapter_model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")


def first_set(settings: CheckpointingConfig, names: Iterable[str]) -> str | None:
    """The first of the settings ``names`` that is not at its default, or ``None``. Local."""
    defaults = CheckpointingConfig()
    return next((name for name in names if getattr(settings, name) != getattr(defaults, name)), None)


def refuse_derived(settings: CheckpointingConfig, derived: Mapping[str, str], host: str) -> None:
    """Raise `ConfigError` where a setting is given that follows from one of the host's own (name -> name). Local."""
    if (name := first_set(settings, derived)) is not None:
        raise ConfigError(
            f"checkpointing sets {name}, which {host} takes from {derived[name]}",
            hint=f"Leave {name} out, and set {derived[name]}.",
        )


def refuse_ways(accelerator: Any, host: str, sharding: str, further: Mapping[str, tuple[bool, str]]) -> None:
    """Raise `ConfigError` where accelerate spreads a model in a way that is not saved, or one ``further`` is asked for.

    ``sharding`` is the hint that says what can be saved; ``further`` says by name whether it is asked for, and a hint.
    """
    from accelerate.utils import DistributedType

    kind, fsdp = accelerator.distributed_type, getattr(accelerator.state, "fsdp_plugin", None)
    asked = {
        "DeepSpeed": (kind == DistributedType.DEEPSPEED, sharding),
        "Megatron-LM": (kind == DistributedType.MEGATRON_LM, sharding),
        "torch_xla": (kind == DistributedType.XLA, sharding),
        "FSDP 1": (fsdp is not None and fsdp.fsdp_version != 2, "Set fsdp_version ('version' in fsdp_config) to 2."),
    }
    for name, (is_asked, hint) in [*asked.items(), *further.items()]:
        if is_asked:
            raise ConfigError(f"{host} does not support {name}", hint=hint)


# --- checkpoints at paths ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Parts:
    """What a checkpoint is made of; ``extra`` is everything else by name, the tokenizer goes beside the weights."""

    model: nn.Module
    optimizers: list[Optimizer]
    schedulers: list[LRScheduler]
    extra: MutableMapping[str, object]
    tokenizer: SavesPretrained | None = None


class HostPaths:
    """Saves to, restores from and removes paths. All ranks call each method; each ends an earlier save first.

    By default each checkpoint has an export. Making one raises `ConfigError` where a setting contradicts what the
    ``host`` (its name) decides, or no checkpointer can be built of them. ``writing`` is an asynchronous save that has
    not been waited for: checkpointer, path and the checkpoint's name.
    """

    def __init__(self, settings: CheckpointingConfig | None, host: str) -> None:
        settings = settings or CheckpointingConfig(save_consolidated=SaveConsolidatedMode.EVERY)
        if (name := first_set(settings, _DERIVED)) is not None:
            raise ConfigError(
                f"checkpointing sets {name}, which {host} decides",
                hint=f"Leave {name} out: where and when checkpoints are written, and which are kept, is up to the "
                "training script.",
            )
        settings.build().close()  # refuses what no checkpointer can be built of
        self.settings = settings
        self.writing: tuple[Checkpointer, Path, str] | None = None

    def save(self, path: str | os.PathLike[str], parts: Parts, numbers: tuple[int, int] | None, is_final: bool) -> None:
        """Write a checkpoint; in asynchronous mode it is complete after `finish`.

        ``numbers`` are epoch and step; of a step that is there already, the next free one counts. By default saves to
        the path are counted. Where this fails, on any rank, what was at the path before is still there.
        """
        self.finish()
        root = local_path(path)
        epoch, step = Group.current().broadcast_result(lambda: list(_free(root, numbers)), f"looking into {root}")
        checkpointer = self._built(root, parts.model)
        try:
            checkpointer.save(
                epoch=epoch,
                step=step,
                model=parts.model,
                optimizer=parts.optimizers or None,
                scheduler=parts.schedulers or None,
                tokenizer=parts.tokenizer,
                extra_state=parts.extra,
                is_final_checkpoint=is_final,
            )
        except BaseException:
            checkpointer.finalize()
            raise
        self.writing = checkpointer, root, checkpoint_name(epoch, step)
        if not self.settings.is_async:
            self.finish()

    def finish(self) -> None:
        """Return when what was saved is complete, and what it replaces is removed; raises what failed in the save."""
        if self.writing is None:
            return
        (checkpointer, root, name), self.writing = self.writing, None
        checkpointer.finalize()
        group = Group.current()
        with group.together(f"removing what {root / name} replaces"):
            if group.is_main:
                for info in list_checkpoints(root):
                    if info.name != name:
                        with storage_errors(info.path):
                            LOCAL.remove_tree(info.path)

    def restore(self, path: str | os.PathLike[str], parts: Parts) -> RestoreRecord:
        """Fill the parts from the checkpoint that `find` finds, all or nothing; ``extra`` takes the saved values."""
        found = self.find(path)
        with self._built(found.parent, parts.model) as checkpointer:
            record = checkpointer.restore(
                parts.model,
                parts.optimizers or None,
                parts.schedulers or None,
                restore_from=found,
                extra_state=parts.extra or None,
            )
        if record is None:
            raise CheckpointNotFoundError("the checkpoint is gone", path=found, hint="Look for what deletes it.")
        return record

    def find(self, path: str | os.PathLike[str]) -> Path:
        """The checkpoint at a path; `CheckpointNotFoundError` or `IncompleteCheckpointError` where there is none."""
        self.finish()
        root = local_path(path)
        return Path(str(Group.current().broadcast_result(lambda: str(_found(root)), f"looking for {root}")))

    def remove(self, path: str | os.PathLike[str]) -> None:
        """Remove a path with everything below it; nothing where there is none."""
        self.finish()
        target = local_path(path)
        group = Group.current()
        with group.together(f"removing {target}"):
            if group.is_main:
                with storage_errors(target):
                    LOCAL.remove_tree(target)

    def _built(self, root: Path, model: nn.Module) -> Checkpointer:
        settings = replace(self.settings, checkpoint_dir=root, is_peft=is_peft_adapted([model]))
        if isinstance(model, ModuleList):  # of models that have files of their own, and together none
            settings = replace(settings, save_consolidated=SaveConsolidatedMode.FALSE)
        return settings.build()

    def write_model(self, model: nn.Module, directory: Path) -> None:
        """Write a model's files into a directory, for ``from_pretrained``."""
        self.finish()
        settings = replace(self.settings, is_peft=is_peft_adapted([model]))
        write_pretrained(model, directory, settings, CheckpointingConfig.build)


def local_path(path: str | os.PathLike[str]) -> Path:
    """The absolute path; `ConfigError` for a URL, which, were a host's string made a `Path`, would be a directory."""
    if "://" in str(path):
        raise ConfigError(
            "the path is a URL, which the mounted file systems cannot reach",
            path=str(path),
            hint="Write to a local or mounted directory.",
        )
    return Path(path).expanduser().absolute()


def is_complete(path: Path) -> bool:
    """Whether a path has a checkpoint that may be resumed from. Any rank calls."""
    return any(info.complete for info in list_checkpoints(path.absolute()))


def _free(root: Path, numbers: tuple[int, int] | None) -> tuple[int, int]:
    """Epoch and step of a checkpoint that is not there yet."""
    taken = {(info.epoch, info.step) for info in list_checkpoints(root)}
    epoch, step = numbers or (0, 1 + max((step for _, step in taken), default=-1))
    while (epoch, step) in taken:
        step += 1
    return epoch, step


def _found(root: Path) -> Path:
    found = resolve(root) if root.is_dir() else None
    if found is not None:
        return found.path
    if root.is_dir() and any(entry.name.startswith(".saving-") for entry in root.iterdir()):
        raise IncompleteCheckpointError(
            "the first save to this path was interrupted, and no earlier checkpoint is there",
            path=root,
            hint="Resume from another checkpoint, or delete the directory and begin afresh.",
        )
    raise CheckpointNotFoundError(
        "there is no checkpoint of shardwise at this path",
        path=root,
        hint="Pass the path that was saved to; what the host itself has written is resumed with the host alone.",
    )


# --- a model's files, for from_pretrained: what a host's save_model leaves --------------------------------------------


def write_pretrained(
    model: nn.Module,
    target: Path,
    settings: CheckpointingConfig,
    build: Callable[[CheckpointingConfig], Checkpointer],
    tokenizer: SavesPretrained | None = None,
) -> None:
    """Write a model (or an adapter), its configuration and tokenizer into the directory ``target``. All ranks call.

    ``build`` makes the checkpointer of ``settings``, changed to those of a model that is written once.
    """
    every = SaveConsolidatedMode.EVERY
    settings = replace(
        settings, is_async=False, model_save_format="safetensors", save_consolidated=every, export_merged=False
    )
    with build(settings) as checkpointer:
        checkpointer.save_model(model, target / _SCRATCH, tokenizer=tokenizer, is_final_checkpoint=True)
    group = Group.current()
    with group.together(f"putting the model into {target}"):
        if group.is_main:
            _put_in_place(target / _SCRATCH / "model", target)


def _put_in_place(written: Path, target: Path) -> None:
    """Move a model's files into a directory, each in one step, and what says how to open them last. One rank calls."""
    exported = written / "consolidated"
    source = exported if exported.is_dir() else written
    names = [
        path.name for path in sorted(source.iterdir()) if not path.name.startswith(".") and path.name not in _NOT_MODELS
    ]
    with storage_errors(target):
        for old in target.iterdir():
            if old.name not in names and _WEIGHTS.fullmatch(old.name):
                LOCAL.remove_file(old)
        for name in sorted(names, key=lambda name: (name.endswith(".json"), name.endswith("config.json"))):
            if (target / name).is_dir():
                LOCAL.remove_tree(target / name)
            LOCAL.rename(source / name, target / name)
        LOCAL.sync_directory(target)
        LOCAL.remove_tree(written.parent)


# --- a host's loader as `DataOrder.batches` has to see it -------------------------------------------------------------


class Pass:
    """One pass over a loader: its batches, their number, and what the order is drawn from, but no position of its own.

    ``begin`` begins the pass; ``order`` has the generators of the order, by a ``DataLoader``'s names of them.
    """

    def __init__(self, loader: object, begin: Callable[[], Iterator[object]], **order: object) -> None:
        self._loader, self._begin = loader, begin
        vars(self).update(order)

    def __iter__(self) -> Iterator[object]:
        return self._begin()

    def __len__(self) -> int:
        return len(cast(Sized, self._loader))


def first_then(batches: Iterable[object], generators: dict[str, object]) -> Iterator[object]:
    """The batches; once the first is there, the process's generators are set, since making an iterator draws."""
    for number, batch in enumerate(batches):
        if number == 0:
            RandomState().load_state_dict(generators)
        yield batch
