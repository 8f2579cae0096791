"""Private names of diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from shardwise.upstream.python import imported_class

if TYPE_CHECKING:
    from torch import nn

#: The entry of a configuration that names the class it is of.
CLASS_NAME = "_class_name"


def model_mixin() -> type | None:
    """The base of diffusers' models; ``None`` where its module was not imported."""
    return imported_class("diffusers.models.modeling_utils", "ModelMixin")


def keeps_config(model: nn.Module) -> bool:
    """Whether a model has its configuration where diffusers keeps it, so that it can be replaced."""
    return hasattr(model, "_internal_dict")


def replace_config(model: nn.Module, config: dict[Any, Any]) -> None:
    """Give a model of diffusers another configuration, which cannot be changed in place."""
    cast(Any, model)._internal_dict = config
