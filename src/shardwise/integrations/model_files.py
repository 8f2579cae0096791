"""A model's files in a directory of their own, for ``from_pretrained``: what a host's ``save_model`` leaves."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from shardwise.addons.base import SavesPretrained
from shardwise.comm import Group
from shardwise.config import CheckpointingConfig, SaveConsolidatedMode
from shardwise.disk.storage import LOCAL, storage_errors
from shardwise.lifecycle import MANIFEST_NAME

if TYPE_CHECKING:
    from torch import nn

    from shardwise.checkpointing import Checkpointer

#: Below the directory: where a model is written before its files are put in place.
_SCRATCH = ".saving-model"
#: What is beside a model in a component's directory.
_NOT_MODELS = (MANIFEST_NAME, "consolidate.sh")
#: Files of an earlier model that would be opened instead of, or together with, those of a new one.
_WEIGHTS = re.compile(r"(?:model|adapter_model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")


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
