"""What only wraps a model, and the model that the files are of: the one place that knows.

Two questions, since a wrapper may have state of its own:

* `unwrap`: which module has just the state of this one? DDP, DataParallel, torch.compile and activation checkpointing
  add a prefix to names and nothing else.
* `inner_model`: which module do the files belong to? A running average (``AveragedModel``), a value head around a
  language model, a SentenceTransformer are modules with something besides; their files are the model's inside, under
  the names that it has, and the rest is kept apart.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple, cast

from torch import nn

#: Path components that torch.compile, activation checkpointing (and offloading) and FSDP1 put into names.
_SEGMENTS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module)\.")

#: Those of them behind which there is a module with the same state.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module")


def plain_name(name: str) -> str:
    """A tensor's name without what torch.compile, activation checkpointing and FSDP1 put into it."""
    return _SEGMENTS.sub("", name) if "_mod." in name or "_wrapped_module." in name else name


def plain_path(path: str) -> str:
    """The same of a module's path; empty for what stands in the wrapped module's place."""
    return plain_name(f"{path}.").rstrip(".")


def wrapped(module: nn.Module) -> nn.Module | None:
    """The module that this one wraps and has the same state as; ``None`` where it wraps none."""
    for name in _WRAPPED:
        inner = module._modules.get(name)
        if inner is not None:
            return inner
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        return cast("nn.Module", module.module)
    return None


def unwrap(module: nn.Module) -> nn.Module:
    """The module inside DistributedDataParallel, DataParallel, torch.compile and activation checkpointing."""
    while (inner := wrapped(module)) is not None:
        module = inner
    return module


class Inner(NamedTuple):
    """The model that the files of a part are of.

    Attributes:
        module: The model, out of everything around it.
        prefix: What its names begin with in the part's state; empty where they are the same.
        has_rest: Whether the part may have state outside of it.
    """

    module: nn.Module
    prefix: str = ""
    has_rest: bool = False


def inner_model(part: nn.Module) -> Inner:
    """The model whose files a save of ``part`` writes: ``part`` itself out of its wrappers, or a model inside it.

    A model is looked for inside of ``AveragedModel``, and of a module that is no library's pretrained model and shows
    the configuration of one that it holds. Where several could be meant, none is.
    """
    inner = Inner(unwrap(part))
    while (found := _inside(inner.module)) is not None:
        path, module, has_rest = found
        prefix = f"{inner.prefix}{path}."
        while (below := wrapped(module)) is not None:
            # Below the top, DDP's own name for what it wraps is in the state's names.
            prefix += "" if any(name in module._modules for name in _WRAPPED) else "module."
            module = below
        inner = Inner(module, _SEGMENTS.sub("", prefix), inner.has_rest or has_rest)
    return inner


def _inside(module: nn.Module) -> tuple[str, nn.Module, bool] | None:
    """Path of the module that the files are of, that module, and whether there is state besides."""
    if isinstance(module, _averaged()):
        return "module", cast("nn.Module", module.module), True
    sharded = module._modules.get("_fsdp_wrapped_module")
    if sharded is not None:
        return "_fsdp_wrapped_module", sharded, False
    if is_loaded_by_others(module) or _speaks_for_itself(module):
        return None
    config = _transformers_config(module)
    if config is None and not is_sentence_transformer(module):
        return None
    found = list(outermost_pretrained(module))
    own = [pair for pair in found if getattr(pair[1], "config", None) is config] or found
    if len(own) != 1:
        return None
    return own[0][0], own[0][1], True


def _averaged() -> type:
    # Importing torch.optim.swa_utils would cost whoever has no average.
    known = getattr(sys.modules.get("torch.optim.swa_utils"), "AveragedModel", None)
    return known if isinstance(known, type) else type(None)


def _speaks_for_itself(module: nn.Module) -> bool:
    """Whether a module says by itself what its files are: an adapter of state dicts, an exporter, a peft model."""
    methods = ("_get_consolidated_hf_metadata_exporter", "get_base_model")
    return (
        any(hasattr(type(module), name) for name in methods) or getattr(module, "state_dict_adapter", None) is not None
    )


def _transformers_config(module: nn.Module) -> object | None:
    """The configuration of transformers that a module shows."""
    known = getattr(sys.modules.get("transformers.configuration_utils"), "PreTrainedConfig", None)
    if known is None:
        return None
    try:
        config: object = getattr(module, "config", None)
    except Exception:  # noqa: BLE001 - whoever writes the configuration says what it raises
        return None
    return config if isinstance(config, known) else None


def outermost_pretrained(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of each of transformers' models below a module, but for those inside another."""
    pending = [(name, child) for name, child in reversed(list(module.named_children()))]
    while pending:
        name, child = pending.pop()
        if is_pretrained(child):
            yield name, child
        else:
            below = [(f"{name}.{inner}", module) for inner, module in child.named_children()]
            pending.extend(reversed(below))


def is_pretrained(module: nn.Module) -> bool:
    """Whether a module is of one of transformers' classes of models."""
    return is_of(module, "transformers.modeling_utils", "PreTrainedModel")


def is_loaded_by_others(module: nn.Module) -> bool:
    """Whether a library builds and loads a module's class by itself: transformers, diffusers, huggingface_hub."""
    return (
        is_pretrained(module) or is_of(module, "diffusers.models.modeling_utils", "ModelMixin") or is_hub_mixin(module)
    )


def is_hub_mixin(module: nn.Module) -> bool:
    """Whether a module has huggingface_hub's ``PyTorchModelHubMixin``."""
    return is_of(module, "huggingface_hub.hub_mixin", "ModelHubMixin")


def is_sentence_transformer(module: nn.Module) -> bool:
    """Whether a module is a whole model of sentence-transformers."""
    return is_of(module, "sentence_transformers", "SentenceTransformer")


def is_of(module: nn.Module, where: str, name: str) -> bool:
    """Whether a module is of a class of a library, which is not imported for this: it could not exist without."""
    cls: object = getattr(sys.modules.get(where), name, None)
    return isinstance(cls, type) and isinstance(module, cls)


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as its author wrote it: FSDP2 and ``replicate`` put a generated one in front of it."""
    return _original(type(module))  # type: ignore[arg-type]


@cache  # a model has few classes, and asking abstract ones what they are is slow
def _original(own: type[nn.Module]) -> type[nn.Module]:
    from torch.distributed.fsdp import FSDPModule

    generated = (FSDPModule, getattr(sys.modules.get("torch.distributed._composable.replicate"), "DDP", FSDPModule))
    for cls in own.__mro__:
        if not issubclass(cls, generated) and issubclass(cls, nn.Module):
            return cls
    return own
