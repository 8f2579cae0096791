"""Checkpoints at paths that the host chooses: each path is a directory in which one complete checkpoint is.

A host that writes the same path again replaces what is there. The new checkpoint is published beside the old one, which
is removed after that: at no moment is there none.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from torch.nn import ModuleList

from shardwise.addons.base import SavesPretrained
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.disk.storage import LOCAL, storage_errors
from shardwise.errors import CheckpointNotFoundError, ConfigError, IncompleteCheckpointError
from shardwise.integrations.host_settings import first_set
from shardwise.integrations.model_files import write_pretrained
from shardwise.lifecycle import checkpoint_name, list_checkpoints, resolve
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
    ``host`` (its name) decides, or no checkpointer can be built of them.
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
        self._writing: tuple[Checkpointer, Path, str] | None = None

    @property
    def is_writing(self) -> bool:
        """Whether an asynchronous save has not been waited for."""
        return self._writing is not None

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
        self._writing = checkpointer, root, checkpoint_name(epoch, step)
        if not self.settings.is_async:
            self.finish()

    def finish(self) -> None:
        """Return when what was saved is complete, and what it replaces is removed; raises what failed in the save."""
        if self._writing is None:
            return
        (checkpointer, root, name), self._writing = self._writing, None
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
