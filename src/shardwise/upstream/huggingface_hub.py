"""Private and undocumented names of huggingface_hub."""

from __future__ import annotations

from typing import TYPE_CHECKING

from shardwise.upstream.python import imported_class

if TYPE_CHECKING:
    from torch import nn


def cache_folder(repo_id: str) -> str:
    """The name of a model's folder in a cache: ``models--org--name``."""
    from huggingface_hub.file_download import repo_folder_name

    return repo_folder_name(repo_id=repo_id, repo_type="model")


def hub_mixin() -> type | None:
    """The mixin for models of one's own; ``None`` where its module was not imported."""
    return imported_class("huggingface_hub.hub_mixin", "ModelHubMixin")


def mixin_config(model: nn.Module) -> object:
    """The arguments with which a model with huggingface_hub's mixin was built; ``None`` where it keeps none."""
    return getattr(model, "_hub_mixin_config", None)
