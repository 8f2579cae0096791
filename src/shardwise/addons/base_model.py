"""Finds the base model's directory, and tells links that stay inside it from links that leave it."""

from __future__ import annotations

import os
from pathlib import Path

#: Files of which at least one is in every model's folder of the hub cache.
_LANDMARKS = ("config.json", "model_index.json", "tokenizer_config.json", "generation_config.json")


def base_directory(original_model_path: str | None) -> Path | None:
    """The local directory of the base model, or ``None``. The network is never asked.

    Args:
        original_model_path: A local directory; a hub id, whose snapshot is looked up in the hub cache; or a single
            file, which has no directory of its own.
    """
    if not original_model_path:
        return None
    if os.path.isdir(original_model_path):
        return Path(original_model_path)
    if os.path.exists(original_model_path) or original_model_path.count("/") > 1:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    for name in _LANDMARKS:
        try:
            cached = try_to_load_from_cache(original_model_path, name)
        except HFValidationError:
            return None
        if isinstance(cached, str):
            return Path(cached).parent
    return _only_snapshot(original_model_path)


def _only_snapshot(hub_id: str) -> Path | None:
    """The snapshot of a model that was fetched at one revision and never at ``main``.

    A model in memory does not say which revision it is of, so among several there is no telling.
    """
    from huggingface_hub import constants

    snapshots = Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}" / "snapshots"
    found = [path for path in snapshots.iterdir() if path.is_dir()] if snapshots.is_dir() else []
    return found[0] if len(found) == 1 else None


def is_inside(path: Path, base: Path) -> bool:
    """Whether ``path``, its links followed, is a file of ``base`` or a blob of a hub cache.

    The hub cache keeps a model's files as ``models--<org>--<name>/blobs/<digest>`` and makes snapshots of links to
    them (huggingface_hub, "Understand caching").
    """
    resolved = path.resolve()
    if resolved.is_relative_to(base.resolve()):
        return True
    return resolved.parent.name == "blobs" and resolved.parent.parent.name.startswith("models--")
