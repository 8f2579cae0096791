"""A model's files in a directory of their own, for ``from_pretrained``: what a host's ``save_model`` leaves."""

from __future__ import annotations

import re
from pathlib import Path

from shardwise.disk.storage import LOCAL, storage_errors
from shardwise.lifecycle import MANIFEST_NAME

#: Below the directory: where a model is written before its files are put in place.
SCRATCH = ".saving-model"
#: What is beside a model in a component's directory.
_NOT_MODELS = (MANIFEST_NAME, "consolidate.sh")
#: Files of an earlier model that would be opened instead of, or together with, those of a new one.
_WEIGHTS = re.compile(r"(?:model|adapter_model|pytorch_model)(?:-\d+-of-\d+)?\.(?:safetensors|bin)(?:\.index\.json)?")


def put_in_place(written: Path, target: Path) -> None:
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
