"""Finds the base model's directory, and checks whether links lead outside it."""

from __future__ import annotations

import os
from pathlib import Path

from shardwise.base.hub_cache import default_cache, find_snapshot, hub_name
from shardwise.sources.directory_contents import holds_model

#: Every model's folder has at least one of these files.
_LANDMARKS = ("config.json", "model_index.json", "tokenizer_config.json", "generation_config.json")


def base_directory(original_model_path: str | None) -> Path | None:
    """The local directory of the base model, or ``None``. The network is never asked.

    Args:
        original_model_path: A local directory; a hub id, with or without a revision behind an ``@``, whose snapshot is
            looked up in the hub cache; or a single file, which has no directory of its own.
    """
    if not original_model_path:
        return None
    directory = Path(original_model_path) if os.path.isdir(original_model_path) else None
    if directory is not None and (directory.is_absolute() or _is_a_models(directory)):
        return directory
    if directory is None and os.path.exists(original_model_path):
        return None
    # A stray folder of the model's name in the working directory does not hide the one in the cache.
    name = hub_name(original_model_path)
    return directory if name is None else find_snapshot(default_cache(), name).path or directory


def _is_a_models(directory: Path) -> bool:
    return any((directory / name).exists() for name in _LANDMARKS) or holds_model(directory)


def is_inside(path: Path, base: Path) -> bool:
    """Whether ``path``, its links followed, is a file of ``base`` or a blob of a hub cache.

    The hub cache keeps a model's files as ``models--<org>--<name>/blobs/<digest>`` and makes snapshots of links to
    them (huggingface_hub, "Understand caching").
    """
    resolved = path.resolve()
    if resolved.is_relative_to(base.resolve()):
        return True
    return resolved.parent.name == "blobs" and resolved.parent.parent.name.startswith("models--")
