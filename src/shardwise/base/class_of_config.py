"""The class that a config.json names, built on the meta device.

Classes are those that transformers and diffusers themselves have; no code of a checkpoint runs.
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any, cast

import torch
from torch import nn

from shardwise.upstream.hugging_face import CLASS_NAME
from shardwise.upstream.transformers import without_initial_values


def named_classes(entries: Mapping[str, object]) -> list[type[nn.Module]]:
    """The classes that a configuration names (``architectures``, or diffusers' ``_class_name``) and its library has."""
    own, listed = entries.get(CLASS_NAME), entries.get("architectures")
    library = "transformers" if own is None else "diffusers"
    names = [own] if own is not None else listed if isinstance(listed, list) else []
    if not names:
        return []
    try:
        module = importlib.import_module(library)
    except ImportError:
        return []
    public = [name for name in names if isinstance(name, str) and name.isidentifier() and not name.startswith("_")]
    found = [getattr(module, name, None) for name in public]
    return [cls for cls in found if isinstance(cls, type) and issubclass(cls, nn.Module)]


def configuration(cls: type, entries: Mapping[str, object]) -> object:
    """The configuration of a class of transformers', from a config.json that may be that of a model around it.

    Source: ``PretrainedConfig.from_pretrained``, which looks for the class's own part first by the key that it has in
    others' configurations, and then by its ``model_type``.
    """
    made = cast(Any, cls)
    inner = entries.get(made.base_config_key or "")
    if isinstance(inner, Mapping):
        entries = inner
    if entries.get("model_type", made.model_type) != made.model_type:
        parts = (part for part in entries.values() if isinstance(part, Mapping))
        entries = next((part for part in parts if part.get("model_type") == made.model_type), entries)
    return made.from_dict(deepcopy(dict(entries)))  # it writes into the mappings inside


def build_on_meta(cls: type, config: object) -> nn.Module:
    """Build a model of transformers' or diffusers' without memory, without initial values and without ties.

    The configuration is transformers', or for diffusers the content of config.json; what the class does not like about
    it is raised. The libraries say nothing while they build, and the random number generators are left as they were.
    """
    made = cast(Any, cls)
    with quiet(), torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        if isinstance(config, Mapping):
            stack.enter_context(torch.device("meta"))
            return cast(nn.Module, made.from_config(dict(config)))
        stack.enter_context(without_initial_values())
        stack.enter_context(torch.device("meta"))
        return cast(nn.Module, made(config))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the libraries' own words about loading, and their progress bars."""
    with contextlib.ExitStack() as stack:
        for name in ("transformers.utils.logging", "diffusers.utils.logging"):
            library = cast(Any, sys.modules.get(name))
            if library is None:
                continue
            stack.callback(library.set_verbosity, library.get_verbosity())
            library.set_verbosity_error()
            if library.is_progress_bar_enabled():
                stack.callback(library.enable_progress_bar)
                library.disable_progress_bar()
        yield
