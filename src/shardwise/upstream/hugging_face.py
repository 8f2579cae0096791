"""Private names of accelerate, diffusers, huggingface_hub and sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any, cast

from shardwise.upstream.python import imported_class

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import nn

#: The entry of a configuration of diffusers that names the class it is of.
CLASS_NAME = "_class_name"

#: The base of diffusers' models, and huggingface_hub's mixin for models of one's own; ``None`` where its module was not
#: imported.
model_mixin = partial(imported_class, "diffusers.models.modeling_utils", "ModelMixin")
hub_mixin = partial(imported_class, "huggingface_hub.hub_mixin", "ModelHubMixin")

#: What an accelerator has prepared (an optimizer or scheduler around one of torch's, its ``optimizer``, ``scheduler``)
#: or been given by ``register_for_checkpointing``; no public attribute lists these.
prepared_models: Callable[[Accelerator], list[nn.Module]] = attrgetter("_models")
prepared_optimizers: Callable[[Accelerator], list[object]] = attrgetter("_optimizers")
prepared_schedulers: Callable[[Accelerator], list[object]] = attrgetter("_schedulers")
prepared_dataloaders: Callable[[Accelerator], list[object]] = attrgetter("_dataloaders")
registered_objects: Callable[[Accelerator], list[object]] = attrgetter("_custom_objects")


def keeps_config(model: nn.Module) -> bool:
    """Whether a model has its configuration where diffusers keeps it, so that it can be replaced."""
    return hasattr(model, "_internal_dict")


def replace_config(model: nn.Module, config: dict[Any, Any]) -> None:
    """Give a model of diffusers another configuration, which cannot be changed in place."""
    cast(Any, model)._internal_dict = config


def cache_folder(repo_id: str) -> str:
    """The name of a model's folder in a hub cache: ``models--org--name``."""
    from huggingface_hub.file_download import repo_folder_name

    return repo_folder_name(repo_id=repo_id, repo_type="model")


def mixin_config(model: nn.Module) -> object:
    """The arguments with which a model with huggingface_hub's mixin was built; ``None`` where it keeps none."""
    return getattr(model, "_hub_mixin_config", None)


def model_settings(model: nn.Module) -> object | None:
    """The settings that a SentenceTransformer writes beside its modules; ``None`` where its release has none."""
    settings = getattr(model, "_get_model_config", None)
    return cast("Callable[[], object]", settings)() if callable(settings) else None
